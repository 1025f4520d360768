"""The strategies by the name that the configuration gives them."""

from __future__ import annotations

from collections.abc import Callable

from flwr.serverapp.strategy import Strategy

from strategies.delta_fedavg import DeltaFedAvg, RoundExporter

# The minimums are 1 because the round loop decides who takes part, not the strategy; clients
# evaluate nothing, because the global model is evaluated on the test split after the update.
_BUILDERS: dict[str, Callable[[RoundExporter], Strategy]] = {
    "delta-fedavg": lambda exporter: DeltaFedAvg(
        exporter=exporter,
        fraction_evaluate=0.0,
        min_train_nodes=1,
        min_available_nodes=1,
    ),
}

NAMES = tuple(_BUILDERS)


def build_strategy(name: str, exporter: RoundExporter) -> Strategy:
    """Build a strategy that exports its rounds.

    Parameters
    ----------
    name : str
        One of `NAMES`.
    exporter : RoundExporter
        Receives the artifacts of every round.
    """
    return _BUILDERS[name](exporter)
