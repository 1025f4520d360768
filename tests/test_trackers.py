from __future__ import annotations

import math
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fedsim import cli, tracking
from fedsim.core.config import RunConfig
from fedsim.core.errors import InputError
from fedsim.core.plan import RunPlan
from fedsim.flower.client_app import app
from fedsim.flower.server_app import execute
from fedsim.recording.reader import load_run
from fedsim.recording.recovery import find_recovery
from fedsim.tracking import (
    TrackingObserver,
    check_tracker,
    client_values,
    make_tracker,
    observers,
    round_values,
    run_id_of,
)
from tests.installed import needs
from tests.local_grid import LocalGrid
from tests.observers import Memory

VALUES = {
    "dataset": "synthetic:60:3",
    "model": "cnn",
    "clients": 3,
    "clients-per-round": 2,
    "rounds": 2,
    "batch-size": 8,
    "capture": "none",
    "device": "cpu",
}


class Listed:
    """A tracker that lists what it was told, and from which threads."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.threads: set[int] = set()

    def _add(self, *call: Any) -> None:
        self.threads.add(threading.get_ident())
        self.calls.append(call)

    def start(self, path: Path, config: Mapping[str, Any], step: int) -> None:
        self._add("start", path, config["seed"], step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._add("log", dict(values), step)

    def finish(self, succeeded: bool) -> None:
        self._add("finish", succeeded)


class Raising(Listed):
    """A tracker that raises in the call of that name, or in all."""

    def __init__(self, where: str, error: BaseException | None = None) -> None:
        super().__init__()
        self._where = where
        self._error = error or OSError("no network\nand more lines")

    def _add(self, *call: Any) -> None:
        super()._add(*call)
        if self._where in (call[0], "all"):
            raise self._error


def go(path: Path, told: list[Any], rounds: int = 2, *, resume: bool = False) -> None:
    plan = RunPlan.prepare(RunConfig.from_mapping({**VALUES, "rounds": rounds}))
    execute(
        LocalGrid(app, 3, recordings=path.parent),
        plan,
        path,
        observer=observers(*told),
        workers=2,
        stop=threading.Event(),
        recovery=find_recovery(path) if resume else None,
    )


def track(
    path: Path, tracker: Any, *, patience: float = 30.0, **options: Any
) -> tuple[list[str], Memory]:
    warnings: list[str] = []
    observer = TrackingObserver("any", tracker, warnings.append, patience=patience)
    memory = Memory()
    go(path, [memory, observer], **options)
    observer.close()
    return warnings, memory


def test_every_row_is_told_with_its_round_as_the_step(tmp_path):
    tracker = Listed()
    warnings, _ = track(tmp_path / "run", tracker)
    assert warnings == []
    run = load_run(tmp_path / "run")
    expected: list[tuple[Any, ...]] = [("start", tmp_path / "run", 42, 0)]
    for row in run.round_rows:
        clients = [c for c in run.client_rows if c["round"] == row["round"]]
        expected += [("log", client_values(client), row["round"]) for client in clients]
        expected.append(("log", round_values(row), row["round"]))
    assert tracker.calls == [*expected, ("finish", True)]
    assert len([call for call in tracker.calls if call[0] == "log"]) == 3 + 2 * 2
    assert threading.get_ident() not in tracker.threads
    assert len(tracker.threads) == 1


def test_a_run_that_is_continued_begins_with_its_next_round(tmp_path):
    track(tmp_path / "run", Listed())
    tracker = Listed()
    track(tmp_path / "run", tracker, rounds=3, resume=True)
    assert tracker.calls[0] == ("start", tmp_path / "run", 42, 3)
    assert {call[2] for call in tracker.calls if call[0] == "log"} == {3}


def test_a_run_that_did_not_succeed_ends_so(tmp_path):
    tracker = Listed()
    observer = TrackingObserver("any", tracker, pytest.fail)
    plan = RunPlan.prepare(RunConfig.from_mapping(VALUES))
    observer.run_started(plan, 2, tmp_path)
    observer.round_started(1, [0])
    observer.close()
    assert tracker.calls == [("start", tmp_path, 42, 1), ("finish", False)]


@pytest.mark.parametrize("where", ["start", "log", "finish", "all"])
@pytest.mark.parametrize("error", [None, SystemExit(3), KeyboardInterrupt()])
def test_a_tracker_that_raises_is_left_with_one_warning_and_the_run_is_not_harmed(
    tmp_path, where, error
):
    track(tmp_path / "without", Listed())
    tracker = Raising(where, error)
    warnings, memory = track(tmp_path / "run", tracker)
    told = {None: "OSError: no network"}.get(error, type(error).__name__)
    told = f"{told}: 3" if isinstance(error, SystemExit) else told
    assert warnings == [f"tracker any failed: {told}; the run goes on without it"]
    # Nothing is asked of it any more.
    raised = {"all": "start"}.get(where, where)
    assert tracker.calls[-1][0] == raised
    assert [call[0] for call in tracker.calls].count(raised) == 1
    assert memory.of("run finished") == [("run finished", tmp_path / "run")]
    run, other = load_run(tmp_path / "run"), load_run(tmp_path / "without")
    assert run.status == "finished"
    assert [r["state_sha256"] for r in run.round_rows] == [
        r["state_sha256"] for r in other.round_rows
    ]


def test_a_tracker_that_hangs_holds_up_nothing(tmp_path):
    forever = threading.Event()

    class Hanging(Listed):
        def log(self, values: Mapping[str, float], step: int) -> None:
            forever.wait()

    try:
        warnings, memory = track(tmp_path / "run", Hanging(), patience=0.05)
        assert warnings == ["tracker any has not ended within 0.05 s; the run goes on without it"]
        assert len(memory.of("round finished")) == 3
    finally:
        forever.set()


def test_a_tracker_that_does_not_keep_up_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "_MOST_WAITING", 3)
    forever = threading.Event()

    class Hanging(Listed):
        def start(self, path: Path, config: Mapping[str, Any], step: int) -> None:
            super().start(path, config, step)
            forever.wait()

    warnings: list[str] = []
    tracker = Hanging()
    observer = TrackingObserver("any", tracker, warnings.append)
    memory = Memory()
    go(tmp_path / "run", [memory, observer])
    assert warnings == ["tracker any does not keep up; the run goes on without it"]
    assert len(memory.of("round finished")) == 3
    forever.set()
    observer.close()
    assert [call[0] for call in tracker.calls] == ["start"]
    assert len(warnings) == 1


def test_figures_that_are_not_finite_or_not_there_are_not_told():
    row = {
        "round": 1,
        "global_loss": math.nan,
        "global_accuracy": 0.25,
        "seconds": {"clients": 1.5, "evaluate": 0.5, "total": 2.0},
    }
    assert round_values(row) == {
        "global/accuracy": 0.25,
        "seconds/clients": 1.5,
        "seconds/evaluate": 0.5,
        "seconds/total": 2.0,
    }
    row |= {"global_loss": None, "global_accuracy": None, "seconds": {}}
    assert round_values(row) == {}
    client = {"partition": 7, "local_loss": math.inf, "gradient_norm": 3}
    assert client_values(client) == {"client_gradient_norm/7": 3.0}
    assert client_values({**client, "local_loss": 0.5}) == {
        "client_loss/7": 0.5,
        "client_gradient_norm/7": 3.0,
    }


def test_several_observers_are_told_in_turn(tmp_path):
    first, second = Memory(), Memory()
    go(tmp_path / "run", [first, second])
    assert first.events == second.events
    assert {event[0] for event in first.events} == {
        "run started",
        "round started",
        "client finished",
        "round finished",
        "run finished",
    }


def test_a_tracker_that_does_not_exist_is_refused():
    with pytest.raises(InputError) as refused:
        check_tracker("aim")
    assert str(refused.value) == (
        "tracker = 'aim' cannot be used; expected one of 'mlflow', 'tensorboard', 'trackio', "
        "'wandb', or your own as module:NAME"
    )


OWN = """
class Own:
    def start(self, path, config, step):
        self.file = (path.parent / "told").open("w")
        print(config["seed"], step, file=self.file)

    def log(self, values, step):
        print(step, *sorted(values), file=self.file)

    def finish(self, succeeded):
        self.file.close()
"""


def test_a_tracker_of_the_users_own_is_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    warnings, _ = track(tmp_path / "run", make_tracker("own.py:Own"))
    assert warnings == []
    told = Path("told").read_text().splitlines()
    assert told[0] == "42 0"
    assert {line.split()[0] for line in told[1:]} == {"0", "1", "2"}
    assert cli.run(["run", "--tracker", "own.py:Other"]) == 2
    refused = "fedsim: tracker = 'own.py:Other' cannot be used; expected a callable that can be "
    assert capsys.readouterr().err.startswith(refused)


@needs("compare")
@pytest.mark.parametrize("name", ["mlflow", "tensorboard", "trackio", "wandb"])
@pytest.mark.parametrize("command", ["run", "compare"])
def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(
    name, command, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    # For Python, a package that is None is not there.
    monkeypatch.setitem(sys.modules, name, None)
    package = "mlflow-skinny" if name == "mlflow" else name
    flags = ["--model", "cnn", "--tracker", name]
    grid = ["--seeds", "1"] if command == "compare" else []
    assert cli.run([command, *flags, *grid]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == (
        "",
        f"fedsim: tracker = '{name}' is not installed; install it: pip install {package}\n",
    )
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_reads_what_was_told(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    warnings, _ = track(tmp_path / "run", make_tracker("tensorboard"))
    assert warnings == []
    # Round 2 is made again, and told again.
    (tmp_path / "run" / "rounds" / "0002" / "global.safetensors").write_bytes(b"damage")
    track(tmp_path / "run", make_tracker("tensorboard"), rounds=3, resume=True)
    read = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    read.Reload()
    run = load_run(tmp_path / "run")
    told = [(event.step, event.value) for event in read.Scalars("global/accuracy")]
    assert told == [
        (row["round"], pytest.approx(row["global_accuracy"], rel=1e-6)) for row in run.round_rows
    ]
    for row in run.client_rows:
        events = read.Scalars(f"client_loss/{row['partition']}")
        values = {event.step: event.value for event in events}
        assert values[row["round"]] == pytest.approx(row["local_loss"], rel=1e-6)
    assert [tag for tag in read.Tags()["tensors"] if tag.startswith("config")]


def test_a_run_directory_has_one_name_at_a_tracker(tmp_path):
    for name in ("one", "other"):
        go(tmp_path / name, [])
    names = [run_id_of(tmp_path / name) for name in ("one", "other", "one")]
    assert names[0] == names[2] != names[1]
    go(tmp_path / "one", [], rounds=3, resume=True)
    assert run_id_of(tmp_path / "one") == names[0]
    assert len(names[0]) == 16
