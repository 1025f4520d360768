"""A copy of a run at a URL that grows round by round, and the way back.

An object store can neither rename nor append, but an object that is put appears whole in place of
the one before. So the rule of the run directory holds there too: files of rounds first, then the
lists as they were when the last of those rounds was closed, ``rounds.jsonl`` the last of them, for
its lines make rounds exist. Wherever that is cut off, the copy is a run with the rounds before.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim.core.errors import ConfigError, FedsimError, InputError, RunFailedError
from fedsim.core.inputs import parse_json
from fedsim.plugins.remote.folder import Folder, OtherFileError, RemoteError
from fedsim.recording.checksums import (
    ChecksumLine,
    checksum_line,
    files_away,
    files_of,
    parse_checksums,
)
from fedsim.recording.files import Checksum, temporary
from fedsim.recording.layout import RunLayout
from fedsim.recording.reader import load_run

MANIFEST, ROUNDS, CLIENTS, CHECKSUMS = (
    "run.json",
    "rounds.jsonl",
    "clients.jsonl",
    "checksums.jsonl",
)
_BATCH = 256 * 2**20
"""Bytes of rounds after which the lists are put again; they are put whole."""
_FIRST_PAUSE, _LONGEST_PAUSE = 5.0, 300.0
"""Seconds until a copy that failed is tried again."""
_SILENCE = 3.0
"""Seconds at the end of a run after which it is told that the copy is waited for."""
_ATTEMPTS = 3
"""How often a copy is read whose lists change meanwhile."""

Progress = Callable[[int, int], None]
Files = dict[str, Checksum]


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """The copy is no longer wanted."""


@dataclass(frozen=True)
class _Lists:
    """What a run directory or its copy says that it holds, as one moment had it.

    Parameters
    ----------
    manifest : bytes
        ``run.json``; empty where there is none.
    rounds, clients : bytes
        The rows.
    lines : list of (ChecksumLine, bytes)
        Of ``checksums.jsonl``, and as they are written; without those of rounds to come.
    """

    manifest: bytes
    rounds: bytes
    clients: bytes
    lines: list[tuple[ChecksumLine, bytes]]

    @classmethod
    def of(cls, folder: Folder) -> _Lists:
        """Read the four files, each after those that must speak of less than it does.

        Raises
        ------
        InputError
            When a line of the checksums is not what was written, or lacks a list of its round.
        """
        manifest, rounds, clients, text = map(folder.read, (MANIFEST, ROUNDS, CLIENTS, CHECKSUMS))
        seals = [line + b"\n" for line in text.split(b"\n")[:-1]]
        lines = list(parse_checksums(seals, f"{folder.url}/{CHECKSUMS}"))
        if any(line.rows is not None and CLIENTS not in line.files for line in lines):
            raise InputError(f"{folder.url}: {CLIENTS} is not listed with its round in {CHECKSUMS}")
        there = [
            (line, seal)
            for line, seal in zip(lines, seals, strict=True)
            if line.rows is None or line.rows.size <= len(rounds)
        ]
        return cls(manifest, rounds, clients, there)

    def entry(self, key: str) -> Any:
        """Give an entry of ``run.json``, or None if it has no such entry."""
        try:
            return parse_json(self.manifest)[key]
        except (ValueError, KeyError, TypeError):
            return None

    @property
    def begun(self) -> list[ChecksumLine]:
        """The lines of no round."""
        return [line for line, _ in self.lines if line.rows is None]

    @property
    def closed(self) -> list[ChecksumLine]:
        """The lines of the rounds that exist."""
        return [line for line, _ in self.lines if line.rows is not None]

    def knows(self, manifest: bytes) -> bool:
        """Say whether ``run.json`` was ever written so."""
        checksum = Checksum.of(manifest)
        return any(line.files.get(MANIFEST) == checksum for line, _ in self.lines)

    def after(self, rounds: int) -> dict[str, bytes]:
        """Give the lists as they were after so many rounds, in the order in which they are put."""
        ahead = {line.number for line in self.closed[rounds:]}
        files = self.closed[rounds - 1].files if rounds else {}
        return {
            CHECKSUMS: b"".join(seal for line, seal in self.lines if line.number not in ahead),
            CLIENTS: self.clients[: files[CLIENTS].size if files else 0],
            ROUNDS: self.rounds[: files[ROUNDS].size if files else 0],
        }


def _check_apart(remote: Folder, root: Path) -> None:
    """Refuse a copy that would be written over its run, or into it."""
    if remote.local is None:
        return
    # Not `resolve`, which raises where links lead in a circle.
    copy, run = (Path(os.path.realpath(folder)) for folder in (remote.local, root))
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
        remote = Folder(url)
        _check_apart(remote, root)
        present = remote.read(MANIFEST) or remote.read(CHECKSUMS)
        remote.check_writable()
    except FedsimError as error:
        raise ConfigError("mirror", url, f"a URL that can be written ({error})") from None
    if present:
        raise ConfigError("mirror", url, "a URL that holds no run, since none is ever overwritten")


def check_same(url: str, root: Path) -> None:
    """Refuse a URL that holds another run than a run directory does, or is no place apart from it.

    One that cannot be reached at the moment is taken: the copy is brought up to date later.

    Raises
    ------
    ConfigError
        Naming the URL.
    """
    try:
        remote = Folder(url)
        _check_apart(remote, root)
        with contextlib.suppress(RemoteError):
            _compare(_Lists.of(Folder(root)), _Lists.of(remote), url)
    except InputError as error:
        raise ConfigError("mirror", url, f"a copy of {root}, or a new URL ({error})") from None


def _compare(ours: _Lists, theirs: _Lists, url: str) -> int:
    """Count the rounds that a run and its copy have alike; refuse the copy of another run."""
    common = 0
    for here, there in zip(ours.closed, theirs.closed, strict=False):
        if here.files != there.files:
            break
        common += 1
    keys = ("created", "seed", "partition") if theirs.manifest else ()
    if (theirs.closed and not common) or any(theirs.entry(k) != ours.entry(k) for k in keys):
        raise InputError(f"{url} holds another run")
    return common


def push(
    root: Path,
    remote: Folder,
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
    remote : Folder
        Its copy, or where it is to be.
    stop : callable
        Says that nothing further is to be copied.
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
    ours, theirs = _Lists.of(Folder(root)), _Lists.of(remote)
    if not ours.manifest:
        raise InputError(f"{root} is not a run directory: it has no {MANIFEST}")
    common = _compare(ours, theirs, remote.url)
    at_first = {} if theirs.manifest else _files_of(ours.begun)
    at_first |= _brought_since(root, remote, ours.closed[:common])
    rounds = [_files_here(root, [line]) for line in ours.closed[common:]]
    total = sum(c.size for files in (at_first, *rounds) for c in files.values())
    layout, done = RunLayout(root), 0
    for name, content in _order(ours, theirs, common, at_first, rounds):
        if stop():
            raise Stopped
        if isinstance(content, bytes):
            remote.put(name, content)
            continue
        path = layout.inside(name)
        try:
            whole = content.matches(path)
        except OSError as error:
            raise RunFailedError(f"{path} cannot be read: {error.strerror}") from None
        if not whole:
            raise RunFailedError(f"{path} is not what was written")
        remote.put(name, path)
        done += content.size
        if progress is not None:
            progress(done, total)
    return done


def _order(
    ours: _Lists, theirs: _Lists, common: int, at_first: Files, rounds: Sequence[Files]
) -> Iterator[tuple[str, bytes | Checksum]]:
    """Give what to put, in order: files by their checksums, lists by their content."""
    manifest = theirs.manifest

    def lists(count: int) -> Iterator[tuple[str, bytes]]:
        content = ours.after(count)
        if manifest and not ours.knows(manifest):
            # Until it is replaced, the copy's own is listed too.
            content[CHECKSUMS] += checksum_line({MANIFEST: Checksum.of(manifest)})
        yield from content.items()

    if theirs.rounds and theirs.rounds != (kept := ours.after(common)[ROUNDS]):
        # Rounds that were made again since: first of all they do not exist.
        yield ROUNDS, kept
    yield from at_first.items()
    if ours.entry("status") == "running" and manifest != ours.manifest:
        # Only a run that has ended needs all of its rounds.
        yield from lists(common)
        yield MANIFEST, ours.manifest
        manifest = ours.manifest
    since = 0
    for number, files in enumerate(rounds, start=common + 1):
        yield from files.items()
        since += sum(checksum.size for checksum in files.values())
        if since >= _BATCH and number < len(ours.closed):
            yield from lists(number)
            since = 0
    if rounds or manifest != ours.manifest:
        yield from lists(len(ours.closed))
    if manifest != ours.manifest:
        yield MANIFEST, ours.manifest


def _files_here(root: Path, lines: Sequence[ChecksumLine]) -> Files:
    """Give the files of some lines, without those that are not here."""
    away = files_away(root, lines)
    return {name: checksum for name, checksum in _files_of(lines).items() if name not in away}


def _brought_since(root: Path, remote: Folder, lines: Sequence[ChecksumLine]) -> Files:
    """Give the files that came from clients after their round was copied."""
    late = {name for line in lines for name in line.may_lack}
    here = _files_here(root, lines) if late else {}
    return {n: c for n, c in here.items() if n in late and remote.size(n) != c.size}


def _files_of(lines: Iterable[ChecksumLine]) -> Files:
    """Give the files of some lines, without the lists, which are copied on their own."""
    return {n: c for n, c in files_of(lines).items() if n not in (MANIFEST, ROUNDS, CLIENTS)}


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
    remote = Folder(url)
    _check_apart(remote, folder)
    lists = _consistent_lists(remote)
    unfinished = folder.with_name(f"{folder.name}.partial")
    layout = RunLayout(unfinished)
    if unfinished.is_symlink():
        raise InputError(f"{unfinished} is a symbolic link; remove it and try again")
    try:
        layout.inside("rounds/any").parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made: {error.strerror}") from None
    kept = [line for line, _ in lists.lines]
    files, away = _files_of(kept), {name for line in kept for name in line.may_lack}
    total, done = sum(checksum.size for checksum in files.values()), 0
    for name, checksum in files.items():
        _get(remote, name, layout.inside(name), checksum, may_lack=name in away)
        done += checksum.size
        if progress is not None:
            progress(done, total)
    for name, content in {**lists.after(len(lists.closed)), MANIFEST: lists.manifest}.items():
        with temporary(unfinished / name) as path:
            path.write_bytes(content)
    load_run(unfinished)
    unfinished.rename(folder)
    return len(lists.closed)


def _consistent_lists(remote: Folder) -> _Lists:
    for _ in range(_ATTEMPTS):
        lists = _Lists.of(remote)
        if not lists.manifest:
            raise InputError(f"{remote.url} holds no run: it has no {MANIFEST}")
        held = lists.after(len(lists.closed))
        files = lists.closed[-1].files if lists.closed else {}
        if lists.knows(lists.manifest) and all(
            Checksum.of(held[name]) == files[name] for name in held if name in files
        ):
            return lists
    raise InputError(f"{remote.url} holds lists that do not fit together; push the run again")


def _get(remote: Folder, name: str, path: Path, checksum: Checksum, *, may_lack: bool) -> None:
    with contextlib.suppress(OSError):
        if checksum.matches(path):
            return
    # No more than was promised, however much there is.
    size = remote.size(name)
    if size == checksum.size:
        remote.get(name, path, checksum)
    elif size is not None:
        raise OtherFileError(f"{remote.url}/{name} has {size} bytes, not {checksum.size}")
    elif not may_lack:
        raise OtherFileError(f"{remote.url}/{name} is not there")


class Mirror:
    """Copies a run to a URL while it is being made, from a thread of its own.

    The run waits for it only at its end. A copy that fails is told once, and tried again.

    Parameters
    ----------
    root : Path
        The run directory.
    remote : Folder
        The copy.
    tell : callable
        Takes a sentence for the person at the terminal; called from the thread.
    stop : threading.Event
        Set when the run is to end.
    """

    def __init__(
        self, root: Path, remote: Folder, *, tell: Callable[[str], None], stop: threading.Event
    ) -> None:
        self._root = root
        self._remote = remote
        self._tell = tell
        self._stop = stop
        self._changed = threading.Event()
        self._ending = threading.Event()
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
        pause, ending, told = None, False, False
        while not ending:
            self._changed.wait(pause)
            ending = self._ending.is_set()
            self._changed.clear()
            failure = self._try()
            if failure is None:
                pause, told = None, False
            elif ending:
                self._tell(
                    f"the copy is behind: {failure}; "
                    f"`fedsim push {self._root} {self._remote.url}` brings it up to date"
                )
            else:
                pause = min(2 * pause, _LONGEST_PAUSE) if pause else _FIRST_PAUSE
                if not told:
                    self._tell(f"the copy is behind and will be tried again: {failure}")
                    told = True

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
    mirror = Mirror(root, Folder(url), tell=tell, stop=stop)
    try:
        yield mirror.wake
    finally:
        mirror.close()
