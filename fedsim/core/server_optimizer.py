"""What server optimisers keep from round to round, and the step that follows from it.

The arithmetic is Flower's 1.41, operation by operation. Each operation of it is monotone and
rounded by itself, so the ends of a range go through it to the ends of the range of its results.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.core.aggregation import Array, State, local_range
from fedsim.core.rng import Purpose, generator
from fedsim.core.strategies import StrategySettings

Numbers = NDArray[Any]

KEEPS: dict[str, tuple[str, ...]] = {
    "fedavgm": ("momentum",),
    "fedadagrad": ("m", "v"),
    "fedadam": ("m", "v"),
    "fedyogi": ("m", "v"),
}
"""Names of the arrays that a strategy keeps for each parameter, of its shape and dtype.

FedAvgM: Hsu et al. 2019, the others: Reddi et al. 2021.
"""


def kept_by(strategy: StrategySettings) -> tuple[str, ...]:
    """Give those names for a strategy as it is set: FedAvgM without momentum keeps nothing."""
    if strategy.name == "fedavgm" and not strategy.own["server_momentum"]:
        return ()
    return KEEPS.get(strategy.name, ())


@dataclass(frozen=True)
class Range:
    """All that an array may be: from one to another in each entry.

    Parameters
    ----------
    low, high : ndarray
        Of one shape and dtype.
    """

    low: Numbers
    high: Numbers

    def holds(self, array: Numbers) -> bool:
        """Say whether an array is in the range."""
        return bool(((self.low <= array) & (array <= self.high)).all())

    @property
    def is_one(self) -> bool:
        """Whether there is only one such array, but for the signs of zeros."""
        return bool((self.low == self.high).all())


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


def mean_weights(sent: Iterable[tuple[Range, int]], total: int) -> Range:
    """Give the mean of what clients sent, in float32 and in the order of folding.

    Parameters
    ----------
    sent : iterable of (Range, int)
        What each sent, and the samples it weighs.
    total : int
        All samples.
    """
    low: Numbers | None = None
    for array, samples in sent:
        # A Python number, so that the product is of the array's own dtype.
        weight = samples / total
        if low is None:
            low, high = np.multiply(array.low, weight), np.multiply(array.high, weight)
        else:
            low, high = low + array.low * weight, high + array.high * weight
    if low is None:
        raise ValueError("no client sent anything")
    return Range(np.asarray(low), np.asarray(high))


def kept_after(
    strategy: StrategySettings, kept: Mapping[str, Numbers], parameter: Numbers, mean: Range
) -> dict[str, Range]:
    """Give what is kept of a parameter after a round.

    Parameters
    ----------
    strategy : StrategySettings
        One that keeps something.
    kept : mapping of str to ndarray
        What was kept before; empty before the first round.
    parameter : ndarray
        Before the round.
    mean : Range
        The mean of what the clients sent.
    """
    settings = strategy.own
    if strategy.name == "fedavgm":
        low, high = parameter - mean.high, parameter - mean.low
        if kept:
            decayed = settings["server_momentum"] * kept["momentum"]
            low, high = decayed + low, decayed + high
        return {"momentum": Range(np.asarray(low), np.asarray(high))}
    low, high = mean.low - parameter, mean.high - parameter
    zero = np.zeros_like(parameter)
    m, v = kept.get("m", zero), kept.get("v", zero)
    beta_1 = settings.get("beta_1", 0.0)
    decayed = beta_1 * m
    first = Range(
        np.asarray(decayed + (1 - beta_1) * low), np.asarray(decayed + (1 - beta_1) * high)
    )
    least = np.where(np.sign(low) * np.sign(high) < 0, zero, np.minimum(low**2, high**2))
    squares = Range(np.asarray(least, parameter.dtype), np.asarray(np.maximum(low**2, high**2)))
    return {"m": first, "v": _second_moment(strategy, v, squares)}


def _second_moment(strategy: StrategySettings, v: Numbers, squares: Range) -> Range:
    low, high = squares.low, squares.high
    if strategy.name == "fedadagrad":
        return Range(np.asarray(v + low), np.asarray(v + high))
    beta_2 = strategy.own["beta_2"]
    if strategy.name == "fedadam":
        decayed = beta_2 * v
        return Range(
            np.asarray(decayed + (1 - beta_2) * low), np.asarray(decayed + (1 - beta_2) * high)
        )

    def moved(square: Numbers) -> Numbers:
        return np.asarray(v - (1.0 - beta_2) * square * np.sign(v - square))

    # Down to where the square is what was kept, and up from there with a jump.
    inside = (low <= v) & (v <= high)
    ends = [moved(low), moved(high), np.where(inside, v, moved(low))]
    ends.append(np.where(inside & (low < v), v - (1.0 - beta_2) * v, moved(low)))
    return Range(np.minimum.reduce(ends), np.maximum.reduce(ends))


def moved_to(strategy: StrategySettings, parameter: Numbers, mean: Range) -> Range | None:
    """Give where a round without anything kept moves a parameter; None where that is not known."""
    if strategy.name in ("fedavg", "fedprox"):
        return mean
    if strategy.name != "fedavgm" or kept_by(strategy):
        return None
    rate = strategy.own["server_learning_rate"]
    if rate == 1:
        return mean
    ends = [np.asarray(parameter - rate * (parameter - end)) for end in (mean.low, mean.high)]
    return Range(*ends)


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
        # As `global_seed` seeds it, anew each time: the noise is the first that is drawn.
        draw = np.random.RandomState(
            int(generator(seed, Purpose.NOISE, round_number).integers(2**32))
        )
        share = float(draw.normal(clipped, deviation)) / float(told)
        norms.append(norm * math.exp(-0.2 * ((1.0 - share) - 0.5)))
    return norms


def server_step(
    strategy: StrategySettings, parameters: State, kept: Mapping[str, State], round_number: int
) -> dict[str, Array]:
    """Move the parameters.

    Parameters
    ----------
    strategy : StrategySettings
        One that keeps something.
    parameters : mapping of str to ndarray
        Before the round.
    kept : mapping of str to mapping
        What the optimiser keeps *after* the round: ``momentum``, or ``m`` and ``v``; each maps
        the names of the parameters to arrays.
    round_number : int
        From 1.

    Returns
    -------
    dict of str to ndarray
        After the round, each in its own dtype.
    """
    settings = strategy.own
    if strategy.name == "fedavgm":
        rate, momentum = settings["server_learning_rate"], kept["momentum"]
        return {n: _rounded(p - np.multiply(rate, momentum[n]), p) for n, p in parameters.items()}
    rate, tau, m, v = settings["eta"], settings["tau"], kept["m"], kept["v"]
    if strategy.name == "fedadam":
        beta_1, beta_2 = settings["beta_1"], settings["beta_2"]
        rate = (
            rate
            * np.sqrt(1 - np.power(beta_2, round_number + 1.0))
            / (1 - np.power(beta_1, round_number + 1.0))
        )
    return {
        n: _rounded(np.add(p, np.multiply(rate, m[n]) / (np.sqrt(v[n]) + tau)), p)
        for n, p in parameters.items()
    }


def _rounded(moved: Array, before: Array) -> Array:
    # A rate that numpy computed is a float64, and so is what it is multiplied with.
    return np.asarray(moved, dtype=before.dtype)
