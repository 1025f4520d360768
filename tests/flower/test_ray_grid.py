"""The grid over Ray's workers, with others in their place, and the map that it knows."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode

from fedsim.core.errors import RunFailedError
from fedsim.flower import messages as wire
from fedsim.flower.client_app import app
from fedsim.flower.engine import RayGrid
from fedsim.flower.grid import stream_replies
from fedsim.flower.membership import KnownMembership, Membership, membership_of
from fedsim.flower.patches import server_identity
from tests.local_grid import LocalGrid
from tests.patience import PATIENCE

Answer = Callable[[Message, int, Context], Message]


class InProcess:
    """Workers that are threads."""

    def __init__(self, count: int, answer: Answer) -> None:
        self.count = count
        self.asked: list[int] = []
        self._answer = answer

    def run(self, message: Message, client: int, context: Context) -> Message:
        self.asked.append(client)
        return self._answer(message, client, context)


@pytest.fixture(autouse=True)
def _identity() -> Any:
    with server_identity():
        yield


def grid_of(clients: int, answer: Answer | None = None, *, workers: int = 2) -> Any:
    found = InProcess(workers, answer or (lambda message, client, context: app(message, context)))
    return RayGrid(found, clients), found  # type: ignore[arg-type]


def query(grid: RayGrid, client: int) -> Message:
    return Message(wire.query_content(), grid.nodes_by_partition()[client], MessageType.QUERY)


def test_every_client_has_a_node_of_its_own_and_is_told_who_it_is() -> None:
    grid, _ = grid_of(5)
    assert len(set(grid.get_node_ids())) == 5
    replies = stream_replies(
        grid, [query(grid, c) for c in (4, 0, 2)], window=2, stop=threading.Event()
    )
    assert [wire.client_told_by(reply) for reply in replies] == [4, 0, 2]


def test_as_many_clients_are_under_way_as_there_are_workers() -> None:
    together = threading.Barrier(7)

    def answer(message: Message, client: int, context: Context) -> Message:
        together.wait(PATIENCE)
        return Message(RecordDict(), reply_to=message)

    grid, _ = grid_of(7, answer, workers=7)
    replies = grid.send_and_receive([query(grid, client) for client in range(7)])
    assert not any(reply.has_error() for reply in replies)


def test_a_reply_is_given_once_and_what_went_wrong_is_a_reply() -> None:
    def answer(message: Message, client: int, context: Context) -> Message:
        raise RunFailedError("took longer than client-timeout = 1 s")

    grid, _ = grid_of(1, answer)
    (number,) = grid.push_messages([query(grid, 0)])
    grid.wait_for_reply(PATIENCE)
    (reply,) = grid.pull_messages([number])
    assert wire.traceback_of(reply) == "took longer than client-timeout = 1 s"
    assert reply.error.code == ErrorCode.UNKNOWN
    assert grid.pull_messages([number]) == []


def membership(grid: Any, clients: int) -> Membership | KnownMembership:
    return membership_of(grid, clients=clients, stop=threading.Event(), tell=lambda line: None)


def test_where_the_map_is_known_one_node_is_asked_however_many_there_are() -> None:
    grid, workers = grid_of(10_000)
    known = membership(grid, 10_000)
    known.wait_for_all(0.0)
    assert workers.asked == [0]
    nodes = grid.nodes_by_partition()
    assert known.nodes_of([9_999, 3], spare=0, patience=0.0) == {9_999: nodes[9_999], 3: nodes[3]}


def test_a_partition_that_no_node_holds_ends_the_run_as_ever() -> None:
    with pytest.raises(RunFailedError, match=r"^no node holds partition 3; clients = 4$"):
        membership(grid_of(3)[0], 4).wait_for_all(0.0)


def test_an_app_that_cannot_answer_ends_the_run_with_its_cause() -> None:
    def answer(message: Message, client: int, context: Context) -> Message:
        raise ValueError("no such data")

    expected = r"^a node could not say which partition it holds: no such data$"
    with pytest.raises(RunFailedError, match=expected):
        membership(grid_of(3, answer)[0], 3).wait_for_all(0.0)


def test_a_grid_that_does_not_know_is_asked_node_by_node() -> None:
    assert isinstance(membership(LocalGrid(app, 3), 3), Membership)
    assert isinstance(membership(grid_of(3)[0], 3), KnownMembership)
