"""Files that are whole or absent, and lines that are whole or ignored."""

from __future__ import annotations

import errno
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

TEMPORARY = ".partial"


def _unfinished(path: Path) -> Path:
    # With the process id: a retry in another process never writes into the same file.
    return path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")


@contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """Give a name beside `path` to write to; rename it to `path` at a clean end.

    Whatever kills the process, `path` holds a whole file or does not exist.
    """
    unfinished = _unfinished(path)
    try:
        yield unfinished
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write one JSON object atomically, indented for people."""
    with temporary(path) as unfinished:
        unfinished.write_text(
            json.dumps(_finite(value), indent=2, allow_nan=False) + "\n", encoding="utf-8"
        )


class TensorWriter:
    """A safetensors file of known names and shapes, written tensor by tensor without a copy.

    The library writes a file from a dictionary that holds all of it in memory. Here the header
    comes first, so the data can follow as it is made.

    Parameters
    ----------
    path : Path
        The file; it appears at `close`, whole.
    entries : mapping of str to (str, tuple of int)
        Name to safetensors dtype (``F32``, ``I64``, ...) and shape, in the order of `append`.
    """

    def __init__(self, path: Path, entries: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        header: dict[str, Any] = {}
        offset = 0
        for name, (dtype, shape) in entries.items():
            end = offset + math.prod(shape) * _ITEM_BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._path = path
        self._unfinished = _unfinished(path)
        self._file = self._unfinished.open("wb", buffering=0)
        try:
            self._write(memoryview(struct.pack("<Q", len(encoded)) + encoded))
        except BaseException:
            self.discard()
            raise

    def append(self, array: NDArray[np.generic]) -> None:
        """Write the bytes of the next array."""
        # A scalar has no buffer of its own to view as bytes; ravel gives it one.
        flat = np.ravel(array)
        self._write(flat.astype(flat.dtype.newbyteorder("<"), copy=False).view(np.uint8).data)

    def close(self) -> None:
        """Rename the finished file into place."""
        self._file.close()
        self._unfinished.replace(self._path)

    def discard(self) -> None:
        """Remove what was written."""
        self._file.close()
        self._unfinished.unlink(missing_ok=True)

    def _write(self, view: memoryview) -> None:
        while len(view):
            view = view[self._file.write(view) :]


_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_ITEM_BYTES = {code: np.dtype(name).itemsize for name, code in _DTYPES.items()}


def write_tensors(path: Path, tensors: Mapping[str, NDArray[np.generic]]) -> None:
    """Write arrays as one safetensors file, atomically, in the order given."""
    entries = {name: (_DTYPES[array.dtype.name], array.shape) for name, array in tensors.items()}
    writer = TensorWriter(path, entries)
    try:
        for array in tensors.values():
            writer.append(array)
        writer.close()
    except BaseException:
        writer.discard()
        raise


def json_line(value: Mapping[str, Any]) -> bytes:
    """Encode one row; floats that are not finite become ``null``, which JSON has no name for."""
    return json.dumps(_finite(value), separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append one row to a JSON Lines file with a single write, or leave the file as it was.

    Raises
    ------
    OSError
        When the disk has no room for the whole row.
    """
    line = json_line(value)
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        if file.write(line) != len(line):
            file.truncate(before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON Lines file; a last line without its newline is no row."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)


class LineFile:
    """A JSON Lines file that appears whole at `close` and not at all after `discard`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unfinished = _unfinished(path)
        self._file: BinaryIO = self._unfinished.open("wb")

    def write(self, value: Mapping[str, Any]) -> None:
        """Append one row."""
        self._file.write(json_line(value))

    def close(self) -> None:
        """Flush and rename into place, or remove what was written where that fails."""
        try:
            self._file.close()
            self._unfinished.replace(self._path)
        except BaseException:
            self._unfinished.unlink(missing_ok=True)
            raise

    def discard(self) -> None:
        """Remove what was written."""
        self._file.close()
        self._unfinished.unlink(missing_ok=True)
