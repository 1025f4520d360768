"""What a verification has found so far, told by several threads."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from fedsim.core.capture import kept_kinds
from fedsim.core.errors import InputError

FILES, PARTITION, PARTICIPANTS = "files", "partition", "participants"
INITIAL, STEPS, GRADIENTS = "initial state", "steps", "gradients"
REPLAY, AGGREGATE, STATE, RECOMPUTED = "replay", "aggregate", "state", "recomputed"
KEPT, ROWS, EVALUATION = "kept", "rows", "evaluation"

# What one check leaves open and another may settle: both use these words.
BUFFERS = "buffers: their deltas follow from no gradient"
"""Under `REPLAY`, by client."""
SOURCES = f"{kept_kinds()}: that they are of the data is seen only where the step is computed again"
"""Under `RECOMPUTED`, by step of a client."""
LOSSES = "loss, loss_history, local_loss: seen only where the step is computed again"
"""Under `ROWS`, by step of a client."""
STATISTICS = (
    "gradient_norm, per_layer_norms, cosine_to_previous, cosine_to_mean, zero_fraction, proximal, "
    "objective_norm: measured again only where gradients of all layers and steps were captured"
)
"""Under `ROWS`, by step of a client."""
EVALUATED = "evaluation: seen only where steps of the client are computed again by its arithmetic"
"""Under `ROWS`, by client."""
SCORES = "global_loss, global_accuracy: seen only where the state is evaluated again"
"""Under `ROWS`, by round."""

_CHECKS = {
    FILES: ("files", "bytes equal their checksums"),
    PARTITION: ("clients", "every sample at one client; hash, sizes and class counts as recorded"),
    PARTICIPANTS: ("rounds", "equal to the list, or to the draw from the seed"),
    INITIAL: ("states", "equal to the model drawn from the seed, bit for bit"),
    STEPS: ("steps", "batches equal to the draw from the seed; losses, sizes equal to telemetry"),
    GRADIENTS: ("steps", "norms equal to those measured when the gradients were made"),
    REPLAY: ("steps", "the local optimizer over the gradients lands on the recorded delta"),
    AGGREGATE: ("rounds", "equal to the weighted mean of the deltas, bit for bit"),
    STATE: ("rounds", "equal to the state before plus the update, bit for bit, and its hash"),
    KEPT: ("rounds", "what the strategy keeps follows from what it kept, and the deltas"),
    EVALUATION: ("states", "loss and accuracy equal to those of the state evaluated again"),
    RECOMPUTED: ("steps", "losses and gradients equal to those computed again from the data"),
    ROWS: ("rows", "numbers equal to those that the files and the configuration lead to"),
}
_MOST_PARTS, _MOST_RANGES = 6, 8
"""Of a list of places, and of one of rounds or clients in it, that are written out."""

Place = tuple[int | None, int | None]
"""A round and a client in it; None where a round, or the run, is meant as a whole."""
WHOLE_RUN: Place = (None, None)
Roll = dict[int, frozenset[int]]
"""The clients that trained in each round."""


@dataclass
class _Left:
    """Where one thing is not proven."""

    steps: dict[Place, int | None] = field(default_factory=dict)
    settled: dict[Place, set[int | None]] = field(default_factory=dict)

    def open(self) -> dict[Place, int | None]:
        """Give the places that nobody has settled, and how many steps are left of each."""
        found = {}
        for place, steps in self.steps.items():
            settled = self.settled.get(place, set())
            if None in settled or (steps is not None and len(settled) >= steps):
                continue
            found[place] = None if steps is None else steps - len(settled)
        return found

    def where(self, roll: Mapping[int, Collection[int]]) -> str:
        """Write the places that are open, and how many steps of them."""
        places = self.open()
        parts = []
        if counted := [steps for steps in places.values() if steps is not None]:
            left, total = sum(counted), sum(steps or 0 for steps in self.steps.values())
            of = f" of {total:,}" if left < total else ""
            parts.append(f"{left:,}{of} {'step' if left == total == 1 else 'steps'}")
        parts += _described(places, roll)
        return "; ".join(parts)


@dataclass
class Check:
    """What came of one kind of check.

    Parameters
    ----------
    name : str
        Like ``replay``.
    unit : str
        Of what `proven` counts: files, rounds, clients, steps.
    meaning : str
        What is proven where it holds.
    proven : int
        How many times it held.
    notes : list of str
        How strictly.
    violations : list of str
        What is wrong: file, tensor, step.
    """

    name: str
    unit: str
    meaning: str
    proven: int = 0
    notes: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    left: dict[str, _Left] = field(default_factory=dict, repr=False)
    roll: Roll = field(default_factory=dict, repr=False)

    @property
    def reasons(self) -> list[str]:
        """What could not be proven and why, once each."""
        return [reason for reason, left in self.left.items() if left.open()]

    @property
    def unproven(self) -> list[str]:
        """The same, each with the rounds and clients that it is about."""
        lines = []
        for reason in self.reasons:
            where = self.left[reason].where(self.roll)
            lines.append(f"{reason} ({where})" if where else reason)
        return lines


@dataclass
class Findings:
    """The outcome of a verification, in the making until it is returned.

    Parameters
    ----------
    roll : dict of int to frozenset of int
        The clients that trained in each round: when all of them are meant, the text says "all".
    bytes_read : int
        Bytes of the files that were read.

    Attributes
    ----------
    checks : dict of str to Check
        One for each kind, by name.
    """

    roll: Roll = field(default_factory=dict, repr=False)
    bytes_read: int = 0
    checks: dict[str, Check] = field(init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        """Begin with one check of each kind."""
        self.checks = {n: Check(n, *about, roll=self.roll) for n, about in _CHECKS.items()}

    @property
    def violations(self) -> list[str]:
        """All violations."""
        return [violation for check in self.checks.values() for violation in check.violations]

    def prove(self, check: str, count: int = 1) -> None:
        """Count what holds."""
        with self._lock:
            self.checks[check].proven += count

    def violate(self, check: str, violation: str) -> None:
        """Tell what is wrong."""
        with self._lock:
            self.checks[check].violations.append(violation)

    def note(self, check: str, note: str) -> None:
        """Say once how strictly something was proven."""
        with self._lock:
            if note not in self.checks[check].notes:
                self.checks[check].notes.append(note)

    def leave(
        self,
        check: str,
        reason: str,
        *,
        at: Place = WHOLE_RUN,
        steps: int | None = None,
    ) -> None:
        """Say what could not be proven, and why.

        Parameters
        ----------
        check : str
            The check that would have proven it.
        reason : str
            What is left and why. The same reason is one line, for any number of places.
        at : tuple of (int or None, int or None)
            Round and client; a round as a whole has no client, the run as a whole neither.
        steps : int, optional
            How many local steps of the client are meant, each of which may be settled alone.
        """
        with self._lock:
            left = self.checks[check].left.setdefault(reason, _Left())
            left.steps[at] = steps

    def settle(
        self,
        check: str,
        reason: str,
        *,
        at: Place = WHOLE_RUN,
        step: int | None = None,
    ) -> None:
        """Take back what `leave` said or is going to say of a place: something else proved it.

        Parameters
        ----------
        check, reason : str
            As for `leave`, to the letter.
        at : tuple of (int or None, int or None)
            The same place.
        step : int, optional
            One step of those that were left; without it, the place as a whole.
        """
        with self._lock:
            left = self.checks[check].left.setdefault(reason, _Left())
            left.settled.setdefault(at, set()).add(step)

    @contextmanager
    def in_one_order(self) -> Iterator[None]:
        """Sort what several threads report meanwhile, so that their pace does not show."""
        before = {n: (len(c.violations), len(c.left)) for n, c in self.checks.items()}
        yield
        for name, (violations, left) in before.items():
            check = self.checks[name]
            check.violations[violations:] = sorted(check.violations[violations:])
            for reason in sorted(list(check.left)[left:]):
                check.left[reason] = check.left.pop(reason)

    @contextmanager
    def guarded(self, check: str, what: str) -> Iterator[None]:
        """Turn any error that a damaged or forged file causes in a check into a violation."""
        try:
            yield
        except InputError as error:
            self.violate(check, str(error))
        except Exception as error:
            self.violate(check, f"{what} cannot be checked: {type(error).__name__}: {error}")


def _described(places: Iterable[Place], roll: Mapping[int, Collection[int]]) -> list[str]:
    """Write places in a few words, however many there are.

    Rounds all of whose clients are among them come first, then what is left by client.
    """
    rounds: set[int] = set()
    clients: dict[int, set[int]] = {}
    for number, client in places:
        if number is None:
            continue
        if client is None:
            rounds.add(number)
        else:
            clients.setdefault(number, set()).add(client)
    parts = [f"{_named('round', rounds)}"] if rounds else []
    whole = {n for n, found in clients.items() if len(found) > 1 and found == roll.get(n)}
    if whole:
        parts.append(f"all clients of {_named('round', whole)}")
    of_client: dict[int, list[int]] = {}
    for number in sorted(clients.keys() - whole):
        for client in clients[number]:
            of_client.setdefault(client, []).append(number)
    alike: dict[tuple[int, ...], list[int]] = {}
    for client in sorted(of_client):
        alike.setdefault(tuple(of_client[client]), []).append(client)
    groups = list(alike.items())
    room = _MOST_PARTS if len(groups) <= _MOST_PARTS else _MOST_PARTS - 1
    parts += [f"{_named('client', who)} of {_named('round', when)}" for when, who in groups[:room]]
    if rest := sum(len(who) * len(when) for when, who in groups[room:]):
        parts.append(f"and {rest:,} more")
    return parts


def _named(what: str, numbers: Collection[int]) -> str:
    """Write ``rounds 1 to 4, 7``."""
    ordered = sorted(numbers)
    ranges: list[list[int]] = []
    for number in ordered:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    # Two neighbours are no shorter as a range.
    written = [
        " to ".join(map(str, r)) if r[-1] - r[0] > 1 else ", ".join(map(str, r)) for r in ranges
    ]
    if len(written) > _MOST_RANGES:
        shown = ranges[: _MOST_RANGES - 1]
        rest = len(ordered) - sum(r[-1] - r[0] + 1 for r in shown)
        written = [*written[: len(shown)], f"and {rest:,} more"]
    return f"{what}{'s' if len(ordered) > 1 else ''} {', '.join(written)}"
