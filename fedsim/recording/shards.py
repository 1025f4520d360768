"""Files of captured gradients, whatever their encoding and dtype."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.core.errors import InputError
from fedsim.core.support import Taps, packed_shape, unpack
from fedsim.recording.layout import gradient_key, support_key
from fedsim.recording.tensor_files import TensorFile

# A number has one name: "0000001" would be the step of "000001" once more.
_STEP = re.compile(r"[0-9]{6}|[1-9][0-9]{6,11}")


class Gradient(Mapping[str, Tensor]):
    """The gradient of one local step: parameter name to float32 tensor, read when looked up.

    Attributes
    ----------
    step : int
        Local step of the round, from 0.
    """

    def __init__(self, shards: Mapping[str, Shard], step: int, order: list[str]) -> None:
        self._shards = {n: s for n in order if (s := shards.get(gradient_key(step, n)))}
        self.step = step

    def __getitem__(self, name: str) -> Tensor:
        return self._shards[name].gradient(self.step, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)

    def numpy(self) -> dict[str, NDArray[np.float32]]:
        """Read all of it as numpy arrays."""
        return {name: tensor.numpy() for name, tensor in self.items()}

    def __repr__(self) -> str:
        return f"<gradient of step {self.step}: {len(self)} parameters>"


class Shard:
    """A file of captured gradients, whatever their encoding and dtype.

    Parameters
    ----------
    path : Path
        ``gradients-SSSSS.safetensors``.
    shapes : mapping of str to tuple of int
        Shapes of the model's parameters.
    content : memoryview, optional
        The bytes of the file, where they have been read already.
    """

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, ...]],
        content: memoryview | None = None,
    ) -> None:
        self.path = path
        self.file = TensorFile(path, content)
        self._shapes = shapes
        self._taps: dict[str, Taps | None] = {}

    @cached_property
    def steps(self) -> list[int]:
        """The local steps in it, ascending."""
        return sorted({int(key.partition("/")[0]) for key in self.keys})

    @cached_property
    def keys(self) -> list[str]:
        """Names of the gradients in it, ``SSSSSS/<parameter>``, in the order of the file.

        Raises
        ------
        InputError
            When there are other names.
        """
        keys = [key for key in self.file if not key.startswith(support_key(""))]
        for key in keys:
            step, _, parameter = key.partition("/")
            if not _STEP.fullmatch(step) or parameter not in self._shapes:
                raise InputError(f"{self.path}: {key} is no gradient of a step of this model")
        return keys

    @property
    def packed_parameters(self) -> list[str]:
        """The parameters of which taps are left out."""
        return [name for name in self._shapes if support_key(name) in self.file]

    def taps(self, parameter: str) -> Taps | None:
        """Give the taps that are in the file; None where all are.

        Raises
        ------
        InputError
            When they cannot be those of the parameter.
        """
        if parameter not in self._taps:
            key = support_key(parameter)
            kernel = self._shapes[parameter][2:]
            taps = self.file.get(key)
            if taps is not None and not _are_taps(taps, kernel):
                raise InputError(f"{self.path}: {key} does not fit a kernel of shape {kernel}")
            self._taps[parameter] = None if taps is None else tuple(taps.tolist())
        return self._taps[parameter]

    def packed(self, step: int, parameter: str) -> Tensor:
        """Read a gradient as it is stored.

        Raises
        ------
        InputError
            When its shape is not that of the parameter and its taps.
        """
        key = gradient_key(step, parameter)
        tensor, taps = self.file[key], self.taps(parameter)
        expected = packed_shape(self._shapes[parameter], taps)
        if tuple(tensor.shape) != expected:
            raise InputError(f"{self.path}: {key} has shape {tuple(tensor.shape)}, not {expected}")
        if not tensor.dtype.is_floating_point:
            raise InputError(f"{self.path}: {key} holds no floating-point numbers")
        return tensor

    def gradient(self, step: int, parameter: str, *, out: Tensor | None = None) -> Tensor:
        """Read a gradient in its own shape, float32; `out` as for `unpack`."""
        packed = self.packed(step, parameter).float()
        return unpack(packed, self._shapes[parameter], self.taps(parameter), out=out)


def _are_taps(tensor: Tensor, kernel: tuple[int, ...]) -> bool:
    if tensor.ndim != 1 or tensor.dtype != torch.int64 or not kernel:
        return False
    taps = tensor.tolist()
    return taps == sorted(set(taps)) and all(0 <= tap < math.prod(kernel) for tap in taps)
