"""The duty of workers on other machines: compute what the server would, and hand over files."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import psutil
import ray
from flwr.app import Message
from numpy.typing import NDArray

from fedsim.core.config import RunConfig
from fedsim.core.errors import InputError, RunFailedError
from fedsim.flower import messages
from fedsim.flower.actor import Duty
from fedsim.plugins.cluster import machines
from fedsim.recording.files import temporary, write_json
from fedsim.recording.layout import RunLayout

_PREFIX, _MANIFEST = "fedsim-worker-", "run.json"
_CHUNK = 32 * 2**20
"""Bytes of a file that travel at once."""


@dataclass(kw_only=True)
class ClusterDuty(Duty):
    """What a worker on a node of a cluster must know before its first client.

    Where the run directory is out of its reach, it records into a folder of its own, from which
    the files are brought to the server.

    Parameters
    ----------
    run_config : str
        Configuration as JSON.
    facts : mapping of str to str
        `machines.facts_of` at the server.
    data_sha256 : str
        Of the run's data.
    data : mapping of str to ray.ObjectRef, optional
        The data itself, where a machine lacks it.
    checked : frozenset of str
        Ids of Ray nodes that were found to be fit.
    sharing : frozenset of str
        Those of them that write into the run directory themselves.
    recordings : str
        The folder that the run directory is in, on the disk of the server.
    """

    run_config: str
    facts: Mapping[str, str]
    data_sha256: str
    data: Mapping[str, Any] | None
    checked: frozenset[str]
    sharing: frozenset[str]
    recordings: str
    # Of this process: where it records, if the run directory is out of its reach.
    _is_away: bool = field(default=False, init=False)
    _folder: Path | None = field(default=None, init=False)

    def begin(self) -> bool:
        """Check the machine unless the server has, and set the environment of its clients."""
        node = ray.get_runtime_context().get_node_id()
        if node not in self.checked:
            self._check()
        os.environ["FEDSIM_CAPTURE"] = "true"
        os.environ["FEDSIM_RECORDINGS"] = self.recordings
        self._is_away = node not in self.sharing
        if self._is_away:
            _sweep()
        return self._is_away

    def _check(self) -> None:
        """Refuse a machine that came after the others and would not compute what they do."""
        config = RunConfig.from_json(self.run_config)
        if found := machines.difference(machines.facts_of(config), self.facts):
            raise InputError(f"its node has {found}")
        sha256 = machines.data_sha256(config)
        if sha256 is None and self.data is not None:
            tensors = {name: ray.get(reference) for name, reference in self.data.items()}
            sha256 = machines.store_data(config, tensors)
        if sha256 != self.data_sha256:
            raise InputError(f"its node has {'other' if sha256 else 'no'} data")

    def prepare(self, message: Message) -> None:
        """Make the folder that the client records into, where the run directory is elsewhere."""
        if not self._is_away or (run := messages.run_of(message)) is None:
            return
        name, run_id = run
        self.forget()
        # Of its owner alone, and of a name that nobody knows before.
        self._folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
        os.environ["FEDSIM_RECORDINGS"] = str(self._folder)
        (self._folder / name).mkdir()
        # For the client it is the run directory: its files will be there in the end.
        write_json(self._folder / name / _MANIFEST, {"id": run_id})

    def files(self, run: str) -> dict[str, int]:
        """Name the files that the last client of a run left here, with slashes, and their bytes."""
        root = self._place_of(run)
        found = [p.relative_to(root) for p in root.rglob("*") if p.is_file()]
        return {p.as_posix(): (root / p).stat().st_size for p in found if p.name != _MANIFEST}

    def read(self, run: str, name: str, start: int) -> NDArray[np.uint8]:
        """Give some bytes of such a file."""
        with (self._place_of(run) / name).open("rb") as file:
            file.seek(start)
            return np.frombuffer(file.read(_CHUNK), np.uint8)

    def forget(self) -> None:
        """Remove them."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def bring_back(self, worker: Any, message: Message) -> None:
        """Move the files of a worker's last client into the run directory."""
        if (run := messages.run_of(message)) is None:
            return
        layout = RunLayout(Path(self.recordings) / run[0])
        for name, size in ray.get(worker.ask.remote("files", run[0])).items():
            path = layout.inside(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary(path) as unfinished, unfinished.open("wb") as file:
                receive(file, name, size, functools.partial(_read, worker, run[0], name))
        ray.get(worker.ask.remote("forget"))

    def _place_of(self, run: str) -> Path:
        if self._folder is None:
            raise RuntimeError("asked for files before a client was trained")
        return self._folder / run


def _sweep() -> None:
    """Remove what workers of this user left here that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        with contextlib.suppress(OSError, ValueError):
            owner = int(folder.name.removeprefix(_PREFIX).partition("-")[0])
            known = folder.lstat()
            is_ours = stat.S_ISDIR(known.st_mode) and known.st_uid == os.geteuid()
            if is_ours and (owner == os.getpid() or not psutil.pid_exists(owner)):
                shutil.rmtree(folder)


def _read(worker: Any, run: str, name: str, position: int) -> NDArray[np.uint8]:
    content: NDArray[np.uint8] = ray.get(worker.ask.remote("read", run, name, position))
    return content


def receive(file: BinaryIO, name: str, size: int, read: Callable[[int], NDArray[np.uint8]]) -> None:
    """Write what `read` gives of another file, position by position, until there are `size` bytes.

    Raises
    ------
    RunFailedError
        When the other file ends before.
    """
    while (done := file.tell()) < size:
        chunk = read(done)
        if not len(chunk):
            raise RunFailedError(f"{name} became shorter at its worker: {done} bytes, not {size}")
        file.write(chunk.data)
