"""What a verification gives to the proof of a capture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fedsim.recording.findings import REPLAY, WHOLE_RUN, Findings, Place
from fedsim.recording.reader import Client


class DamagedFileError(Exception):
    """A file is not what was written; the findings say so already."""


class _Whole(Protocol):
    def __call__(self, check: str, names: Sequence[str], at: Place = WHOLE_RUN) -> bool: ...


@dataclass(frozen=True)
class Evidence:
    """The files of one client in one round, and where to tell what was found.

    Names of files are relative to the run directory, with slashes.

    Parameters
    ----------
    client : Client
        Whose.
    findings : Findings
        Told of everything.
    folder : str
        The client's folder.
    own : list of str
        The files in it that the client listed.
    are_here : bool
        Whether all of them are in the run directory.
    why_away : str
        Why not, where not.
    whole : callable
        Takes a check, names and a place, and says whether those files are what was written. Says
        under that check that it cannot be made where they are not.
    read : callable
        Yields path and content of files in turn, each read once for its checksum and its content;
        None for the content of one that is too large to hold. Raises `DamagedFileError`.
    """

    client: Client
    findings: Findings
    folder: str
    own: list[str]
    are_here: bool
    why_away: str
    whole: _Whole
    read: Callable[[Sequence[str]], Iterator[tuple[Path, memoryview | None]]]

    def leave_replay(self) -> None:
        """Say that the client's steps cannot be replayed: no gradient was to be kept."""
        reason = f"capture = {self.client.run.config.capture!r} keeps no gradients"
        self.findings.leave(REPLAY, reason, at=self.client.place)
