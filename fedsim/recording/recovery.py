"""Finding the round after which a run can go on, and whether anything can be written there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedsim.core.aggregation import state_sha256
from fedsim.core.errors import InputError
from fedsim.core.inputs import parse_json
from fedsim.recording.checksums import ChecksumLine, read_checksums
from fedsim.recording.files import TEMPORARY, Checksum, text_lines
from fedsim.recording.layout import RunLayout
from fedsim.recording.reader import Run, TensorFile

_WRITTEN = ("run.json", "rounds.jsonl", "clients.jsonl", "checksums.jsonl", "lock")


@dataclass(frozen=True)
class Recovery:
    """Where a run can go on.

    Parameters
    ----------
    round : int
        Its newest whole round; -1 for a run that was stopped before there was one.
    line : int
        The number of that round's line in ``checksums.jsonl``, from 1; 0 where there is none.
    damage : list of str
        What is wrong with the rounds after it, a sentence each, newest first.
    """

    round: int
    line: int
    damage: list[str]


def check_continuable(run: Run) -> None:
    """Check what continuing a run relies on before its data and its model are made.

    Raises
    ------
    InputError
        Naming the file.
    """
    check_places(run.path)
    layout = run.layout
    listed = [line.files.get("run.json") for line in read_checksums(layout.checksums)]
    try:
        if Checksum.of_file(layout.manifest) not in listed:
            raise InputError(f"{layout.manifest} is not what was written")
    except OSError as error:
        raise InputError(f"{layout.manifest} cannot be read: {error.strerror}") from None
    if run.round_rows:
        run.check_sizes()


def check_places(root: Path) -> None:
    """Refuse a run directory whose files a writer would find outside of it.

    Raises
    ------
    InputError
        When something to be written, emptied or removed is a symbolic link, or is no file or no
        folder where one must be.
    """
    for folder in (root, root / "rounds"):
        try:
            with os.scandir(folder) as entries:
                odd = [entry.path for entry in entries if not _is_in_place(entry, folder == root)]
        except FileNotFoundError:
            continue
        except OSError as error:
            raise InputError(f"{folder} cannot be read: {error.strerror}") from None
        if odd:
            raise InputError(f"{min(odd)} is not a file or folder that a run writes")


def _is_in_place(entry: os.DirEntry[str], at_top: bool) -> bool:
    if at_top and (entry.name in _WRITTEN or entry.name.endswith(TEMPORARY)):
        return entry.is_file(follow_symlinks=False)
    if entry.name == "rounds" if at_top else entry.name.isdecimal():
        return entry.is_dir(follow_symlinks=False)
    return True


def find_recovery(root: Path) -> Recovery:
    """Find the newest round of a run whose every file is what was written.

    Files of a round are read whole, from the newest round backwards until one is whole. Older
    rounds are not looked at: nothing that follows depends on them, and `verify` tells of them.

    Parameters
    ----------
    root : Path
        A run directory.

    Raises
    ------
    InputError
        When there were rounds and none is whole.
    """
    check_places(root)
    layout = RunLayout(root)
    lines = list(read_checksums(layout.checksums))
    rows = layout.rounds.lstat().st_size if layout.rounds.exists() else 0
    listed = [line.rows.size for line in lines if line.rows is not None]
    if rows and _rows_before(layout, rows) > len(listed):
        raise InputError(
            f"{layout.rounds} has rounds of which {layout.checksums.name} does not tell"
        )
    damage: list[str] = []
    for line in reversed(lines):
        # A line without the rows is of run.json; one with more rows, of a round never closed.
        if line.rows is None or line.rows.size > rows:
            continue
        problem = next(_problems(layout, line), None)
        if problem is None:
            return Recovery(_rows_before(layout, line.rows.size) - 1, line.number, damage)
        damage.append(problem)
    if not damage and len(listed) <= 1:
        return Recovery(-1, 0, [])
    told = damage[-1] if damage else "rounds.jsonl is not what was written"
    raise InputError(f"{root} holds no whole round: {told}; allowed is a new run")


def _problems(layout: RunLayout, line: ChecksumLine) -> Iterator[str]:
    grows = (layout.rounds.name, layout.clients.name)
    for name, expected in line.files.items():
        try:
            path = layout.inside(name)
            # Of files that grow, the beginning is what the line speaks of.
            same_size = name in grows or path.lstat().st_size == expected.size
            if not same_size or Checksum.of_file(path, expected.size) != expected:
                yield f"{name} is not what was written"
        except InputError as error:
            yield str(error)
        except OSError as error:
            yield f"{name} cannot be read: {error.strerror}"
    if line.rows is None or layout.clients.name not in line.files:
        yield f"line {line.number} of checksums.jsonl lists no rows"
        return
    try:
        *_, text = _beginning(layout, line.rows.size)
        row = parse_json(text)
        number, told = int(row["round"]), str(row["state_sha256"])
        state = {name: tensor.numpy() for name, tensor in TensorFile(layout.state(number)).items()}
    except (InputError, ValueError, KeyError, TypeError) as error:
        yield f"rounds.jsonl is not what was written: {error}"
        return
    if state_sha256(state) != told:
        yield f"rounds/{number:04d}/global.safetensors is not the state that the round ended with"


def _rows_before(layout: RunLayout, size: int) -> int:
    return len(_beginning(layout, size))


def _beginning(layout: RunLayout, size: int) -> list[bytes]:
    rows: list[bytes] = []
    for row in text_lines(layout.rounds):
        if size <= 0:
            break
        rows.append(row)
        size -= len(row)
    return rows
