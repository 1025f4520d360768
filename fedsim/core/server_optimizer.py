"""What server optimisers keep from round to round, and the step that follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedsim.core.aggregation import Array, State


@dataclass(frozen=True)
class ServerOptimizer:
    """A strategy that moves the parameters by an optimiser's step.

    Parameters
    ----------
    keeps : tuple of str
        Names of the arrays that it keeps for each parameter, of the parameter's shape and dtype.
    settings : mapping of str to float
        Keywords of Flower's strategy of that name.
    """

    keeps: tuple[str, ...]
    settings: Mapping[str, float]


SERVER_OPTIMIZERS: dict[str, ServerOptimizer] = {
    # With Flower's own momentum of 0 it would be plain averaging.
    "fedavgm": ServerOptimizer(
        ("momentum",), {"server_learning_rate": 1.0, "server_momentum": 0.9}
    ),
    "fedadagrad": ServerOptimizer(("m", "v"), {"eta": 0.1, "tau": 1e-3}),
    "fedadam": ServerOptimizer(
        ("m", "v"), {"eta": 0.1, "beta_1": 0.9, "beta_2": 0.99, "tau": 1e-3}
    ),
    "fedyogi": ServerOptimizer(
        ("m", "v"), {"eta": 0.01, "beta_1": 0.9, "beta_2": 0.99, "tau": 1e-3}
    ),
}
"""By the name of the strategy; FedAvgM: Hsu et al. 2019, the others: Reddi et al. 2021."""


def server_step(
    strategy: str, parameters: State, kept: Mapping[str, State], round_number: int
) -> dict[str, Array]:
    """Move the parameters as Flower 1.41 does, operation by operation.

    Parameters
    ----------
    strategy : str
        One of `SERVER_OPTIMIZERS`.
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
    settings = SERVER_OPTIMIZERS[strategy].settings
    if strategy == "fedavgm":
        rate, momentum = settings["server_learning_rate"], kept["momentum"]
        return {n: _rounded(p - np.multiply(rate, momentum[n]), p) for n, p in parameters.items()}
    rate, tau, m, v = settings["eta"], settings["tau"], kept["m"], kept["v"]
    if strategy == "fedadam":
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
