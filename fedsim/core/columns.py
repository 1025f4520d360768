"""Columns of any shape in one safetensors file, which every process maps."""

from __future__ import annotations

import functools
import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedsim.core.task import Column, Columns, DataSpec, rows_of, tensors_of

_XXH3 = "xxh3_128"
"""Key in the metadata of a file: the hash of its tensors in the order of the columns."""


@dataclass(frozen=True, kw_only=True)
class ColumnSpec:
    """A `DataSpec` of plain values."""

    name: str
    columns: Mapping[str, Column]
    label: str | None
    train_size: int
    test_size: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    official_sha256: str | None = None


@dataclass(frozen=True)
class ColumnData:
    """`FederatedData` of columns that are there, in memory or mapped."""

    spec: ColumnSpec
    _train: Columns
    _test: Columns

    @classmethod
    def split(cls, name: str, columns: Columns, *, label: str | None, test: int) -> Self:
        """Take the last samples of some columns as the test split.

        Parameters
        ----------
        name : str
            What the data is called.
        columns : mapping of str to Tensor
            Of one leading length.
        label : str or None
            The column of categories, integers from 0, by which samples are dealt.
        test : int
            Samples of the test split.
        """
        size = len(next(iter(columns.values()))) - test
        described = {
            column: Column(
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape[1:]),
                values=int(tensor.max()) + 1 if column == label else None,
            )
            for column, tensor in columns.items()
        }
        spec = ColumnSpec(
            name=name, columns=described, label=label, train_size=size, test_size=test
        )
        return cls(spec, rows_of(columns, slice(size)), rows_of(columns, slice(size, None)))

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of both splits, column by column."""
        return sha256_of(tensors_of(self))

    def train(self) -> Columns:
        """Give the training split."""
        return self._train

    def test(self) -> Columns:
        """Give the test split."""
        return self._test

    def check_official(self) -> None:
        """Do nothing: nobody else has this data."""


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
