import platform
import subprocess
import sys

import pytest

MAPPED = """
import ctypes, sys
import torch
from fedsim.core.allocator import give_freed_memory_back, keep_freed_memory

class MallInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost")]

def resident():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

library = ctypes.CDLL(None)
library.mallinfo2.restype = MallInfo
if sys.argv[1] == "keep":
    assert keep_freed_memory()
before = library.mallinfo2().hblkhd
blocks = [torch.ones(5_000_000) for _ in range(3)]
print(library.mallinfo2().hblkhd - before)
held = library.mallinfo2().arena
del blocks
print(held - library.mallinfo2().arena)
before = resident()
give_freed_memory_back()
print(before - resident())
"""


def after_allocating(mode):
    finished = subprocess.run(
        [sys.executable, "-c", MAPPED, mode], capture_output=True, text=True, check=True
    )
    mapped, returned, given_back = finished.stdout.split()
    return int(mapped), int(returned), int(given_back)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tells glibc what to do")
def test_blocks_of_tens_of_megabytes_come_from_the_heap_and_stay_in_it():
    mapped, _, _ = after_allocating("leave")
    assert mapped >= 20_000_000
    mapped, returned, given_back = after_allocating("keep")
    assert (mapped, returned) == (0, 0)
    # Three blocks of 20 MB.
    assert 59_000_000 < given_back < 75_000_000
