"""Folders at URLs: what a run is copied to and fetched from."""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from fedsim.core.errors import InputError, RunFailedError
from fedsim.core.inputs import open_regular
from fedsim.recording.files import MOST_TEXT_BYTES, read_text
from fedsim.recording.layout import RunLayout

_READ_BYTES = 4 * 2**20
_GIVE_UP = datetime.timedelta(seconds=30)
"""Of trying again what an object store did not do."""


class RemoteError(RunFailedError):
    """A folder at a URL could not be read or written."""


class RemoteFolder:
    """A folder at a URL whose files are put and got whole.

    Object stores have neither renaming nor appending; what they do have is that an object which
    is put appears at once, whole, in place of the one before. So it is here, for paths too.

    Parameters
    ----------
    url : str
        A path, or a URL that fsspec knows: ``file:///data/run``, ``s3://bucket/run``. Endpoints
        and credentials come from the environment, as the store's own tools take them.

    Raises
    ------
    InputError
        When the kind of URL is unknown, or the package for it is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._fs, self._root = file_system(url)
        self.folder = Path(self._root) if isinstance(self._fs, LocalFileSystem) else None

    def read(self, name: str) -> bytes | None:
        """Give the content of a file; None where there is none.

        Raises
        ------
        RemoteError
            When it cannot be read.
        """
        with self._reported("read", name):
            try:
                if self.folder is not None:
                    return read_text(self._local(name))
                # A store may be a stranger's, too: what it has is asked before it is taken.
                if self._size_there(name) > MOST_TEXT_BYTES:
                    raise OSError(errno.EFBIG, f"it has more than {MOST_TEXT_BYTES:,} bytes")
                return bytes(self._fs.cat_file(self._path(name)))
            except FileNotFoundError:
                return None

    def size(self, name: str) -> int | None:
        """Count the bytes of a file; None where there is none.

        Raises
        ------
        RemoteError
            When that cannot be told.
        """
        with self._reported("read", name):
            try:
                if self.folder is not None:
                    return self._local(name).lstat().st_size
                return self._size_there(name)
            except FileNotFoundError:
                return None

    def _size_there(self, name: str) -> int:
        found = self._fs.info(self._path(name))
        if found["type"] != "file" or found["size"] is None:
            raise OSError(errno.EINVAL, "it is not a file of a known size")
        return int(found["size"])

    def get(self, name: str, path: Path) -> None:
        """Copy a file to a path on this machine.

        Raises
        ------
        RemoteError
            When it is not there or cannot be read.
        """
        with self._reported("read", name):
            if self.folder is None:
                self._fs.get_file(self._path(name), str(path))
                return
            source = os.fdopen(open_regular(self._local(name)), "rb")
            with source, path.open("wb") as file:
                shutil.copyfileobj(source, file, _READ_BYTES)

    def write(self, name: str, content: bytes) -> None:
        """Put a file of this content.

        Raises
        ------
        RemoteError
            When it cannot be written.
        """
        with self._reported("written", name):
            if self.folder is not None:
                with self._replaced(name) as unfinished:
                    unfinished.write_bytes(content)
            else:
                self._fs.pipe_file(self._path(name), content)

    def put(self, name: str, path: Path) -> None:
        """Put a copy of a file of this machine.

        Raises
        ------
        RemoteError
            When it cannot be read or written.
        """
        with self._reported("written", name):
            if self.folder is not None:
                with self._replaced(name) as unfinished:
                    shutil.copyfile(path, unfinished)
            else:
                self._fs.put_file(str(path), self._path(name))

    def remove(self, name: str) -> None:
        """Remove a file that is there.

        Raises
        ------
        RemoteError
            When it cannot be removed.
        """
        with self._reported("removed", name):
            self._fs.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _local(self, name: str) -> Path:
        # A copy may be a stranger's, as a run directory may.
        return RunLayout(Path(self._root)).inside(name)

    @contextlib.contextmanager
    def _replaced(self, name: str) -> Iterator[Path]:
        path = self._local(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
        try:
            yield unfinished
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _reported(self, done: str, name: str) -> Iterator[None]:
        try:
            yield
        # Each store has exceptions of its own.
        except Exception as error:
            raise RemoteError(f"{self.url}/{name} cannot be {done}: {reason_of(error)}") from error

    def check_writable(self) -> None:
        """Put a small file and remove it again; of a path, look whether that could be done.

        Raises
        ------
        RemoteError
            When it cannot.
        """
        if self.folder is not None:
            path = self.folder
            above = next(p for p in (path, *path.parents) if os.path.lexists(p))
            if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
                raise RemoteError(
                    f"{self.url} cannot be written: {above} is not a folder to write to"
                )
            return
        name = f"probe-{secrets.token_hex(8)}"
        self.write(name, b"")
        self.remove(name)


def file_system(url: str) -> tuple[Any, str]:
    """Give the file system of fsspec for a URL, and the path on it.

    ``s3://`` and other object stores take fsspec's own package for them where it is installed, and
    obstore otherwise.

    Raises
    ------
    InputError
        When the kind of URL is unknown, or the package for it is not installed.
    """
    try:
        fs, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        return _by_obstore(url, str(error))
    except (ValueError, OSError, TypeError) as error:
        raise InputError(f"{url} is no place for a run: {reason_of(error)}") from None
    if isinstance(fs, LocalFileSystem):
        root = os.path.abspath(root)  # noqa: PTH100 - what comes later must not follow a chdir
    return fs, root


def _by_obstore(url: str, lacking: str) -> tuple[Any, str]:
    protocol = url.partition("://")[0]
    try:
        from obstore.fsspec import FsspecStore
    except ImportError:
        raise InputError(
            f"{url} needs a package that is not here ({lacking}); `pip install obstore` brings one"
        ) from None
    # Its types list every service; here the URL says which.
    make_store: Any = FsspecStore
    try:
        fs = make_store(protocol, retry_config={"retry_timeout": _GIVE_UP})
        return fs, str(fs._strip_protocol(url))
    except Exception as error:
        raise InputError(f"{url} is no place for a run: {reason_of(error)}") from None


def reason_of(error: BaseException) -> str:
    """Give the first line of what went wrong."""
    text = getattr(error, "strerror", None) or str(error).strip()
    return (text.splitlines() or [type(error).__name__])[0].strip() or type(error).__name__
