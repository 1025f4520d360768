"""``checksums.jsonl``: what every file of a run must hash to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedsim.core.errors import InputError
from fedsim.core.inputs import parse_json
from fedsim.recording.files import Checksum, json_line, text_lines
from fedsim.recording.rows import ChecksumRow

_SEAL = ',"line":"'


def checksum_line(files: Mapping[str, Checksum]) -> bytes:
    """Encode a line: the checksums of some files, and one of the line itself up to there."""
    body = json_line({"files": {name: c.to_json() for name, c in files.items()}})[:-2]
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
    """

    number: int
    files: dict[str, Checksum]

    @property
    def rows(self) -> Checksum | None:
        """Of ``rounds.jsonl`` after the round of this line; None for a line of no round."""
        return self.files.get("rounds.jsonl")


def read_checksums(path: Path) -> Iterator[ChecksumLine]:
    """Yield the lines, each checked against its own checksum; an unfinished last one is none.

    Raises
    ------
    InputError
        When the file is missing, or a line is not what was written.
    """
    try:
        for number, line in enumerate(text_lines(path), start=1):
            files = _files_of(line[:-1])
            if files is None:
                raise InputError(f"{path}: line {number} is not what was written")
            yield ChecksumLine(number, files)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def _files_of(line: bytes) -> dict[str, Checksum] | None:
    body, seal, rest = line.rpartition(_SEAL.encode())
    if not seal or rest != f'{Checksum.of(body).xxh3_128}"}}'.encode():
        return None
    try:
        found = ChecksumRow.model_validate(parse_json(body + b"}")).files
    except ValueError:
        return None
    return {name: Checksum(file.bytes, file.xxh3_128) for name, file in found.items()}
