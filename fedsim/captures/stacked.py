"""The base of captures that keep one small array of every step, stacked in one file."""

from __future__ import annotations

import math
import os
from abc import abstractmethod
from collections.abc import Collection, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedsim.core.capture import Capture, Observer, SeenStep, Sink, Sizes
from fedsim.core.errors import InputError
from fedsim.core.training import Step
from fedsim.recording.evidence import Evidence
from fedsim.recording.files import write_tensors
from fedsim.recording.findings import STEPS
from fedsim.recording.reader import Client
from fedsim.recording.tensor_files import TensorFile


class StackedArray(Capture):
    """Keeps one float32 array of every step, in ``<name>.safetensors`` under the key ``<name>``.

    Attributes
    ----------
    name : str
        Of the array, its file, and the method ``client.<name>(step)`` of the reader.
    plural : str
        The same of many; `name` where it is not given.
    """

    name: ClassVar[str]
    plural: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        """Offer the array to readers."""
        cls.reads = frozenset({cls.name})

    @abstractmethod
    def shape(self, parameters: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Give the shape of a step's array, from the shapes of the model's parameters."""

    @abstractmethod
    def measure(self, seen: SeenStep, sink: Sink) -> NDArray[np.float32]:
        """Compute a step's array."""

    def wants(self, parameters: Mapping[str, tuple[int, ...]]) -> Collection[str]:
        """Name the parameters whose gradients `measure` needs."""
        return self.layers_of(parameters)

    def step_bytes(self, sizes: Sizes) -> int:
        """Count the bytes of an array."""
        return 4 * math.prod(self.shape(sizes.parameters))

    def bytes_of(self, steps: int, parameters: Mapping[str, tuple[int, ...]]) -> int:
        """Count the bytes of so many."""
        return 4 * math.prod(self.shape(parameters)) * steps

    @classmethod
    def file(cls) -> str:
        """Name the file."""
        return f"{cls.name}.safetensors"

    @classmethod
    def owns(cls, name: str) -> bool:
        """Say whether it is that file."""
        return name == cls.file()

    def record(self, sink: Sink) -> Observer | None:
        """Stack the arrays of all steps in memory."""
        return _Stacking(self, sink)

    @classmethod
    def open(cls, client: Client) -> Any:
        """Give ``client.<name>(step)``."""

        def read(step: int) -> NDArray[np.float32]:
            stacked = cls._read(client)
            if not 0 <= step < len(stacked):
                raise InputError(
                    f"step {step} of client {client.partition} in round {client.round} has no "
                    f"{cls.name}; there are {len(stacked)}"
                )
            found: NDArray[np.float32] = stacked[step]
            return found

        return SimpleNamespace(**{cls.name: read})

    @classmethod
    def _read(cls, client: Client) -> NDArray[np.float32]:
        path, own = client.folder / cls.file(), client.run.config.policy
        there = cls.file() in client.telemetry["files"] and os.path.lexists(path)
        if not (there and isinstance(own, cls)):
            return np.empty((0, 0), np.float32)
        file, shape = TensorFile(path), own.shape(client.run.shapes)
        dtype, found = file.described.get(cls.name, ("none", ()))
        if dtype != "F32" or len(found) != 1 + len(shape) or found[1:] != shape:
            numbers = " x ".join(map(str, shape))
            raise InputError(f"{path} does not hold {cls.plural or cls.name} of {numbers} numbers")
        stacked: NDArray[np.float32] = file[cls.name].numpy()
        return stacked

    def check(self, evidence: Evidence) -> None:
        """Say that no gradient is there to replay, and prove what follows from a whole file."""
        if evidence.are_here and evidence.whole(STEPS, evidence.own):
            evidence.leave_replay()
            self.prove(evidence)

    def prove(self, evidence: Evidence) -> None:
        """Prove what the arrays hold, as far as it follows from something else."""


class _Stacking(Observer):
    def __init__(self, capture: StackedArray, sink: Sink) -> None:
        self._capture = capture
        self._sink = sink
        self._names = capture.wants(sink.shapes)
        self._kept = capture.kept_steps(sink.num_steps) if self._names else range(0)
        self._stacked: list[NDArray[np.float32]] = []
        self.due = len(self._kept)

    def wants(self, step: Step) -> Collection[str] | None:
        return self._names if step.index in self._kept else None

    def measure(self, seen: SeenStep) -> None:
        array = self._capture.measure(seen, self._sink)
        self._stacked.append(array)
        self.nbytes += array.nbytes
        self.kept += 1

    def finish(self) -> None:
        if self._stacked:
            path = self._sink.folder / self._capture.file()
            stacked = {self._capture.name: np.stack(self._stacked)}
            self._sink.files[path.name] = write_tensors(path, stacked)
