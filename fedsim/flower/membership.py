"""Which node holds which partition, while nodes join, leave and come back."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from flwr.app import Message, MessageType
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedsim.core.errors import RunFailedError, RunInterruptedError
from fedsim.flower import messages as wire
from fedsim.flower.grid import stream_replies

_SHORTEST_POLL = 0.005
_LONGEST_POLL = 0.1
_REFRESH = 0.5
"""Seconds after which the list of nodes is fetched again; there may be thousands."""
_QUIET = 3.0
"""Seconds of waiting before anything is told."""
_WINDOW = 64
"""Nodes that are asked at a time; a question is small."""
_ASSIGNED = re.compile(r"partition-([0-9]{1,9})")


@dataclass(frozen=True)
class _Member:
    """A node since it was last started: a restart may have given it another partition."""

    node_id: int
    since: str


@runtime_checkable
class KnowsPartitions(Protocol):
    """A grid that knows which node holds which partition, and whose nodes neither come nor go."""

    def nodes_by_partition(self) -> Mapping[int, int]:
        """Give the node of each client."""


def membership_of(
    grid: Grid, *, clients: int, stop: threading.Event, tell: Callable[[str], None]
) -> Membership | KnownMembership:
    """Give the membership of a grid; parameters as of `Membership`."""
    if isinstance(grid, KnowsPartitions):
        return KnownMembership(grid, grid, clients=clients, stop=stop)
    return Membership(grid, clients=clients, stop=stop, tell=tell)


class KnownMembership:
    """The map from partitions to nodes where it is known, however many there are.

    A question to each node takes as long as a message to each. Here one is asked, which waits for
    the first worker; every client compares whom a message is for with what it holds.

    Parameters
    ----------
    grid, known : Grid, KnowsPartitions
        The same one.
    clients, stop : int, threading.Event
        As of `Membership`.
    """

    def __init__(
        self, grid: Grid, known: KnowsPartitions, *, clients: int, stop: threading.Event
    ) -> None:
        self._grid = grid
        self._known = known
        self._clients = clients
        self._stop = stop
        self._nodes: Mapping[int, int] = {}

    def wait_for_all(self, patience: float) -> None:
        """Wait for the engine and its first worker, as long as that takes.

        Raises
        ------
        RunFailedError
            When a partition is held by no node, or a node cannot say which one it holds.
        RunInterruptedError
            Once the stop event is set.
        """
        self._nodes = self._known.nodes_by_partition()
        if missing := sorted(set(range(self._clients)) - set(self._nodes)):
            raise RunFailedError(_unheld(missing, self._clients))
        query = Message(wire.query_content(), self._nodes[0], MessageType.QUERY)
        (reply,) = stream_replies(self._grid, [query], window=1, stop=self._stop)
        if reply.has_error():
            raise RunFailedError(_speechless(reply))

    def nodes_of(
        self, partitions: Sequence[int], *, spare: int, patience: float
    ) -> Mapping[int, int]:
        """Give the node of each partition."""
        return {partition: self._nodes[partition] for partition in partitions}


class Membership:
    """The map from partitions to the nodes that hold them.

    Node ids are random and never leave this map. A node says which partition it holds. Where
    whoever registered its key gave it the name ``partition-N``, it must say N; and where any node
    has such a name, all must: then no node can serve, or read the messages of, another's partition.

    Parameters
    ----------
    grid : Grid
        Any of Flower's grids.
    clients : int
        Partitions that must be held, 0 to `clients` - 1.
    stop : threading.Event
        Set when the run is to end.
    tell : callable
        Told a line whenever a node is refused, and whom the run waits for.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        clients: int,
        stop: threading.Event,
        tell: Callable[[str], None],
    ) -> None:
        self._grid = grid
        self._clients = clients
        self._stop = stop
        self._tell = tell
        self._here: dict[_Member, str] = {}
        self._asked: dict[str, _Member] = {}
        self._claims: dict[_Member, int | None] = {}
        self._holders: dict[int, list[int]] = {}
        self._last: dict[int, int] = {}
        self._told: set[str] = set()
        self._failures: list[str] = []

    def wait_for_all(self, patience: float) -> None:
        """Wait until each partition is held by one node.

        Parameters
        ----------
        patience : float
            Seconds to wait.

        Raises
        ------
        RunFailedError
            When nodes are missing, a partition is held by no node or by two, or a node cannot
            say which one it holds.
        RunInterruptedError
            Once the stop event is set.
        """
        if not self._wait(range(self._clients), 0, patience, alone=True):
            raise RunFailedError(self._problem(patience))

    def nodes_of(
        self, partitions: Sequence[int], *, spare: int, patience: float
    ) -> Mapping[int, int]:
        """Give the node of each partition, waiting for those that left where the run needs them.

        Parameters
        ----------
        partitions : sequence of int
            The participants of a round.
        spare : int
            How many of them may be missing without ending the run; these are not waited for.
        patience : float
            Seconds to wait for the others.

        Returns
        -------
        dict of int to int
            Partition to node id; of a node that is away, the one that it had last.
        """
        self._wait(partitions, spare, patience, alone=False)
        for failure in self._failures:
            self._tell_once(failure)
        for partition, nodes in self._holders.items():
            if len(nodes) > 1:
                last = self._last[partition] == nodes[-1]
                which = "came last has it" if last else "had it keeps it"
                self._tell_once(f"two nodes hold partition {partition}; the one that {which}")
        return {partition: self._last[partition] for partition in partitions}

    def _wait(self, partitions: Sequence[int], spare: int, patience: float, *, alone: bool) -> bool:
        started = refreshed = time.monotonic()
        pause = _SHORTEST_POLL
        changed = self._see()
        while True:
            if changed := self._ask_and_hear() or changed:
                self._settle()
                changed = False
                pause = _SHORTEST_POLL
            if alone and self._failures:
                raise RunFailedError(self._failures[0])
            held = [len(self._holders.get(p, ())) for p in partitions]
            if held.count(0) <= spare and not (alone and max(held) > 1):
                return True
            now = time.monotonic()
            if now - started >= patience:
                return False
            if now - started >= _QUIET and held.count(0):
                missing = [p for p, nodes in zip(partitions, held, strict=True) if not nodes]
                self._tell_once(f"waiting for {_named(missing)} of {self._clients}")
            if self._stop.wait(pause):
                raise RunInterruptedError("interrupted")
            pause = min(pause * 1.5, _LONGEST_POLL)
            if now - refreshed >= _REFRESH:
                changed = self._see()
                refreshed = now

    def _see(self) -> bool:
        """Fetch the list of nodes; say whether anybody came or left."""
        nodes = sorted(self._grid.get_nodes(), key=lambda node: node.node_id)
        here = {_Member(n.node_id, n.last_activated_at): n.name for n in nodes}
        before, self._here = self._here, here
        return here != before

    def _ask_and_hear(self) -> bool:
        """Ask who is new, take the answers that are there; say whether there were any."""
        under_way = set(self._asked.values())
        new = [m for m in self._here if m not in self._claims and m not in under_way]
        for member in new[: _WINDOW - len(self._asked)]:
            query = Message(wire.query_content(), member.node_id, MessageType.QUERY)
            if message_id := next(iter(self._grid.push_messages([query])), None):
                self._asked[message_id] = member
        heard = False
        for reply in self._grid.pull_messages(list(self._asked)) if self._asked else []:
            member = self._asked.pop(reply.metadata.reply_to_message_id)
            # One that left before it could answer is asked again when it is back.
            if not (reply.has_error() and self._left(reply, member)):
                self._claims[member] = self._claim_of(reply)
                heard = True
        return heard

    def _settle(self) -> None:
        """Decide which nodes that are here hold each partition, in the order they answered."""
        assigned = {m: _ASSIGNED.fullmatch(name) for m, name in self._here.items()}
        registered = any(assigned.values())
        self._holders = {}
        for member, claim in self._claims.items():
            if claim is None or member not in self._here:
                continue
            match = assigned[member]
            if registered and (match is None or int(match[1]) != claim):
                place = f"partition {match[1]}" if match else "none"
                self._tell_once(
                    f"refused a node that claims partition {claim} and is registered for {place}"
                )
                continue
            self._holders.setdefault(claim, []).append(member.node_id)
        for partition, nodes in self._holders.items():
            # Who is registered comes back under the same id: another one has another key. Without
            # that, it is the same one as a rule, which was killed and is not missed yet.
            if not registered:
                self._last[partition] = nodes[-1]
            elif self._last.get(partition) not in nodes:
                self._last[partition] = nodes[0]

    def _left(self, reply: Message, member: _Member) -> bool:
        # The list of nodes may be older than the reply.
        return reply.error.code == ErrorCode.NODE_UNAVAILABLE or member not in self._here

    def _claim_of(self, reply: Message) -> int | None:
        claim = None if reply.has_error() else wire.client_told_by(reply)
        if claim is None:
            self._failures.append(_speechless(reply))
        return claim

    def _problem(self, patience: float) -> str:
        if len(self._here) < self._clients:
            return (
                f"clients = {self._clients} needs as many Flower nodes and {len(self._here)} "
                f"registered in {patience:.0f} s; a simulation under `flwr run` gets them with "
                f'--federation-config "num-supernodes={self._clients}"'
            )
        held = [len(self._holders.get(p, ())) for p in range(self._clients)]
        if max(held) > 1:
            return f"two nodes hold partition {held.index(max(held))}; each needs its own"
        missing = [p for p, nodes in enumerate(held) if not nodes]
        return _unheld(missing, self._clients)

    def _tell_once(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            self._tell(line)


def _named(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return f"partition{'s' if len(numbers) > 1 else ''} {shown}{more}"


def _unheld(missing: Sequence[int], clients: int) -> str:
    return f"no node holds {_named(missing)}; clients = {clients}"


def _speechless(reply: Message) -> str:
    cause = wire.cause_of(reply) if reply.has_error() else "its answer names none"
    return f"a node could not say which partition it holds: {cause}"
