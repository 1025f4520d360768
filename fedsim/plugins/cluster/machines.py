"""What a machine needs to train clients of a run that another machine records."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import fedsim
import strategies
from fedsim.core.config import RunConfig
from fedsim.core.device import resolve_device
from fedsim.core.errors import ConfigError, InputError
from fedsim.core.task import StoresData, task_of
from fedsim.flower.machine import versions

CODE, DEVICE, PROCESSOR, GPU = "code", "device", "processor", "GPU"


def facts_of(config: RunConfig) -> dict[str, str]:
    """Say what decides the bits of a client's training on this machine.

    Returns
    -------
    dict of str to str
        Versions by name, ``code`` (a hash of fedsim's files), ``device``, ``processor`` (the
        instructions that torch uses) and, where it trains on one, ``GPU``.

    Raises
    ------
    ConfigError
        When this machine has not the run's device.
    """
    minor = ".".join(platform.python_version_tuple()[:2])
    device = resolve_device(config.device).type
    facts = {
        **versions(),
        "python": minor,
        CODE: code_sha256()[:16],
        DEVICE: device,
        PROCESSOR: torch.backends.cpu.get_cpu_capability(),
    }
    if device == "cuda":
        facts[GPU] = torch.cuda.get_device_name(0)
    return facts


def code_sha256() -> str:
    """Hash the Python files of fedsim."""
    digest = hashlib.sha256()
    for package in (fedsim, strategies):
        root = Path(package.__path__[0])
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def difference(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str | None:
    """Name the first thing in which another machine differs: "torch 2.9.0, here 2.12.1"."""
    for name, here in ours.items():
        if (there := theirs.get(name, "none")) != here:
            return f"{name} {there}, here {here}"
    return None


def data_sha256(config: RunConfig) -> str | None:
    """Hash the data of a run as this machine has it; None where it is not to be found.

    What is not in the cache is looked for under ``data-root``, or computed, but not downloaded.
    """
    try:
        data = task_of(config, download=False).data()
    except InputError:
        return None
    return data.fingerprint


def store_data(config: RunConfig, tensors: Mapping[str, NDArray[np.generic]]) -> str:
    """Put data that came from elsewhere into this machine's cache, and hash what is there then.

    Raises
    ------
    InputError
        When the cache cannot be written.
    """
    copies = {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}
    task = task_of(config)
    if not isinstance(task, StoresData):
        raise InputError(f"the data of {config.dataset} cannot be sent to another machine")
    return task.store(copies).fingerprint


@dataclass(frozen=True)
class Mark:
    """A file by which another machine knows the disk of this one.

    Parameters
    ----------
    path : str
        Its absolute path.
    content : str
        What nobody can guess.
    user : int
        Who will own the run directory.
    """

    path: str
    content: str
    user: int

    @classmethod
    @contextlib.contextmanager
    def beside(cls, output: Path) -> Iterator[Mark]:
        """Leave a mark in the nearest folder above a path for as long as the context lasts.

        Raises
        ------
        InputError
            When that folder cannot be written.
        """
        folder = next(p for p in output.absolute().parents if p.exists())
        mark = cls(str(folder / f".fedsim-{secrets.token_hex(8)}"), secrets.token_hex(), _user())
        try:
            Path(mark.path).write_text(mark.content, encoding="ascii")
        except OSError as error:
            raise ConfigError(
                "output", str(output), f"a folder that can be made: {error.strerror}"
            ) from None
        try:
            yield mark
        finally:
            Path(mark.path).unlink(missing_ok=True)

    def is_writable_here(self) -> bool:
        """Say whether this process can write where the mark is."""
        try:
            if Path(self.path).read_text(encoding="ascii") != self.content:
                return False
            beside = Path(f"{self.path}-{secrets.token_hex(8)}")
            beside.touch(exist_ok=False)
            beside.unlink()
        except OSError:
            return False
        # The folders to come belong to that user.
        return _user() in (0, self.user)


def _user() -> int:
    return os.geteuid()
