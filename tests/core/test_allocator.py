import platform
import subprocess
import sys

import pytest

MAPPED = """
import ctypes, sys
import torch
from fedsim.core.allocator import keep_freed_memory

class MallInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost")]

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
"""


def after_allocating(mode):
    finished = subprocess.run(
        [sys.executable, "-c", MAPPED, mode], capture_output=True, text=True, check=True
    )
    mapped, returned = finished.stdout.split()
    return int(mapped), int(returned)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tells glibc what to do")
def test_blocks_of_tens_of_megabytes_come_from_the_heap_and_stay_in_it():
    mapped, _ = after_allocating("leave")
    assert mapped >= 20_000_000
    assert after_allocating("keep") == (0, 0)
