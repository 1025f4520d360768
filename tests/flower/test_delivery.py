"""Messages that are brought as they come, and a map of partitions that nobody is asked for."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping
from typing import Any

import pytest
from flwr.app import Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.server.superlink.fleet.vce import vce_api
from flwr.supercore.task_identity import TaskIdentity

from fedsim.core.errors import RunFailedError, RunInterruptedError
from fedsim.flower.client_app import app
from fedsim.flower.delivery import Deliveries, EngineGrid
from fedsim.flower.grid import GridBehind
from fedsim.flower.membership import KnownMembership, Membership, membership_of
from tests.local_grid import LocalGrid
from tests.patience import PATIENCE


class Link:
    """Flower's state of the link, as far as messages to nodes go."""

    def __init__(self) -> None:
        self.waiting: dict[int, list[Message]] = {}
        self.asked: list[int] = []

    def store_message_ins(self, message: Message) -> str | None:
        if message.metadata.dst_node_id == 0:
            return None
        self.waiting.setdefault(message.metadata.dst_node_id, []).append(message)
        return "stored"

    def get_message_ins(self, node_id: int, limit: int | None) -> list[Message]:
        self.asked.append(node_id)
        found = self.waiting.get(node_id, [])
        taken, self.waiting[node_id] = found[:limit], found[limit:]
        return taken


def message_to(node: int) -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    return Message(RecordDict(), node, MessageType.TRAIN)


@pytest.fixture
def running() -> Any:
    """Run the loop in place of Flower's; stop it at the end."""
    deliveries, link, stopped = Deliveries(), Link(), threading.Event()
    messages: queue.Queue[Message] = queue.Queue()
    with deliveries.installed():
        loop = threading.Thread(
            target=vce_api.add_messages_to_queue, args=[link, messages, {70: 0, 50: 1}, stopped]
        )
    loop.start()
    yield deliveries, link, messages
    stopped.set()
    loop.join(10)
    assert not loop.is_alive()


def test_the_loop_is_flowers_again_after_the_run() -> None:
    theirs = vce_api.add_messages_to_queue
    with Deliveries().installed():
        assert vce_api.add_messages_to_queue is not theirs
    assert vce_api.add_messages_to_queue is theirs


def test_messages_are_brought_in_the_order_of_sending_and_no_other_node_is_asked(
    running: tuple[Deliveries, Link, queue.Queue[Message]],
) -> None:
    deliveries, link, messages = running
    assert deliveries.nodes_by_partition(threading.Event()) == {0: 70, 1: 50}
    sent = [message_to(node) for node in (50, 70, 50)]
    assert [link.store_message_ins(message) for message in sent] == ["stored"] * 3
    assert [messages.get(timeout=PATIENCE) for _ in sent] == sent
    assert link.asked == [50, 70, 50]


def test_a_message_that_the_link_refuses_is_not_waited_for(
    running: tuple[Deliveries, Link, queue.Queue[Message]],
) -> None:
    deliveries, link, messages = running
    deliveries.nodes_by_partition(threading.Event())
    assert link.store_message_ins(message_to(0)) is None
    last = message_to(70)
    link.store_message_ins(last)
    assert messages.get(timeout=PATIENCE) is last


def test_a_stop_ends_waiting_for_an_engine_that_does_not_begin() -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(RunInterruptedError):
        EngineGrid(LocalGrid(app, 2), Deliveries()).nodes_by_partition(stop)


class Knowing(GridBehind):
    """A local grid that knows its map, and counts what is sent."""

    def __init__(self, grid: LocalGrid) -> None:
        super().__init__(grid)
        self.known = {partition: node for node, partition in grid.partitions.items()}
        self.sent: list[int] = []

    def nodes_by_partition(self, stop: threading.Event) -> Mapping[int, int]:
        return self.known

    def push_messages(self, messages: Any) -> Any:
        messages = list(messages)
        self.sent += [message.metadata.dst_node_id for message in messages]
        return super().push_messages(messages)


def membership(grid: Any, clients: int) -> Membership | KnownMembership:
    return membership_of(grid, clients=clients, stop=threading.Event(), tell=lambda line: None)


def test_where_the_map_is_known_one_node_is_asked_however_many_there_are() -> None:
    grid = Knowing(LocalGrid(app, 10_000))
    known = membership(grid, 10_000)
    known.wait_for_all(0.0)
    assert grid.sent == [grid.known[0]]
    assert known.nodes_of([9_999, 3], spare=0, patience=0.0) == {
        9_999: grid.known[9_999],
        3: grid.known[3],
    }


def test_a_partition_that_no_node_holds_ends_the_run_as_ever() -> None:
    with pytest.raises(RunFailedError, match=r"^no node holds partition 3; clients = 4$"):
        membership(Knowing(LocalGrid(app, 3)), 4).wait_for_all(0.0)


def test_an_app_that_cannot_answer_ends_the_run_with_its_cause() -> None:
    def before(partition: int, message: Message) -> None:
        raise ValueError("no such data")

    grid = Knowing(LocalGrid(app, 3, before=before))
    expected = r"^a node could not say which partition it holds: ValueError: no such data$"
    with pytest.raises(RunFailedError, match=expected):
        membership(grid, 3).wait_for_all(0.0)


def test_a_grid_that_does_not_know_is_asked_node_by_node() -> None:
    assert isinstance(membership(LocalGrid(ClientApp(), 3), 3), Membership)
    assert isinstance(membership(Knowing(LocalGrid(app, 3)), 3), KnownMembership)
