"""Federated averaging of sample-weighted deltas, one reply at a time, in a fixed order."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray

from fedsim.core.aggregation import DeltaMean, apply_delta, delta_of

State = dict[str, NDArray[np.generic]]


class RoundExporter(Protocol):
    """Where a strategy leaves the artifacts of a round."""

    def add_client(self, row: Mapping[str, Any], delta: State) -> None:
        """Take one client's telemetry and delta."""

    def add_aggregate(self, round_number: int, aggregate: State) -> None:
        """Take the sample-weighted mean delta."""

    def add_state(self, round_number: int, state: State) -> None:
        """Take the new global state."""


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
        self._exporter = exporter
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
        if isinstance(replies, list):
            replies = sorted((r for r in replies if not r.has_error()), key=_fold_key)
        mean = DeltaMean()
        metrics: list[RecordDict] = []
        for reply in replies:
            if reply.has_error():
                continue
            self._fold(server_round, reply, mean)
            metrics.append(RecordDict({"metrics": _metrics_of(reply)}))
            # The next reply is decoded before this name is bound again.
            del reply
        if mean.weight == 0:
            return None, None
        aggregate = mean.mean()
        state = apply_delta(self._reference, aggregate)
        if self._exporter is not None:
            self._exporter.add_aggregate(server_round, aggregate)
            self._exporter.add_state(server_round, state)
        arrays = ArrayRecord({name: Array(np.asarray(a)) for name, a in state.items()})
        return arrays, self.train_metrics_aggr_fn(metrics, self.weighted_by_key)

    def _fold(self, server_round: int, reply: Message, mean: DeltaMean) -> None:
        row = telemetry_of(reply)
        record = next(iter(reply.content.array_records.values()))
        try:
            delta = delta_of({n: view_of(a) for n, a in record.items()}, self._reference)
        except ValueError as error:
            raise ValueError(f"client {row.get('partition', '?')} returned {error}") from None
        weight = _metrics_of(reply)[self.weighted_by_key]
        if not isinstance(weight, int):
            raise ValueError(f"{self.weighted_by_key} is {weight!r}; a whole number is needed")
        mean.add(delta, weight)
        if self._exporter is not None:
            self._exporter.add_client({"round": server_round, **row}, delta)


def telemetry_of(reply: Message) -> dict[str, Any]:
    """Read the telemetry that a fedsim client attaches to its reply; empty for other clients."""
    record = reply.content.config_records.get("telemetry")
    return {} if record is None else json.loads(str(record["json"]))


def view_of(array: Array) -> NDArray[np.generic]:
    """Decode an array of a message without copying it: a read-only view of its bytes.

    Flower serialises with ``numpy.save`` and its own decoding copies twice, which for every
    reply is twice the model.
    """
    if array.stype != "numpy.ndarray":
        return array.numpy()
    stream = io.BytesIO(array.data)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        return array.numpy()
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    flat: NDArray[np.generic] = np.frombuffer(array.data, dtype=dtype, offset=stream.tell())
    return flat.reshape(shape, order="F" if fortran else "C")


def _metrics_of(reply: Message) -> MetricRecord:
    return next(iter(reply.content.metric_records.values()))


def _fold_key(reply: Message) -> tuple[float, int]:
    weight = _metrics_of(reply)["num-examples"]
    partition = telemetry_of(reply).get("partition", reply.metadata.src_node_id)
    return (-float(weight) if isinstance(weight, int | float) else 0.0, int(partition))
