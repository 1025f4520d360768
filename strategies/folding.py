"""Folding the replies of a round: order, deltas, their mean, and the exports on the way."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from flwr.app import Array, Message, MetricRecord
from numpy.typing import NDArray

from fedsim.core.aggregation import DeltaMean, delta_of

State = dict[str, NDArray[np.generic]]


class RoundExporter(Protocol):
    """Where a strategy leaves the artifacts of a round."""

    def add_client(self, row: Mapping[str, Any], delta: State) -> None:
        """Take one client's telemetry and delta."""

    def add_aggregate(self, round_number: int, aggregate: State) -> None:
        """Take the sample-weighted mean delta."""

    def add_state(self, round_number: int, state: State) -> None:
        """Take the new global state."""

    def add_control(self, round_number: int, partition: int, arrays: State) -> None:
        """Take what the strategy keeps for a client's next round."""

    def control(self, partition: int) -> State:
        """Give it back; empty before there is any."""

    def add_strategy_state(self, round_number: int, arrays: State) -> None:
        """Take what the strategy keeps for the next round."""


class DeltaFold:
    """Folds replies into the sample-weighted mean delta, one by one, exporting each.

    Parameters
    ----------
    server_round : int
        The round.
    weighted_by_key : str
        The metric that is a client's weight.
    exporter : RoundExporter, optional
        Receives every client's telemetry and delta.
    """

    def __init__(
        self,
        server_round: int,
        *,
        weighted_by_key: str,
        exporter: RoundExporter | None,
    ) -> None:
        self._round = server_round
        self._weighted_by_key = weighted_by_key
        self._exporter = exporter
        self._mean = DeltaMean()

    @property
    def is_empty(self) -> bool:
        """Whether no reply was folded yet."""
        return self._mean.weight == 0

    def add(self, reply: Message, reference: State) -> None:
        """Fold one reply.

        Parameters
        ----------
        reply : Message
            With the local state.
        reference : dict of str to ndarray
            The global state that the client started from.

        Raises
        ------
        ValueError
            When its arrays differ from the global ones in name, shape or dtype, or its weight is
            no whole number.
        """
        row = telemetry_of(reply)
        record = next(iter(reply.content.array_records.values()))
        try:
            delta = delta_of({n: view_of(a) for n, a in record.items()}, reference)
        except ValueError as error:
            raise ValueError(f"client {row.get('partition', '?')} returned {error}") from None
        weight = metrics_of(reply)[self._weighted_by_key]
        if not isinstance(weight, int):
            raise ValueError(f"{self._weighted_by_key} is {weight!r}; a whole number is needed")
        self._mean.add(delta, weight)
        self._take(row, delta, weight)
        if self._exporter is not None:
            self._exporter.add_client({"round": self._round, **row}, delta)

    def aggregate(self) -> State:
        """Give the mean delta."""
        return self._mean.mean()

    def update(self, aggregate: State) -> State:
        """Give what is added to the global state: the mean delta."""
        return aggregate

    def _take(self, row: Mapping[str, Any], delta: State, weight: int) -> None:
        """Look at a delta that was folded, and at its client's telemetry."""


def usable_replies(replies: Iterable[Message]) -> Iterator[Message]:
    """Yield the replies that have content, none of which is held on to.

    A generator's come as they come: whoever feeds it decides the order. A list, as
    ``Strategy.start`` gives it, is put into the fixed order: most samples first, ties by
    partition id.
    """
    if isinstance(replies, list):
        replies = sorted((r for r in replies if not r.has_error()), key=_fold_key)
    for reply in replies:
        if not reply.has_error():
            yield reply
        # The next reply is decoded before this name is bound again.
        del reply


MOST_TELEMETRY = 8 * 2**20
"""Of a client's telemetry, as text and as a line of ``clients.jsonl``: 300,000 local steps."""


def telemetry_of(reply: Message) -> dict[str, Any]:
    """Read the telemetry that a fedsim client attaches to its reply; empty for other clients.

    Raises
    ------
    ValueError
        When it has more than `MOST_TELEMETRY` characters, or is not JSON.
    """
    record = reply.content.config_records.get("telemetry")
    if record is None:
        return {}
    text = str(record["json"])
    if len(text) > MOST_TELEMETRY:
        raise ValueError(
            f"telemetry of {len(text):,} characters; expected at most {MOST_TELEMETRY:,}"
        )
    row: dict[str, Any] = json.loads(text)
    return row


def metrics_of(reply: Message) -> MetricRecord:
    """Give the one record of metrics of a reply."""
    return next(iter(reply.content.metric_records.values()))


def view_of(array: Array) -> NDArray[np.generic]:
    """Decode an array of a message without copying it: a read-only view of its bytes.

    Flower serialises with ``numpy.save`` and its own decoding copies twice, which for every
    reply is twice the model.
    """
    if array.stype != "numpy.ndarray":
        return array.numpy()
    header, data = array.data[:10], array.data
    if header[:8] != _NPY_1_0:
        return array.numpy()
    start = 10 + int.from_bytes(header[8:], "little")
    shape, fortran, dtype = _described(data[:start])
    flat: NDArray[np.generic] = np.frombuffer(data, dtype=dtype, offset=start)
    return flat.reshape(shape, order="F" if fortran else "C")


_NPY_1_0 = np.lib.format.magic(1, 0)


# A model has few shapes, and every reply the same ones: to parse one takes longer than its bytes.
@functools.lru_cache(maxsize=1024)
def _described(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    stream = io.BytesIO(header[len(_NPY_1_0) :])
    return np.lib.format.read_array_header_1_0(stream)


def _fold_key(reply: Message) -> tuple[float, int]:
    weight = metrics_of(reply)["num-examples"]
    partition = telemetry_of(reply).get("partition", reply.metadata.src_node_id)
    return (-float(weight) if isinstance(weight, int | float) else 0.0, int(partition))
