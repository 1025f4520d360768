"""Telling a run to a tracker of experiments while it goes on, without depending on it."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import queue
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from fedsim.core import registry
from fedsim.core.errors import InputError
from fedsim.core.plan import RunPlan
from fedsim.flower.rounds import RunObserver
from fedsim.recording.reader import load_run

_MOST_WAITING = 100_000
_PATIENCE = 30.0
"""Seconds that a tracker has to end when the run does."""
PROJECT = "fedsim"
"""What trackers call all of our runs, where the user says nothing else."""


class Tracker(Protocol):
    """Where the figures of one run go. Any method may raise: that ends the tracking alone.

    A file of ``fedsim.trackers`` names it ``make``, whose ``package`` is what pip installs for it.
    It is made before anything of the run is written; all methods are called from one thread.
    """

    def start(self, path: Path, config: Mapping[str, Any], step: int) -> None:
        """Begin, or continue, the record of a run.

        Parameters
        ----------
        path : Path
            The run directory, which exists.
        config : mapping
            The whole configuration, as in ``run.json``.
        step : int
            The first round that will be told; above 0 for a run that is continued.
        """

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record finite figures of a round."""

    def finish(self, succeeded: bool) -> None:
        """End the record, and return when all of it is safe."""


def make_tracker(name: str) -> Tracker:
    """Load a tracker.

    Parameters
    ----------
    name : str
        Of a file of ``fedsim.trackers``, or of the user's own callable without arguments, as
        ``module:NAME`` or ``FILE.py:NAME``.

    Raises
    ------
    InputError
        When it does not exist, is not installed, or cannot be loaded.
    """
    make = check_tracker(name)
    try:
        made: Tracker = make()
    except InputError:
        raise
    except Exception as error:
        # A package of others may raise anything.
        raise InputError(f"tracker = {name!r} cannot be loaded: {_told(error)}") from None
    return made


def check_tracker(name: str) -> Callable[[], Any]:
    """Refuse a tracker that does not exist or is not installed, without loading its package.

    Raises
    ------
    InputError
        Naming the package to install.
    """
    # Only a user names trackers; no run does.
    registry.trust([name])
    make = registry.factory("tracker", "trackers", name)
    package = getattr(make, "package", None)
    if package is not None and importlib.util.find_spec(name) is None:
        raise InputError(f"tracker = {name!r} is not installed; install it: pip install {package}")
    return make


def run_id_of(path: Path) -> str:
    """Give the name by which a tracker knows a run directory again: 16 hexadecimal digits."""
    text = f"{load_run(path).entry('created')} {path.absolute()}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def round_values(row: Mapping[str, Any]) -> dict[str, float]:
    """Give the figures of a round's row that are finite, by the names that trackers show."""
    values = {"global/loss": row["global_loss"], "global/accuracy": row["global_accuracy"]}
    values |= {f"seconds/{name}": value for name, value in row["seconds"].items()}
    return _finite(values)


def client_values(row: Mapping[str, Any]) -> dict[str, float]:
    """Give the figures of a client's row that are finite, by the names that trackers show."""
    client = row["partition"]
    return _finite(
        {
            f"client_loss/{client}": row["local_loss"],
            f"client_gradient_norm/{client}": row["gradient_norm"],
        }
    )


def _finite(values: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in values.items() if v is not None and math.isfinite(v)}


class TrackingObserver:
    """Tells a run to a tracker, from a thread of its own: the run never waits for it.

    A tracker that raises or is too slow ends the tracking with one warning and nothing else.

    Parameters
    ----------
    name : str
        What to call it in a warning.
    tracker : Tracker
        What is told.
    warn : callable
        Takes one sentence.
    patience : float
        Seconds that the tracker has to end when the run does.
    """

    def __init__(
        self,
        name: str,
        tracker: Tracker,
        warn: Callable[[str], None],
        *,
        patience: float = _PATIENCE,
    ) -> None:
        self._name = name
        self._tracker = tracker
        self._warn = warn
        self._patience = patience
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._broken = threading.Lock()
        self._succeeded = False

    def run_started(self, plan: RunPlan, workers: int, path: Path) -> None:
        """Remember what to begin with."""
        self._path = path
        self._config = plan.config.to_mapping()

    def warned(self, text: str) -> None:
        """Tell nothing: there is no figure."""

    def round_started(self, round_number: int, participants: Sequence[int]) -> None:
        """Begin with this round, where none was told before."""
        self._start(round_number)

    def client_finished(self, row: Mapping[str, Any]) -> None:
        """Tell a client's loss and gradient norm."""
        self._log(client_values(row), row["round"])

    def client_failed(self, round_number: int, partition: int, reason: str) -> None:
        """Tell nothing: there is no figure."""

    def round_finished(self, row: Mapping[str, Any]) -> None:
        """Tell the global loss and accuracy, and the seconds."""
        self._start(row["round"])
        self._log(round_values(row), row["round"])

    def run_finished(self, path: Path) -> None:
        """Remember that the run succeeded."""
        self._succeeded = True

    def close(self) -> None:
        """End the record and wait for that; to be called however the run ends."""
        if self._thread is None:
            return
        self._tell(lambda: self._tracker.finish(self._succeeded))
        self._calls.put(None)
        self._thread.join(self._patience)
        if self._thread.is_alive():
            self._give_up(f"has not ended within {self._patience:g} s")

    def _start(self, step: int) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
            path, config = self._path, self._config
            self._tell(lambda: self._tracker.start(path, config, step))

    def _log(self, values: Mapping[str, float], step: int) -> None:
        if values:
            self._tell(lambda: self._tracker.log(values, step))

    def _tell(self, call: Callable[[], None]) -> None:
        if self._calls.qsize() >= _MOST_WAITING:
            self._give_up("does not keep up")
        if not self._broken.locked():
            self._calls.put(call)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except BaseException as error:
                self._give_up(f"failed: {_told(error)}")
            if self._broken.locked():
                return

    def _give_up(self, why: str) -> None:
        # Taken once and never given back, so there is one warning.
        if self._broken.acquire(blocking=False):
            self._warn(f"tracker {self._name} {why}; the run goes on without it")


def _told(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class _Observers:
    def __init__(self, observers: Collection[RunObserver]) -> None:
        self._observers = observers

    def __getattr__(self, name: str) -> Callable[..., None]:
        methods = [getattr(observer, name) for observer in self._observers]

        def tell(*arguments: Any) -> None:
            for method in methods:
                method(*arguments)

        return tell


def observers(*several: RunObserver) -> RunObserver:
    """Make one observer of several, which are told in turn."""
    return cast("RunObserver", _Observers(several))
