"""Which gradients of a client's local steps are kept, and in which form."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, Self

from fedsim.core.units import parse_count

Dtype = Literal["float32", "bfloat16", "float16"]
Encoding = Literal["support", "dense"]

ITEM_BYTES: Mapping[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a stored number."""

LARGEST_SKETCH = 2**20

_FORMS = f"none, all, first:K, last:K, every:K or sketch:K with K from 1, a sketch to {2**20:,}"


@dataclass(frozen=True, kw_only=True)
class CapturePolicy:
    """A choice of local steps, of parameters and of a form to keep their gradients in.

    Parameters
    ----------
    steps : {"none", "all", "first", "last", "every", "sketch"}
        Which steps of a client's round, counted from 0. ``sketch`` keeps a random projection
        of every step in place of its gradients.
    count : int
        The K of ``first:K`` and ``last:K`` (so many steps), ``every:K`` (steps 0, K, 2K, ...)
        and ``sketch:K`` (so many numbers a step).
    layers : tuple of str
        Globs; a parameter is kept when one of them matches its whole name.
    dtype : {"float32", "bfloat16", "float16"}
        Of the stored numbers; training computes float32 gradients.
    encoding : {"support", "dense"}
        Whether kernel taps that never get a gradient are left out.
    """

    steps: Literal["none", "all", "first", "last", "every", "sketch"]
    count: int = 1
    layers: tuple[str, ...] = ("*",)
    dtype: Dtype = "float32"
    encoding: Encoding = "support"

    @classmethod
    def parse(
        cls,
        text: str,
        layers: Sequence[str] = ("*",),
        dtype: Dtype = "float32",
        encoding: Encoding = "support",
    ) -> Self:
        """Read ``none``, ``all``, ``first:K``, ``last:K``, ``every:K`` or ``sketch:K``.

        Raises
        ------
        ValueError
            With the allowed forms, when `text` is none of them.
        """
        name, _, digits = text.partition(":")
        counted = name in ("first", "last", "every", "sketch")
        count = (parse_count(digits) or 0) if counted else 1
        most = LARGEST_SKETCH if name == "sketch" else math.inf
        if not 1 <= count <= most or not (counted or text in ("none", "all")):
            raise ValueError(_FORMS)
        return cls(
            steps=name,  # type: ignore[arg-type]
            count=count,
            layers=tuple(layers),
            dtype=dtype,
            encoding=encoding,
        )

    def __str__(self) -> str:
        return self.steps if self.steps in ("none", "all") else f"{self.steps}:{self.count}"

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients themselves are kept, rather than nothing or sketches of them."""
        return self.steps not in ("none", "sketch")

    def kept_steps(self, num_steps: int) -> range:
        """Give the kept steps among `num_steps` local steps of a round."""
        match self.steps:
            case "none":
                return range(0)
            case "first":
                return range(min(self.count, num_steps))
            case "last":
                return range(max(0, num_steps - self.count), num_steps)
            case "every":
                return range(0, num_steps, self.count)
            case "all" | "sketch":
                return range(num_steps)

    def layers_of(self, parameters: Iterable[str]) -> list[str]:
        """Select the kept parameter names, in the order given."""
        return [n for n in parameters if any(fnmatchcase(n, glob) for glob in self.layers)]
