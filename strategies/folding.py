"""Folding the replies of a round: order, deltas, their mean, and the exports on the way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from flwr.app import Message
from numpy.typing import NDArray

from fedsim.core.aggregation import DeltaMean, delta_of
from fedsim.flower import messages as wire
from fedsim.flower.messages import Reply

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


@dataclass
class Taken:
    """One reply, folded into the mean.

    Parameters
    ----------
    row : dict
        The client's telemetry; empty for clients that send none.
    delta : dict of str to ndarray
        Local minus global state.
    weight : int
        The client's weight.
    """

    row: dict[str, Any]
    delta: State
    weight: int


class DeltaFold:
    """Folds replies into the sample-weighted mean delta, one by one, and exports each.

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

    def take(self, reply: Reply, reference: State) -> Taken:
        """Fold one reply.

        Parameters
        ----------
        reply : Reply
            With the local state.
        reference : dict of str to ndarray
            The global state that the client started from.

        Raises
        ------
        ValueError
            When its arrays differ from the global ones in name, shape or dtype, or its weight is
            no whole number.
        """
        row = reply.telemetry
        try:
            delta = delta_of(reply.state, reference)
        except ValueError as error:
            raise ValueError(f"client {row.get('partition', '?')} returned {error}") from None
        weight = reply.metrics[self._weighted_by_key]
        if not isinstance(weight, int):
            raise ValueError(f"{self._weighted_by_key} is {weight!r}; a whole number is needed")
        self._mean.add(delta, weight)
        return Taken(row, delta, weight)

    def export(self, taken: Taken) -> None:
        """Hand on what a client sent."""
        if self._exporter is not None:
            self._exporter.add_client({"round": self._round, **taken.row}, taken.delta)

    def mean(self) -> State:
        """Give the mean delta."""
        return self._mean.mean()


def usable_replies(replies: Iterable[Message]) -> Iterator[Reply]:
    """Yield the replies that have content, decoded; none of them is held on to.

    A generator's come in its own order. A list, as ``Strategy.start`` gives it, is put into the
    fixed order: most samples first, ties by client.
    """
    if isinstance(replies, list):
        decoded = [Reply.of(reply) for reply in replies if not reply.has_error()]
        decoded.sort(key=_fold_key)
        replies = decoded
    for reply in replies:
        if not reply.has_error():
            yield Reply.of(reply)
        # The next reply is decoded before this name is bound again.
        del reply


def _fold_key(reply: Reply) -> tuple[float, int]:
    weight = reply.metrics[wire.NUM_EXAMPLES]
    partition = reply.telemetry.get("partition", reply.metadata.src_node_id)
    return (-float(weight) if isinstance(weight, int | float) else 0.0, int(partition))
