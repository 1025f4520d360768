"""Which gradients of a client's local steps are kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, Self


@dataclass(frozen=True, kw_only=True)
class CapturePolicy:
    """A choice of local steps and of parameters.

    Parameters
    ----------
    steps : {"none", "all", "first", "every"}
        Which steps of a client's round, counted from 0.
    count : int
        The K of ``first:K`` (the first K steps) and ``every:K`` (steps 0, K, 2K, ...).
    layers : tuple of str
        Globs; a parameter is kept when one of them matches its whole name.
    """

    steps: Literal["none", "all", "first", "every"]
    count: int = 1
    layers: tuple[str, ...] = ("*",)

    @classmethod
    def parse(cls, text: str, layers: Sequence[str] = ("*",)) -> Self:
        """Read ``none``, ``all``, ``first:K`` or ``every:K``.

        Raises
        ------
        ValueError
            With the allowed forms, when `text` is none of them.
        """
        name, _, count = text.partition(":")
        if text in ("none", "all"):
            return cls(steps=text, layers=tuple(layers))  # type: ignore[arg-type]
        if name in ("first", "every") and count.isdecimal() and int(count) >= 1:
            return cls(steps=name, count=int(count), layers=tuple(layers))  # type: ignore[arg-type]
        raise ValueError("none, all, first:K or every:K with a whole K of 1 or more")

    def keeps_step(self, step: int) -> bool:
        """Say whether local step `step` (from 0) of a round is kept."""
        match self.steps:
            case "none":
                return False
            case "all":
                return True
            case "first":
                return step < self.count
            case "every":
                return step % self.count == 0

    def count_of(self, num_steps: int) -> int:
        """Count the kept steps among `num_steps` local steps."""
        match self.steps:
            case "none":
                return 0
            case "all":
                return num_steps
            case "first":
                return min(self.count, num_steps)
            case "every":
                return -(-num_steps // self.count)

    def layers_of(self, parameters: Iterable[str]) -> list[str]:
        """Select the kept parameter names, in the order given."""
        return [n for n in parameters if any(fnmatchcase(n, glob) for glob in self.layers)]
