"""What server optimisers keep from round to round, and the step that follows from it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedsim.core.aggregation import Array, State
from fedsim.core.strategies import StrategySettings

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


def server_step(
    strategy: StrategySettings, parameters: State, kept: Mapping[str, State], round_number: int
) -> dict[str, Array]:
    """Move the parameters as Flower 1.41 does, operation by operation.

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
