from __future__ import annotations

import errno
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import xxhash
from numpy.typing import NDArray

from fedsim.core.errors import RunFailedError
from fedsim.recording.files import (
    _READ_BYTES,
    DTYPES,
    ITEM_BYTES,
    Checksum,
    Digest,
    LineFile,
    TensorWriter,
    append_line,
    json_document,
    json_line,
    read_lines,
    temporary,
    write_json,
    write_tensors,
)

CODES = {
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
ROOT = Path(__file__).parents[2]


def header_of(path: Path) -> tuple[int, bytes, dict[str, Any]]:
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    return size, raw[8 : 8 + size], json.loads(raw[8 : 8 + size])


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let files of this process grow to `size` bytes only: a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_every_dtype_that_can_be_written_is_tested_here() -> None:
    assert DTYPES == CODES


@pytest.mark.parametrize("name", CODES)
def test_tensors_are_read_identically_by_the_safetensors_library(name: str, tmp_path: Path) -> None:
    draw = np.random.default_rng(7)
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for shape in [(3, 5), (4,), (), (0,), (0, 4), (2, 0, 3), (1, 1, 1, 7)]:
        raw = draw.integers(0, 2 if name == "bool" else 256, (*shape, np.dtype(name).itemsize))
        arrays[f"of shape {shape}"] = raw.astype(np.uint8).view(name).reshape(shape)
    path = tmp_path / "t.safetensors"
    write_tensors(path, arrays)

    by_numpy = safetensors.numpy.load_file(path)
    by_torch = safetensors.torch.load_file(path)
    _, _, header = header_of(path)
    assert list(header) == list(arrays)
    assert set(by_numpy) == set(by_torch) == set(arrays)
    for key, array in arrays.items():
        assert header[key]["dtype"] == CODES[name]
        for found in (by_numpy[key], by_torch[key].numpy()):
            assert (found.dtype, found.shape) == (array.dtype, array.shape)
            # Bytes: not-a-number has many of them, and all are kept.
            assert found.tobytes() == array.tobytes()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda a: a[:, ::2], id="strided"),
        pytest.param(lambda a: a[::-1], id="reversed"),
        pytest.param(lambda a: a.T, id="transposed"),
        pytest.param(np.asfortranarray, id="column-major"),
        pytest.param(lambda a: np.broadcast_to(a[:1], a.shape), id="broadcast"),
        pytest.param(lambda a: a.astype(a.dtype.newbyteorder(">")), id="big-endian"),
        pytest.param(lambda a: a.astype(a.dtype.newbyteorder(">")).T, id="big-endian transposed"),
        pytest.param(lambda a: a.astype(a.dtype.newbyteorder(">"))[1, 2], id="big-endian scalar"),
    ],
)
@pytest.mark.parametrize("name", ["float32", "int64", "int16"])
def test_values_do_not_depend_on_how_an_array_lies_in_memory(
    change: Any, name: str, tmp_path: Path
) -> None:
    given = change((np.arange(24).reshape(4, 6) * 1000 - 7).astype(name))
    write_tensors(tmp_path / "t", {"a": given})
    found = safetensors.numpy.load_file(tmp_path / "t")["a"]
    assert found.dtype == np.dtype(name)
    assert found.shape == given.shape
    assert found.tolist() == given.tolist()


@pytest.mark.parametrize("length", range(1, 10))
def test_data_begins_at_a_multiple_of_eight_and_follows_without_gaps(
    length: int, tmp_path: Path
) -> None:
    path = tmp_path / "t"
    write_tensors(path, {"z" * length: np.ones(3, np.int8), "a": np.ones((2, 2), np.float32)})
    size, raw, header = header_of(path)
    assert size % 8 == 0
    assert raw.rstrip(b" ") == raw[: raw.rindex(b"}") + 1]
    assert size - len(raw.rstrip(b" ")) < 8
    assert header == {
        "z" * length: {"dtype": "I8", "shape": [3], "data_offsets": [0, 3]},
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [3, 19]},
    }
    assert path.stat().st_size == 8 + size + 19


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_files_have_the_mode_that_the_umask_asks_for(mask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        write_tensors(tmp_path / "tensors", {"a": np.zeros(1)})
        write_json(tmp_path / "json", {})
        append_line(tmp_path / "appended", b"{}\n", at=0)
        lines = LineFile(tmp_path / "lines")
        lines.close()
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in tmp_path.iterdir()}
    assert modes == dict.fromkeys(["tensors", "json", "appended", "lines"], mode)


def test_a_full_disk_leaves_neither_the_tensors_nor_a_partial_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="too large") as caught, file_size_limit(4096):
        write_tensors(tmp_path / "t", {"a": np.zeros(100), "b": np.zeros(1000)})
    assert caught.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_at_the_header_leaves_no_partial_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="too large"), file_size_limit(16):
        write_tensors(tmp_path / "t", {"a": np.zeros(100)})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_earlier_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "t"
    write_tensors(path, {"a": np.arange(5)})
    write_json(tmp_path / "j", {"a": 1})
    before = path.read_bytes()
    with pytest.raises(OSError, match="too large"), file_size_limit(4096):
        write_tensors(path, {"a": np.zeros(1000)})
    with pytest.raises(OSError, match="too large"), file_size_limit(10):
        write_json(tmp_path / "j", {"a": "b" * 100})
    assert path.read_bytes() == before
    assert json.loads((tmp_path / "j").read_text()) == {"a": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["j", "t"]


def test_an_array_that_cannot_be_stored_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="complex128"):
        write_tensors(tmp_path / "t", {"a": np.zeros(2), "b": np.zeros(2, np.complex128)})
    assert list(tmp_path.iterdir()) == []


def test_a_file_appears_at_the_end_of_writing_only(tmp_path: Path) -> None:
    path = tmp_path / "t"
    writer = TensorWriter(path, {"a": ("F32", (2,)), "b": ("F32", (1,))})
    writer.append(np.array([1, 2], np.float32))
    assert [p.name for p in tmp_path.iterdir()] == [f"t.{os.getpid()}.partial"]
    writer.append(np.array([3], np.float32))
    assert not path.exists()
    writer.close()
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    assert safetensors.numpy.load_file(path)["b"].tolist() == [3.0]


@pytest.mark.parametrize(
    ("array", "bytes_there"),
    [
        (np.zeros(3, np.float32), 12),
        (np.zeros(5, np.float32), 20),
        (np.zeros(4, np.float64), 32),
        (np.zeros((), np.float32), 4),
        (np.zeros(0, np.float32), 0),
    ],
)
def test_an_array_of_another_size_than_announced_is_refused(
    array: NDArray[Any], bytes_there: int, tmp_path: Path
) -> None:
    writer = TensorWriter(tmp_path / "t", {"a": ("F32", (2,)), "b": ("F32", (2, 2))})
    writer.append(np.ones(2, np.float32))
    with pytest.raises(ValueError) as caught:
        writer.append(array)
    assert str(caught.value) == f"b has {bytes_there} bytes; F32 (2, 2) was announced"
    assert writer.data_bytes == 8
    # Nothing of it was written: what fits can follow.
    writer.append(np.full((2, 2), 3, np.float32))
    writer.close()
    found = safetensors.numpy.load_file(tmp_path / "t")
    assert {k: a.tolist() for k, a in found.items()} == {"a": [1, 1], "b": [[3, 3], [3, 3]]}


def test_bfloat16_is_written_from_integers_of_its_bits(tmp_path: Path) -> None:
    sizes = {code: np.dtype(name).itemsize for name, code in CODES.items()}
    assert sizes | {"BF16": 2} == ITEM_BYTES
    numbers = torch.tensor([[1.5, -0.0], [float("nan"), 3e38]], dtype=torch.bfloat16)
    writer = TensorWriter(tmp_path / "t", {"a": ("BF16", (2, 2))})
    writer.append(numbers.view(torch.int16).numpy())
    writer.close()
    found = safetensors.torch.load_file(tmp_path / "t")["a"]
    assert (found.dtype, found.shape) == (torch.bfloat16, (2, 2))
    assert found.view(torch.int16).tolist() == numbers.view(torch.int16).tolist()


ENTRIES = {f"{n:06d}/w": ("F32", (2, 3)) for n in range(5)} | {"end": ("I64", (1,))}


@pytest.mark.parametrize("written", range(6))
def test_a_writer_closed_early_leaves_a_whole_file_of_what_was_appended(
    written: int, tmp_path: Path
) -> None:
    path = tmp_path / "t"
    writer = TensorWriter(path, ENTRIES)
    full, _, _ = header_of(tmp_path / f"t.{os.getpid()}.partial")
    for number in range(written):
        writer.append(np.full((2, 3), number, np.float32))
    assert writer.data_bytes == 24 * written
    checksum = writer.close()
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    found = safetensors.numpy.load_file(path)
    assert {k: a.tolist() for k, a in found.items()} == {
        f"{n:06d}/w": [[n] * 3] * 2 for n in range(written)
    }
    size, raw, header = header_of(path)
    # The header keeps its room, so that no data has to move; spaces fill it.
    assert size == full
    assert list(header) == list(ENTRIES)[:written]
    assert raw.rstrip(b" ").endswith(b"}")
    assert path.stat().st_size == 8 + size + 24 * written
    assert checksum == Checksum.of_file(path) == Checksum.of(path.read_bytes())


def test_a_writer_closed_at_its_end_knows_the_checksum_of_header_and_data(tmp_path: Path) -> None:
    path = tmp_path / "t"
    writer = TensorWriter(path, ENTRIES)
    for number in range(5):
        writer.append(np.full((2, 3), number, np.float32)[:, ::-1])
    writer.append(np.array([7]))
    checksum = writer.close()
    content = path.read_bytes()
    assert checksum == Checksum(len(content), xxhash.xxh3_128_hexdigest(content))
    assert write_tensors(tmp_path / "u", {"a": np.arange(5), "b": np.ones(())}) == Checksum.of_file(
        tmp_path / "u"
    )


def test_a_writer_that_cannot_put_its_file_in_place_removes_it_when_discarded(
    tmp_path: Path,
) -> None:
    (tmp_path / "t").mkdir()
    writer = TensorWriter(tmp_path / "t", {"a": ("F32", (1,))})
    writer.append(np.ones(1, np.float32))
    with pytest.raises(IsADirectoryError):
        writer.close()
    writer.discard()
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


# --- checksums


def test_a_checksum_is_the_xxh3_of_128_bits() -> None:
    # Of the reference implementation, with no bytes at all.
    assert Checksum.of(b"") == Checksum(0, "99aa06d3014798d86001c324468d497f")
    for content in (b"a", b"abc" * 1000, bytes(range(256)) * 99):
        digits = f"{xxhash.xxh3_128_intdigest(content):032x}"
        assert Checksum.of(content) == Checksum(len(content), digits)
    assert Checksum(3, "0f").to_json() == {"bytes": 3, "xxh3_128": "0f"}


def test_a_digest_of_pieces_is_the_checksum_of_the_whole() -> None:
    content = bytes(range(256)) * 11
    digest = Digest()
    for start in range(0, len(content), 100):
        assert digest.checksum() == Checksum.of(content[:start])
        piece = content[start : start + 100]
        digest.update(memoryview(piece) if start % 200 else piece)
    assert digest.checksum() == Checksum.of(content)


@pytest.mark.parametrize(
    "length", [0, 1, 1000, _READ_BYTES - 1, _READ_BYTES, _READ_BYTES + 1, 2 * _READ_BYTES + 5]
)
def test_the_checksum_of_a_file_or_its_beginning_is_that_of_its_bytes(
    length: int, tmp_path: Path
) -> None:
    content = np.random.default_rng(length).bytes(length)
    path = tmp_path / "file"
    path.write_bytes(content)
    assert Checksum.of_file(path) == Checksum.of(content)
    for size in {0, 1, length // 2, _READ_BYTES, length - 1, length} & set(range(length + 1)):
        assert Checksum.of_file(path, size) == Checksum.of(content[:size])
    # A file that lost its end is told by the size.
    assert Checksum.of_file(path, length + 1) == Checksum.of(content)


def test_a_large_file_is_hashed_without_being_held(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(64 * 2**20)
    tracemalloc.start()
    try:
        assert Checksum.of_file(path).size == 64 * 2**20
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * _READ_BYTES


def test_a_file_that_is_not_there_has_no_checksum(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Checksum.of_file(tmp_path / "file")


def test_a_line_file_knows_the_checksum_of_its_lines(tmp_path: Path) -> None:
    lines = LineFile(tmp_path / "lines")
    for number in range(3000):
        lines.write({"number": number, "text": "é" * (number % 7)})
    assert lines.close() == Checksum.of_file(tmp_path / "lines")
    empty = LineFile(tmp_path / "empty")
    assert empty.close() == Checksum.of(b"")


def test_a_line_file_that_cannot_be_put_in_place_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "lines").mkdir()
    lines = LineFile(tmp_path / "lines")
    lines.write({"a": 1})
    with pytest.raises(IsADirectoryError):
        lines.close()
    assert [p.name for p in tmp_path.iterdir()] == ["lines"]
    full = LineFile(tmp_path / "full")
    full.write({"a": "b" * 100})
    with pytest.raises(OSError, match="too large"), file_size_limit(10):
        full.close()
    assert [p.name for p in tmp_path.iterdir()] == ["lines"]


def test_a_json_document_is_what_a_json_file_holds(tmp_path: Path) -> None:
    value = {"a": [1, float("nan")], "b": "é"}
    write_json(tmp_path / "j", value)
    assert (tmp_path / "j").read_bytes() == json_document(value)
    assert json.loads(json_document(value)) == {"a": [1, None], "b": "é"}


def test_lines_appear_together_at_close_and_not_at_all_after_discard(tmp_path: Path) -> None:
    kept, dropped = LineFile(tmp_path / "kept"), LineFile(tmp_path / "dropped")
    for file in (kept, dropped):
        file.write({"a": 1})
        file.write({"a": float("nan")})
    assert not (tmp_path / "kept").exists()
    kept.close()
    dropped.discard()
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_bytes() == b'{"a":1}\n{"a":null}\n'


def test_an_exception_leaves_no_temporary_file_and_is_the_one_that_surfaces(
    tmp_path: Path,
) -> None:
    error = ZeroDivisionError("in the block")

    def fail() -> None:
        with temporary(tmp_path / "t") as unfinished:
            unfinished.write_bytes(b"half")
            assert unfinished.name == f"t.{os.getpid()}.partial"
            raise error

    with pytest.raises(ZeroDivisionError) as caught:
        fail()
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []


KILLS = {
    "tensors": """
writer = files.TensorWriter(path, {"a": ("F64", (1000,)), "b": ("F64", (1000,))})
writer.append(np.zeros(1000))
kill()
""",
    "all tensors but not closed": """
writer = files.TensorWriter(path, {"a": ("F64", (1000,))})
writer.append(np.zeros(1000))
kill()
""",
    "lines": """
lines = files.LineFile(path)
for number in range(5000):
    lines.write({"number": number})
kill()
""",
    "json": """
with files.temporary(path) as unfinished:
    unfinished.write_text('{"half": ')
    kill()
""",
}


@pytest.mark.parametrize("what", KILLS)
def test_a_kill_in_the_middle_of_writing_leaves_the_earlier_file_and_a_partial_one(
    what: str, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"the earlier file")
    program = f"""
import os, pathlib, signal, sys
import numpy as np
from fedsim.recording import files
path = pathlib.Path(sys.argv[1])
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
{KILLS[what]}
"""
    ended = subprocess.run([sys.executable, "-c", program, path], cwd=ROOT, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"the earlier file"
    (left,) = (p for p in tmp_path.iterdir() if p != path)
    assert left.name.startswith("file.")
    assert left.name.endswith(".partial")
    assert left.stat().st_size > 0


def test_a_row_is_strict_json_with_null_for_what_is_not_finite() -> None:
    nan, inf = float("nan"), float("inf")
    row = {"a": nan, "b": [inf, {"c": -inf, "d": [1, (nan, 2.5)]}], "e": np.float64("nan")}
    assert json_line(row) == b'{"a":null,"b":[null,{"c":null,"d":[1,[null,2.5]]}],"e":null}\n'
    assert json_line({"a": None, "b": True, "c": 3, "d": "x"}) == (
        b'{"a":null,"b":true,"c":3,"d":"x"}\n'
    )


def test_a_row_is_one_line_of_ascii_whatever_its_text() -> None:
    line = json_line({"error": "one\ntwo\r\nthree é \u2028"})
    assert line.count(b"\n") == 1
    assert line.isascii()
    assert json.loads(line) == {"error": "one\ntwo\r\nthree é \u2028"}


@pytest.mark.parametrize("value", [0.1, 2.0e17, 5e-324, float(np.float32(0.1)), -0.0])
def test_a_float_in_a_row_comes_back_to_the_bit(value: float) -> None:
    found = json.loads(json_line({"a": value}))["a"]
    assert struct.pack("<d", found) == struct.pack("<d", value)


def test_a_json_file_is_strict_and_ends_with_a_newline(tmp_path: Path) -> None:
    write_json(tmp_path / "j", {"a": {"b": float("inf")}})
    assert (tmp_path / "j").read_text() == '{\n  "a": {\n    "b": null\n  }\n}\n'


def test_a_row_is_appended_with_one_write(tmp_path: Path) -> None:
    counters = Path("/proc/thread-self/io")
    if not counters.exists():
        pytest.skip("this system does not count the writes of a thread")

    def writes() -> int:
        return int(counters.read_text().split("syscw: ")[1].split()[0])

    path = tmp_path / "rows.jsonl"
    append_line(path, json_line({"row": 0}), at=0)
    before = writes()
    # Larger than any buffer on the way.
    append_line(path, json_line({"row": 1, "text": "x" * 1_000_000}), at=10)
    assert writes() - before == 1
    assert [row["row"] for row in read_lines(path)] == [0, 1]


def test_a_row_that_the_disk_took_in_part_is_an_error_and_is_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = json_line({"round": 1, "text": "longer than ten bytes"})
    with pytest.raises(OSError, match="No space left") as caught, file_size_limit(10):
        append_line(path, row, at=0)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b""
    append_line(path, b'{"round":0}\n', at=0)
    with pytest.raises(OSError, match="No space left"), file_size_limit(20):
        append_line(path, row, at=12)
    assert path.read_bytes() == b'{"round":0}\n'
    append_line(path, row, at=12)
    assert [found["round"] for found in read_lines(path)] == [0, 1]


def test_an_appended_line_is_the_bytes_given(tmp_path: Path) -> None:
    append_line(tmp_path / "rows", b"one\n", at=0)
    append_line(tmp_path / "rows", b"\xff\x00two\n", at=4)
    assert (tmp_path / "rows").read_bytes() == b"one\n\xff\x00two\n"


@pytest.mark.parametrize("at", [0, 3, 5])
def test_a_file_that_somebody_else_wrote_to_is_not_appended_to(tmp_path: Path, at: int) -> None:
    (tmp_path / "rows").write_bytes(b"one\n")
    with pytest.raises(RunFailedError, match=f"another program: it has 4 bytes, not {at}"):
        append_line(tmp_path / "rows", b"two\n", at=at)
    assert (tmp_path / "rows").read_bytes() == b"one\n"


def test_a_last_line_without_its_newline_is_no_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"")
    assert list(read_lines(path)) == []
    path.write_bytes(b'{"round":0}\n{"round":1}\n')
    assert list(read_lines(path)) == [{"round": 0}, {"round": 1}]
    for torn in (b'{"rou', b'{"round":2}', b"\xff\xfe"):
        path.write_bytes(b'{"round":0}\n' + torn)
        assert list(read_lines(path)) == [{"round": 0}]
    path.write_bytes(b'{"round"')
    assert list(read_lines(path)) == []


def test_rows_that_were_removed_are_not_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_line(path, b"{}\n", at=0)
    path.unlink()
    with pytest.raises(RunFailedError, match=f"^{path} was removed by another program$"):
        append_line(path, b"{}\n", at=3)
    assert not path.exists()
