from __future__ import annotations

import threading
from collections.abc import Iterable

import pytest
from flwr.app import Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo

from fedsim.core.errors import RunFailedError, RunInterruptedError
from fedsim.flower import membership
from fedsim.flower.client_app import app
from fedsim.flower.membership import Membership
from tests.flower.conftest import SMALL
from tests.local_grid import LocalGrid
from tests.observers import Memory


class Nodes(LocalGrid):
    """Nodes that say what they are told to, and come and go between two looks at their list.

    Parameters
    ----------
    *looks
        Who is there at each look, the last one from then on: node id, name, the moment it was
        started, and the partition that it claims, an error of Flower's, None for its own, or what
        it answers in place of a claim.
    """

    def __init__(self, *looks: list[tuple[int, str, str, int | Error | RecordDict | None]]) -> None:
        super().__init__(app, 0)
        self._looks = list(looks)
        self.asked: list[int] = []

    def get_nodes(self) -> Iterable[NodeInfo]:
        self._now = self._looks.pop(0) if len(self._looks) > 1 else self._looks[0]
        return [NodeInfo(node_id=i, name=n, last_activated_at=s) for i, n, s, _ in self._now]

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        self.asked.append(node)
        claim = next(claim for i, _, _, claim in self._now if i == node)
        if isinstance(claim, Error):
            return Message(claim, reply_to=message)
        if claim is None:
            return Message(Error(code=2, reason="Traceback\nno such folder"), reply_to=message)
        if isinstance(claim, RecordDict):
            return Message(claim, reply_to=message)
        content = RecordDict({"metrics": MetricRecord({"partition": claim})})
        return Message(content, reply_to=message)


class Clock(threading.Event):
    """A stop that nobody sets: waiting for it takes no time and moves the clock."""

    now = 0.0

    def wait(self, timeout):
        self.now += max(timeout, 0.001)
        return self.is_set()

    def monotonic(self):
        return self.now


@pytest.fixture(autouse=True)
def _clock(monkeypatch):
    monkeypatch.setattr(membership, "time", Clock())


def wait(grid, clients, *, patience=0.0, stop=None):
    told = []
    members = Membership(grid, clients=clients, stop=stop or membership.time, tell=told.append)
    try:
        members.wait_for_all(patience)
    except RunFailedError as failed:
        return str(failed), told, members
    return None, told, members


def nodes_of(members, partitions, *, spare=0, patience=0.0):
    return members.nodes_of(partitions, spare=spare, patience=patience)


def test_the_map_is_found_whatever_the_node_ids():
    grid = LocalGrid(app, 5)
    problem, told, members = wait(grid, 5)
    assert (problem, told) == (None, [])
    found = nodes_of(members, range(5))
    assert {node: partition for partition, node in found.items()} == grid.partitions


def test_more_nodes_than_are_asked_at_a_time_are_all_found():
    problem, _, members = wait(LocalGrid(app, 200), 200, patience=30.0)
    assert problem is None
    assert len(set(nodes_of(members, range(200)).values())) == 200


def test_too_few_nodes_are_told_with_the_remedy():
    problem, _, _ = wait(LocalGrid(app, 2), 6)
    assert "num-supernodes=6" in problem
    assert "2 registered" in problem


def test_a_run_waits_for_late_nodes():
    first, second = (7, "", "a", 0), (3, "", "b", 1)
    problem, _, members = wait(Nodes([], [first], [first, second]), 2, patience=30.0)
    assert problem is None
    assert nodes_of(members, [1, 0]) == {1: 3, 0: 7}


def test_whom_a_run_waits_for_is_told_once(monkeypatch):
    monkeypatch.setattr(membership, "_QUIET", 0.0)
    first, second = (7, "", "a", 0), (3, "", "b", 2)
    _, told, _ = wait(Nodes([first], [first, second]), 4, patience=1.0)
    assert told == ["waiting for partitions 1, 2, 3 of 4", "waiting for partitions 1, 3 of 4"]


def test_a_stop_ends_the_waiting():
    stop = threading.Event()
    stop.set()
    with pytest.raises(RunInterruptedError):
        wait(Nodes([]), 2, patience=1e300, stop=stop)


def test_two_nodes_with_the_same_partition_are_refused():
    problem, _, _ = wait(Nodes([(7, "", "a", 0), (3, "", "b", 1), (4, "", "c", 1)]), 2)
    assert problem == "two nodes hold partition 1; each needs its own"


def test_one_of_two_nodes_with_the_same_partition_may_leave():
    both = [(7, "", "a", 0), (3, "", "b", 1), (4, "", "c", 1)]
    problem, _, members = wait(Nodes(both, both[:2]), 2, patience=30.0)
    assert problem is None
    assert nodes_of(members, [0, 1]) == {0: 7, 1: 3}


@pytest.mark.parametrize(
    "answer",
    [
        RecordDict(),
        RecordDict({"metrics": MetricRecord()}),
        RecordDict({"metrics": MetricRecord({"partition": [0, 1]})}),
        RecordDict({"metrics": MetricRecord({"partition": 1.5})}),
    ],
)
def test_an_answer_without_a_partition_is_that_of_a_node_that_cannot_say(answer):
    problem, _, _ = wait(Nodes([(7, "", "a", 0), (3, "", "b", answer)]), 2)
    assert problem == "a node could not say which partition it holds: its answer names none"


def test_a_node_that_comes_late_and_cannot_say_does_not_end_the_run():
    first = (7, "", "a", 0)
    problem, told, members = wait(Nodes([first], [first, (3, "", "b", RecordDict())]), 1)
    assert problem is None
    assert nodes_of(members, [0]) == {0: 7}
    assert told == ["a node could not say which partition it holds: its answer names none"]


def test_a_node_that_claims_anothers_partition_is_refused():
    named = [(7, "partition-0", "a", 0), (3, "partition-1", "b", 0)]
    problem, told, _ = wait(Nodes(named), 2)
    assert problem == "no node holds partition 1; clients = 2"
    assert told == ["refused a node that claims partition 0 and is registered for partition 1"]


def test_a_node_without_a_registered_partition_is_refused_where_others_have_one():
    named = [(7, "partition-0", "a", 0), (3, "a hospital", "b", 1), (4, "", "c", 0)]
    problem, told, _ = wait(Nodes(named), 2)
    assert problem == "no node holds partition 1; clients = 2"
    assert sorted(told) == [
        "refused a node that claims partition 0 and is registered for none",
        "refused a node that claims partition 1 and is registered for none",
    ]


def test_a_refused_node_is_asked_again_once_it_was_restarted():
    other = (7, "partition-0", "a", 0)
    wrong, right = (3, "partition-1", "b", 0), (3, "partition-1", "c", 1)
    grid = Nodes([other, wrong], [other], [other, right])
    problem, told, members = wait(grid, 2, patience=30.0)
    assert problem is None
    assert len(told) == 1
    assert nodes_of(members, [0, 1]) == {0: 7, 1: 3}
    assert sorted(grid.asked) == [3, 3, 7]


def test_a_node_that_cannot_say_its_partition_ends_a_run_that_begins():
    nodes = [(7, "", "a", 0), (3, "", "b", None)]
    problem, _, _ = wait(Nodes(nodes), 2, patience=1e300)
    assert problem == "a node could not say which partition it holds: no such folder"


def test_a_node_that_leaves_before_it_answers_is_asked_again_when_it_is_back():
    staying, after = (7, "", "a", 0), (3, "", "c", 1)
    gone = (3, "", "b", Error(code=ErrorCode.NODE_UNAVAILABLE, reason="no heartbeat"))
    for looks in (
        ([staying, gone], [staying], [staying, after]),
        # By a network that was away; the list of nodes shows nothing of it.
        ([staying, gone], [staying, (3, "", "b", 1)]),
    ):
        problem, told, members = wait(Nodes(*looks), 2, patience=30.0)
        assert (problem, told) == (None, [])
        assert nodes_of(members, [0, 1]) == {0: 7, 1: 3}


def test_a_node_that_never_answers_is_waited_for_as_long_as_any():
    gone = (3, "", "b", Error(code=ErrorCode.NODE_UNAVAILABLE, reason="no heartbeat"))
    grid = Nodes([(7, "", "a", 0), gone])
    problem, _, _ = wait(grid, 2, patience=10.0)
    assert problem == "no node holds partition 1; clients = 2"
    # Soon at first, then ten times a second.
    assert 100 < grid.asked.count(3) < 120


def test_a_node_that_comes_back_and_cannot_say_its_partition_is_told():
    staying, before, after = (7, "", "a", 0), (3, "", "b", 1), (3, "", "c", None)
    problem, told, members = wait(Nodes([staying, before], [staying, after]), 2)
    assert (problem, told) == (None, [])
    assert nodes_of(members, [0, 1]) == {0: 7, 1: 3}
    assert told == ["a node could not say which partition it holds: no such folder"]


def test_a_node_that_came_back_as_another_serves_its_partition():
    staying, before, after = (7, "", "a", 0), (3, "", "b", 1), (9, "", "c", 1)
    problem, told, members = wait(Nodes([staying, before], [staying, before, after]), 2)
    assert problem is None
    assert nodes_of(members, [0, 1]) == {0: 7, 1: 9}
    assert told == ["two nodes hold partition 1; the one that came last has it"]


def test_a_second_key_takes_a_partition_from_no_registered_node_that_is_here():
    """As with a stolen key, which is registered for the partition too."""
    name = "partition-0"
    first, thief, third = [(i, name, str(i), 0) for i in (7, 3, 9)]
    again = (7, name, "later", 0)
    grid = Nodes([first], [first, thief], [first, thief], [again, thief], [thief, third])
    problem, told, members = wait(grid, 1)
    assert (problem, told) == (None, [])
    assert [nodes_of(members, [0])[0] for _ in range(2)] == [7, 7]
    assert told == ["two nodes hold partition 0; the one that had it keeps it"]
    assert nodes_of(members, [0]) == {0: 7}
    assert nodes_of(members, [0]) == {0: 3}
    assert nodes_of(members, [0]) == {0: 3}


def test_a_round_waits_for_a_node_where_it_needs_it():
    staying, before, after = (7, "", "a", 0), (3, "", "b", 1), (3, "", "c", 1)
    grid = Nodes([staying, before], [staying], [staying, after])
    _, _, members = wait(grid, 2)
    assert nodes_of(members, [0, 1], patience=30.0) == {0: 7, 1: 3}
    assert grid.asked == [3, 7, 3]


def test_a_round_does_not_wait_for_as_many_as_may_fail():
    staying, leaving = (7, "", "a", 0), (3, "", "b", 1)
    grid = Nodes([staying, leaving], [staying])
    _, _, members = wait(grid, 2)
    # Addressed all the same: whoever runs the nodes answers for one that is away.
    assert nodes_of(members, [0, 1], spare=1, patience=1e300) == {0: 7, 1: 3}


class Unregistering(LocalGrid):
    """Refuses messages for one node once it has said which partition it holds."""

    gone = 2

    def push_messages(self, messages):
        (message,) = list(messages)
        partition = self.partitions[message.metadata.dst_node_id]
        if message.metadata.message_type == "train" and partition == self.gone:
            return [""]
        return super().push_messages([message])


def test_a_node_that_is_not_registered_any_more_is_a_client_that_failed(tmp_path):
    from fedsim.core.config import RunConfig
    from fedsim.core.plan import RunPlan
    from fedsim.flower.server_app import execute

    values = {**SMALL, "clients": 3, "rounds": 1, "max-failures": 1}
    plan = RunPlan.prepare(RunConfig.from_mapping(values))
    observer = Memory()
    execute(
        Unregistering(app, 3),
        plan,
        tmp_path / "run",
        observer=observer,
        workers=1,
        stop=membership.time,
    )
    assert observer.of("client failed") == [("client failed", 1, 2, "its node is gone")]
