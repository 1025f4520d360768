from __future__ import annotations

import json
from pathlib import Path

import pytest
import xxhash

from fedsim.core.errors import InputError
from fedsim.recording.checksums import ChecksumLine, checksum_line, read_checksums
from fedsim.recording.files import Checksum, append_line
from fedsim.recording.writer import RunWriter
from tests.recording.conftest import Recorded

ONE = {
    "run.json": Checksum(12, "0" * 31 + "a"),
    "rounds/0001/a b.safetensors": Checksum(0, "f" * 32),
}
TWO = {"clients.jsonl": Checksum(2**40, "12" * 16)}


def write(folder: Path, content: bytes) -> Path:
    path = folder / "checksums.jsonl"
    path.write_bytes(content)
    return path


def test_a_line_is_json_that_ends_with_the_checksum_of_what_comes_before() -> None:
    body = b'{"files":{"clients.jsonl":{"bytes":1099511627776,"xxh3_128":"' + b"12" * 16 + b'"}}'
    line = checksum_line(TWO)
    assert line == body + b',"line":"' + xxhash.xxh3_128_hexdigest(body).encode() + b'"}\n'
    assert json.loads(line)["files"] == {n: c.to_json() for n, c in TWO.items()}
    assert checksum_line({}).startswith(b'{"files":{},"line":"')


@pytest.mark.parametrize(
    "name", ["a", "é/ü", 'quo"te', "back\\slash", 'a,"line":"b', "a\nb", "x" * 500, "}", ""]
)
def test_lines_come_back_as_they_were_written(name: str, tmp_path: Path) -> None:
    files = {name: Checksum(3, "ab" * 16), "other": Checksum(4, "cd" * 16)}
    path = tmp_path / "checksums.jsonl"
    for line in (ONE, {}, files):
        append_line(path, checksum_line(line), at=path.stat().st_size if path.exists() else 0)
    assert path.read_bytes().isascii()
    assert path.read_bytes().count(b"\n") == 3
    assert list(read_checksums(path)) == [
        ChecksumLine(1, ONE),
        ChecksumLine(2, {}),
        ChecksumLine(3, files),
    ]


def test_every_single_bit_that_turns_in_a_line_is_noticed(tmp_path: Path) -> None:
    first, second = checksum_line(ONE), checksum_line(TWO)
    path = tmp_path / "checksums.jsonl"
    # Its newline too: without it the line runs into the next.
    for position in range(8 * len(first)):
        turned = bytearray(first)
        turned[position // 8] ^= 1 << position % 8
        path.write_bytes(bytes(turned) + second)
        with pytest.raises(InputError) as caught:
            list(read_checksums(path))
        assert str(caught.value) == f"{path}: line 1 is not what was written"


def test_what_comes_before_a_bad_line_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, checksum_line(ONE) + b"{}\n" + checksum_line(TWO))
    lines = read_checksums(path)
    assert next(lines) == ChecksumLine(1, ONE)
    with pytest.raises(InputError, match=r"checksums\.jsonl: line 2 is not what was written$"):
        next(lines)


def test_an_unfinished_last_line_is_no_line(tmp_path: Path) -> None:
    first, second = checksum_line(ONE), checksum_line(TWO)
    for length in range(len(second)):
        path = write(tmp_path, first + second[:length])
        assert [line.number for line in read_checksums(path)] == [1]
    assert list(read_checksums(write(tmp_path, b""))) == []
    assert list(read_checksums(write(tmp_path, first[:-1]))) == []


def sealed(body: bytes) -> bytes:
    return body + f',"line":"{Checksum.of(body).xxh3_128}"}}\n'.encode()


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"null\n",
        b'{"files":{}}\n',
        checksum_line(ONE).upper(),
        checksum_line(ONE).replace(b"\n", b"\r\n"),
        b" " + checksum_line(ONE),
        checksum_line(ONE)[:-1] + b" \n",
        sealed(b'{"files":3'),
        sealed(b'{"files":{"a":3}'),
        sealed(b'{"files":{"a":{"bytes":1}}'),
        sealed(b'{"files":{"a":{"bytes":"x","xxh3_128":"a"}}'),
        sealed(b'{"other":{}'),
        sealed(b"[1"),
        sealed(b'{"files":{"\xff":{}}'),
    ],
)
def test_a_line_that_was_never_written_is_an_input_error(line: bytes, tmp_path: Path) -> None:
    path = write(tmp_path, checksum_line(TWO) + line)
    with pytest.raises(InputError) as caught:
        list(read_checksums(path))
    assert str(caught.value) == f"{path}: line 2 is not what was written"


def test_a_file_that_cannot_be_read_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "checksums.jsonl"
    with pytest.raises(InputError) as caught:
        list(read_checksums(path))
    assert str(caught.value) == f"{path} cannot be read: No such file or directory"
    path.mkdir()
    with pytest.raises(InputError, match=r"cannot be read: Is a directory$"):
        list(read_checksums(path))


# --- in a run


def names_of(line: ChecksumLine) -> set[str]:
    return set(line.files)


def test_a_new_run_lists_its_manifest_and_its_partition(tmp_path: Path) -> None:
    root = tmp_path / "run"
    RunWriter.create(root, {"seed": 1}, [])
    lines = list(read_checksums(root / "checksums.jsonl"))
    assert [names_of(line) for line in lines] == [{"run.json"}, {"partition.safetensors"}]
    for line in lines:
        for name, checksum in line.files.items():
            assert checksum == Checksum.of_file(root / name)


def test_every_file_of_a_run_hashes_to_its_last_checksum(recorded: Recorded) -> None:
    root = recorded.path
    latest: dict[str, Checksum] = {}
    for line in read_checksums(root / "checksums.jsonl"):
        latest |= line.files
    there = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}
    assert set(latest) == there - {"checksums.jsonl", "lock"}
    for name, checksum in latest.items():
        assert checksum == Checksum.of_file(root / name)


def test_each_round_has_a_line_of_its_own_files_and_of_the_rows_so_far(recorded: Recorded) -> None:
    lines = list(read_checksums(recorded.path / "checksums.jsonl"))
    rows = {"clients.jsonl", "rounds.jsonl"}
    by_round = [line for line in lines if rows <= names_of(line)]
    assert len(by_round) == 3
    for number, line in enumerate(by_round):
        own = names_of(line) - rows
        assert own
        assert {name.split("/")[1] for name in own} == {f"{number:04d}"}
        for name in rows:
            path = recorded.path / name
            assert line.files[name] == Checksum.of_file(path, line.files[name].size)
    rounds = (recorded.path / "rounds.jsonl").read_bytes().splitlines(keepends=True)
    sizes = [line.files["rounds.jsonl"].size for line in by_round]
    assert sizes == [len(b"".join(rounds[: n + 1])) for n in range(3)]
    # The manifest is listed at the beginning and once more with the end of the run.
    assert [names_of(line) for line in lines if "run.json" in line.files] == [{"run.json"}] * 2


def test_no_round_is_told_before_its_checksums_are_there(
    recorded: Recorded, tmp_path: Path
) -> None:
    for _, files in recorded.moments:
        path = write(tmp_path, files["checksums.jsonl"])
        listed: set[str] = set()
        for line in read_checksums(path):
            listed |= names_of(line)
        finished = [json.loads(row)["round"] for row in files["rounds.jsonl"].splitlines()]
        for number in finished:
            folder = f"rounds/{number:04d}/"
            assert {name for name in files if name.startswith(folder)} <= listed
