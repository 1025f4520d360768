"""Sending messages through a bounded window, and a grid that shows chosen nodes only."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedsim.core.errors import RunFailedError, RunInterruptedError

_SHORTEST_POLL = 0.005
_LONGEST_POLL = 0.1


@runtime_checkable
class TellsReplies(Protocol):
    """A grid that need not be asked again and again whether there is a reply."""

    def wait_for_reply(self, seconds: float) -> None:
        """Wait until there is another reply, or for some time."""


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
        Set when the run is to end.
    patience : float, optional
        Seconds without any reply after which there will be none.

    Raises
    ------
    RunInterruptedError
        Once `stop` is set.
    RunFailedError
        When no reply came in time.
    """
    wait = grid.wait_for_reply if isinstance(grid, TellsReplies) else stop.wait
    waiting: dict[str, int] = {}
    arrived: dict[int, Message] = {}
    sent = 0
    last = time.monotonic()
    for position in range(len(messages)):
        pause = _SHORTEST_POLL
        while True:
            while sent < min(len(messages), position + window):
                message_id = next(iter(grid.push_messages([messages[sent]])), None)
                if message_id:
                    waiting[message_id] = sent
                else:
                    # The node is not registered any more.
                    arrived[sent] = Message(
                        Error(ErrorCode.NODE_UNAVAILABLE, "its node is gone"),
                        reply_to=messages[sent],
                    )
                sent += 1
            if position in arrived:
                break
            # One at a time: a pull holds everything it returns in memory at once.
            for message_id in list(waiting):
                for reply in grid.pull_messages([message_id]):
                    arrived[waiting.pop(message_id)] = reply
                    pause, last = _SHORTEST_POLL, time.monotonic()
            if position not in arrived:
                wait(pause)
                if stop.is_set():
                    raise RunInterruptedError("interrupted")
                if patience is not None and time.monotonic() - last > patience:
                    raise RunFailedError(f"no client has answered for {patience:.0f} s")
                pause = min(pause * 1.5, _LONGEST_POLL)
        yield arrived.pop(position)
        last = time.monotonic()


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

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Give what the grid behind knows of its nodes."""
        return self._grid.get_nodes()

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
