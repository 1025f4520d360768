"""Names and places of the files of a run directory."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from fedsim.core.capture import all_captures
from fedsim.core.errors import InputError

FORMAT = 1
SHARED_FORMAT = 2
"""Of a run with a round whose clients share files; otherwise as format 1."""
SHARED_FROM = 64
"""Clients of a round from which on their deltas and lines of steps go to shared files."""


def format_of(most_clients: int) -> int:
    """Give the format of a run whose largest round has so many clients."""
    return SHARED_FORMAT if most_clients >= SHARED_FROM else FORMAT


class RunLayout:
    """Paths inside a run directory, none of which leads through a symbolic link out of it.

    All code that opens or writes a file of a run takes its path from here, or by `inside`.

    Parameters
    ----------
    root : Path
        The run directory.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.manifest = root / "run.json"
        self.partition = root / "partition.safetensors"
        self.rounds = root / "rounds.jsonl"
        self.clients = root / "clients.jsonl"
        self.checksums = root / "checksums.jsonl"
        self.lock = root / "lock"

    def round(self, number: int) -> Path:
        """Folder of a round; round 0 holds the initial state."""
        return self._folder("rounds", f"{number:04d}")

    def state(self, number: int) -> Path:
        """Global state after a round."""
        return self.round(number) / "global.safetensors"

    def aggregate(self, number: int) -> Path:
        """Sample-weighted mean delta of a round."""
        return self.round(number) / "aggregate.safetensors"

    def strategy(self, number: int) -> Path:
        """Arrays that the strategy keeps after a round, where it keeps any."""
        return self.round(number) / "strategy.safetensors"

    def client(self, number: int, partition: int) -> Path:
        """Folder of one client in a round."""
        return self._folder("rounds", f"{number:04d}", "clients", f"{partition:04d}")

    def delta(self, number: int, partition: int) -> Path:
        """Local minus global state of one client in a round."""
        return self.client(number, partition) / "delta.safetensors"

    def control(self, number: int, partition: int) -> Path:
        """Arrays that the strategy keeps of one client after a round, where it keeps any."""
        return self.client(number, partition) / "control.safetensors"

    def steps(self, number: int, partition: int) -> Path:
        """Lines about the local steps of one client in a round."""
        return self.client(number, partition) / STEPS

    def shared_deltas(self, number: int, shard: int) -> Path:
        """Deltas of many clients of a round, by `delta_key`."""
        return self.round(number) / f"deltas-{shard:05d}.safetensors"

    def shared_steps(self, number: int, shard: int) -> Path:
        """Lines about the local steps of many clients of a round, each with its partition."""
        return self.round(number) / f"steps-{shard:05d}.jsonl"

    def inside(self, name: str) -> Path:
        """Give the path of a name with slashes, as ``checksums.jsonl`` lists them.

        Raises
        ------
        InputError
            When it leads out of the run directory.
        """
        parts = PurePosixPath(name).parts
        if not parts or "\0" in name or parts[0] == "/" or ".." in parts:
            raise InputError(f"{name} leads out of the run directory")
        return self._folder(*parts[:-1]) / parts[-1]

    def _folder(self, *names: str) -> Path:
        folder = self.root
        for name in names:
            folder = folder / name
            try:
                is_link = stat.S_ISLNK(os.lstat(folder).st_mode)
            except OSError:
                # Not there, or out of reach: then nothing behind it can be opened either.
                continue
            if is_link:
                raise InputError(f"{folder} is a symbolic link; a run directory has none")
        return folder


STEPS = "steps.jsonl"


def is_of_client(name: str) -> bool:
    """Say whether a file of that name in a client's folder is one that a client writes."""
    return name == STEPS or any(capture.owns(name) for capture in all_captures())


def is_removable(name: str) -> bool:
    """Say whether a path inside the run directory is one that may be removed to make room."""
    found = _OF_CLIENT.fullmatch(name)
    return found is not None and any(capture.may_remove(found[1]) for capture in all_captures())


_OF_CLIENT = re.compile(r"rounds/[0-9]{4,}/clients/[0-9]{4,9}/([^/]+)")
_CONTROL = re.compile(r"rounds/[0-9]{4,}/clients/([0-9]{4,9})/control\.safetensors")


def newest_controls(files: Iterable[str]) -> dict[int, str]:
    """Give each client's control variate that is the last one in a list of files.

    Parameters
    ----------
    files : iterable of str
        As ``checksums.jsonl`` lists them, those of earlier rounds first.

    Returns
    -------
    dict of int to str
        Partition id to file.
    """
    matches = (_CONTROL.fullmatch(name) for name in files)
    return {int(match[1]): match[0] for match in matches if match}


def delta_key(partition: int, name: str) -> str:
    """Key of an array of one client's delta inside a file of many clients."""
    return f"{partition}/{name}"
