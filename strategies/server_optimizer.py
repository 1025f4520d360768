"""Flower's strategies that move the parameters by the mean of the clients' float32 weights.

The arithmetic is Flower's 1.41, operation by operation. A round uses it on the mean itself; a
proof has deltas, from which the mean follows as a `Range`, and uses it on the ends. Each operation
is monotone and rounded by itself, so the ends of a range go to the ends of the range of results.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedsim.core.aggregation import local_range
from fedsim.core.algorithm import (
    Algorithm,
    ArraySpec,
    Claim,
    Keeps,
    Moves,
    Outcome,
    Range,
    RecordedRound,
    Round,
    Unproven,
)
from fedsim.core.errors import InputError

Numbers = NDArray[Any]
Kept = Mapping[str, Numbers]
"""What is kept of one parameter, by kind."""


class MeanOfWeights(Algorithm):
    """The mean of the clients' weights, and what an optimizer of the server makes of it.

    Subclasses that keep something define `renewed`, and all that do not take the mean as it is
    define `moved`.
    """

    kinds: ClassVar[tuple[str, ...]] = ()
    """Arrays that are kept of each parameter, of its shape and dtype."""

    def renewed(self, kept: Kept, start: Numbers, mean: Numbers) -> dict[str, Numbers]:
        """Give what is kept of a parameter after a round.

        Parameters
        ----------
        kept : mapping of str to ndarray
            By kind, what was kept before; empty before the first round.
        start, mean : ndarray
            The parameter before the round, and the mean of what clients sent of it.
        """
        return {}

    def moved(self, start: Numbers, mean: Numbers, kept: Kept, number: int) -> Numbers:
        """Move a parameter.

        Parameters
        ----------
        start, mean : ndarray
            As for `renewed`; a strategy that keeps something goes by `kept`, not by `mean`.
        kept : mapping of str to ndarray
            What is kept of the parameter after the round.
        number : int
            The round, from 1.
        """
        return mean

    def renewed_range(self, kept: Kept, start: Numbers, mean: Range) -> dict[str, Range]:
        """Give what `renewed` may give where the mean is known as a range."""
        ends = [self.renewed(kept, start, end) for end in (mean.low, mean.high)]
        return {kind: Range.around([end[kind] for end in ends]) for kind in self._kinds}

    def keeps(self) -> dict[str, ArraySpec]:
        """Name ``KIND/PARAMETER`` for each kind and parameter."""
        return self.for_parameters(*self._kinds)

    @property
    def _kinds(self) -> tuple[str, ...]:
        return self.kinds

    @np.errstate(all="ignore")
    def fold(self, this_round: Round) -> Outcome:
        """Take the mean of all updates, which are held in memory until there are no more."""
        sent = [(update.sent, update.samples) for update in this_round.updates()]
        total = sum(samples for _, samples in sent)
        parameters: dict[str, Numbers] = {}
        kept: dict[str, dict[str, Numbers]] = {kind: {} for kind in self._kinds}
        for name, start in this_round.before.items():
            mean = weighted_mean([(arrays[name], samples) for arrays, samples in sent], total)
            renewed = self.renewed(self._of(this_round.kept, name), start, mean)
            for kind, array in renewed.items():
                kept[kind][name] = np.asarray(array)
            # A rate that numpy computed is a float64, and so is what it is multiplied with.
            parameters[name] = self.moved(start, mean, renewed, this_round.number)
        of_kinds = kept.items()
        return Outcome(
            parameters, {f"{kind}/{n}": a for kind, found in of_kinds for n, a in found.items()}
        )

    def check(self, this_round: RecordedRound) -> Iterator[Claim]:
        """Move the parameters by what is kept, and that by its recurrence over the deltas."""
        if self._kinds:
            for name, start in this_round.before.items():
                moved = self.moved(
                    start, start, self._of(this_round.kept_after, name), this_round.number
                )
                yield Moves(name, np.asarray(moved, dtype=start.dtype))
        if this_round.has_diverged:
            if self._kinds:
                reason = f"what {self.name} keeps is not followed from deltas that are not finite"
                yield Unproven("kept", reason)
            else:
                yield Unproven("parameters")
            return
        updates = list(this_round.updates())
        for name, start in this_round.before.items():
            mean = mean_range(updates, name, start)
            if not self._kinds:
                ends = [
                    self.moved(start, end, {}, this_round.number) for end in (mean.low, mean.high)
                ]
                yield Moves(name, Range.around(ends))
            found = self.renewed_range(self._of(this_round.kept, name), start, mean)
            for kind, expected in found.items():
                yield Keeps(f"{kind}/{name}", expected)

    def _of(self, kept: Mapping[str, Any], name: str) -> dict[str, Numbers]:
        keys = {kind: f"{kind}/{name}" for kind in self._kinds}
        return {kind: kept[key] for kind, key in keys.items() if key in kept}


class Moments(MeanOfWeights):
    """Adaptive optimizers of the server (Reddi et al. 2021), which keep two moments.

    Subclasses define `second`.
    """

    kinds = ("m", "v")

    def second(self, v: Numbers, square: Numbers) -> Numbers:
        """Renew the second moment by the square of the mean update."""
        raise NotImplementedError

    def turns(self, v: Numbers) -> list[Numbers]:
        """Give squares where `second` is not monotone."""
        return []

    def rate(self, number: int) -> Any:
        """Give the step size of a round."""
        return self.settings.eta

    def renewed(self, kept: Kept, start: Numbers, mean: Numbers) -> dict[str, Numbers]:
        """Renew both moments, which begin at zero."""
        m, v = self._before(kept, start)
        delta = mean - start
        return {"m": self._first(m, delta), "v": np.asarray(self.second(v, delta**2))}

    def renewed_range(self, kept: Kept, start: Numbers, mean: Range) -> dict[str, Range]:
        """Follow the second moment where it turns, too."""
        m, v = self._before(kept, start)
        ends = [mean.low - start, mean.high - start]
        least = np.clip(np.zeros_like(start), *ends)
        squares = Range.around([delta**2 for delta in (*ends, least)])
        turns = [np.clip(turn, squares.low, squares.high) for turn in self.turns(v)]
        points = [squares.low, squares.high, *turns]
        return {
            "m": Range.around([self._first(m, delta) for delta in ends]),
            "v": Range.around([self.second(v, square) for square in points]),
        }

    def _before(self, kept: Kept, start: Numbers) -> tuple[Numbers, Numbers]:
        zero = np.zeros_like(start)
        return kept.get("m", zero), kept.get("v", zero)

    def _first(self, m: Numbers, delta: Numbers) -> Numbers:
        beta_1 = getattr(self.settings, "beta_1", 0.0)
        return np.asarray(beta_1 * m + (1 - beta_1) * delta)

    def moved(self, start: Numbers, mean: Numbers, kept: Kept, number: int) -> Numbers:
        """Take a step of the first moment over the root of the second."""
        scale = np.sqrt(kept["v"]) + self.settings.tau
        return np.asarray(np.add(start, np.multiply(self.rate(number), kept["m"]) / scale))


def weighted_mean(sent: Iterable[tuple[Numbers, int]], total: int) -> Numbers:
    """Give the mean of arrays in their own dtype, in the order that they come in.

    Parameters
    ----------
    sent : iterable of (ndarray, int)
        What each client sent, and the samples it weighs.
    total : int
        All samples.
    """
    mean: Numbers | None = None
    for array, samples in sent:
        # A Python number, so that the product is of the array's own dtype.
        weighted = np.multiply(array, samples / total)
        mean = weighted if mean is None else mean + weighted
    if mean is None:
        raise ValueError("no client sent anything")
    return np.asarray(mean)


def mean_range(updates: list[Any], name: str, start: Numbers) -> Range:
    """Give what the mean of a parameter may be, by the deltas.

    Raises
    ------
    InputError
        When a delta is one that no client can have sent, or is not finite.
    """
    total = sum(update.samples for update in updates)
    ranges = []
    for update in updates:
        try:
            ranges.append((sent_by(update.delta[name], start), update.samples))
        except ValueError as error:
            raise InputError(f"{name} of client {update.client} {error}") from None
    low = weighted_mean([(sent.low, samples) for sent, samples in ranges], total)
    high = weighted_mean([(sent.high, samples) for sent, samples in ranges], total)
    return Range(low, high)


def sent_by(delta: Numbers, reference: Numbers) -> Range:
    """Give what a client may have sent, by its delta.

    Raises
    ------
    ValueError
        When nothing that it could have sent has that delta, or one is not finite.
    """
    if not (np.isfinite(delta).all() and np.isfinite(reference).all()):
        raise ValueError("is not finite")
    low, high = local_range(delta, reference)
    if not (low <= high).all():
        raise ValueError("is the difference of no two states")
    return Range(low, high)
