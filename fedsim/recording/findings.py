"""What a verification has found so far, told by several threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fedsim.core.errors import InputError

FILES, PARTITION, PARTICIPANTS = "files", "partition", "participants"
INITIAL, STEPS, GRADIENTS = "initial state", "steps", "gradients"
REPLAY, AGGREGATE, STATE, RECOMPUTED = "replay", "aggregate", "state", "recomputed"

_CHECKS = {
    FILES: ("files", "bytes equal their checksums"),
    PARTITION: ("clients", "every sample at one client; hash, sizes and class counts as recorded"),
    PARTICIPANTS: ("rounds", "equal to the list, or to the draw from the seed"),
    INITIAL: ("states", "equal to the model drawn from the seed, bit for bit"),
    STEPS: ("steps", "batches equal to the draw from the seed; losses, sizes equal to telemetry"),
    GRADIENTS: ("steps", "norms equal to those measured when the gradients were made"),
    REPLAY: ("steps", "the local optimiser over the gradients lands on the recorded delta"),
    AGGREGATE: ("rounds", "equal to the weighted mean of the deltas, bit for bit"),
    STATE: ("rounds", "equal to the state before plus the update, bit for bit, and its hash"),
    RECOMPUTED: ("steps", "gradients computed once more from data, draws and parameters"),
}


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
    unproven : list of str
        What could not be proven, and why.
    violations : list of str
        What is wrong: file, tensor, step.
    """

    name: str
    unit: str
    meaning: str
    proven: int = 0
    notes: list[str] = field(default_factory=list)
    unproven: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)


@dataclass
class Findings:
    """The outcome of a verification, in the making until it is returned.

    Parameters
    ----------
    checks : dict of str to Check
        One for each kind, by name.
    bytes_read : int
        Bytes of the files that were read.
    """

    checks: dict[str, Check] = field(
        default_factory=lambda: {name: Check(name, *about) for name, about in _CHECKS.items()}
    )
    bytes_read: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

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

    def leave(self, check: str, reason: str) -> None:
        """Say once what could not be proven, and why."""
        with self._lock:
            if reason not in self.checks[check].unproven:
                self.checks[check].unproven.append(reason)

    @contextmanager
    def guarded(self, check: str, what: str) -> Iterator[None]:
        """Turn whatever a damaged or forged file makes of a check into a violation."""
        try:
            yield
        except InputError as error:
            self.violate(check, str(error))
        except Exception as error:
            self.violate(check, f"{what} cannot be checked: {type(error).__name__}: {error}")
