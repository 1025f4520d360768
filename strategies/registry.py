"""The strategies by the name that the configuration gives them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedYogi,
    Strategy,
)

from fedsim.core.server_optimizer import SERVER_OPTIMIZERS
from strategies.delta_fedavg import DeltaFedAvg
from strategies.folding import RoundExporter
from strategies.recorded import Recorded

# The minimums are 1 because the round loop decides who takes part, not the strategy; clients
# evaluate nothing, because the global model is evaluated on the test split after the update.
_COMMON: dict[str, Any] = {
    "fraction_evaluate": 0.0,
    "min_train_nodes": 1,
    "min_available_nodes": 1,
}
_RECORDED: dict[str, Callable[..., FedAvg]] = {
    "fedavgm": FedAvgM,
    "fedadagrad": FedAdagrad,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
}

NAMES = ("delta-fedavg", *_RECORDED)


def build_strategy(name: str, exporter: RoundExporter, parameters: Collection[str]) -> Strategy:
    """Build a strategy that exports its rounds.

    Parameters
    ----------
    name : str
        One of `NAMES`.
    exporter : RoundExporter
        Receives the artifacts of every round.
    parameters : collection of str
        Names of the trainable parameters.
    """
    if name == "delta-fedavg":
        return DeltaFedAvg(exporter=exporter, **_COMMON)
    settings = SERVER_OPTIMIZERS[name].settings
    return Recorded(_RECORDED[name](**_COMMON, **settings), parameters, exporter)
