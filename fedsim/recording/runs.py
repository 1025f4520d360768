"""The runs that lie in a folder: what they are and take, and removing them or their gradients.

Nothing is removed but what a run writes, of a run that nobody writes to. No symbolic link is
followed, and a folder that holds anything else is left as it is.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim.core.errors import InputError, RunFailedError
from fedsim.core.inputs import open_regular
from fedsim.recording.checksums import checksum_line, read_checksums
from fedsim.recording.files import TEMPORARY, temporary
from fedsim.recording.layout import RunLayout, is_removable
from fedsim.recording.reader import Run, load_run
from fedsim.recording.writer import is_being_written, only_writer

COMPARISON = "compare.json"
"""In the folder of a comparison, whose folders are its cells; guarded by `lock` there."""
_LISTS = ("run.json", "checksums.jsonl", "partition.safetensors", "rounds.jsonl", "clients.jsonl")
_TRACKED = "tensorboard"
_OF_ROUNDS = re.compile(r".*\.(safetensors|jsonl|json)")


@dataclass(frozen=True, kw_only=True)
class FoundRun:
    """A run directory and what it takes.

    Parameters
    ----------
    path : Path
        Where it is.
    created : str
        When it was begun, UTC, as ``run.json`` has it.
    state : str
        ``running``, ``finished``, ``failed``, or ``killed``: it was running and nobody writes it.
    rounds, rounds_asked : int
        Whole rounds without round 0, and those of its configuration.
    strategy : str
        Its name.
    size, gradients : int
        Bytes of all its files, and of those with captured gradients.
    """

    path: Path
    created: str
    state: str
    rounds: int
    rounds_asked: Any
    strategy: str
    size: int
    gradients: int


def find_runs(folder: Path) -> list[FoundRun]:
    """Find the runs in a folder and in the folders right below it, the oldest first.

    Raises
    ------
    InputError
        When the folder cannot be read, or is a run and holds none.
    """
    try:
        inner = [entry for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from None
    found = []
    for entry in inner:
        if (run := _opened(path := Path(folder) / entry.name)) is not None:
            found.append(_described(run))
            continue
        # A comparison, or a folder for some of the runs. One that cannot be read counts as empty.
        with contextlib.suppress(OSError):
            cells = [cell.name for cell in os.scandir(path) if cell.is_dir(follow_symlinks=False)]
            opened = (_opened(path / name) for name in cells)
            found += [_described(run) for run in opened if run is not None]
    if not found and _opened(Path(folder)) is not None:
        raise InputError(
            f"{folder} is a run itself; expected a folder of runs, and `fedsim inspect` shows a run"
        )
    return sorted(found, key=lambda run: (run.created, str(run.path)))


def find_run(path: Path) -> FoundRun:
    """Give what one run directory is and takes.

    Raises
    ------
    InputError
        When it is not one, or is a symbolic link.
    """
    if path.is_symlink():
        raise InputError(f"{path} is a symbolic link; expected the run directory itself")
    load_run(path)
    if (run := _opened(path)) is None:
        raise InputError(f"{path} is not a run directory: it has no checksums.jsonl")
    return _described(run)


def _opened(path: Path) -> Run | None:
    # A configuration that was copied out of a run has no checksums beside it.
    if not _is_regular(path / "checksums.jsonl"):
        return None
    try:
        return load_run(path)
    except InputError:
        return None


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _described(run: Run) -> FoundRun:
    size = gradients = 0
    for name, status in _files_below(run.path):
        size += status.st_size
        gradients += status.st_size if is_removable(name) else 0
    state = run.status
    if state == "running" and not is_being_written(run.path):
        state = "killed"
    config = run.manifest.get("config", {})
    strategy = config.get("strategy")
    if isinstance(strategy, dict):
        strategy = strategy.get("name")
    return FoundRun(
        path=run.path,
        created=str(run.manifest.get("created", "")),
        state=state,
        rounds=max(0, _lines_of(run.layout.rounds) - 1),
        rounds_asked=config.get("rounds"),
        strategy=str(strategy),
        size=size,
        gradients=gradients,
    )


def _files_below(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Give the files of a folder and of those in it, by path inside of it, links as they are."""
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder) / name
            # One that is being written may be gone by now.
            with contextlib.suppress(FileNotFoundError):
                yield path.relative_to(root).as_posix(), path.lstat()


def _lines_of(path: Path) -> int:
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))
    except OSError:
        return 0


def check_removable(path: Path) -> None:
    """Refuse a run directory that somebody writes to, or that holds what no run writes.

    Raises
    ------
    InputError
        Naming the file.
    """
    if is_being_written(path):
        raise InputError(
            f"{path} is being written by another process; expected a run that has ended"
        )
    with _not_compared(path):
        if odd := _not_of_a_run(path):
            raise InputError(
                f"{odd} is not something that a run writes; move it out of {path} first"
            )


def remove_run(path: Path) -> int:
    """Remove a run directory.

    If it is interrupted, what is left is still a run directory, which the next call removes.

    Returns
    -------
    int
        Bytes that were removed.

    Raises
    ------
    InputError
        As `check_removable`; nothing was removed then.
    RunFailedError
        When something cannot be removed.
    """
    check_removable(path)
    with _told(path), _not_compared(path), only_writer(path):
        size = sum(status.st_size for _, status in _files_below(path))
        for folder in ("rounds", _TRACKED):
            if os.path.lexists(path / folder):
                shutil.rmtree(path / folder)
        # The file that makes it a run goes last, with the lock.
        last = ["checksums.jsonl", "run.json", "lock"]
        rest = sorted(entry.name for entry in os.scandir(path) if entry.name not in last)
        for name in [*rest, *last]:
            (path / name).unlink(missing_ok=True)
        path.absolute().rmdir()
    return size


def remove_gradients(path: Path) -> int:
    """Remove the captured gradients of a run, and say so in ``checksums.jsonl``.

    The run stays a run: everything else of it can be read, verified and continued.

    Returns
    -------
    int
        Bytes that were removed.

    Raises
    ------
    InputError
        As `check_removable`, or when the checksums are damaged; nothing was removed then.
    RunFailedError
        When something cannot be removed; the same call goes on.
    """
    check_removable(path)
    layout = RunLayout(path)
    with _told(path), _not_compared(path), only_writer(path):
        lines = list(read_checksums(layout.checksums))
        there = {
            name
            for line in lines
            for name in line.files
            if is_removable(name) and _is_regular(layout.inside(name))
        }
        # First that they may be missing, then that they are: in between nothing is damaged.
        with temporary(layout.checksums) as unfinished:
            unfinished.write_bytes(
                b"".join(
                    checksum_line(
                        line.files, line.elsewhere, line.removed | (there & line.files.keys())
                    )
                    for line in lines
                )
            )
        size = 0
        for name in sorted(there):
            file = layout.inside(name)
            size += file.lstat().st_size
            file.unlink()
    return size


def outdated(runs: Sequence[FoundRun], keep: int) -> list[FoundRun]:
    """Give the runs with gradients that are not among the newest so many, the oldest first."""
    newest = sorted(runs, key=lambda run: (run.created, str(run.path)))
    return [run for run in newest[: max(0, len(newest) - keep)] if run.gradients]


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunFailedError(
            f"{error.filename or path} cannot be removed: {error.strerror}"
        ) from None


@contextlib.contextmanager
def _not_compared(path: Path) -> Iterator[None]:
    """Keep a comparison that the run is a cell of from going on meanwhile."""
    above = path.absolute().parent
    if not _is_regular(above / COMPARISON):
        yield
        return
    try:
        lock = os.fdopen(open_regular(above / "lock"), "rb")
    except OSError:
        yield
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"{above} is in use by another comparison, which needs {path.name}; wait "
                "until that ends"
            ) from None
        yield


def _not_of_a_run(root: Path) -> Path | None:
    """Find something in a run directory that no run writes, such as a link."""
    for folder, folders, files in os.walk(root):
        inside = Path(folder).relative_to(root).parts
        for name in sorted(folders):
            if not _is_own_folder((*inside, name), Path(folder) / name):
                return Path(folder) / name
        for name in sorted(files):
            if not _is_own_file((*inside, name)) or not _is_regular(Path(folder) / name):
                return Path(folder) / name
    return None


def _is_own_folder(parts: tuple[str, ...], path: Path) -> bool:
    if path.is_symlink():
        return False
    if parts[0] == _TRACKED or parts == ("rounds",):
        return True
    numbers = parts[1:2] + parts[3:4]
    return (
        parts[0] == "rounds"
        and len(parts) <= 4
        and parts[2:3] in ((), ("clients",))
        and all(number.isdecimal() for number in numbers)
    )


def _is_own_file(parts: tuple[str, ...]) -> bool:
    *folders, name = parts
    if not folders:
        return name in (*_LISTS, "lock") or name.endswith(TEMPORARY)
    if folders[0] == _TRACKED:
        return True
    return bool(_OF_ROUNDS.fullmatch(name)) or name.endswith(TEMPORARY)
