"""Finding the round after which a run can go on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedsim.core.errors import InputError
from fedsim.recording.checksums import ChecksumLine, read_checksums
from fedsim.recording.files import Checksum
from fedsim.recording.layout import RunLayout


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
    layout = RunLayout(root)
    lines = list(read_checksums(layout.checksums))
    rows = layout.rounds.stat().st_size if layout.rounds.is_file() else 0
    damage: list[str] = []
    for line in reversed(lines):
        # A line without the rows is of run.json; one with more rows, of a round never closed.
        if line.rows is None or line.rows.size > rows:
            continue
        problem = next(_problems(root, line), None)
        if problem is None:
            content = layout.rounds.read_bytes()[: line.rows.size]
            return Recovery(content.count(b"\n") - 1, line.number, damage)
        damage.append(problem)
    if not damage and sum(line.rows is not None for line in lines) <= 1:
        return Recovery(-1, 0, [])
    told = damage[-1] if damage else "rounds.jsonl is not what was written"
    raise InputError(f"{root} holds no whole round: {told}; allowed is a new run")


def _problems(root: Path, line: ChecksumLine) -> Iterator[str]:
    for name, expected in line.files.items():
        try:
            found = Checksum.of_file(root / name, expected.size)
            # Of files that grow, the beginning is what the line speaks of.
            grows = name in ("rounds.jsonl", "clients.jsonl")
            if found != expected or (not grows and (root / name).stat().st_size != expected.size):
                yield f"{name} is not what was written"
        except OSError as error:
            yield f"{name} cannot be read: {error.strerror}"
