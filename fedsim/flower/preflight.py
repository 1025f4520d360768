"""What can be known of this machine before Ray is started on it, and is refused in a sentence."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import socket
import tempfile
from pathlib import Path

from fedsim.core.errors import InputError
from fedsim.core.units import format_bytes

_HANDLES, _HANDLES_OF_A_WORKER, _PLENTY = 48, 4, 4096
"""Open files: what a process of Ray needs (64 are enough for two workers), for each worker, and
what is asked for where it may be had."""
_ROOM = 64 * 10**6
"""Bytes for Ray's logs and sockets; a run of three rounds leaves 2 MB."""


def check_machine(workers: int) -> None:
    """Refuse to start an engine on a machine that cannot run it.

    Parameters
    ----------
    workers : int
        Processes that are to train at the same time.

    Raises
    ------
    InputError
        Naming what is missing. Nothing has been written then.
    """
    _check_loopback()
    _check_handles(workers)
    _check_temporary_folder()


def _check_loopback() -> None:
    # Ray waits for minutes for processes that it cannot reach.
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(5)
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as error:
        raise InputError(
            "the address 127.0.0.1 cannot be reached on this machine "
            f"({error.strerror or error}), and Ray's processes speak to each other there"
        ) from None


def _check_handles(workers: int) -> None:
    needed = _HANDLES + _HANDLES_OF_A_WORKER * workers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    no_limit = resource.RLIM_INFINITY
    if hard != no_limit and hard < needed:
        raise InputError(
            f"this process may open {hard} files and {workers} workers need {needed}; "
            f"`ulimit -n {needed}` allows them"
        )
    # The soft limit is ours to raise.
    if soft != no_limit and soft < max(_PLENTY, needed):
        most = max(_PLENTY, needed) if hard == no_limit else min(hard, max(_PLENTY, needed))
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _check_temporary_folder() -> None:
    try:
        folder = tempfile.gettempdir()
    except OSError:
        raise InputError(
            f"TMPDIR = {os.environ.get('TMPDIR', '')!r} cannot be used; "
            "expected a folder that can be written"
        ) from None
    if (free := shutil.disk_usage(folder).free) < _ROOM:
        raise InputError(
            f"the temporary folder {folder} has {format_bytes(free)} free and Ray needs "
            f"{format_bytes(_ROOM)}; TMPDIR names another"
        )


def check_can_be_made(path: Path) -> None:
    """Refuse a folder that cannot be made, without making anything.

    Parameters
    ----------
    path : Path
        A folder that does not exist.

    Raises
    ------
    InputError
        Naming it and the reason.
    """
    parent = next(p for p in path.absolute().parents if os.path.lexists(p))
    try:
        # A file without a name: nobody sees it, and it is gone with this process at the latest.
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise InputError(f"output = {str(path)!r} cannot be made: {error.strerror}") from None


def check_can_be_written(path: Path) -> None:
    """Refuse to go on with a run on a disk that takes nothing.

    Parameters
    ----------
    path : Path
        A run directory.

    Raises
    ------
    InputError
        Naming it and the reason.
    """
    try:
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise InputError(
            f"{path} cannot be continued: nothing can be written there ({error.strerror})"
        ) from None
