"""A worker: the Ray actor that trains clients, also on machines that see no run directory."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import psutil
import ray
from flwr.app import Context, Message
from flwr.simulation.ray_transport.ray_actor import VirtualClientEngineActor
from numpy.typing import NDArray

from fedsim.core.config import RunConfig
from fedsim.core.errors import InputError, RunFailedError
from fedsim.flower import machines, messages
from fedsim.recording.files import temporary, write_json
from fedsim.recording.layout import RunLayout

_PREFIX, _MANIFEST = "fedsim-worker-", "run.json"
_CHUNK = 32 * 2**20
"""Bytes of a file that travel at once."""


@dataclass(frozen=True)
class Duty:
    """What a worker must know before its first client.

    Parameters
    ----------
    run_config : str
        Configuration as JSON; empty for workers on the machine of the server, which have nothing
        to check.
    facts : mapping of str to str
        `machines.facts_of` at the server.
    data_sha256 : str
        Of the run's data.
    data : mapping of str to ray.ObjectRef
        The data itself, for machines that have it not; empty where all have it.
    checked : frozenset of str
        Ids of Ray nodes that were found to be fit.
    sharing : frozenset of str
        Those of them that write into the run directory themselves.
    recordings : str
        The folder that the run directory is in, on the disk of the server.
    """

    run_config: str = ""
    facts: Mapping[str, str] | None = None
    data_sha256: str = ""
    data: Mapping[str, Any] | None = None
    checked: frozenset[str] = frozenset()
    sharing: frozenset[str] = frozenset()
    recordings: str = ""

    def check(self) -> None:
        """Refuse a machine that came after the others and would not compute what they do.

        Raises
        ------
        InputError
            Naming the first thing that differs.
        """
        config = RunConfig.from_json(self.run_config)
        if found := machines.difference(machines.facts_of(config), self.facts or {}):
            raise InputError(f"its node has {found}")
        sha256 = machines.data_sha256(config)
        if sha256 is None and self.data is not None:
            tensors = {name: ray.get(reference) for name, reference in self.data.items()}
            sha256 = machines.store_data(config, tensors)
        if sha256 != self.data_sha256:
            raise InputError(f"its node has {'other' if sha256 else 'no'} data")


@ray.remote
class ClientAppWorker(VirtualClientEngineActor):
    """A process that trains one client after the other."""

    def __init__(self) -> None:
        self._is_away = False
        # Of its owner alone, and of a name that nobody knows before.
        self._folder: Path | None = None

    def start(self, duty: Duty) -> bool:
        """Get ready for clients, and say whether their files have to be fetched.

        Raises
        ------
        InputError
            When this machine cannot take part.
        """
        if duty.run_config:
            node = ray.get_runtime_context().get_node_id()
            if node not in duty.checked:
                duty.check()
            self._is_away = node not in duty.sharing
            os.environ["FEDSIM_CAPTURE"] = "true"
            os.environ["FEDSIM_RECORDINGS"] = duty.recordings
        if self._is_away:
            _sweep()
        return self._is_away

    def run(
        self, client_app_fn: Any, message: Message, cid: str, context: Context
    ) -> tuple[str, Message, Context]:
        """Train a client; where the run directory is out of reach, into one of our own."""
        if self._is_away and (run := messages.run_of(message)) is not None:
            name, run_id = run
            self.forget()
            self._folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
            os.environ["FEDSIM_RECORDINGS"] = str(self._folder)
            (self._folder / name).mkdir()
            # For the client it is the run directory: its files will be there in the end.
            write_json(self._folder / name / _MANIFEST, {"id": run_id})
        return super().run(client_app_fn, message, cid, context)

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


def bring_back(worker: Any, message: Message, recordings: str) -> None:
    """Move the files of a worker's last client into the run directory.

    Parameters
    ----------
    worker : actor handle
        A `ClientAppWorker` that is away.
    message : Message
        What the client was asked.
    recordings : str
        The folder that the run directory is in.

    Raises
    ------
    RayError
        When the worker dies meanwhile.
    RunFailedError
        As `receive`.
    """
    if (run := messages.run_of(message)) is None:
        return
    layout = RunLayout(Path(recordings) / run[0])
    for name, size in ray.get(worker.files.remote(run[0])).items():
        path = layout.inside(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary(path) as unfinished, unfinished.open("wb") as file:
            read = functools.partial(_read, worker, run[0], name)
            receive(file, name, size, read)
    ray.get(worker.forget.remote())


def _read(worker: Any, run: str, name: str, position: int) -> NDArray[np.uint8]:
    content: NDArray[np.uint8] = ray.get(worker.read.remote(run, name, position))
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
