"""Finding the round after which a run can go on, and whether it may."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.core.aggregation import state_sha256
from fedsim.core.errors import InputError
from fedsim.core.inputs import MOST_JSON_BYTES, open_regular, parse_json
from fedsim.recording import rows
from fedsim.recording.checksums import ChecksumLine, files_of, read_checksums
from fedsim.recording.files import TEMPORARY, Checksum, text_lines
from fedsim.recording.layout import RunLayout, newest_controls
from fedsim.recording.reader import Run
from fedsim.recording.tensor_files import TensorFile

_WRITTEN = ("run.json", "rounds.jsonl", "clients.jsonl", "checksums.jsonl", "lock")


def check_continuable(run: Run) -> None:
    """Refuse to continue a run that is not what it says, before anything of it is changed.

    Raises
    ------
    InputError
        Naming the file.
    """
    check_places(run.path)
    try:
        there = Checksum.of_file(run.layout.manifest)
    except OSError as error:
        raise InputError(f"{run.layout.manifest} cannot be read: {error.strerror}") from None
    listed = (line.files.get("run.json") for line in read_checksums(run.layout.checksums))
    if there not in listed:
        raise InputError(f"{run.layout.manifest} is not what was written")
    # A run that was killed before it had one is begun again.
    if os.path.lexists(run.layout.partition):
        run.check_sizes()


def check_places(root: Path) -> None:
    """Refuse a run directory whose files a writer would find outside of it.

    Raises
    ------
    InputError
        When something to be written, emptied or removed is a symbolic link, or is not a file or no
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


def find_recovery(root: Path) -> Recovery:
    """Find the newest round of a run whose every file is what was written.

    Files of a round are read whole, from the newest round backwards until one is whole. Of older
    rounds only the control variates are looked at that clients of later rounds begin with:
    nothing else that follows depends on them, and `verify` reports them.

    Parameters
    ----------
    root : Path
        A run directory.

    Raises
    ------
    InputError
        When there were rounds and none is whole.
    """
    layout = RunLayout(root)
    lines = list(read_checksums(layout.checksums))
    there = layout.rounds.lstat().st_size if os.path.lexists(layout.rounds) else 0
    damage: list[str] = []
    for line in reversed(lines):
        # A line without the rows is of run.json; one with more rows, of a round never closed.
        if line.rows is None or line.rows.size > there:
            continue
        try:
            _check_files(layout, line)
            _check_controls(layout, lines[: line.number], line)
            recovery = Recovery(_check_rows(layout, line.rows.size), line.number, damage)
        except InputError as error:
            # One old file may be what keeps every round since from being whole.
            if str(error) not in damage:
                damage.append(str(error))
            continue
        if not damage:
            _check_nothing_unlisted(layout, line.rows.size)
        return recovery
    if not damage and sum(line.rows is not None for line in lines) <= 1:
        return Recovery(-1, 0, [])
    told = damage[-1] if damage else "rounds.jsonl is not what was written"
    raise InputError(f"{root} holds no whole round: {told}; start a new run")


def _check_nothing_unlisted(layout: RunLayout, listed: int) -> None:
    """Refuse to throw away finished rounds when only their checksums are lost."""
    with os.fdopen(open_regular(layout.rounds), "rb") as file:
        file.seek(listed)
        if b"\n" in file.read(MOST_JSON_BYTES):
            raise InputError(
                f"{layout.rounds} has lines that {layout.checksums.name} does not list; expected "
                "a run whose finished rounds are listed"
            )


def _check_files(layout: RunLayout, line: ChecksumLine) -> None:
    """Check that all files of a round are what was written."""
    missing = {"rounds.jsonl", "clients.jsonl"} - {*line.files}
    if missing:
        raise InputError(f"{min(missing)} is not listed with its round in checksums.jsonl")
    for name, expected in line.files.items():
        path = layout.inside(name)
        if name not in line.may_lack or os.path.lexists(path):
            # Of files that grow, the line describes the beginning.
            grows = name in ("rounds.jsonl", "clients.jsonl")
            _check_file(path, name, expected, grows=grows)


def _check_controls(layout: RunLayout, lines: Sequence[ChecksumLine], last: ChecksumLine) -> None:
    """Check what clients that took no part in the last round will begin their next one with."""
    listed = files_of(lines)
    for name in newest_controls(listed).values():
        if name not in last.files:
            _check_file(layout.inside(name), name, listed[name])


def _check_file(path: Path, name: str, expected: Checksum, *, grows: bool = False) -> None:
    try:
        if not expected.matches(path, grows=grows):
            raise InputError(f"{name} is not what was written")
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}") from None


def _check_rows(layout: RunLayout, size: int) -> int:
    """Give the last round of the first `size` bytes of the rows, whose state must be there."""
    # They have the checksum of what was written; a forgery has that too.
    last, state_hash = -1, ""
    try:
        for number, row in enumerate(_rows_within(layout.rounds, size)):
            rows.check(rows.RoundRow, row, f"{layout.rounds}: line {number + 1}")
            if row["round"] != number:
                raise InputError(f"{layout.rounds}: rounds do not count up from 0")
            last, state_hash = number, row["state_sha256"]
    except ValueError:
        raise InputError(f"{layout.rounds} holds a line that is not JSON") from None
    except OSError as error:
        raise InputError(f"{layout.rounds} cannot be read: {error.strerror}") from None
    read_state(layout, last, state_hash)
    return last


def read_state(layout: RunLayout, number: int, sha256: str) -> dict[str, NDArray[np.generic]]:
    """Read the global state after a round, mapped from the disk.

    Raises
    ------
    InputError
        When it is not the one that the round's row tells of.
    """
    path = layout.state(number)
    state = {name: tensor.numpy() for name, tensor in TensorFile(path).items()}
    if state_sha256(state) != sha256:
        raise InputError(f"{path} is not the state that round {number} ended with")
    return state


def _rows_within(path: Path, size: int) -> Iterator[Any]:
    left = size
    for line in text_lines(path):
        if left <= 0:
            break
        left -= len(line)
        yield parse_json(line)
    if left or not size:
        raise InputError(f"{path} ends within a line")
