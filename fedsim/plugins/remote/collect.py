"""Bringing the files that clients kept on their own disks into the run directory."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil
from fsspec.implementations.local import LocalFileSystem

from fedsim.core.errors import InputError
from fedsim.core.inputs import open_regular
from fedsim.core.units import format_bytes
from fedsim.plugins.remote.urls import file_system, reason_of
from fedsim.recording.checksums import files_away, read_checksums
from fedsim.recording.files import TEMPORARY, Checksum, Digest, temporary
from fedsim.recording.layout import RunLayout
from fedsim.recording.reader import Run
from fedsim.recording.writer import is_being_written

Progress = Callable[[int, int], None]

_READ_BYTES = 4 * 2**20
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
    listed: dict[str, Checksum] = {}
    for line in lines:
        listed.update(line.files)
    wanted = {name: listed[name] for name in sorted(files_away(run.path, lines))}
    if not wanted:
        return Collected()
    _remove_leftovers({run.layout.inside(name).parent for name in wanted})
    run_id = run.entry("id")
    folders = [folder for source in sources for folder in _Source.at(source, run_id)]
    collected = Collected()
    offers = {name: _offers(name, checksum, folders) for name, checksum in wanted.items()}
    # What no source has needs no room.
    total = sum(wanted[name].size for name, found in offers.items() if found.sources)
    if total > (free := shutil.disk_usage(run.path).free):
        raise InputError(
            f"{run.path} needs {format_bytes(total)} more and its disk has {format_bytes(free)} "
            "free"
        )
    done = 0
    for name, checksum in wanted.items():
        _fetch(run, name, checksum, offers[name], collected)
        if offers[name].sources:
            done += checksum.size
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


@dataclass(frozen=True)
class _Source:
    """A folder with the layout of a run directory, on any file system."""

    fs: Any
    path: str
    below: str
    shown: str

    @classmethod
    def at(cls, source: str, run_id: str) -> Iterator[_Source]:
        """Give the places below a source where files of a run may be."""
        fs, path = file_system(source)
        path = path.rstrip("/")
        try:
            is_folder = fs.isdir(path or "/")
        # Each store has exceptions of its own.
        except Exception as error:
            raise InputError(f"{source} cannot be collected from: {reason_of(error)}") from None
        if not is_folder:
            raise InputError(f"{source} cannot be collected from: it is not a folder")
        for below in (f"/{run_id}", ""):
            yield cls(fs, path, below, f"{source.rstrip('/')}{below}")

    def size(self, name: str) -> int | None:
        """Count the bytes of a file; None where there is none."""
        try:
            if isinstance(self.fs, LocalFileSystem):
                with self._opened(name) as file:
                    return os.fstat(file.fileno()).st_size
            found = self.fs.info(f"{self.path}{self.below}/{name}")
        except FileNotFoundError:
            return None
        return int(found["size"]) if found["type"] == "file" else None

    def chunks(self, name: str) -> Iterator[bytes]:
        """Read a file."""
        with self._opened(name) as file:
            while chunk := file.read(_READ_BYTES):
                yield chunk

    def _opened(self, name: str) -> IO[bytes]:
        if not isinstance(self.fs, LocalFileSystem):
            opened: IO[bytes] = self.fs.open(f"{self.path}{self.below}/{name}", "rb")
            return opened
        # What a node sent may be a stranger's, as a run directory may.
        inside = RunLayout(Path(self.path or "/")).inside(f"{self.below}/{name}".lstrip("/"))
        return os.fdopen(open_regular(inside), "rb")


@dataclass
class _Offers:
    """Sources that have a file of the right size, and what is wrong with the others."""

    sources: list[_Source]
    refused: list[str]


def _offers(name: str, checksum: Checksum, sources: Iterable[_Source]) -> _Offers:
    offers = _Offers([], [])
    for source in sources:
        try:
            size = source.size(name)
        except Exception as error:
            offers.refused.append(f"{source.shown}/{name} cannot be copied: {reason_of(error)}")
            continue
        if size == checksum.size:
            offers.sources.append(source)
        elif size is not None:
            offers.refused.append(f"{source.shown}/{name} is not what the client wrote")
    return offers


def _fetch(run: Run, name: str, checksum: Checksum, offers: _Offers, collected: Collected) -> None:
    path = run.layout.inside(name)
    refused = list(offers.refused)
    for source in offers.sources:
        try:
            _copy(source.chunks(name), path, checksum)
        except _OtherBytesError:
            refused.append(f"{source.shown}/{name} is not what the client wrote")
        except Exception as error:
            refused.append(f"{source.shown}/{name} cannot be copied: {reason_of(error)}")
        else:
            collected.files += 1
            collected.size += checksum.size
            return
    collected.wrong += refused
    if not refused:
        collected.missing.append(name)


class _OtherBytesError(Exception):
    """A file has other bytes than those of its checksum."""


def _copy(chunks: Iterable[bytes], path: Path, checksum: Checksum) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = Digest()
    with temporary(path) as unfinished:
        with unfinished.open("wb") as file:
            for chunk in chunks:
                digest.update(chunk)
                # No more than was promised, however much there is.
                if digest.size > checksum.size:
                    break
                file.write(chunk)
        if digest.checksum() != checksum:
            raise _OtherBytesError
