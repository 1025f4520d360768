"""Files that are whole or absent, and lines that are whole or ignored."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from fedsim.core.errors import RunFailedError
from fedsim.core.inputs import MOST_JSON_BYTES, open_regular, parse_json
from fedsim.recording.disk import OutputFile

TEMPORARY = ".partial"
MOST_TEXT_BYTES = 4 * 2**30
"""Of a list that is copied whole: a million rows and more."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of writing where there is no room."""


def _unfinished(path: Path) -> Path:
    # With the process id: a retry in another process never writes into the same file.
    return path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")


@contextlib.contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """Give a name beside `path` to write to; rename it to `path` at a clean end.

    Even if the process is killed, `path` holds a whole file or does not exist.
    """
    unfinished = _unfinished(path)
    # A file or a link that somebody put there is replaced, not written through.
    unfinished.unlink(missing_ok=True)
    try:
        yield unfinished
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class Checksum:
    """What is known of the bytes of a file, or of its beginning.

    Parameters
    ----------
    size : int
        Number of bytes.
    xxh3_128 : str
        Their XXH3 hash of 128 bits (Collet, xxHash), 32 hexadecimal digits in lower case.
    """

    size: int
    xxh3_128: str

    def to_json(self) -> dict[str, Any]:
        """Give the two as a JSON object."""
        return {"bytes": self.size, "xxh3_128": self.xxh3_128}

    @classmethod
    def of(cls, content: bytes | memoryview) -> Checksum:
        """Hash bytes in memory."""
        return cls(len(content), xxhash.xxh3_128_hexdigest(content))

    @classmethod
    def of_file(cls, path: Path, size: int | None = None) -> Checksum:
        """Hash a file, or its first `size` bytes, without holding it in memory.

        Raises
        ------
        OSError
            When the file cannot be read.
        """
        return Digest.of_file(path, size).checksum()

    def matches(self, path: Path, *, grows: bool = False) -> bool:
        """Say whether this is the checksum of a file; of its beginning, where the file grows.

        Raises
        ------
        OSError
            When the file cannot be read.
        """
        # Reading a hole of any size takes hours.
        size = path.lstat().st_size
        fits = size >= self.size if grows else size == self.size
        return fits and Checksum.of_file(path, self.size) == self


_READ_BYTES = 4 * 2**20


class Digest:
    """A checksum in the making.

    Attributes
    ----------
    size : int
        Bytes so far.
    """

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()
        self.size = 0

    @classmethod
    def of_file(cls, path: Path, size: int | None = None) -> Digest:
        """Take a file, or its first `size` bytes, as `Checksum.of_file` does."""
        digest = cls()
        with os.fdopen(open_regular(path), "rb", buffering=0) as file:
            buffer = memoryview(bytearray(_READ_BYTES))
            left = math.inf if size is None else size
            while left and (count := file.readinto(buffer[: int(min(left, len(buffer)))])):
                digest.update(buffer[:count])
                left -= count
        return digest

    def update(self, content: bytes | memoryview) -> None:
        """Take the next bytes."""
        self._hash.update(content)
        self.size += len(content)

    def checksum(self) -> Checksum:
        """Give the checksum of all bytes so far."""
        return Checksum(self.size, self._hash.hexdigest())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write one JSON object atomically, indented for people."""
    with temporary(path) as unfinished:
        unfinished.write_bytes(json_document(value))


def json_document(value: Mapping[str, Any]) -> bytes:
    """Encode one JSON object, indented for people."""
    text = json.dumps(_finite(value), indent=2, allow_nan=False)
    return text.encode() + b"\n"


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

    Attributes
    ----------
    data_bytes : int
        Bytes of data so far, without the header.
    """

    def __init__(self, path: Path, entries: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        self._path = path
        self._unfinished = _unfinished(path)
        self._left = list(entries.items())[::-1]
        self._header = _header(entries)
        self._done: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._digest = Digest()
        self.data_bytes = 0
        announced = sum(math.prod(shape) * ITEM_BYTES[dtype] for dtype, shape in entries.values())
        self._file = OutputFile(self._unfinished, size=len(self._header) + announced)
        try:
            self._write(memoryview(self._header))
        except BaseException:
            self.discard()
            raise

    def append(self, array: NDArray[np.generic]) -> None:
        """Write the bytes of the next array.

        Raises
        ------
        ValueError
            When its size in bytes is not that of the next entry.
        """
        name, (dtype, shape) = self._left[-1]
        if array.nbytes != math.prod(shape) * ITEM_BYTES[dtype]:
            raise ValueError(f"{name} has {array.nbytes} bytes; {dtype} {shape} was announced")
        # A scalar has no buffer of its own to view as bytes; ravel gives it one.
        flat = np.ravel(array)
        view = flat.astype(flat.dtype.newbyteorder("<"), copy=False).view(np.uint8).data
        self._write(view)
        self.data_bytes += len(view)
        self._done.update([self._left.pop()])

    def close(self) -> Checksum:
        """Rename the finished file into place; entries never appended are not in it."""
        if self._left:
            # Rare: the shorter header is filled up with spaces, so that no data has to move.
            self._file.finish(head=_header(self._done, size=len(self._header)))
            checksum = Checksum.of_file(self._unfinished)
        else:
            self._file.finish()
            checksum = self._digest.checksum()
        self._unfinished.replace(self._path)
        return checksum

    def discard(self) -> None:
        """Remove what was written."""
        self._file.close()
        self._unfinished.unlink(missing_ok=True)

    def _write(self, view: memoryview) -> None:
        self._digest.update(view)
        self._file.write(view)


def _header(entries: Mapping[str, tuple[str, tuple[int, ...]]], size: int = 0) -> bytes:
    header: dict[str, Any] = {}
    offset = 0
    for name, (dtype, shape) in entries.items():
        end = offset + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * max(-len(encoded) % 8, size - 8 - len(encoded))
    return struct.pack("<Q", len(encoded)) + encoded


DTYPES = {
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
"""Names of dtypes in numpy and in safetensors."""
ITEM_BYTES = {code: np.dtype(name).itemsize for name, code in DTYPES.items()} | {"BF16": 2}
"""Bytes of one number of each safetensors dtype that is written here."""


def write_tensors(path: Path, tensors: Mapping[str, NDArray[np.generic]]) -> Checksum:
    """Write arrays as one safetensors file, atomically, in the order given."""
    entries = {name: (DTYPES[array.dtype.name], array.shape) for name, array in tensors.items()}
    writer = TensorWriter(path, entries)
    try:
        for array in tensors.values():
            writer.append(array)
        return writer.close()
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


def append_line(path: Path, line: bytes, *, at: int) -> None:
    """Append a row to a JSON Lines file with a single write, or leave the file as it was.

    Parameters
    ----------
    path : Path
        The file; made where it is not there.
    line : bytes
        The row with its newline.
    at : int
        Bytes that the file must have.

    Raises
    ------
    RunFailedError
        When the file was removed, or has other bytes than those that were appended to it.
    OSError
        When the disk has no room for the whole row.
    """
    # A file that somebody removed is not made again, without its rows.
    if at and not path.exists():
        raise RunFailedError(f"{path} was removed by another program")
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        if before != at:
            raise RunFailedError(
                f"{path} was changed by another program: it has {before} bytes, not {at}"
            )
        if file.write(line) != len(line):
            file.truncate(before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def cut_unfinished_line(path: Path) -> int:
    """Cut what follows the last newline of a file off; give the bytes that are left.

    Raises
    ------
    OSError
        When the file cannot be read, or a line has more than `MOST_JSON_BYTES`.
    """
    if not path.exists():
        return 0
    whole = sum(map(len, text_lines(path)))
    os.truncate(path, whole)
    return whole


def text_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file; a last one without its newline is skipped.

    Raises
    ------
    OSError
        When the file cannot be read, or a line has more than `MOST_JSON_BYTES`.
    """
    yield from (line for line in _lines(path) if line.endswith(b"\n"))


def _lines(path: Path) -> Iterator[bytes]:
    with os.fdopen(open_regular(path), "rb") as file:
        while line := file.readline(MOST_JSON_BYTES + 1):
            if len(line) > MOST_JSON_BYTES:
                raise OSError(errno.EFBIG, f"a line has more than {MOST_JSON_BYTES:,} bytes")
            yield line


def read_text(path: Path) -> bytes:
    """Read a file of lines whole.

    Raises
    ------
    OSError
        As `open_regular`, or when it has more than `MOST_TEXT_BYTES` or a line has more than
        `MOST_JSON_BYTES`: a hole, which takes no room on a disk, is one line.
    """
    lines, left = [], MOST_TEXT_BYTES
    for line in _lines(path):
        left -= len(line)
        if left < 0:
            raise OSError(errno.EFBIG, f"it has more than {MOST_TEXT_BYTES:,} bytes")
        lines.append(line)
    return b"".join(lines)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON Lines file; a last line without its newline is skipped."""
    for line in text_lines(path):
        yield parse_json(line)


class LineFile:
    """A JSON Lines file that appears whole at `close` and not at all after `discard`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unfinished = _unfinished(path)
        self._digest = Digest()
        self._file: BinaryIO = self._unfinished.open("wb")

    def write(self, value: Mapping[str, Any]) -> None:
        """Append one row."""
        line = json_line(value)
        self._digest.update(line)
        self._file.write(line)

    def close(self) -> Checksum:
        """Flush and rename into place, or remove what was written where that fails."""
        try:
            self._file.close()
            self._unfinished.replace(self._path)
        except BaseException:
            self._unfinished.unlink(missing_ok=True)
            raise
        return self._digest.checksum()

    def discard(self) -> None:
        """Remove what was written."""
        # The last lines may not reach a full disk; they are no longer needed.
        with contextlib.suppress(OSError):
            self._file.close()
        self._unfinished.unlink(missing_ok=True)
