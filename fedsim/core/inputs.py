"""Reading what others wrote: regular files only, up to a limit in size."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

from pydantic_core import from_json

MOST_JSON_BYTES = 32 * 2**20
"""Of one JSON text: a ``run.json``, a line, the header of a safetensors file."""
MOST_JSON_CONTAINERS = 2**20
"""Objects and lists in one: an empty list is two bytes of text and a hundred of memory."""


def open_regular(path: Path, flags: int = 0, *, follow: bool = False) -> int:
    """Open a file for reading, without waiting for anything.

    Parameters
    ----------
    path : Path
        The file.
    flags : int
        More flags of `os.open`.
    follow : bool
        Whether the last component may be a symbolic link.

    Returns
    -------
    int
        A file descriptor, to be closed by the caller.

    Raises
    ------
    OSError
        Also for a folder, a pipe, a socket, a device, a name that no file can have and, unless
        `follow`, for a symbolic link.
    """
    if "\0" in str(path):
        raise OSError(errno.EINVAL, "its name holds a zero byte")
    # Opening a pipe would wait for its other end.
    flags |= os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP and not follow:
            raise OSError(errno.ELOOP, "it is a symbolic link") from None
        if error.errno == errno.ENXIO:
            raise OSError(errno.ENXIO, "it is not a regular file") from None
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        raise OSError(errno.EINVAL, "it is not a regular file")
    return descriptor


def read_text_bytes(path: Path, *, most: int = MOST_JSON_BYTES, follow: bool = False) -> bytes:
    """Read a whole file that holds one text.

    Raises
    ------
    OSError
        As `open_regular`, or when the file is larger than `most` bytes.
    """
    with os.fdopen(open_regular(path, follow=follow), "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes")
    return content


def parse_json(text: bytes) -> Any:
    """Parse one JSON text: strict, of bounded depth and size. Of equal keys the last counts.

    Raises
    ------
    ValueError
        Saying why.
    """
    if len(text) > MOST_JSON_BYTES:
        raise ValueError(f"it has more than {MOST_JSON_BYTES:,} bytes")
    if text.count(b"[") + text.count(b"{") > MOST_JSON_CONTAINERS:
        raise ValueError(f"it has more than {MOST_JSON_CONTAINERS:,} objects and lists")
    return from_json(text, allow_inf_nan=False)
