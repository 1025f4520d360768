"""A folder for Ray's files that outlives nobody, and neither do the processes that use it.

A run's engine is many processes with sockets, logs and shared memory. They must be gone after any
end of the run: also after a kill that gives no chance to tidy up. A second process, the janitor,
waits for the end of the first and removes both. Where it was killed too, the next run does it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, BinaryIO, Self

import psutil

from fedsim.core.errors import InputError
from fedsim.core.processes import start_module

_PREFIX = "fedsim-"
_OWNER = "owner"
VARIABLE = "FEDSIM_SCRATCH"
"""Environment variable with the folder, by which its processes are known."""
_PATIENCE = 10.0
_SHORT = 42
"""Characters that a socket's path has room for before what Ray appends, of 107 in all: 64 of
``/session_2026-11-28_08-00-00_000000_1234567/sockets/plasma_store``, and one that ends it."""
_BASES = (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"))  # noqa: S108 - links of our own


class Scratch:
    """A temporary folder that is removed, with every process started under it, at any end.

    Used as a context manager. Within, the environment variable `VARIABLE` names the folder, so
    that processes started there inherit it.

    Attributes
    ----------
    path : Path
        The folder.
    short : Path
        Another name for it, of few ASCII characters, for the sockets in it: the folder itself
        where its path is so, or a link.
    """

    def __enter__(self) -> Self:
        """Remove what dead runs left, make the folder and start its janitor.

        Raises
        ------
        InputError
            When the temporary folder cannot be used.
        """
        sweep()
        try:
            self.path, self._owner = _own_folder()
        except OSError as error:
            folder = tempfile.gettempdir()
            raise InputError(
                f"the temporary folder {folder} cannot be used: {error.strerror}"
            ) from None
        try:
            self.short = _short_name(self.path)
        except InputError:
            self._owner.close()
            shutil.rmtree(self.path)
            raise
        self._janitor = start_module(
            __name__,
            [str(self.path), str(self.short)],
            environment={k: v for k, v in os.environ.items() if k != VARIABLE},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.environ[VARIABLE] = str(self.path)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Let the janitor do its work, and wait for it."""
        os.environ.pop(VARIABLE, None)
        self._owner.close()
        pipe: IO[bytes] | None = self._janitor.stdin
        if pipe is not None:
            pipe.close()
        try:
            self._janitor.wait(2 * _PATIENCE)
        except subprocess.TimeoutExpired:
            self._janitor.kill()
        # Where somebody killed the janitor.
        clear(self.path, self.short)


def _own_folder() -> tuple[Path, BinaryIO]:
    """Make a folder, and lock it for as long as this process lives."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        # The kernel gives the lock of a dead process back: a folder whose lock can be had is free
        # to be removed. So may this one be, by another run, before it is locked.
        owner = (path / _OWNER).open("wb")
        fcntl.flock(owner, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(owner.fileno()), (path / _OWNER).stat()):
                return path, owner
        owner.close()


def _short_name(path: Path) -> Path:
    """Find a name for a folder that has room for a socket's, and make it where there is none.

    Batch systems give each job a temporary folder with a long path, and a login may have letters
    that Ray cannot encode.
    """
    if _is_short(path):
        return path
    for base in _BASES:
        short = base / f"{_PREFIX}{secrets.token_hex(4)}"
        with contextlib.suppress(OSError):
            short.symlink_to(path)
            return short
    raise InputError(
        f"the path of the temporary folder {tempfile.gettempdir()} is too long for a socket or "
        f"not ASCII, and {' and '.join(map(str, _BASES))} cannot be written; TMPDIR names another "
        f"one, of at most {_SHORT - len(path.name) - 1} characters"
    )


def _is_short(path: Path) -> bool:
    return str(path).isascii() and len(str(path)) <= _SHORT


def sweep() -> None:
    """Remove the folders of this user's runs that are dead, and what still runs in them."""
    _sweep_folders()
    for link in (link for base in _BASES for link in base.glob(f"{_PREFIX}*")):
        with contextlib.suppress(OSError):
            if link.is_symlink() and link.lstat().st_uid == os.getuid() and not link.exists():
                link.unlink()


def _sweep_folders() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            with (folder / _OWNER).open("rb") as owner:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                clear(folder)


def clear(folder: Path, short: Path | None = None) -> None:
    """Kill the processes that were started under a scratch folder, and remove it and its link."""
    processes = _processes_of(folder)
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    deadline = time.monotonic() + _PATIENCE
    while any(map(_is_running, processes)) and time.monotonic() < deadline:
        time.sleep(0.01)
    shutil.rmtree(folder, ignore_errors=True)
    if short is not None and short != folder:
        short.unlink(missing_ok=True)


def _is_running(process: psutil.Process) -> bool:
    # What was killed stays in the list of processes until its parent asks for its end, which
    # the owner of a folder cannot do while it waits for this.
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def _processes_of(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(VARIABLE) == str(folder):
                found.append(process)
    return found


@contextlib.contextmanager
def stack_when_late(partition: int, client_timeout: float | None) -> Iterator[None]:
    """Have `place_of` know where a client is when its time is nearly over.

    Parameters
    ----------
    partition : int
        The client.
    client_timeout : float or None
        Seconds that it has; None for as many as it wants.
    """
    if client_timeout is None or VARIABLE not in os.environ:
        yield
        return
    with _stack_file(partition).open("w", encoding="utf-8") as file:
        faulthandler.dump_traceback_later(0.8 * client_timeout, file=file)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


def place_of(partition: int | None) -> str:
    """Give the line of code at which a late client was; empty where that is not known."""
    try:
        text = _stack_file(partition).read_text("utf-8", "replace")
    except (OSError, KeyError):
        return ""
    # Python writes the main thread as the last of all, and its latest call first.
    main = text.rpartition("Thread 0x")[2].splitlines()[1:2]
    return main[0].strip() if main else ""


def _stack_file(partition: int | None) -> Path:
    return Path(os.environ[VARIABLE]) / f"stack-{partition}.txt"


if __name__ == "__main__":
    # Ends when the last holder of the other end does, however it ends.
    sys.stdin.buffer.read()
    clear(*map(Path, sys.argv[1:]))
