"""Columns of any shape in one safetensors file, which every process maps."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedsim.core.task import DataSpec

_XXH3 = "xxh3_128"
"""Key in the metadata of a file: the hash of its tensors in the order of the columns."""


def sha256_of(tensors: Mapping[str, Tensor]) -> str:
    """Hash the bytes of tensors in their order, little-endian."""
    return _hashed(hashlib.sha256(), tensors)


def save_columns(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the columns of both splits, named as by `tensors_of`.

    Processes that start together may all write, on several machines with one disk too: each
    renames a whole file into place.

    Raises
    ------
    OSError, SafetensorError
        When the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        about = {_XXH3: _hashed(xxhash.xxh3_128(), tensors)}
        save_file({n: t.contiguous() for n, t in tensors.items()}, partial, metadata=about)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def map_columns(path: Path, spec: DataSpec) -> dict[str, Tensor] | None:
    """Map the columns of both splits from a file, unread but for their hash.

    Every process that maps them compares the hash, 10 ms for CIFAR: none has to rely on another.

    Returns
    -------
    dict of str to Tensor or None
        Named as by `tensors_of`; None where the file is not there, or is not what `spec` says,
        or not what was written.
    """
    sizes = {"train": spec.train_size, "test": spec.test_size}
    described = {
        f"{s}_{n}": (size, c) for s, size in sizes.items() for n, c in spec.columns.items()
    }
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in described}
            recorded = (file.metadata() or {}).get(_XXH3)
    except (OSError, SafetensorError):
        return None
    for name, (size, column) in described.items():
        dtype = getattr(torch, column.dtype)
        if tensors[name].shape != (size, *column.shape) or tensors[name].dtype != dtype:
            return None
    return tensors if _hashed(xxhash.xxh3_128(), tensors) == recorded else None


def _hashed(digest: Any, tensors: Mapping[str, Tensor]) -> str:
    for tensor in tensors.values():
        digest.update(tensor.contiguous().numpy().data)
    return str(digest.hexdigest())
