"""A worker: the Ray actor that trains clients, also on machines that see no run directory."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from flwr.app import Context, Message
from flwr.simulation.ray_transport.ray_actor import VirtualClientEngineActor
from numpy.typing import NDArray

from fedsim.core.config import RunConfig
from fedsim.core.errors import InputError
from fedsim.flower import machines, messages
from fedsim.recording.files import temporary
from fedsim.recording.layout import RunLayout

_PREFIX = "fedsim-worker-"
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
    """

    run_config: str = ""
    facts: Mapping[str, str] | None = None
    data_sha256: str = ""
    data: Mapping[str, Any] | None = None
    checked: frozenset[str] = frozenset()
    sharing: frozenset[str] = frozenset()

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
        if self._is_away:
            _sweep()
        return self._is_away

    def run(
        self, client_app_fn: Any, message: Message, cid: str, context: Context
    ) -> tuple[str, Message, Context]:
        """Train a client; where the run directory is out of reach, into a folder of our own."""
        if self._is_away and (settings := _recording(message)) is not None:
            settings[messages.RUN_FOLDER] = str(_folder())
        return super().run(client_app_fn, message, cid, context)

    def files(self) -> dict[str, int]:
        """Name the files that the last client left here, with slashes, and their bytes."""
        found = [path for path in _folder().rglob("*") if path.is_file()]
        return {path.relative_to(_folder()).as_posix(): path.stat().st_size for path in found}

    def read(self, name: str, start: int) -> NDArray[np.uint8]:
        """Give some bytes of such a file."""
        with (_folder() / name).open("rb") as file:
            file.seek(start)
            return np.frombuffer(file.read(_CHUNK), np.uint8)

    def forget(self) -> None:
        """Remove them."""
        shutil.rmtree(_folder(), ignore_errors=True)


def _recording(message: Message) -> Any:
    """Give the settings of a message that asks for a record."""
    settings = (
        message.content.config_records.get(messages.CONFIG) if message.has_content() else None
    )
    return settings if settings and settings.get(messages.RUN_FOLDER) else None


def _folder() -> Path:
    return Path(tempfile.gettempdir()) / f"{_PREFIX}{os.geteuid()}-{os.getpid()}"


def _sweep() -> None:
    """Remove what workers left here that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}{os.geteuid()}-*"):
        with contextlib.suppress(OSError, ValueError):
            owner = int(folder.name.rpartition("-")[2])
            if owner == os.getpid() or not psutil.pid_exists(owner):
                shutil.rmtree(folder)


def bring_back(worker: Any, message: Message) -> None:
    """Move the files of a worker's last client into the run directory.

    Parameters
    ----------
    worker : actor handle
        A `ClientAppWorker` that is away.
    message : Message
        What the client was asked.

    Raises
    ------
    RayError
        When the worker dies meanwhile.
    """
    if (settings := _recording(message)) is None:
        return
    layout = RunLayout(Path(str(settings[messages.RUN_FOLDER])))
    for name, size in ray.get(worker.files.remote()).items():
        path = layout.inside(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary(path) as unfinished, unfinished.open("wb") as file:
            while file.tell() < size:
                file.write(ray.get(worker.read.remote(name, file.tell())).data)
    ray.get(worker.forget.remote())
