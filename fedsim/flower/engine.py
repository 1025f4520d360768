"""A Grid of Flower over Ray's actors: messages go to free workers, replies are there at once.

Flower's own engine passes each message through a database and a store of hashed objects, and looks
for new ones node by node. Its actors need none of that.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping

from flwr.app import Context, Error, Message, RecordDict, UserConfig
from flwr.common.constant import (
    NUM_PARTITIONS_KEY,
    PARTITION_ID_KEY,
    SUPERLINK_NODE_ID,
    ErrorCode,
)
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from ray.exceptions import RayTaskError

from fedsim.flower.workers import Workers

_FIRST_NODE = SUPERLINK_NODE_ID + 1


class RayGrid(Grid):
    """Runs the ClientApp of many clients on a few workers.

    Parameters
    ----------
    workers : Workers
        Each runs one client at a time.
    clients : int
        Clients, numbered from 0; each has a node of its own.
    """

    def __init__(self, workers: Workers, clients: int) -> None:
        self._workers = workers
        self._clients = clients
        self._numbers = itertools.count(1)
        self._asked: queue.SimpleQueue[tuple[str, Message] | None] = queue.SimpleQueue()
        self._replies: dict[str, Message] = {}
        self._answered = threading.Event()
        self._threads = [
            threading.Thread(target=self._serve, daemon=True) for _ in range(workers.count)
        ]
        for thread in self._threads:
            thread.start()

    def await_worker(self, stop: threading.Event, patience: float) -> None:
        """Wait as `Workers.await_first` does."""
        self._workers.await_first(stop, patience)

    def close(self) -> None:
        """Kill the workers, and wait for what still waits for them: Ray may end only then."""
        self._workers.end()
        for _ in self._threads:
            self._asked.put(None)
        for thread in self._threads:
            thread.join()

    def nodes_by_partition(self) -> Mapping[int, int]:
        """Give the node of each client."""
        return {client: _FIRST_NODE + client for client in range(self._clients)}

    def get_node_ids(self) -> Iterable[int]:
        """Give all nodes."""
        return self.nodes_by_partition().values()

    def set_run(self, run: Run) -> None:
        """Do nothing: there is one run."""

    @property
    def run(self) -> Run:
        """The only run."""
        return Run.create_empty(run_id=1)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make a message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Have messages answered as workers become free, and give their ids."""
        ids = []
        for message in messages:
            ids.append(str(next(self._numbers)))
            self._asked.put((ids[-1], message))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Give the replies that are there, each once."""
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def wait_for_reply(self, seconds: float) -> None:
        """Wait until there is another reply, or for some time."""
        self._answered.wait(seconds)
        self._answered.clear()

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Yield replies as they come; the time limit is that of each client."""
        waiting = set(self.push_messages(messages))
        while waiting:
            self.wait_for_reply(1)
            for number in [number for number in waiting if number in self._replies]:
                waiting.remove(number)
                yield from self.pull_messages([number])

    def _serve(self) -> None:
        while (asked := self._asked.get()) is not None:
            number, message = asked
            self._replies[number] = self._answer(message)
            self._answered.set()
            # The next message may be long in coming.
            del asked, message

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        client = node - _FIRST_NODE
        about: UserConfig = {PARTITION_ID_KEY: client, NUM_PARTITIONS_KEY: self._clients}
        context = Context(1, node, about, RecordDict(), {})
        try:
            return self._workers.run(message, client, context)
        except Exception as error:
            raised = isinstance(error, RayTaskError)
            code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION if raised else ErrorCode.UNKNOWN
            return Message(Error(code, str(error)), reply_to=message)
