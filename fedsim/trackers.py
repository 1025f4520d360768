"""Telling a run to a tracker of experiments while it goes on, without depending on it."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from fedsim.core.errors import InputError
from fedsim.core.plan import RunPlan
from fedsim.flower.rounds import RunObserver
from fedsim.recording.reader import load_run

_MOST_WAITING = 100_000
_PATIENCE = 30.0
"""Seconds that a tracker has to end when the run does."""
_PROJECT = "fedsim"


class Tracker(Protocol):
    """Where the figures of one run go. Any method may raise: that ends the tracking alone.

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


class TensorBoard:
    """Event files in the run directory, under ``tensorboard/``."""

    def __init__(self) -> None:
        self._module = importlib.import_module("torch.utils.tensorboard")

    def start(self, path: Path, config: Mapping[str, Any], step: int) -> None:
        """Open an event file; what an earlier one says of `step` and later rounds is hidden."""
        self._writer = self._module.SummaryWriter(
            str(path / "tensorboard"), purge_step=step or None, flush_secs=2
        )
        # As a block of code in Markdown.
        lines = json.dumps(config, indent=2, sort_keys=True).splitlines()
        self._writer.add_text("config", "\n".join(f"    {line}" for line in lines), step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write a scalar for each figure."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, succeeded: bool) -> None:
        """Write out what is left."""
        self._writer.close()


class MLflow:
    """A run in the experiment ``fedsim`` (or ``MLFLOW_EXPERIMENT_NAME``) at the tracking URI."""

    def __init__(self) -> None:
        self._mlflow = importlib.import_module("mlflow")

    def start(self, path: Path, config: Mapping[str, Any], step: int) -> None:
        """Find the run of this run directory, or create it with the configuration as parameters."""
        self._client = self._mlflow.MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        number = (
            self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        )
        tag = run_id_of(path)
        found = self._client.search_runs([number], f"tags.fedsim_id = '{tag}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        tags = {"fedsim_id": tag, "fedsim_path": str(path.absolute())}
        self._id = self._client.create_run(number, tags=tags, run_name=path.name).info.run_id
        entities = self._mlflow.entities
        # MLflow takes up to 6000 characters of a parameter.
        params = [entities.Param(key, str(value)[:6000]) for key, value in config.items()]
        self._client.log_batch(self._id, params=params)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log all figures in one request."""
        now = int(time.time() * 1000)
        entities = self._mlflow.entities
        metrics = [entities.Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def finish(self, succeeded: bool) -> None:
        """Set the status."""
        self._client.set_terminated(self._id, "FINISHED" if succeeded else "FAILED")


class WeightsAndBiases:
    """A run in the project ``fedsim`` (or ``WANDB_PROJECT``), grouped by the folder above it."""

    def __init__(self) -> None:
        self._wandb = importlib.import_module("wandb")
        # Its service must not count among the processes of the engine, which end with that.
        settings = self._wandb.setup().settings
        if settings.mode not in ("offline", "disabled") and not self._wandb.login(
            prompt=False, verify=False
        ):
            raise InputError(
                "tracker = 'wandb' has no key; run `wandb login` first, or set WANDB_MODE=offline"
            )

    def start(self, path: Path, config: Mapping[str, Any], step: int) -> None:
        """Begin the run, or take up the one of this run directory."""
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=path.name,
            group=path.absolute().parent.name,
            id=run_id_of(path),
            resume="allow" if step else None,
            config=dict(config),
            dir=str(path),
            # Our own output is not theirs to capture.
            settings=self._wandb.Settings(console="off"),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log all figures as one row."""
        self._run.log(dict(values), step=step)

    def finish(self, succeeded: bool) -> None:
        """Upload what is left."""
        self._run.finish(exit_code=0 if succeeded else 1)


class Trackio:
    """A run in trackio's local project ``fedsim``, grouped by the folder above it."""

    def __init__(self) -> None:
        self._trackio = importlib.import_module("trackio")

    def start(self, path: Path, config: Mapping[str, Any], step: int) -> None:
        """Begin the run, or take up the one of that name."""
        self._run = self._trackio.init(
            project=_PROJECT,
            # It knows runs by their names alone, and cells of two comparisons have the same.
            name=f"{path.name}~{run_id_of(path)[:8]}",
            group=path.absolute().parent.name,
            config=dict(config),
            resume="allow" if step else "never",
            embed=False,
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log all figures as one row."""
        self._run.log(dict(values), step=step)

    def finish(self, succeeded: bool) -> None:
        """Write out what is left."""
        self._run.finish()


_TRACKERS: dict[str, tuple[type[Tracker], str]] = {
    "tensorboard": (TensorBoard, "tensorboard"),
    "mlflow": (MLflow, "mlflow"),
    "wandb": (WeightsAndBiases, "wandb"),
    "trackio": (Trackio, "trackio"),
}
NAMES = tuple(_TRACKERS)
# By its own name: on an index of packages, "fedsim" need not be this one.
_PACKAGES = {"mlflow": "mlflow-skinny"}


def check_tracker(name: str) -> None:
    """Refuse a tracker that does not exist or is not installed, without loading it.

    Raises
    ------
    InputError
        Naming the package to install.
    """
    if name not in _TRACKERS:
        allowed = ", ".join(repr(known) for known in NAMES)
        raise InputError(f"tracker = {name!r} cannot be used; expected one of {allowed}")
    if importlib.util.find_spec(_TRACKERS[name][1]) is None:
        package = _PACKAGES.get(name, name)
        raise InputError(f"tracker = {name!r} is not installed; install it: pip install {package}")


def make_tracker(name: str) -> Tracker:
    """Load a tracker.

    Raises
    ------
    InputError
        When it does not exist, is not installed, or cannot be loaded.
    """
    check_tracker(name)
    try:
        return _TRACKERS[name][0]()
    except InputError:
        raise
    except Exception as error:
        # It is somebody else's package: whatever it raises, it cannot be used.
        raise InputError(f"tracker = {name!r} cannot be loaded: {_told(error)}") from None


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
    partition = row["partition"]
    return _finite(
        {
            f"client_loss/{partition}": row["local_loss"],
            f"client_gradient_norm/{partition}": row["gradient_norm"],
        }
    )


def _finite(values: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in values.items() if v is not None and math.isfinite(v)}


class TrackingObserver:
    """Tells a run to a tracker, from a thread of its own: the run never waits for it.

    Whatever the tracker raises, or however slow it is, ends the tracking with one warning and
    nothing else.

    Parameters
    ----------
    name : str
        What to call it in a warning.
    tracker : Tracker
        Who is told.
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
        """End the record and wait for that; call it whatever ends the run."""
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
        # Whoever takes the lock warns, and nobody gives it back.
        if self._broken.acquire(blocking=False):
            self._warn(f"tracker {self._name} {why}; the run goes on without it")


def _told(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class Observers:
    """Several observers as one; each is told in turn.

    Parameters
    ----------
    observers : collection of RunObserver
        Who is told.
    """

    def __init__(self, observers: Collection[RunObserver]) -> None:
        self._observers = observers

    def run_started(self, plan: RunPlan, workers: int, path: Path) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.run_started(plan, workers, path)

    def warned(self, text: str) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.warned(text)

    def round_started(self, round_number: int, participants: Sequence[int]) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.round_started(round_number, participants)

    def client_finished(self, row: Mapping[str, Any]) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.client_finished(row)

    def client_failed(self, round_number: int, partition: int, reason: str) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.client_failed(round_number, partition, reason)

    def round_finished(self, row: Mapping[str, Any]) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.round_finished(row)

    def run_finished(self, path: Path) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.run_finished(path)
