"""A seeded random projection of gradients to a few numbers that keeps their inner products.

A sparse Johnson-Lindenstrauss transform with one entry in each column (CountSketch: Charikar,
Chen, Farach-Colton 2002; Kane & Nelson 2014), laid out in rows so that it runs at the speed of
memory. The gradient is cut into rows of K entries; row r is multiplied by K random signs, the
same for all rows, rotated by a random shift, given a random sign of its own and added up:

    S x = sum over r of sign[r] * rotate(signs * x[r], shift[r])

Entries of a row never meet in a bucket; those of two rows meet with probability 1/K, and then
with independent signs. So for all x and y

    E <Sx, Sy> = <x, y>        Var <Sx, Sy> <= 6 |x|^2 |y|^2 / K

and where no few entries dominate, the variance is (|x|^2 |y|^2 + <x, y>^2) / K: the error of a
cosine is about ``1 / sqrt(K)``. The K x n matrix (183 GB for ResNet18 and K = 4096) never exists.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.captures.stacked import StackedArray
from fedsim.core.capture import Capture, SeenStep, Sink, first_fitting, parse_form
from fedsim.core.config import RunConfig
from fedsim.core.rng import Purpose, generator
from fedsim.core.support import Taps
from fedsim.recording.reader import Client

LARGEST_SKETCH = 2**20


@dataclass(frozen=True, kw_only=True)
class Sketch(StackedArray):
    """A random projection of every step's gradient, ``sketch:K``.

    Parameters
    ----------
    count : int
        K, the numbers of a sketch.
    layers : tuple of str
        Globs of the parameters that are projected.
    seed : int
        The run's seed.
    """

    name: ClassVar[str] = "sketch"
    plural: ClassVar[str] = "sketches"
    most_count: ClassVar[float] = LARGEST_SKETCH
    limit: ClassVar[str] = f"a sketch to {LARGEST_SKETCH:,}"
    count: int
    layers: tuple[str, ...] = ("*",)
    seed: int = 0

    @classmethod
    def of(cls, config: RunConfig) -> Self:
        """Read ``sketch:K``."""
        count = parse_form(config.capture)[2]
        return cls(count=count, layers=config.capture_layers, seed=config.seed)

    def __str__(self) -> str:
        return f"sketch:{self.count}"

    def shape(self, parameters: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Give ``(K,)``, float32."""
        return (self.count,)

    def fewer(self, most_steps: int, fits: Callable[[Capture], bool]) -> Capture | None:
        """Lower K."""
        counts = range(self.count - 1, 0, -1)
        return first_fitting(counts, lambda count: replace(self, count=count), fits)

    def measure(self, seen: SeenStep, sink: Sink) -> NDArray[np.float32]:
        """Project the gradient of a step."""
        sketcher, names = _sketcher(self, tuple(sink.shapes))
        packed = seen.packed
        host = sink.to_host({name: packed[name] for name in names}, torch.float32)
        vector = sketcher.sketch(host, seen.taps)
        if "per_layer_norms" not in seen.row:
            norms = {n: float(torch.linalg.vector_norm(g)) for n, g in host.items()}
            seen.row["per_layer_norms"] = norms
        return vector

    def vector(self, client: Client, step: int) -> _Whole:
        """Give the sketch."""
        return _Whole(torch.from_numpy(client.sketch(step)))

    def vector_layers(self, parameters: Iterable[str]) -> list[str]:
        """Name the one piece."""
        return ["sketch"]

    def basis(self, parameters: Sequence[str]) -> str:
        """Say how well inner products are estimated."""
        return (
            "inner products are estimated from sketches, each cosine with a standard deviation "
            f"of about {self.count**-0.5:.2g}."
        )


class _Whole:
    def __init__(self, vector: Tensor) -> None:
        self._vector = vector

    def pieces(self, name: str) -> dict[int, Tensor]:
        return {0: self._vector}


@functools.lru_cache(maxsize=1)
def _sketcher(of: Sketch, parameters: tuple[str, ...]) -> tuple[Sketcher, list[str]]:
    # What it draws for each parameter is drawn once in a process.
    positions = {name: position for position, name in enumerate(parameters)}
    return Sketcher(of.seed, of.count, positions), of.layers_of(parameters)


class Sketcher:
    """Projects gradients of one model; the same for every step, client and round of a run.

    Rows are cut from planes: a plane is a tap of a kernel, (outputs, inputs) in row-major
    order, or the whole of another parameter. The projection of a plane does not depend on
    which others are alive, so sketches of steps with different supports belong together.

    Parameters
    ----------
    seed : int
        The run's seed.
    size : int
        K, the numbers of a sketch.
    positions : mapping of str to int
        Position of each parameter in ``model.parameters()`` order.
    """

    def __init__(self, seed: int, size: int, positions: Mapping[str, int]) -> None:
        self._seed = seed
        self._size = size
        self._positions = dict(positions)
        self._rows: dict[tuple[str, int], list[tuple[int, bool]]] = {}
        signs = generator(seed, Purpose.PROJECTION).integers(0, 2, size=size)
        self._signs = (1 - 2 * signs).astype(np.float32)

    def sketch(
        self, packed: Mapping[str, Tensor], taps: Mapping[str, Taps | None]
    ) -> NDArray[np.float32]:
        """Project the gradient of one step.

        Parameters
        ----------
        packed : mapping of str to Tensor of float32
            Packed gradients on the CPU.
        taps : mapping of str to tuple of int or None
            The support that each was packed with.

        Returns
        -------
        ndarray of float32, shape (K,)
        """
        # Twice as wide: a rotated row is added without wrapping around.
        total = np.zeros(2 * self._size, np.float32)
        for name, tensor in packed.items():
            values: NDArray[np.float32] = tensor.detach().numpy()
            live = taps[name]
            if live is not None:
                # Not -1 for the second: a kernel whose every tap is dead has no entries.
                planes = values.reshape(len(live), math.prod(values.shape[1:]))
            elif values.ndim > 2:
                planes = values.reshape(-1, math.prod(values.shape[2:])).T
                live = tuple(range(len(planes)))
            else:
                planes, live = values.reshape(1, -1), (0,)
            self._add(planes, [self._draw(name, tap, planes.shape[1]) for tap in live], total)
        return total[: self._size] + total[self._size :]

    def _draw(self, name: str, tap: int, size: int) -> list[tuple[int, bool]]:
        """Give the shift of each row of a plane, and whether its sign is minus."""
        key = (name, tap)
        if key not in self._rows:
            rows = -(-size // self._size)
            draw = generator(self._seed, Purpose.PROJECTION, 1 + self._positions[name], tap)
            shifts = draw.integers(0, self._size, size=rows)
            minus = draw.integers(0, 2, size=rows)
            self._rows[key] = [(int(s), bool(m)) for s, m in zip(shifts, minus, strict=True)]
        return self._rows[key]

    def _add(
        self,
        planes: NDArray[np.float32],
        rows: list[list[tuple[int, bool]]],
        total: NDArray[np.float32],
    ) -> None:
        """Flip signs of planes, an array of shape (planes, entries), and add them row by row."""
        signed = np.empty((len(planes), self._size), np.float32)
        for number, start in enumerate(range(0, planes.shape[1], self._size)):
            # One row of every plane at a time: they lie entry by entry beside each other where
            # nothing was left out, and laying them out happens in cache.
            block = planes[:, start : start + self._size]
            width = block.shape[1]
            product = np.multiply(block, self._signs[:width], out=signed[:, :width])
            for row, of_plane in zip(product, rows, strict=True):
                shift, minus = of_plane[number]
                target = total[shift : shift + width]
                (np.subtract if minus else np.add)(target, row, target)
