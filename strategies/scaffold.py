"""Federated averaging with control variates against the drift of the clients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord
from numpy.typing import NDArray

from fedsim.core.aggregation import ControlMean, correction_of, local_work
from fedsim.recording.layout import strategy_key
from fedsim.recording.rows import updates_of
from strategies.delta_fedavg import DeltaFedAvg
from strategies.folding import DeltaFold, RoundExporter, State

_CONTROL = "control"


class Scaffold(DeltaFedAvg):
    """SCAFFOLD (Karimireddy et al. 2020, alg. 1, option II).

    A client adds ``c - c_i`` to every gradient: the mean direction of all clients less its own.
    After a round ``c_i`` is renewed by what the client did, ``c_i - c - delta / work``, which
    follows from its delta: only the correction travels beside the model. The exporter keeps every
    client's ``c_i``. The parameters move by the plain mean of the deltas, all participants alike,
    times the server's rate. Buffers are averaged as in `DeltaFedAvg`.

    Parameters
    ----------
    parameters : mapping of str to tuple of int
        Shapes of the trainable parameters, float32.
    exporter : RoundExporter
        Receives the artifacts of every round, and keeps the clients' control variates.
    clients : int
        How many there are, taking part or not.
    server_learning_rate : float
        Of the server.
    momentum, nesterov : float, bool
        Of the clients' SGD. Their telemetry tells the updates made and ``learning_rate``.
    **settings
        Those of Flower's FedAvg.
    """

    def __init__(
        self,
        parameters: Mapping[str, tuple[int, ...]],
        exporter: RoundExporter,
        *,
        clients: int,
        server_learning_rate: float = 1.0,
        momentum: float = 0.0,
        nesterov: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(exporter, **settings)
        self._trainable = frozenset(parameters)
        self._controls = exporter
        self._clients = clients
        self._rate = server_learning_rate
        self._momentum = momentum
        self._nesterov = nesterov
        self._control: dict[str, NDArray[np.generic]] = {
            name: np.zeros(shape, np.float32) for name, shape in parameters.items()
        }

    def correction(self, partition: int) -> State:
        """Give what a client adds to the gradients of its next round."""
        return correction_of(self._control, self._controls.control(partition))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies, move the state and renew the control variates."""
        arrays, metrics = super().aggregate_train(server_round, replies)
        if arrays is not None:
            self._control = self._mean.control()
            self._controls.add_strategy_state(server_round, self.state_arrays())
        return arrays, metrics

    def state_arrays(self) -> State:
        """Give the server's control variate, keyed ``control/<parameter>``."""
        return {strategy_key(_CONTROL, name): array for name, array in self._control.items()}

    def load_state_arrays(self, arrays: State) -> None:
        """Go on from what `state_arrays` gave, or from zero; the clients' are with the exporter."""
        self._control |= {key.partition("/")[2]: array for key, array in arrays.items()}

    def fold_client(self, row: Mapping[str, Any], delta: State) -> None:
        """Take one client of the round into the mean, and renew its control variate."""
        work = local_work(
            updates_of(row),
            learning_rate=row["learning_rate"],
            momentum=self._momentum,
            nesterov=self._nesterov,
        )
        partition = row["partition"]
        renewed = self._mean.add(self._bare(delta), self._controls.control(partition), work)
        self._controls.add_control(self._round, partition, renewed)

    def update(self) -> State:
        """Give what is added to the parameters."""
        return self._mean.update(self._rate)

    def _fold(self, server_round: int) -> DeltaFold:
        self._round = server_round
        self._mean = ControlMean(self._control, self._clients)
        return _ControlFold(self, server_round)

    def _bare(self, state: State) -> State:
        return {name: array for name, array in state.items() if name in self._trainable}


class _ControlFold(DeltaFold):
    def __init__(self, strategy: Scaffold, server_round: int) -> None:
        super().__init__(
            server_round, weighted_by_key=strategy.weighted_by_key, exporter=strategy.exporter
        )
        self._strategy = strategy

    def update(self, aggregate: State) -> State:
        return aggregate | self._strategy.update()

    def _take(self, row: Mapping[str, Any], delta: State, weight: int) -> None:
        self._strategy.fold_client(row, delta)
