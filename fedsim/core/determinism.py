"""The one place that decides how far torch's arithmetic repeats."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def use_deterministic(deterministic: bool) -> None:
    """Let torch use, for the rest of this process, algorithms that repeat to the bit only, or any.

    On a CPU everything that fedsim calls repeats with either, as long as the number of threads is
    the same (`torch.set_num_threads`): the sums of a convolution are split by threads. On a GPU
    cuDNN and cuBLAS choose algorithms whose sums come in any order unless told not to, and an
    operation that has no other way raises RuntimeError.

    Parameters
    ----------
    deterministic : bool
        Whether to insist.
    """
    if deterministic:
        # cuBLAS reads it when its first handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # torch tells its compiler, whose import takes more than a second.
    if torch.are_deterministic_algorithms_enabled() != deterministic:
        torch.use_deterministic_algorithms(deterministic)
    # Filling fresh memory finds reads of memory never written; it changes no result and costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = deterministic
    # Its choice by stopwatch differs from run to run.
    torch.backends.cudnn.benchmark = False


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch compute with so many threads for a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def deterministic_block(deterministic: bool) -> Iterator[None]:
    """Do what `use_deterministic` does for a block, and put everything back afterwards."""
    algorithms = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    use_deterministic(deterministic)
    try:
        yield
    finally:
        if torch.are_deterministic_algorithms_enabled() != algorithms:
            torch.use_deterministic_algorithms(algorithms)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        if workspace is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
