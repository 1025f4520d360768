from __future__ import annotations

import errno
import itertools
import os
import random
from pathlib import Path

import pytest

from fedsim.recording.disk import DIRECT_FROM, OutputFile, WholeReader
from tests.recording.test_files import file_size_limit

MEGABYTE = 2**20
SIZES = [
    0,
    1,
    4095,
    4096,
    4097,
    DIRECT_FROM - 1,
    DIRECT_FROM,
    DIRECT_FROM + 1,
    DIRECT_FROM + 4096,
    2 * DIRECT_FROM,
    3 * DIRECT_FROM + 12_345,
]


def pieces_of(content: bytes, draw: random.Random) -> list[bytes]:
    """Cut at random, with pieces of nothing, of bytes and of more than the buffer holds."""
    cuts = sorted(draw.randrange(len(content) + 1) for _ in range(8))
    edges = [0, *cuts, len(content)]
    return [content[a:b] for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("announced", [0, 10 * DIRECT_FROM])
def test_what_was_written_is_in_the_file(tmp_path: Path, size: int, announced: int) -> None:
    draw = random.Random(size)
    content = draw.randbytes(size)
    file = OutputFile(tmp_path / "file", size=announced)
    assert bool(file._direct) == (announced > 0)
    for piece in pieces_of(content, draw):
        file.write(memoryview(piece))
    file.finish()
    assert (tmp_path / "file").read_bytes() == content


@pytest.mark.parametrize("size", [5000, DIRECT_FROM + 5000])
def test_the_head_replaces_the_first_bytes(tmp_path: Path, size: int) -> None:
    content = random.Random(1).randbytes(size)
    file = OutputFile(tmp_path / "file", size=size)
    file.write(memoryview(content))
    file.finish(head=b"a head of some length")
    assert (tmp_path / "file").read_bytes() == b"a head of some length" + content[21:]


def test_an_earlier_file_of_the_name_is_emptied(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100)
    file = OutputFile(tmp_path / "file", size=DIRECT_FROM)
    file.write(memoryview(b"new"))
    file.finish()
    assert (tmp_path / "file").read_bytes() == b"new"


def test_the_file_of_another_file_system_is_the_same() -> None:
    folder = Path("/dev/shm")  # noqa: S108
    if not os.access(folder, os.W_OK):
        pytest.skip("there is no memory-backed file system")
    path = folder / f"fedsim-test-{os.getpid()}"
    try:
        content = random.Random(2).randbytes(DIRECT_FROM + 777)
        file = OutputFile(path, size=len(content))
        file.write(memoryview(content))
        file.finish()
        assert path.read_bytes() == content
    finally:
        path.unlink(missing_ok=True)


def test_closing_early_drops_what_is_in_the_buffer_and_may_be_repeated(tmp_path: Path) -> None:
    file = OutputFile(tmp_path / "file", size=DIRECT_FROM)
    file.write(memoryview(b"x" * 100))
    file.close()
    file.close()
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.parametrize("limit", [2 * MEGABYTE, DIRECT_FROM + 1000])
def test_no_room_surfaces_as_what_the_system_calls_it(tmp_path: Path, limit: int) -> None:
    file = OutputFile(tmp_path / "file", size=3 * DIRECT_FROM)
    with file_size_limit(limit), pytest.raises(OSError) as caught:
        file.write(memoryview(bytes(3 * DIRECT_FROM)))
    assert caught.value.errno == errno.EFBIG
    file.close()


def test_a_folder_that_is_not_there_surfaces(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        OutputFile(tmp_path / "no" / "file", size=DIRECT_FROM)


def test_the_file_is_not_executable(tmp_path: Path) -> None:
    OutputFile(tmp_path / "file", size=0).close()
    assert not (tmp_path / "file").stat().st_mode & 0o111


@pytest.mark.parametrize("size", SIZES)
def test_a_file_is_read_whole(tmp_path: Path, size: int) -> None:
    content = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(content)
    assert bytes(WholeReader().read(tmp_path / "file")) == content


def test_a_reader_reads_files_of_any_size_one_after_the_other(tmp_path: Path) -> None:
    reader = WholeReader()
    for size in [3 * DIRECT_FROM + 7, 5, 2 * DIRECT_FROM, 0, 5 * DIRECT_FROM + 1]:
        content = random.Random(size).randbytes(size)
        (tmp_path / "file").write_bytes(content)
        assert bytes(reader.read(tmp_path / "file")) == content


def test_what_cannot_be_read_surfaces_as_what_the_system_calls_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        WholeReader().read(tmp_path / "absent")
    with pytest.raises(IsADirectoryError):
        WholeReader().read(tmp_path)
