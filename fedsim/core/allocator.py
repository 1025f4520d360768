"""Keeping freed memory in the process, for loops that allocate the same sizes again and again."""

from __future__ import annotations

import ctypes
from typing import Any

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # glibc refuses more
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell glibc to reuse freed blocks of up to 32 MB instead of returning them to the kernel.

    Every backward pass allocates fresh gradients, 45 MB for ResNet18. By default glibc maps
    each large one afresh and unmaps it when it is freed, so the kernel hands out and clears
    11,000 pages a step: 7 % of a step on one core. The process keeps its peak memory instead.

    Returns
    -------
    bool
        Whether the C library took it; others than glibc are left as they are.
    """
    mallopt = _of_the_c_library("mallopt")
    if mallopt is None:
        return False
    settings = {
        _M_MMAP_THRESHOLD: _LARGEST_MMAP_THRESHOLD,
        _M_TRIM_THRESHOLD: _NEVER,
        _M_TOP_PAD: 64 * 2**20,
        # Threads other than the first have heaps of 64 MB, which are given back.
        _M_ARENA_MAX: 1,
    }
    return all(mallopt(option, value) == 1 for option, value in settings.items())


def give_freed_memory_back() -> bool:
    """Return freed blocks to the kernel, for a process that now waits.

    What is kept lies between what is used, and small blocks settle in it: an activation of 16 MB
    that has found its place for a hundred rounds then takes another. Costs 10 ms for each
    100 MB, when they are next used.

    Returns
    -------
    bool
        Whether the C library knows how; others than glibc are left as they are.
    """
    trim = _of_the_c_library("malloc_trim")
    if trim is None:
        return False
    trim(0)
    return True


def _of_the_c_library(name: str) -> Any:
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
