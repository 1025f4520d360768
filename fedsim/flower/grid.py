"""Sending messages through a bounded window, and a grid that shows chosen nodes only."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

from flwr.app import ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedsim.core.errors import RunFailedError, RunInterruptedError
from fedsim.flower import messages as wire
from fedsim.flower.replies import traceback_of

_SHORTEST_POLL = 0.005
_LONGEST_POLL = 0.1


def stream_replies(
    grid: Grid,
    messages: Sequence[Message],
    *,
    window: int,
    stop: threading.Event,
    patience: float | None = None,
) -> Iterator[Message]:
    """Send messages and yield their replies in the order of the messages.

    At most `window` messages are under way or answered and not yet taken, so memory does not
    grow with their number.

    Parameters
    ----------
    grid : Grid
        Any of Flower's grids.
    messages : sequence of Message
        One for each client; sent in this order.
    window : int
        1 or more; twice the number of workers keeps them busy past one slow client.
    stop : threading.Event
        Set by whoever wants the run to end.
    patience : float, optional
        Seconds without any reply after which there will be none.

    Raises
    ------
    RunInterruptedError
        Once `stop` is set.
    RunFailedError
        When Flower refuses a message, or no reply came in time.
    """
    waiting: dict[str, int] = {}
    arrived: dict[int, Message] = {}
    sent = 0
    last = time.monotonic()
    for position in range(len(messages)):
        pause = _SHORTEST_POLL
        while True:
            while sent < min(len(messages), position + window):
                waiting[_push(grid, messages[sent])] = sent
                sent += 1
            if position in arrived:
                break
            # One at a time: a pull holds everything it returns in memory at once.
            for message_id in list(waiting):
                for reply in grid.pull_messages([message_id]):
                    arrived[waiting.pop(message_id)] = reply
                    pause, last = _SHORTEST_POLL, time.monotonic()
            if position not in arrived:
                if stop.wait(pause):
                    raise RunInterruptedError("interrupted")
                if patience is not None and time.monotonic() - last > patience:
                    raise RunFailedError(f"no client has answered for {patience:.0f} s")
                pause = min(pause * 1.5, _LONGEST_POLL)
        yield arrived.pop(position)
        last = time.monotonic()


def _push(grid: Grid, message: Message) -> str:
    message_id = next(iter(grid.push_messages([message])), None)
    if message_id is None:
        raise RunFailedError(f"Flower took no message for node {message.metadata.dst_node_id}")
    return message_id


class GridBehind(Grid):
    """A grid that leaves everything to another one.

    Parameters
    ----------
    grid : Grid
        The grid behind it.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def get_node_ids(self) -> Iterable[int]:
        """Give the nodes of the grid behind."""
        return self._grid.get_node_ids()

    def set_run(self, run: Run) -> None:
        """Do nothing: the grid behind has its run."""

    @property
    def run(self) -> Run:
        """The run of the grid behind."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make a message with the grid behind."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push with the grid behind."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull with the grid behind."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send and receive with the grid behind."""
        return self._grid.send_and_receive(messages, timeout=timeout)


class ChosenNodes(GridBehind):
    """A grid on which a strategy sees the chosen nodes only, so that its sampling takes all.

    Parameters
    ----------
    grid : Grid
        The grid behind it.
    node_ids : sequence of int
        The nodes to show.
    """

    def __init__(self, grid: Grid, node_ids: Sequence[int]) -> None:
        super().__init__(grid)
        self._node_ids = list(node_ids)

    def get_node_ids(self) -> Iterable[int]:
        """Give the chosen nodes."""
        return list(self._node_ids)


@runtime_checkable
class KnowsPartitions(Protocol):
    """A grid that knows which node holds which partition without asking the nodes."""

    def nodes_by_partition(self, stop: threading.Event) -> Mapping[int, int]:
        """Wait until there are nodes; give them by the partition that each holds."""


def map_partitions(
    grid: Grid, *, clients: int, window: int, stop: threading.Event, patience: float = 60.0
) -> dict[int, int]:
    """Learn which node holds which partition, once all of them are there.

    Node ids are random in every run and never leave this map. Each node is asked what it holds;
    where the grid knows, only as many as there is a window for. They are asked so that every worker
    is up before anyone's time counts.

    Parameters
    ----------
    grid : Grid
        Any of Flower's grids.
    clients : int
        Partitions that must be held, 0 to `clients` - 1.
    window : int
        As in `stream_replies`.
    stop : threading.Event
        Set by whoever wants the run to end.
    patience : float
        Seconds to wait for nodes to register.

    Returns
    -------
    dict of int to int
        Partition id to node id.

    Raises
    ------
    RunFailedError
        When nodes are missing, or a partition is held by no node or by two.
    """
    if isinstance(grid, KnowsPartitions):
        known = grid.nodes_by_partition(stop)
        nodes = [node for _, node in zip(range(window), known.values(), strict=False)]
    else:
        known = {}
        nodes = _wait_for_nodes(grid, clients, stop, patience)
    queries = [Message(_empty_query(), node, MessageType.QUERY) for node in nodes]
    held: dict[int, int] = {}
    replies = stream_replies(grid, queries, window=window, stop=stop)
    for node, reply in zip(nodes, replies, strict=True):
        if reply.has_error():
            cause = traceback_of(reply.error.reason or "").splitlines()[-1].strip()
            raise RunFailedError(f"a node could not say which partition it holds: {cause}")
        record = reply.content.metric_records[wire.METRICS]
        partition = int(record[wire.PARTITION])  # type: ignore[arg-type]
        if partition in held:
            raise RunFailedError(f"two nodes hold partition {partition}; each needs its own")
        held[partition] = node
    held = {**known, **held}
    missing = sorted(set(range(clients)) - set(held))
    if missing:
        raise RunFailedError(f"no node holds partition {missing[0]}; clients = {clients}")
    return held


def _empty_query() -> RecordDict:
    return RecordDict({wire.CONFIG: ConfigRecord(), wire.METRICS: MetricRecord()})


def _wait_for_nodes(grid: Grid, clients: int, stop: threading.Event, patience: float) -> list[int]:
    waited = 0.0
    while len(nodes := list(grid.get_node_ids())) < clients:
        if waited >= patience:
            raise RunFailedError(
                f"clients = {clients} needs as many Flower nodes and {len(nodes)} registered in "
                f"{patience:.0f} s; a simulation under `flwr run` gets them with "
                f'--federation-config "num-supernodes={clients}"'
            )
        if stop.wait(_LONGEST_POLL):
            raise RunInterruptedError("interrupted")
        waited += _LONGEST_POLL
    return nodes
