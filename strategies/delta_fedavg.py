"""Federated averaging of sample-weighted deltas, one reply at a time, in a fixed order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedsim.core.aggregation import apply_delta
from strategies.folding import DeltaFold, RoundExporter, State, usable_replies


class DeltaFedAvg(FedAvg):
    """FedAvg (McMahan et al. 2017) over ``delta = local - global``.

    Equal to Flower's FedAvg up to rounding, but: replies are folded one by one and freed, so
    memory does not grow with the number of clients; the sum is float64 in a fixed order, so the
    result is the same to the bit however replies arrive; integer buffers keep their dtype; and
    every round is exported.

    Replies carry full weights and ``num-examples``, as for every Flower strategy. A generator
    of replies is folded as it comes, and whoever feeds it decides the order; a list, as
    ``Strategy.start`` gives it, is put into the fixed order first: most samples first, ties by
    partition id.

    Parameters
    ----------
    exporter : RoundExporter, optional
        Receives the artifacts of every round.
    **settings
        Those of Flower's FedAvg.
    """

    def __init__(self, exporter: RoundExporter | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.exporter = exporter
        self._reference: State = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Remember the global state that deltas are taken from, then do as FedAvg does."""
        self._reference = {name: array.numpy() for name, array in arrays.items()}
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies and move the global state by the mean delta.

        Returns
        -------
        tuple of (ArrayRecord, MetricRecord) or (None, None)
            The new global state and the sample-weighted mean of the clients' metrics; None
            where no reply had content.

        Raises
        ------
        ValueError
            When a client's arrays differ from the global ones in name, shape or dtype.
        """
        fold = self._fold(server_round)
        metrics: list[RecordDict] = []
        for reply in usable_replies(replies):
            fold.add(reply, self._reference)
            metrics.append(RecordDict({"metrics": reply.metrics}))
            # Still bound, it would live on while the next one is decoded.
            del reply
        if fold.is_empty:
            return None, None
        aggregate = fold.aggregate()
        state = apply_delta(self._reference, fold.update(aggregate))
        if self.exporter is not None:
            self.exporter.add_aggregate(server_round, aggregate)
            self.exporter.add_state(server_round, state)
        arrays = ArrayRecord({name: Array(np.asarray(a)) for name, a in state.items()})
        return arrays, self.train_metrics_aggr_fn(metrics, self.weighted_by_key)

    def _fold(self, server_round: int) -> DeltaFold:
        return DeltaFold(server_round, weighted_by_key=self.weighted_by_key, exporter=self.exporter)
