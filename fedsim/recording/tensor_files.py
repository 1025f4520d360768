"""Safetensors files as mappings of names to tensors, read when looked up."""

from __future__ import annotations

import io
import math
import os
import struct
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from fedsim.core.errors import InputError
from fedsim.core.inputs import MOST_JSON_BYTES, open_regular, parse_json
from fedsim.recording.files import DTYPES, ITEM_BYTES

MOST_KEYS = 2**16
"""Arrays that are put into one file by choice: its header is read whole before any of them."""
_TORCH_DTYPES = {code: getattr(torch, name) for name, code in DTYPES.items()}
_TORCH_DTYPES["BF16"] = torch.bfloat16


class _Entry(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile(Mapping[str, Tensor]):
    """A safetensors file as a mapping of names to tensors on the CPU.

    Opening reads the header alone; a tensor's pages are mapped, not copied, and come from the
    disk when they are looked at.

    Parameters
    ----------
    path : Path
        The file.
    content : memoryview, optional
        Its bytes, where they have been read already.

    Raises
    ------
    InputError
        When the file is missing or not a safetensors file.

    Notes
    -----
    The library's ``safe_open`` takes a path alone, and `verify` replays the very bytes that it has
    just hashed. It also follows links, waits for pipes, and takes shapes that torch does not.
    """

    def __init__(self, path: Path, content: memoryview | None = None) -> None:
        self.path = path
        self._content = content
        try:
            if content is None:
                with os.fdopen(open_regular(path), "rb") as file:
                    self._size = os.fstat(file.fileno()).st_size
                    self._entries = _entries_of(file, self._size)
            else:
                self._size = len(content)
                self._entries = _entries_of(io.BytesIO(content[: 8 + MOST_JSON_BYTES]), self._size)
        except FileNotFoundError:
            raise InputError(f"{path} is not there") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{path} is not a whole safetensors file: {reason}") from None

    @cached_property
    def _bytes(self) -> Tensor:
        if self._content is not None:
            return torch.frombuffer(self._content, dtype=torch.uint8)
        try:
            # A private mapping: writing into one of its tensors does not write into the file.
            return torch.from_file(str(self.path), shared=False, size=self._size, dtype=torch.uint8)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"{self.path} cannot be mapped into memory: {reason}") from None

    def __getitem__(self, name: str) -> Tensor:
        dtype, shape, begin, end = self._entries[name]
        if begin == end:
            return torch.empty(shape, dtype=_TORCH_DTYPES[dtype])
        data = self._bytes[begin:end]
        if begin % _TORCH_DTYPES[dtype].itemsize:
            # After a name of odd length, or numbers of fewer bytes.
            data = data.clone()
        return data.view(_TORCH_DTYPES[dtype]).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"<{self.path.name}: {len(self)} tensors>"

    @property
    def described(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The safetensors dtype and the shape of each tensor, by name, in the order of the file."""
        return {name: (entry.dtype, entry.shape) for name, entry in self._entries.items()}


class TensorPart(Mapping[str, Tensor]):
    """Some of the tensors of a file, by shorter names.

    Parameters
    ----------
    file : TensorFile
        The file.
    keys : mapping of str to str
        Name to key in the file.
    """

    def __init__(self, file: TensorFile, keys: Mapping[str, str]) -> None:
        self.path = file.path
        self._file = file
        self._keys = keys

    def __getitem__(self, name: str) -> Tensor:
        return self._file[self._keys[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __repr__(self) -> str:
        return f"<{self.path.name}: {len(self)} tensors of a client>"

    @property
    def described(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """As of a `TensorFile`."""
        described = self._file.described
        return {name: described[key] for name, key in self._keys.items()}


def _entries_of(file: IO[bytes], size: int) -> dict[str, _Entry]:
    """Read a header and check it against the size of the file: all data, no gap, nothing twice."""
    (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
    if length > min(size - 8, MOST_JSON_BYTES):
        raise ValueError(f"a header of {length} bytes does not fit")
    header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("the header is not an object")
    header.pop("__metadata__", None)
    entries = {name: _entry_of(entry, 8 + length) for name, entry in header.items()}
    position = 8 + length
    ordered = dict(sorted(entries.items(), key=lambda item: item[1][2:]))
    for name, entry in ordered.items():
        if entry.begin != position:
            raise ValueError(f"the data of {name} does not follow the data before it")
        position = entry.end
    if position != size:
        raise ValueError(f"the header describes {position} bytes of {size}")
    return ordered


def _entry_of(entry: Any, start: int) -> _Entry:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        item_bytes = ITEM_BYTES[dtype]
        numbers = (*shape, begin, end)
    except (KeyError, TypeError, ValueError):
        raise ValueError("an entry of the header has no dtype, shape or offsets") from None
    if len(numbers) > 10 or not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
        raise ValueError("an entry of the header has numbers that cannot be a shape or offsets")
    if end - begin != math.prod(shape) * item_bytes:
        raise ValueError("an entry of the header has offsets that do not fit its shape")
    return _Entry(dtype, tuple(shape), start + begin, start + end)
