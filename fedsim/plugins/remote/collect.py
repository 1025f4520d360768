"""Bringing the files that clients kept on their own disks into the run directory."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from fedsim.core.errors import InputError
from fedsim.core.units import format_bytes
from fedsim.plugins.remote.folder import Folder, OtherFileError, RemoteError, reason_of
from fedsim.recording.checksums import files_away, files_of, read_checksums
from fedsim.recording.files import TEMPORARY, Checksum
from fedsim.recording.reader import Run
from fedsim.recording.writer import is_being_written

Progress = Callable[[int, int], None]

_OF_PROCESS = re.compile(rf"\.([0-9]{{1,9}}){re.escape(TEMPORARY)}\Z")


@dataclass
class Collected:
    """What a collection did, and what it left.

    Parameters
    ----------
    files, size : int
        Files that were brought, and their bytes.
    missing : list of str
        Files that are in none of the sources, by path inside the run directory.
    wrong : list of str
        What was refused, and why, a sentence each.
    """

    files: int = 0
    size: int = 0
    missing: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def collect(run: Run, sources: Sequence[str], progress: Progress | None = None) -> Collected:
    """Copy what clients recorded into a run directory, each file after its hash was checked.

    A file appears whole or not at all, and one that is there already is not fetched again: an
    interrupted collection goes on where it was.

    Parameters
    ----------
    run : Run
        A run some of whose files are elsewhere.
    sources : sequence of str
        Folders, or URLs as fsspec knows them: what the clients' nodes call ``recordings``, or
        the folder of this run in it.
    progress : callable, optional
        Told bytes done and bytes in all.

    Raises
    ------
    InputError
        When a source cannot be read, none holds anything of the run, the run is being written,
        or there is no room.
    """
    if is_being_written(run.path):
        raise InputError(f"{run.path} is being written; expected a run that has ended")
    lines = list(read_checksums(run.layout.checksums))
    listed = files_of(lines)
    wanted = {name: listed[name] for name in sorted(files_away(run.path, lines))}
    if not wanted:
        return Collected()
    _remove_leftovers({run.layout.inside(name).parent for name in wanted})
    run_id = run.entry("id")
    folders = [_open(source) for source in sources]
    places = [(folder, below) for folder in folders for below in (f"{run_id}/", "")]
    offers = {name: _offers(name, checksum, places) for name, checksum in wanted.items()}
    # What no source has needs no room.
    total = sum(wanted[name].size for name, offer in offers.items() if offer.sources)
    if total > (free := shutil.disk_usage(run.path).free):
        raise InputError(
            f"{run.path} needs {format_bytes(total)} more and its disk has {format_bytes(free)} "
            "free"
        )
    collected, done = Collected(), 0
    for name, offer in offers.items():
        _fetch(run, name, wanted[name], offer, collected)
        done += wanted[name].size if offer.sources else 0
        if progress is not None:
            progress(done, total)
    if not collected.files and not collected.wrong:
        raise InputError(
            f"{', '.join(sources)} holds nothing that is missing from {run.path}; expected what a "
            f"node calls its recordings, with the folder {run_id}, or that folder"
        )
    return collected


def _remove_leftovers(folders: Iterable[Path]) -> None:
    """Remove what collections were writing that were killed."""
    for path in (path for folder in folders for path in folder.glob(f"*{TEMPORARY}")):
        process = _OF_PROCESS.search(path.name)
        if process is not None and not psutil.pid_exists(int(process[1])):
            path.unlink(missing_ok=True)


def _open(source: str) -> Folder:
    folder = Folder(source.rstrip("/") or "/")
    try:
        reason = "" if folder.exists() else "it is not a folder"
    # Each store has exceptions of its own.
    except Exception as error:
        reason = reason_of(error)
    if reason:
        raise InputError(f"{source} cannot be collected from: {reason}")
    return folder


@dataclass
class _Offer:
    """Where a file of the right size is, and what is wrong with those of other places."""

    sources: list[tuple[Folder, str]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def _offers(name: str, checksum: Checksum, places: Iterable[tuple[Folder, str]]) -> _Offer:
    offer = _Offer()
    for folder, below in places:
        try:
            size = folder.size(f"{below}{name}")
        except RemoteError as error:
            offer.refused.append(str(error))
            continue
        if size == checksum.size:
            offer.sources.append((folder, f"{below}{name}"))
        elif size is not None:
            offer.refused.append(f"{folder.url}/{below}{name} is not what the client wrote")
    return offer


def _fetch(run: Run, name: str, checksum: Checksum, offer: _Offer, collected: Collected) -> None:
    for folder, there in offer.sources:
        try:
            folder.get(there, run.layout.inside(name), checksum)
        except OtherFileError:
            offer.refused.append(f"{folder.url}/{there} is not what the client wrote")
        except RemoteError as error:
            offer.refused.append(str(error))
        else:
            collected.files += 1
            collected.size += checksum.size
            return
    collected.wrong += offer.refused
    if not offer.refused:
        collected.missing.append(name)
