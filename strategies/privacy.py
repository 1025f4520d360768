"""Differential privacy around a strategy: what it keeps, and what can be proven with it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from fedsim.core.algorithm import (
    Algorithm,
    ArraySpec,
    Claim,
    Keeps,
    RecordedRound,
    Unproven,
)
from fedsim.core.rng import Purpose, generator

CLIPPING_NORM = "clipping-norm"
"""Key of the one number that adaptive clipping keeps from round to round, float64."""
_NORM_ROUNDING = 1e-5
"""Of the float32 norm of an update, relative to it."""


class Private(Algorithm):
    """Another algorithm, whose updates are clipped and whose parameters get noise.

    Parameters
    ----------
    inner : Algorithm
        The other, with ``dp`` in its settings.
    """

    def __init__(self, inner: Algorithm) -> None:
        super().__init__(inner.settings, inner.setup)
        self.inner = inner

    @property
    def proximal_mu(self) -> float:
        """As without privacy."""
        return self.inner.proximal_mu

    @property
    def _is_adaptive(self) -> bool:
        return str(self.settings.dp).endswith("-adaptive")

    def keeps(self) -> dict[str, ArraySpec]:
        """Add the norm to what is kept, where it adapts."""
        norm = {CLIPPING_NORM: ArraySpec((), "float64")} if self._is_adaptive else {}
        return self.inner.keeps() | norm

    def check(self, this_round: RecordedRound) -> Iterator[Claim]:
        """Follow the norm; the updates are not recorded as they were clipped."""
        yield Unproven("parameters")
        if self.inner.keeps():
            yield Unproven(
                "kept",
                f"with dp = {self.settings.dp!r}, what {self.settings.name} keeps follows from "
                "updates that are not recorded as they were clipped",
            )
        if self._is_adaptive:
            yield Keeps(CLIPPING_NORM, self._norm(this_round))

    def _norm(self, this_round: RecordedRound) -> np.ndarray:
        """Give the norm on record where it may be that, else the nearest that may."""
        before = self.settings.clipping_norm or 0.0
        if CLIPPING_NORM in this_round.kept:
            before = float(this_round.kept[CLIPPING_NORM])
        lengths = [
            math.sqrt(sum(float((a.astype(np.float64) ** 2).sum()) for a in update.delta.values()))
            for update in this_round.updates()
        ]
        norms = clipping_norms_after(
            before,
            noise_multiplier=self.settings.noise_multiplier or 0.0,
            sampled=self.setup.participants,
            told=len(lengths),
            seed=self.setup.seed,
            round_number=this_round.number,
        )
        # Clients that clip are at the norm afterwards: any of those may have been above it.
        most = sum(length > before * (1 - _NORM_ROUNDING) for length in lengths)
        least = sum(length > before * (1 + _NORM_ROUNDING) for length in lengths)
        found = np.asarray(this_round.kept_after[CLIPPING_NORM])
        nearest = min(norms[least : most + 1], key=lambda norm: abs(norm - float(found)))
        is_near = abs(float(found) - nearest) <= 4 * np.finfo(np.float64).eps * nearest
        return found if is_near else np.asarray(nearest, np.float64)


def clipping_norms_after(
    norm: float, *, noise_multiplier: float, sampled: int, told: int, seed: int, round_number: int
) -> list[float]:
    """Give what an adaptive clipping norm may be after a round, by how many updates were clipped.

    Andrew et al. 2021, section 2.1, with the median as the quantile and a rate of 0.2.

    Parameters
    ----------
    norm : float
        Before the round.
    noise_multiplier : float
        Of the configuration; where it is 0, the count is not disturbed either.
    sampled, told : int
        Participants that were asked for in a round, and updates that came.
    seed, round_number : int
        From which the noise of the count is drawn.

    Returns
    -------
    list of float
        For 0, 1, ... `told` clipped updates.
    """
    deviation = sampled / 20 if noise_multiplier > 0 else 0.0
    norms = []
    for clipped in range(told + 1):
        # As `global_seed` seeds it, afresh each time: the noise is the first that is drawn.
        draw = np.random.RandomState(
            int(generator(seed, Purpose.NOISE, round_number).integers(2**32))
        )
        share = float(draw.normal(clipped, deviation)) / float(told)
        norms.append(norm * math.exp(-0.2 * ((1.0 - share) - 0.5)))
    return norms
