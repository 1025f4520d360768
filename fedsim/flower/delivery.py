"""Bringing messages to the workers of Flower's engine as they come."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator, Mapping

from flwr.app import Message
from flwr.server.superlink.fleet.vce import vce_api
from flwr.server.superlink.linkstate import LinkState
from flwr.serverapp import Grid

from fedsim.core.errors import RunInterruptedError
from fedsim.flower.grid import GridBehind

_POLL = 0.1


class Deliveries:
    """Takes the place of Flower's loop that brings messages from the server to the workers.

    Flower asks for every node in turn whether there is a message for it, then rests for 0.1 s.
    With a small window of messages under way, small clients are over long before the next ones
    come, and the more nodes there are the later. Here the state of the link tells for which node it
    has taken a message, so neither waiting nor the number of nodes matters.

    The engine also knows which node holds which partition; to ask takes a message to each.
    """

    def __init__(self) -> None:
        self._taken: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._nodes: dict[int, int] = {}
        self._begun = threading.Event()

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Have an engine that is started within use this loop; Flower has no hook for it."""
        theirs = vce_api.add_messages_to_queue
        setattr(vce_api, "add_messages_to_queue", self._deliver)  # noqa: B010
        try:
            yield
        finally:
            setattr(vce_api, "add_messages_to_queue", theirs)  # noqa: B010

    def nodes_by_partition(self, stop: threading.Event) -> Mapping[int, int]:
        """Wait until the engine runs, and give its nodes by the partition that each holds.

        Raises
        ------
        RunInterruptedError
            Once `stop` is set.
        """
        while not self._begun.wait(_POLL):
            if stop.is_set():
                raise RunInterruptedError("interrupted")
        return self._nodes

    def _deliver(
        self,
        state: LinkState,
        messages: queue.Queue[Message],
        partitions: Mapping[int, int],
        stopped: threading.Event,
    ) -> None:
        store = state.store_message_ins

        def store_and_tell(message: Message) -> str | None:
            message_id = store(message)
            self._taken.put(message.metadata.dst_node_id)
            return message_id

        setattr(state, "store_message_ins", store_and_tell)  # noqa: B010
        self._nodes = {partition: node for node, partition in partitions.items()}
        self._begun.set()
        while not stopped.is_set():
            with contextlib.suppress(queue.Empty):
                node = self._taken.get(timeout=_POLL)
                for message in state.get_message_ins(node_id=node, limit=1):
                    messages.put(message)


class EngineGrid(GridBehind):
    """Flower's grid of an engine with `Deliveries`, which knows who holds which partition.

    Parameters
    ----------
    grid : Grid
        Flower's.
    deliveries : Deliveries
        Those of the engine.
    """

    def __init__(self, grid: Grid, deliveries: Deliveries) -> None:
        super().__init__(grid)
        self._deliveries = deliveries

    def nodes_by_partition(self, stop: threading.Event) -> Mapping[int, int]:
        """Do what `Deliveries.nodes_by_partition` does."""
        return self._deliveries.nodes_by_partition(stop)
