"""What a run directory must hold before a run may be continued in it."""

from __future__ import annotations

import os
from pathlib import Path

from fedsim.core.aggregation import state_sha256
from fedsim.core.errors import InputError
from fedsim.recording.checksums import ChecksumLine, read_checksums
from fedsim.recording.files import TEMPORARY, Checksum
from fedsim.recording.reader import Run

_WRITTEN = ("run.json", "rounds.jsonl", "clients.jsonl", "checksums.jsonl", "lock")


def check_continuable(run: Run) -> None:
    """Check all that continuing a run relies on, and change nothing.

    Raises
    ------
    InputError
        Naming the file.
    """
    check_places(run.path)
    whole_rounds(run)
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


def whole_rounds(run: Run) -> list[ChecksumLine]:
    """Give the lines of ``checksums.jsonl`` up to that of the last whole round.

    Raises
    ------
    InputError
        When there is no whole round, or what is left when all after it is cut off is not what
        was written.
    """
    layout = run.layout
    try:
        there = layout.rounds.lstat().st_size if os.path.lexists(layout.rounds) else 0
        lines = list(read_checksums(layout.checksums))
        whole = [n for n, line in enumerate(lines) if 0 < _rows_of(line) <= there]
        if not whole:
            raise InputError(f"{run.path} holds no whole round; allowed is a new run")
        kept = lines[: whole[-1] + 1]
        manifests = [line.files["run.json"] for line in lines if "run.json" in line.files]
        if Checksum.of_file(layout.manifest) not in manifests:
            raise InputError(f"{layout.manifest} is not what was written")
        for path in (layout.rounds, layout.clients):
            listed = kept[-1].files.get(path.name)
            if listed is None or Checksum.of_file(path, listed.size) != listed:
                raise InputError(f"{path} is not what was written")
    except OSError as error:
        raise InputError(f"{run.path} cannot be continued: {error.strerror}") from None
    if [row["round"] for row in run.round_rows] != list(range(len(whole))):
        raise InputError(
            f"{layout.rounds} does not have a line for each of the rounds 0 to {len(whole) - 1}, "
            f"of which {layout.checksums.name} tells"
        )
    last = run.round(len(whole) - 1)
    if state_sha256({n: t.numpy() for n, t in last.state.items()}) != last.row["state_sha256"]:
        raise InputError(
            f"{layout.state(last.number)} is not the state that round {last.number} ended with"
        )
    return kept


def _rows_of(line: ChecksumLine) -> int:
    """Give the bytes of ``rounds.jsonl`` after the round of a line; 0 for lines of no round."""
    return line.files["rounds.jsonl"].size if "rounds.jsonl" in line.files else 0
