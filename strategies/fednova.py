"""Federated averaging of deltas that are normalised by their clients' work."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from fedsim.core.aggregation import NormalisedMean, local_work
from fedsim.recording.rows import updates_of
from strategies.delta_fedavg import DeltaFedAvg
from strategies.folding import DeltaFold, RoundExporter, State


class FedNova(DeltaFedAvg):
    """FedNova (Wang et al. 2020): equal influence for samples, whatever the local steps.

    In plain averaging a client that makes more local steps pulls the model to its own optimum.
    Here each delta is divided by its client's work, and the mean multiplied by the mean work.
    Buffers are averaged as in `DeltaFedAvg`.

    Parameters
    ----------
    parameters : collection of str
        Names of the trainable parameters.
    momentum, nesterov : float, bool
        Of the clients' SGD. Their telemetry tells the updates made and ``learning_rate``.
    exporter : RoundExporter, optional
        Receives the artifacts of every round.
    **settings
        Those of Flower's FedAvg.
    """

    def __init__(
        self,
        parameters: Collection[str],
        *,
        momentum: float = 0.0,
        nesterov: bool = False,
        exporter: RoundExporter | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(exporter, **settings)
        self._trainable = frozenset(parameters)
        self._momentum = momentum
        self._nesterov = nesterov

    def _fold(self, server_round: int) -> DeltaFold:
        return _NormalisedFold(self, server_round)

    def work_of(self, row: Mapping[str, Any]) -> float:
        """Give the work that a client's telemetry tells of."""
        return local_work(
            updates_of(row),
            learning_rate=row["learning_rate"],
            momentum=self._momentum,
            nesterov=self._nesterov,
        )

    def bare(self, state: State) -> State:
        """Leave out the buffers."""
        return {name: array for name, array in state.items() if name in self._trainable}


class _NormalisedFold(DeltaFold):
    def __init__(self, strategy: FedNova, server_round: int) -> None:
        super().__init__(
            server_round, weighted_by_key=strategy.weighted_by_key, exporter=strategy.exporter
        )
        self._strategy = strategy
        self._normalised = NormalisedMean()

    def update(self, aggregate: State) -> State:
        return aggregate | self._normalised.mean()

    def _take(self, row: Mapping[str, Any], delta: State, weight: int) -> None:
        self._normalised.add(self._strategy.bare(delta), weight, self._strategy.work_of(row))
