"""Flower's grid in one process: a message is answered by the client app when it is pushed."""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

# Flower stamps every message with the identity of the process that makes it.
TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


class LocalGrid(Grid):
    """Runs a ClientApp for `clients` nodes whose ids are neither small nor in order.

    Parameters
    ----------
    app
        Answers the messages.
    clients
        Number of nodes; node `i` of them holds partition `i`.
    newest_first
        Give out the newest waiting reply only: the opposite of the order of sending.
    before
        Called with the partition and the message before the app; may raise.
    recordings
        Folder under which every node records, gradients included; none records without it.
    node_config
        Gives more of the configuration of the node that holds a partition.
    """

    def __init__(
        self,
        app: ClientApp,
        clients: int,
        *,
        newest_first: bool = False,
        before: Callable[[int, Message], None] | None = None,
        recordings: Path | None = None,
        node_config: Callable[[int], dict[str, Any]] | None = None,
    ) -> None:
        self._app = app
        # As long as Flower's own: no other number of a record has 19 digits.
        self.partitions = {2**62 + (7919 * (i + 3) % 100_003 << 40): i for i in range(clients)}
        self._newest_first = newest_first
        self._before = before
        self._recordings = recordings
        self._more = node_config or (lambda partition: {})
        self._numbers = itertools.count(1)
        self._replies: dict[str, Message] = {}
        self.most_waiting = 0

    def get_node_ids(self) -> Iterable[int]:
        return sorted(self.partitions)

    def set_run(self, run: Run) -> None:
        raise AssertionError("no caller sets a run")

    @property
    def run(self) -> Run:
        return Run.create_empty(run_id=1)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            number = str(next(self._numbers))
            message.metadata.__dict__["_message_id"] = number
            message.metadata.__dict__["_run_id"] = 1
            message.metadata.__dict__["_src_node_id"] = 1
            self._replies[number] = self._answer(message)
            ids.append(number)
        trained = [r for r in self._replies.values() if r.metadata.message_type == "train"]
        self.most_waiting = max(self.most_waiting, len(trained))
        return ids

    def _answer(self, message: Message) -> Message:
        partition = self.partitions[message.metadata.dst_node_id]
        context = Context(
            run_id=1,
            node_id=message.metadata.dst_node_id,
            node_config=self._node_config(partition),
            state=RecordDict(),
            run_config={},
        )
        try:
            if self._before is not None:
                self._before(partition, message)
            return self._app(message, context)
        except Exception:
            return Message(Error(code=2, reason=traceback.format_exc()), reply_to=message)

    def _node_config(self, partition: int) -> dict[str, Any]:
        config: dict[str, Any] = {
            "partition-id": partition,
            "num-partitions": len(self.partitions),
        }
        if self._recordings is not None:
            config |= {"recordings": str(self._recordings.resolve()), "capture": True}
        return config | self._more(partition)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        newest = next(reversed(self._replies), None)
        return [
            self._replies.pop(i)
            for i in list(message_ids)
            if i in self._replies and (i == newest or not self._newest_first)
        ]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))
