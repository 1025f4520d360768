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
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from fedsim.core.errors import InputError, RunFailedError
from fedsim.core.inputs import open_regular
from fedsim.recording.files import MOST_TEXT_BYTES, Checksum, read_text, temporary
from fedsim.recording.layout import RunLayout

_GIVE_UP = datetime.timedelta(seconds=30)
"""Of trying again what an object store did not do."""


class RemoteError(RunFailedError):
    """A file in a folder at a URL could not be read or written."""


class OtherFileError(RemoteError):
    """A file is not the one that was written."""


class Folder:
    """A folder whose files are put and got whole.

    Object stores can neither rename nor append, but an object that is put appears at once, whole,
    in place of the one before. Files of folders on this machine do so too.

    Parameters
    ----------
    url : str or Path
        A folder of this machine, or a URL that fsspec knows: ``file:///data/run``,
        ``s3://bucket/run``. Endpoints and credentials come from the environment, as the store's
        own tools take them.

    Attributes
    ----------
    local : Path or None
        The folder, where it is on this machine.

    Raises
    ------
    InputError
        When the kind of URL is unknown, or the package for it is not installed.
    """

    def __init__(self, url: str | Path) -> None:
        self.url = str(url)
        self._fs, self._root = (
            (LocalFileSystem(), str(url)) if isinstance(url, Path) else _file_system(url)
        )
        self.local = Path(self._root) if isinstance(self._fs, LocalFileSystem) else None

    def exists(self) -> bool:
        """Say whether there is a folder, or an object store that holds something there."""
        return bool(self._fs.isdir(self._root.rstrip("/") or "/"))

    def size(self, name: str) -> int | None:
        """Give the size of a file in bytes, or None if it does not exist.

        Raises
        ------
        RemoteError
            When that cannot be told.
        """
        with self._reported("read", name), contextlib.suppress(FileNotFoundError):
            if self.local is not None:
                with self._opened(name) as file:
                    return os.fstat(file.fileno()).st_size
            found = self._fs.info(self._path(name))
            if found["type"] != "file" or found["size"] is None:
                raise OSError(errno.EINVAL, "it is not a file of a known size")
            return int(found["size"])
        return None

    def read(self, name: str) -> bytes:
        """Give the content of a list, or no bytes if it does not exist.

        Raises
        ------
        RemoteError
            When it cannot be read.
        """
        with self._reported("read", name), contextlib.suppress(FileNotFoundError):
            if self.local is not None:
                return read_text(self._inside(name))
            # A store may be a stranger's, so its size is asked before its bytes are taken.
            if (self.size(name) or 0) > MOST_TEXT_BYTES:
                raise OSError(errno.EFBIG, f"it has more than {MOST_TEXT_BYTES:,} bytes")
            return bytes(self._fs.cat_file(self._path(name)))
        return b""

    def get(self, name: str, path: Path, checksum: Checksum) -> None:
        """Copy a file to this machine, where it appears whole and checked, or not at all.

        Raises
        ------
        OtherFileError
            When it is not what the checksum says.
        RemoteError
            When it cannot be copied.
        """
        with self._reported("copied", name):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary(path) as unfinished:
                if self.local is None:
                    self._fs.get_file(self._path(name), str(unfinished))
                else:
                    with self._opened(name) as source, unfinished.open("wb") as file:
                        shutil.copyfileobj(source, file)
                if not checksum.matches(unfinished):
                    raise OtherFileError(f"{self.url}/{name} is not what was written")

    def put(self, name: str, content: bytes | Path) -> None:
        """Put a file of this content, or a copy of a file of this machine.

        Raises
        ------
        RemoteError
            When it cannot be read or written.
        """
        with self._reported("written", name):
            if self.local is not None:
                path = self._inside(name)
                path.parent.mkdir(parents=True, exist_ok=True)
                with temporary(path) as unfinished:
                    if isinstance(content, bytes):
                        unfinished.write_bytes(content)
                    else:
                        shutil.copyfile(content, unfinished)
            elif isinstance(content, bytes):
                self._fs.pipe_file(self._path(name), content)
            else:
                self._fs.put_file(str(content), self._path(name))

    def check_writable(self) -> None:
        """Put a small file and remove it again; of a path, look whether that could be done.

        Raises
        ------
        RemoteError
            When it cannot.
        """
        if self.local is not None:
            above = next(p for p in (self.local, *self.local.parents) if os.path.lexists(p))
            if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
                raise RemoteError(
                    f"{self.url} cannot be written: {above} is not a folder to write to"
                )
            return
        name = f"probe-{secrets.token_hex(8)}"
        self.put(name, b"")
        with self._reported("removed", name):
            self._fs.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _inside(self, name: str) -> Path:
        # A copy may be a stranger's, as a run directory may.
        return RunLayout(Path(self._root)).inside(name)

    def _opened(self, name: str) -> IO[bytes]:
        return os.fdopen(open_regular(self._inside(name)), "rb")

    @contextlib.contextmanager
    def _reported(self, done: str, name: str) -> Iterator[None]:
        try:
            yield
        except RemoteError:
            raise
        # Each store has exceptions of its own.
        except Exception as error:
            raise RemoteError(f"{self.url}/{name} cannot be {done}: {reason_of(error)}") from error


def _file_system(url: str) -> tuple[Any, str]:
    """Give the file system of fsspec for a URL, and the path on it.

    ``s3://`` and other object stores take fsspec's own package for them where it is installed, and
    obstore otherwise.
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
            f"{url} needs a package that is not here ({lacking}); the extra 'remote' brings one"
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
