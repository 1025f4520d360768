"""``checksums.jsonl``: what every file of a run must hash to."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim.core.errors import InputError
from fedsim.core.inputs import parse_json
from fedsim.recording.files import Checksum, json_line, text_lines
from fedsim.recording.layout import RunLayout, is_removable
from fedsim.recording.rows import ChecksumRow

_SEAL = ',"line":"'


def checksum_line(
    files: Mapping[str, Checksum], elsewhere: Collection[str] = (), removed: Collection[str] = ()
) -> bytes:
    """Encode a line: the checksums of some files, and one of the line itself up to there."""
    row: dict[str, Any] = {"files": {name: c.to_json() for name, c in files.items()}}
    if elsewhere:
        row["elsewhere"] = sorted(elsewhere)
    if removed:
        row["removed"] = sorted(removed)
    body = json_line(row)[:-2]
    return body + f'{_SEAL}{Checksum.of(body).xxh3_128}"}}\n'.encode()


@dataclass(frozen=True)
class ChecksumLine:
    """One line: the files of a round, or one of ``run.json`` and the partition.

    Parameters
    ----------
    number : int
        From 1.
    files : dict of str to Checksum
        By path inside the run directory, with slashes. A later line speaks for a file that an
        earlier one listed too; of a file that grows, the checksum is that of its beginning.
    elsewhere : frozenset of str
        Those of them that clients wrote to their own disks, where they stay until they are
        collected.
    removed : frozenset of str
        Those of them that were removed to make room.
    """

    number: int
    files: dict[str, Checksum]
    elsewhere: frozenset[str] = frozenset()
    removed: frozenset[str] = frozenset()

    @property
    def may_lack(self) -> frozenset[str]:
        """The files that the run directory may lack without being damaged."""
        # Nothing else is ever removed from a run, even where a line says so.
        return self.elsewhere | frozenset(filter(is_removable, self.removed))

    @property
    def rows(self) -> Checksum | None:
        """Of ``rounds.jsonl`` after the round of this line; None for a line of no round."""
        return self.files.get("rounds.jsonl")


def read_checksums(path: Path) -> Iterator[ChecksumLine]:
    """Yield the lines, each checked against its own checksum; an unfinished last one is skipped.

    Raises
    ------
    InputError
        When the file is missing, or a line is not what was written.
    """
    try:
        yield from parse_checksums(text_lines(path), str(path))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def parse_checksums(lines: Iterable[bytes], place: str) -> Iterator[ChecksumLine]:
    """Parse lines, each with its newline; an error names the place they came from.

    Raises
    ------
    InputError
        When a line is not what was written.
    """
    for number, line in enumerate(lines, start=1):
        row = _row_of(line[:-1])
        if row is None:
            raise InputError(f"{place}: line {number} is not what was written")
        files = {name: Checksum(file.bytes, file.xxh3_128) for name, file in row.files.items()}
        yield ChecksumLine(number, files, frozenset(row.elsewhere), frozenset(row.removed))


def files_of(lines: Iterable[ChecksumLine]) -> dict[str, Checksum]:
    """Give the files of some lines, each as the last of them has it."""
    return {name: checksum for line in lines for name, checksum in line.files.items()}


def files_away(root: Path, lines: Iterable[ChecksumLine]) -> set[str]:
    """Name the files that a run directory lacks and may lack.

    They are on the disks of clients, or were removed.
    """
    layout, names = RunLayout(root), set[str]()
    for line in lines:
        names -= line.files.keys()
        names |= line.may_lack & line.files.keys()
    away = set()
    for name in names:
        # A name from a forged list may lead anywhere; opening the file reports it.
        with contextlib.suppress(InputError):
            if not os.path.lexists(layout.inside(name)):
                away.add(name)
    return away


def files_removed(lines: Iterable[ChecksumLine]) -> frozenset[str]:
    """Name the files that were removed to make room, whether or not they were brought back."""
    return frozenset[str]().union(*(line.removed & line.may_lack for line in lines))


def _row_of(line: bytes) -> ChecksumRow | None:
    body, seal, rest = line.rpartition(_SEAL.encode())
    if not seal or rest != f'{Checksum.of(body).xxh3_128}"}}'.encode():
        return None
    try:
        return ChecksumRow.model_validate(parse_json(body + b"}"))
    except ValueError:
        return None
