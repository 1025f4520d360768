"""A copy of a run at a URL that grows round by round, and the way back.

An object store can neither rename nor append, but an object that is put appears whole in place of
the one before. So the rule of the run directory holds there too: files of rounds first, then the
lists as they were when the last of those rounds was closed, ``rounds.jsonl`` the last of them, for
its lines make rounds exist. Whenever that is cut off, the copy is a run with the rounds before.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedsim.core.errors import ConfigError, FedsimError, InputError, RunFailedError
from fedsim.core.inputs import parse_json
from fedsim.plugins.remote.urls import RemoteError, RemoteFolder
from fedsim.recording.checksums import (
    ChecksumLine,
    checksum_line,
    files_away,
    read_checksums,
)
from fedsim.recording.files import Checksum, read_text, temporary
from fedsim.recording.layout import RunLayout
from fedsim.recording.reader import load_run

MANIFEST, ROUNDS, CLIENTS, CHECKSUMS = (
    "run.json",
    "rounds.jsonl",
    "clients.jsonl",
    "checksums.jsonl",
)
_LISTS = (MANIFEST, ROUNDS, CLIENTS)
_BATCH = 256 * 2**20
"""Bytes of rounds after which the lists are put again; they are put whole."""
_FIRST_PAUSE, _LONGEST_PAUSE = 5.0, 300.0
"""Seconds until a copy that failed is tried again."""
_SILENCE = 3.0
"""Seconds at the end of a run after which it is told that the copy is waited for."""
_ATTEMPTS = 3
"""How often a copy is read whose lists change meanwhile."""

Progress = Callable[[int, int], None]


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """Whoever wanted a copy wants it no more."""


@dataclass(frozen=True)
class _Lists:
    """What a run directory or its copy says that it holds, as one moment had it.

    Parameters
    ----------
    manifest : bytes
        ``run.json``; empty where there is none.
    rounds, clients : bytes
        The rows.
    lines : list of ChecksumLine
        Of ``checksums.jsonl``.
    seals : list of bytes
        The same lines as they are written.
    """

    manifest: bytes
    rounds: bytes
    clients: bytes
    lines: list[ChecksumLine]
    seals: list[bytes]

    @classmethod
    def taken(cls, read: Callable[[str], bytes | None], what: str) -> _Lists:
        """Read the four files, each after those that must speak of less than it does.

        Raises
        ------
        InputError
            When a line of the checksums is not what was written, or lacks a list of its round.
        """
        manifest = read(MANIFEST) or b""
        rounds, clients, checksums = (read(name) or b"" for name in (ROUNDS, CLIENTS, CHECKSUMS))
        whole = checksums[: checksums.rfind(b"\n") + 1]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / CHECKSUMS
            path.write_bytes(whole)
            try:
                lines = list(read_checksums(path))
            except InputError as error:
                raise InputError(f"{what}: {error}".replace(f"{folder}/", "")) from None
        if any(line.rows is not None and CLIENTS not in line.files for line in lines):
            raise InputError(f"{what}: {CLIENTS} is not listed with its round in {CHECKSUMS}")
        return cls(manifest, rounds, clients, lines, whole.splitlines(keepends=True))

    def entry(self, key: str) -> Any:
        """Give an entry of ``run.json``; None where there is none."""
        try:
            return parse_json(self.manifest)[key]
        except (ValueError, KeyError, TypeError):
            return None

    @cached_property
    def closed(self) -> list[ChecksumLine]:
        """The lines of the rounds that exist."""
        there = len(self.rounds)
        return [line for line in self.lines if line.rows is not None and line.rows.size <= there]

    def knows(self, manifest: bytes) -> bool:
        """Say whether ``run.json`` was ever written so."""
        checksum = Checksum.of(manifest)
        return any(line.files.get(MANIFEST) == checksum for line in self.lines)

    def checksums_of(self, rounds: int) -> bytes:
        """Give the checksums without those of rounds after the first so many."""
        ahead = {line.number for line in self.lines if line.rows is not None}
        ahead -= {line.number for line in self.closed[:rounds]}
        pairs = zip(self.lines, self.seals, strict=True)
        return b"".join(seal for line, seal in pairs if line.number not in ahead)

    def rows_of(self, rounds: int) -> tuple[bytes, bytes]:
        """Give ``rounds.jsonl`` and ``clients.jsonl`` as they were after so many rounds."""
        if rounds == 0:
            return b"", b""
        files = self.closed[rounds - 1].files
        return self.rounds[: files[ROUNDS].size], self.clients[: files[CLIENTS].size]


def _reader_of(root: Path) -> Callable[[str], bytes | None]:
    def read(name: str) -> bytes | None:
        try:
            return read_text(root / name)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InputError(f"{root / name} cannot be read: {error.strerror}") from None

    return read


def _check_apart(remote: RemoteFolder, root: Path) -> None:
    """Refuse a copy that would be written over its run, or into it."""
    if remote.folder is None:
        return
    # Not `resolve`, which raises where links lead in a circle.
    copy, run = (Path(os.path.realpath(folder)) for folder in (remote.folder, root))
    if copy.is_relative_to(run) or run.is_relative_to(copy):
        raise InputError(
            f"{remote.url} is the run directory {root}, lies in it or contains it; expected "
            "a place apart from it"
        )


def check_new(url: str, root: Path) -> None:
    """Refuse a URL for the copy of a run that is yet to be made.

    Raises
    ------
    ConfigError
        When it cannot be written, holds something already, or is no place apart from the run.
    """
    try:
        remote = RemoteFolder(url)
        _check_apart(remote, root)
        present = remote.read(MANIFEST) or remote.read(CHECKSUMS)
        remote.check_writable()
    except FedsimError as error:
        raise ConfigError("mirror", url, f"a URL that can be written ({error})") from None
    if present:
        raise ConfigError("mirror", url, "a URL that holds no run, since none is ever overwritten")


def check_same(url: str, root: Path) -> None:
    """Refuse a URL that holds another run than a run directory does, or is no place apart from it.

    One that cannot be reached at the moment is none: the copy is brought up to date later.

    Raises
    ------
    ConfigError
        Naming the URL.
    """
    try:
        remote = RemoteFolder(url)
        _check_apart(remote, root)
        with contextlib.suppress(RemoteError):
            theirs = _Lists.taken(remote.read, url)
            _check_same(theirs, _Lists.taken(_reader_of(root), str(root)), url)
    except InputError as error:
        raise ConfigError("mirror", url, f"a copy of {root}, or a new URL ({error})") from None


def _check_same(theirs: _Lists, ours: _Lists, url: str) -> None:
    for key in ("created", "seed", "partition") if theirs.manifest else ():
        if theirs.entry(key) != ours.entry(key):
            raise InputError(f"{url} holds another run")
    if theirs.closed and not _common_rounds(ours, theirs):
        raise InputError(f"{url} holds another run")


def push(
    root: Path,
    remote: RemoteFolder,
    *,
    stop: Callable[[], bool] = lambda: False,
    progress: Progress | None = None,
) -> int:
    """Bring the copy of a run up to date, also of one that is being written.

    What the copy holds is read from itself, so an interrupted copy goes on where it was.

    Parameters
    ----------
    root : Path
        The run directory.
    remote : RemoteFolder
        Its copy, or where it is to be.
    stop : callable
        Says that no further file is to be copied.
    progress : callable, optional
        Told bytes done and bytes in all.

    Returns
    -------
    int
        Bytes that were copied, without the lists.

    Raises
    ------
    InputError
        When it is not a run, or the copy is that of another or no place apart from it.
    RunFailedError
        When a file cannot be copied, or is not what was written.
    Stopped
        Once `stop` says so.
    """
    _check_apart(remote, root)
    ours = _Lists.taken(_reader_of(root), str(root))
    if not ours.manifest:
        raise InputError(f"{root} is not a run directory: it has no {MANIFEST}")
    theirs = _Lists.taken(remote.read, remote.url)
    _check_same(theirs, ours, remote.url)
    return _Push(root, remote, ours, theirs, stop, progress).run()


class _Push:
    """One bringing up to date."""

    def __init__(
        self,
        root: Path,
        remote: RemoteFolder,
        ours: _Lists,
        theirs: _Lists,
        stop: Callable[[], bool],
        progress: Progress | None,
    ) -> None:
        self._layout = RunLayout(root)
        self._remote = remote
        self._ours, self._theirs = ours, theirs
        self._stop = stop
        self._progress = progress
        self._common = _common_rounds(ours, theirs)
        self._left = [self._at_hand([line]) for line in ours.closed[self._common :]]
        self._total = sum(checksum.size for files in self._left for checksum in files.values())
        self._done = self._since = 0

    def run(self) -> int:
        """Put what the copy lacks."""
        ours, theirs, there = self._ours, self._theirs, self._common
        rounds, _ = ours.rows_of(there)
        if theirs.rounds and theirs.rounds != rounds:
            # Rounds that were made again since: first of all they do not exist.
            self._remote.write(ROUNDS, rounds)
        if not theirs.manifest:
            self._put_files(_files_of(line for line in ours.lines if line.rows is None))
        self._put_files(self._collected_since())
        if ours.entry("status") == "running" or (not theirs.rounds and not ours.closed):
            self._put_lists(there)
            self._put_manifest()
        for number, files in enumerate(self._left, start=there + 1):
            self._put_files(files)
            if self._since >= _BATCH or number == len(ours.closed):
                self._put_lists(number)
                self._since = 0
        if ours.manifest != theirs.manifest:
            self._put_lists(len(ours.closed))
            self._put_manifest()
        return self._done

    def _at_hand(self, lines: Iterable[ChecksumLine]) -> dict[str, Checksum]:
        """Give the files of some lines, without those that are not here."""
        lines = list(lines)
        away = files_away(self._layout.root, lines)
        return {name: checksum for name, checksum in _files_of(lines).items() if name not in away}

    def _collected_since(self) -> dict[str, Checksum]:
        """Give the files that came from clients after their round was copied."""
        lines = self._ours.closed[: self._common]
        late = {name for line in lines for name in line.may_lack}
        return {
            name: checksum
            for name, checksum in self._at_hand(lines).items()
            if name in late and self._remote.size(name) != checksum.size
        }

    def _put_files(self, files: Mapping[str, Checksum]) -> None:
        for name, checksum in files.items():
            if self._stop():
                raise Stopped
            path = self._layout.inside(name)
            try:
                whole = _holds(path, checksum)
            except OSError as error:
                raise RunFailedError(f"{path} cannot be read: {error.strerror}") from None
            if not whole:
                raise RunFailedError(f"{path} is not what was written")
            self._remote.put(name, path)
            self._since += checksum.size
            self._done += checksum.size
            if self._progress is not None:
                self._progress(self._done, self._total)

    def _put_lists(self, rounds: int) -> None:
        checksums = self._ours.checksums_of(rounds)
        if self._theirs.manifest and not self._ours.knows(self._theirs.manifest):
            # Until it is replaced, the copy's own is listed too.
            checksums += checksum_line({MANIFEST: Checksum.of(self._theirs.manifest)})
        row, client_rows = self._ours.rows_of(rounds)
        self._remote.write(CHECKSUMS, checksums)
        self._remote.write(CLIENTS, client_rows)
        self._remote.write(ROUNDS, row)

    def _put_manifest(self) -> None:
        if self._theirs.manifest != self._ours.manifest:
            self._remote.write(MANIFEST, self._ours.manifest)
            self._theirs = self._ours


def _common_rounds(ours: _Lists, theirs: _Lists) -> int:
    """Count the rounds that both have, and alike."""
    count = 0
    for here, there in zip(ours.closed, theirs.closed, strict=False):
        if here.files != there.files:
            break
        count += 1
    return count


def _files_of(lines: Iterable[ChecksumLine]) -> dict[str, Checksum]:
    """Give the files of some lines, without the lists, which are copied on their own."""
    listed: dict[str, Checksum] = {}
    for line in lines:
        listed.update(line.files)
    return {name: checksum for name, checksum in listed.items() if name not in _LISTS}


def fetch(url: str, folder: Path, progress: Progress | None = None) -> int:
    """Copy a run from a URL into a folder that does not exist, checking every byte.

    What an earlier attempt left in ``<folder>.partial`` is used.

    Parameters
    ----------
    url : str
        A copy that `push` made, or a run directory.
    folder : Path
        The run directory to make.
    progress : callable, optional
        Told bytes done and bytes in all.

    Returns
    -------
    int
        Whole rounds that it has.

    Raises
    ------
    InputError
        When the folder exists, or the URL holds no run.
    RunFailedError
        When a file cannot be copied, or is not what was written.
    """
    if os.path.lexists(folder):
        raise InputError(f"{folder} exists already; expected a new folder")
    remote = RemoteFolder(url)
    _check_apart(remote, folder)
    lists = _consistent_lists(remote)
    rounds = len(lists.closed)
    unfinished = folder.with_name(f"{folder.name}.partial")
    layout = RunLayout(unfinished)
    if unfinished.is_symlink():
        raise InputError(f"{unfinished} is a symbolic link; remove it and try again")
    try:
        layout.inside("rounds/any").parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made: {error.strerror}") from None
    there = {line.number for line in lists.closed}
    kept = [n for n in lists.lines if n.rows is None or n.number in there]
    files = _files_of(kept)
    away = {name for line in kept for name in line.may_lack}
    total, done = sum(checksum.size for checksum in files.values()), 0
    for name, checksum in files.items():
        if name not in away or remote.size(name) is not None:
            _get(remote, name, layout.inside(name), checksum)
        done += checksum.size
        if progress is not None:
            progress(done, total)
    rows, client_rows = lists.rows_of(rounds)
    for name, content in (
        (CHECKSUMS, lists.checksums_of(rounds)),
        (CLIENTS, client_rows),
        (ROUNDS, rows),
        (MANIFEST, lists.manifest),
    ):
        with temporary(unfinished / name) as path:
            path.write_bytes(content)
    load_run(unfinished)
    unfinished.rename(folder)
    return rounds


def _consistent_lists(remote: RemoteFolder) -> _Lists:
    for _ in range(_ATTEMPTS):
        lists = _Lists.taken(remote.read, remote.url)
        if not lists.manifest:
            raise InputError(f"{remote.url} holds no run: it has no {MANIFEST}")
        rows, client_rows = lists.rows_of(len(lists.closed))
        files = lists.closed[-1].files if lists.closed else {}
        held = {ROUNDS: rows, CLIENTS: client_rows}
        if lists.knows(lists.manifest) and all(
            Checksum.of(held[name]) == files[name] for name in held if name in files
        ):
            return lists
    raise InputError(f"{remote.url} holds lists that do not fit together; push the run again")


def _get(remote: RemoteFolder, name: str, path: Path, checksum: Checksum) -> None:
    with contextlib.suppress(OSError):
        if _holds(path, checksum):
            return
    # No more than was promised, however much there is.
    if (size := remote.size(name)) != checksum.size:
        found = "is not there" if size is None else f"has {size} bytes, not {checksum.size}"
        raise RunFailedError(f"{remote.url}/{name} {found}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary(path) as unfinished:
            remote.get(name, unfinished)
            if not _holds(unfinished, checksum):
                raise RunFailedError(f"{remote.url}/{name} is not what was written")
    except OSError as error:
        raise RunFailedError(f"{path} cannot be written: {error.strerror}") from None


def _holds(path: Path, checksum: Checksum) -> bool:
    # A hole of any size is read for hours.
    return path.lstat().st_size == checksum.size and Checksum.of_file(path) == checksum


class Mirror:
    """Copies a run to a URL while it is being made, from a thread of its own.

    The run never waits for it but at its end. A copy that fails is told once, and tried again.

    Parameters
    ----------
    root : Path
        The run directory.
    remote : RemoteFolder
        The copy.
    tell : callable
        Takes a sentence for the person at the terminal; called from the thread.
    stop : threading.Event
        Set by whoever wants the run to end.
    """

    def __init__(
        self,
        root: Path,
        remote: RemoteFolder,
        *,
        tell: Callable[[str], None],
        stop: threading.Event,
    ) -> None:
        self._root = root
        self._remote = remote
        self._tell = tell
        self._stop = stop
        self._changed = threading.Event()
        self._ending = threading.Event()
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Tell that there is something new to copy."""
        self._changed.set()

    def close(self) -> None:
        """Copy what is left, tell if that fails, and end."""
        self._ending.set()
        self._changed.set()
        self._thread.join(_SILENCE)
        if self._thread.is_alive():
            self._tell(f"copying what is left to {self._remote.url}")
        self._thread.join()

    def _work(self) -> None:
        pause = None
        told = False
        while True:
            self._changed.wait(pause)
            ending = self._ending.is_set()
            self._changed.clear()
            failure = self._try()
            if failure is None:
                pause, told = None, False
            else:
                pause = min(2 * pause, _LONGEST_PAUSE) if pause else _FIRST_PAUSE
                if not told and not ending:
                    self._tell(f"the copy is behind and will be tried again: {failure}")
                    told = True
            if ending:
                if failure is not None:
                    self._tell(
                        f"the copy is behind: {failure}; "
                        f"`fedsim push {self._root} {self._remote.url}` brings it up to date"
                    )
                return

    def _try(self) -> str | None:
        """Bring the copy up to date; say why where that fails."""
        try:
            push(self._root, self._remote, stop=self._stop.is_set)
        except Stopped:
            return "the run was stopped"
        except (FedsimError, OSError, ValueError, KeyError) as error:
            return str(error) or type(error).__name__
        return None


@contextlib.contextmanager
def kept(
    url: str, root: Path, *, tell: Callable[[str], None], stop: threading.Event
) -> Iterator[Callable[[], None]]:
    """Keep a copy of a run at a URL for as long as the context lasts.

    Yields
    ------
    callable
        To be called when the run has something new.
    """
    mirror = Mirror(root, RemoteFolder(url), tell=tell, stop=stop)
    try:
        yield mirror.wake
    finally:
        mirror.close()
