from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedsim import cli
from fedsim.core.config import RunConfig, parse_text
from fedsim.core.errors import FedsimError, InputError, RunInterruptedError
from fedsim.core.plan import RunPlan
from fedsim.flower import simulation
from fedsim.flower.client_app import app
from fedsim.flower.server_app import execute, manifest_of
from fedsim.plugins.compare import compare
from fedsim.plugins.compare.cells import Axis, Cell, make_cells
from fedsim.plugins.compare.tables import CellFigures
from fedsim.recording.files import write_json
from fedsim.recording.reader import load_run
from fedsim.recording.recovery import find_recovery
from fedsim.recording.verify import verify
from fedsim.recording.writer import RunWriter
from tests import fuzz
from tests.local_grid import LocalGrid
from tests.observers import Memory
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[3]
SMALL = {
    "dataset": "synthetic:60:3",
    "model": "cnn",
    "clients": 3,
    "clients-per-round": 2,
    "rounds": 2,
    "batch-size": 8,
    "capture": "first:1",
    "device": "cpu",
}
AXES = [Axis("strategy", ("delta-fedavg", "fedavgm")), Axis("seed", (1, 2))]


class Told:
    """What an observer of a grid was told."""

    def __init__(self) -> None:
        self.started: list[Any] = []
        self.cells: list[Any] = []
        self.rounds: list[int] = []
        self.ends: list[CellFigures] = []

    def grid_started(self, cells: int, to_do: int, rounds: int, done: int, path: Path) -> None:
        self.started = [cells, to_do, rounds, done]

    def cell_started(self, name: str, rounds: int, done: int) -> None:
        self.cells.append((name, rounds, done))

    def round_finished(self, row: Any) -> None:
        self.rounds.append(row["round"])

    def cell_finished(self, figures: CellFigures) -> None:
        self.ends.append(figures)


class Local:
    """Runs cells in this process; `fail` names a cell and the round that fails in it."""

    def __init__(self, fail: tuple[str, int] | None = None, *, stop: bool = False) -> None:
        self._fail = fail
        self._stop = stop

    def __call__(self, work: compare.Work, stop: threading.Event, watch: Any) -> str:
        plan = RunPlan.prepare(work.cell.config)

        def before(partition: int, message: Any) -> None:
            watch()
            if message.metadata.message_type == "train" and self._fail is not None:
                number = int(message.content.config_records["config"]["server-round"])
                if (work.cell.name, number) == self._fail:
                    if self._stop:
                        stop.set()
                    raise ValueError("enough")

        try:
            execute(
                LocalGrid(app, plan.config.clients, before=before, recordings=work.path.parent),
                plan,
                work.path,
                observer=Memory(),
                workers=2,
                stop=stop,
                recovery=find_recovery(work.path) if work.action == "resume" else None,
            )
        except FedsimError as error:
            return str(error)
        return ""


def cells_of(axes: list[Axis] = AXES, **changed: Any) -> list[Cell]:
    return make_cells({**SMALL, **{k.replace("_", "-"): v for k, v in changed.items()}}, axes)


def go(
    output: Path, cells: list[Cell] | None = None, launch: Any = None
) -> tuple[Told, dict[str, CellFigures]]:
    told = Told()
    cells = cells or cells_of()
    compare.check_grid(output, cells)
    works = compare.find_work(output, cells, lambda config: None)
    with compare.begun(output, works):
        figures = compare.compare(
            works,
            output,
            target=0.2,
            stop=threading.Event(),
            launch=launch or Local(),
            observer=told,
        )
    return told, figures


def table(output: Path) -> Any:
    """The table without wall time, which no two runs have in common."""
    read = json.loads((output / "table.json").read_text())
    for row in [*read["table"], *read["cells"]]:
        for key in [key for key in row if key.startswith("seconds")]:
            del row[key]
    return read


def tables(output: Path) -> list[bytes]:
    return [(output / name).read_bytes() for name in ("table.csv", "cells.csv", "table.json")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "grid"
    told, figures = go(output)
    assert told.started == [4, 4, 8, 0]
    assert told.rounds == [0, 1, 2] * 4
    assert {f.status for f in figures.values()} == {"finished"}
    return output


NAMES = [
    "strategy=delta-fedavg,seed=1",
    "strategy=delta-fedavg,seed=2",
    "strategy=fedavgm,seed=1",
    "strategy=fedavgm,seed=2",
]


def test_every_cell_is_a_run_of_its_own_that_proves_itself(whole):
    assert [cell["name"] for cell in json.loads((whole / "compare.json").read_text())["cells"]] == (
        NAMES
    )
    for name in NAMES:
        run = load_run(whole / name)
        assert (run.status, f"strategy={run.config.strategy.name},seed={run.config.seed}") == (
            "finished",
            name,
        )
        assert verify(run.path).violations == []


def test_the_table_says_what_the_rows_say(whole):
    rows = {name: load_run(whole / name).round_rows for name in NAMES}
    read = json.loads((whole / "table.json").read_text())
    accuracies = [rows[name][-1]["global_accuracy"] for name in NAMES[:2]]
    mean = sum(accuracies) / 2
    assert read["table"][0]["final_accuracy_mean"] == pytest.approx(mean, rel=1e-15)
    # Of two, half the difference times the root of two.
    deviation = abs(accuracies[0] - accuracies[1]) / 2**0.5
    assert read["table"][0]["final_accuracy_std"] == pytest.approx(deviation, rel=1e-12)
    state = sum(a.nbytes for a in RunPlan.prepare(cells_of()[0].config).initial_state.values())
    cells = list(csv.DictReader((whole / "cells.csv").open()))
    assert [int(cell["up_bytes"]) for cell in cells] == [2 * 2 * state] * 4
    assert [cell["cell"] for cell in cells] == NAMES
    assert float(cells[3]["seconds"]) == sum(r["seconds"]["total"] for r in rows[NAMES[3]])
    assert "nan" not in b"".join(tables(whole)).decode().lower()


def test_a_second_call_repeats_nothing_and_ends_with_the_same_bytes(whole):
    before = tables(whole)

    def never(*_: Any) -> str:
        raise AssertionError("a finished cell was run again")

    told, _ = go(whole, launch=never)
    assert told.started == [4, 0, 8, 8]
    assert told.cells == []
    assert tables(whole) == before


@pytest.mark.parametrize("number", [1, 2])
def test_a_comparison_stopped_in_the_middle_of_a_cell_goes_on_there(whole, tmp_path, number):
    output = tmp_path / "grid"
    with pytest.raises(RunInterruptedError):
        go(output, launch=Local((NAMES[2], number), stop=True))
    finished = {name: load_run(output / name).round_rows for name in NAMES[:2]}
    told, _ = go(output)
    assert told.started == [4, 2, 8, 4 + number - 1]
    assert told.cells == [(NAMES[2], 2, number - 1), (NAMES[3], 2, 0)]
    assert told.rounds == [*range(number, 3), 0, 1, 2]
    assert {name: load_run(output / name).round_rows for name in NAMES[:2]} == finished
    assert table(output) == table(whole)


def test_a_cell_that_failed_is_told_and_tried_again_while_the_others_go_on(whole, tmp_path):
    output = tmp_path / "grid"
    told, figures = go(output, launch=Local((NAMES[1], 2)))
    assert [end.status for end in told.ends] == ["finished", "failed", "finished", "finished"]
    assert "enough" in figures[NAMES[1]].error
    assert [row["failed"] for row in table(output)["table"]] == [1, 0]
    told, figures = go(output)
    assert told.cells == [(NAMES[1], 2, 1)]
    assert table(output) == table(whole)


HUGE = {"learning_rate": 1e30, "momentum": 0.0}


def test_a_cell_that_diverged_is_a_result_and_not_run_again(tmp_path):
    output = tmp_path / "grid"
    cells = cells_of([Axis("learning-rate", (0.01, 1e30))], momentum=0.0)
    told, figures = go(output, cells)
    assert [end.status for end in told.ends] == ["finished", "diverged"]
    assert "with values that are not finite" in told.ends[1].error
    assert table(output)["table"][1]["final_accuracy_mean"] is None
    again, after = go(output, cells)
    assert again.cells == []
    assert after == figures
    # Who wants its rounds all the same gets them.
    told, _ = go(
        output, cells_of([Axis("learning-rate", (0.01, 1e30))], momentum=0.0, allow_divergence=True)
    )
    assert told.cells == [("learning-rate=1e+30", 2, 0)]
    assert [(end.status, end.rounds_done) for end in told.ends] == [("diverged", 2)]
    assert "nan" not in b"".join(tables(output)).decode().lower()


def test_a_run_says_whether_it_failed_because_it_diverged(tmp_path):
    for name, changed in (
        ("nan", HUGE),
        (
            "over",
            {**HUGE, "learning_rate": 1e18, "local_steps": 1, "weight_decay": 0.0, "norm": "group"},
        ),
    ):
        (cell,) = cells_of([Axis("seed", (42,))], **changed)
        work = compare.Work(cell, tmp_path / name, "run")
        assert Local()(work, threading.Event(), lambda: None) != ""
        assert load_run(tmp_path / name).manifest["diverged"] is True
    (cell,) = cells_of([Axis("seed", (42,))])
    work = compare.Work(cell, tmp_path / "other", "run")
    assert "enough" in Local(("seed=42", 1))(work, threading.Event(), lambda: None)
    assert "diverged" not in load_run(tmp_path / "other").manifest


def test_a_round_whose_clients_all_diverged_although_they_may_fail_has_diverged(tmp_path):
    (cell,) = cells_of([Axis("seed", (42,))], max_failures=9, **HUGE)
    work = compare.Work(cell, tmp_path / "run", "run")
    assert "no client of round 1 returned" in Local()(work, threading.Event(), lambda: None)
    assert load_run(tmp_path / "run").manifest["diverged"] is True


def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "grid"))


def test_cells_and_rounds_can_be_added_and_the_others_stay(whole, tmp_path):
    output = copy(whole, tmp_path)
    more = [AXES[0], Axis("seed", (3, 1, 2))]
    told, _ = go(output, cells_of(more))
    assert [name for name, *_ in told.cells] == [
        "strategy=delta-fedavg,seed=3",
        "strategy=fedavgm,seed=3",
    ]
    told, figures = go(output, cells_of(more, rounds=3))
    assert told.started == [6, 6, 18, 12]
    assert told.rounds == [3] * 6
    assert {f.rounds_done for f in figures.values()} == {3}
    with pytest.raises(InputError, match="rounds = 2 cannot be used; expected 3 or more"):
        go(output, cells_of(more))


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        (
            lambda: cells_of(alpha=0.25),
            "cell strategy=delta-fedavg,seed=1: alpha = 0.25 cannot be used; expected 0.5, "
            "with which the comparison was begun",
        ),
        (
            lambda: cells_of([AXES[0]]),
            "compares by strategy, seed, not by strategy; expected the same keys",
        ),
        (
            lambda: cells_of([AXES[0], Axis("seed", (1, 3))]),
            "has a cell strategy=delta-fedavg,seed=2 that the grid lacks; expected the same",
        ),
    ],
)
def test_another_grid_is_refused_with_what_differs(whole, tmp_path, cells, said):
    output = copy(whole, tmp_path)
    before = (output / "compare.json").read_bytes()
    with pytest.raises(InputError) as refused:
        go(output, cells())
    assert said in str(refused.value)
    assert (output / "compare.json").read_bytes() == before


def test_a_folder_that_is_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists already and is not a comparison"):
        go(tmp_path)
    (tmp_path / "compare.json").write_text("{")
    with pytest.raises(InputError, match=r"compare\.json cannot be read"):
        go(tmp_path)
    write_json(tmp_path / "compare.json", {"format": 2, "cells": []})
    with pytest.raises(InputError, match="has format 2; this version reads 1"):
        go(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["compare.json", "notes.txt"]


@pytest.mark.parametrize("left", ["nothing", "lock", "run.json", "half"])
def test_a_cell_killed_before_its_first_round_is_run_again(whole, tmp_path, left):
    output = copy(whole, tmp_path)
    path = output / NAMES[3]
    shutil.rmtree(path)
    if left == "lock":
        path.mkdir()
        (path / "lock").touch()
    if left == "half":
        path.mkdir()
        (path / "run.json.17.partial").write_text("{")
    if left == "run.json":
        plan = RunPlan.prepare(cells_of()[3].config)
        RunWriter.create(path, manifest_of(plan), plan.partition).close()
    told, _ = go(output)
    assert told.cells == [(NAMES[3], 2, 0)]
    assert table(output) == table(whole)


def test_a_damaged_cell_that_was_not_finished_goes_on_before_the_damage(whole, tmp_path):
    output = tmp_path / "grid"
    with pytest.raises(RunInterruptedError):
        go(output, launch=Local((NAMES[0], 2), stop=True))
    (output / NAMES[0] / "rounds" / "0001" / "global.safetensors").write_bytes(b"damage")
    told, _ = go(output)
    assert told.cells[0] == (NAMES[0], 2, 0)
    assert told.rounds[:2] == [1, 2]
    assert table(output) == table(whole)


def test_a_cell_killed_after_its_last_row_is_finished(whole, tmp_path):
    output = copy(whole, tmp_path)
    path = output / NAMES[1]
    manifest = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**manifest, "status": "running"}))
    fuzz.reseal(path)
    told, _ = go(output)
    assert told.cells == [(NAMES[1], 2, 2)]
    assert load_run(path).status == "finished"
    assert table(output) == table(whole)


def test_a_resumed_cell_is_set_as_the_grid_says_and_not_as_it_was_recorded(tmp_path):
    (cell,) = cells_of([Axis("seed", (42,))], workers=2)
    work = compare.Work(cell, tmp_path / cell.name, "resume")
    flags = compare.ProcessLauncher(tmp_path)._arguments(work)[2:]
    read = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
    assert (read["workers"], read["rounds"]) == ("2", "2")
    assert read["client-timeout"] == read["capture-budget"] == read["data-root"] == "none"
    recorded = {**cell.config.to_mapping(), "client-timeout": 300.0, "workers": None}
    asked = {key: parse_text(key, text) for key, text in read.items()}
    assert RunConfig.from_mapping({**recorded, **asked}) == cell.config


def test_a_second_process_in_the_same_folder_is_refused(whole, tmp_path):
    output = copy(whole, tmp_path)
    works = compare.find_work(output, cells_of(), lambda config: None)
    with (
        compare.begun(output, works),
        pytest.raises(InputError, match="is in use by another comparison"),
        compare.begun(output, works),
    ):
        pass


def test_all_cells_are_checked_before_the_first_is_started(tmp_path):
    def no_room(config: Any) -> None:
        if config.client_cpus > 1:
            raise InputError("too few cores")

    cells = cells_of([Axis("client-cpus", (1, 2))])
    with pytest.raises(InputError, match="cell client-cpus=2: too few cores"):
        compare.find_work(tmp_path / "grid", cells, no_room)
    assert list(tmp_path.iterdir()) == []


def test_the_disk_must_have_room_for_all_cells_together(tmp_path, monkeypatch):
    cells = cells_of()
    works = compare.find_work(tmp_path / "grid", cells, lambda config: None)
    assert [work.action for work in works] == ["run"] * 4
    needed = sum(work.needed_bytes for work in works)
    monkeypatch.setattr(compare, "free_bytes", lambda path: needed)
    compare.find_work(tmp_path / "grid", cells, lambda config: None)
    monkeypatch.setattr(compare, "free_bytes", lambda path: needed - 1)
    with pytest.raises(InputError, match=r"needs [0-9.]+ MB for 4 cells and its disk has "):
        compare.find_work(tmp_path / "grid", cells, lambda config: None)
    assert list(tmp_path.iterdir()) == []


BAD = [
    ([], "nothing to compare"),
    (["--seeds", "1,x"], "cell seed='x': seed = 'x' cannot be used"),
    (["--strategies", "fedavgm,best"], "cell strategy='best': strategy = 'best' cannot be used"),
    (["--vary", "alpha"], "--vary alpha cannot be used; expected KEY=A,B"),
    (["--vary", "alhpa=1,2"], "alhpa = '1,2' cannot be used; expected a known key, perhaps"),
    (["--seeds", "1,2", "--seed", "3"], "seed is both varied and set by a flag"),
    (["--seeds", "1,2", "--vary", "seed=3"], "seed is varied twice"),
    (
        ["--seeds", "1,2", "--target", "50"],
        "--target = '50' cannot be used; expected an accuracy",
    ),
    (["--seeds", "1,2", "--rouns", "3"], "rouns = '3' cannot be used; expected a known key"),
    (["--seeds", "1,2", "--output", "."], "exists already and is not a comparison"),
    (["--seeds", "1,2", "--capture-budget", "9 kB"], "cell seed=1: capture-budget = '9 kB' cannot"),
    (["--vary", "client-cpus=1,4096"], "cell client-cpus=4096: client-cpus = 4096 cannot be used"),
]


@pytest.mark.parametrize(("flags", "said"), BAD, ids=lambda value: " ".join(value)[:40])
def test_bad_input_is_one_sentence_and_exit_2_and_writes_nothing(
    flags, said, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").touch()
    assert cli.run(["compare", "--model", "cnn", *flags]) == 2
    out, err = capsys.readouterr()
    # The cells are looked at one by one, which may take a while.
    assert re.fullmatch(r"(preparing  \d+ cells\n)?", out)
    assert said in err
    assert err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_what_is_taken_from_no_run_is_passed_on_to_the_cells(tmp_path, monkeypatch):
    """Their configurations lie in run directories and files that `fedsim` trusts no more."""
    (tmp_path / "own_class.py").write_text(
        "from flwr.serverapp.strategy import FedAvg\nclass Own(FedAvg):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    started = []
    monkeypatch.setattr(simulation, "simulate", lambda plan, *_, **__: started.append(plan.config))
    output = tmp_path / "grid"
    axes = [Axis("strategy", ({"name": "own_class:Own", "dp": None}, "fedavgm"))]
    places = {"mirror": f"{tmp_path}/copies", "client_timeout": 60.0}
    cells = cells_of(axes, **places)
    own = cells[0].name
    compare.check_grid(output, cells)
    launcher = compare.ProcessLauncher(output)
    works = compare.find_work(output, cells, lambda config: None)
    output.mkdir()
    for work in works:
        assert cli.run(launcher._arguments(work)) == 0
    Local((own, 1))(works[0], threading.Event(), lambda: None)
    for asked in (cells, cells_of(axes)):
        (resumed, _) = compare.find_work(output, asked, lambda config: None)
        assert resumed.action == "resume"
        assert cli.run(launcher._arguments(resumed)) == 0
    assert [config.strategy for config in started] == [
        cell.config.strategy for cell in (*cells, cells[0], cells[0])
    ]
    copy = f"{tmp_path}/copies/{own}"
    assert [(config.mirror, config.client_timeout) for config in (started[0], *started[2:])] == [
        (copy, 60.0),
        (copy, 60.0),
        (None, None),
    ]


REAL = {**SMALL, "rounds": 4, "workers": 2}
TWO = [AXES[0], Axis("seed", (1,))]


@pytest.mark.matrix
@pytest.mark.slow
def test_a_comparison_that_is_interrupted_and_killed_ends_with_the_same_table(tmp_path):
    go(tmp_path / "whole", cells_of(TWO, rounds=4, workers=2))
    # Ray's sockets live below it, and the path of a socket has room for 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="fs-"))
    first, second = (folder / "grid" / name / "rounds.jsonl" for name in (NAMES[0], NAMES[2]))

    def start() -> subprocess.Popen[str]:
        flags = [f"--{key}={value}" for key, value in REAL.items()]
        grid = ["--strategies=delta-fedavg,fedavgm", "--seeds=1", "--target=0.2", "--output=grid"]
        return subprocess.Popen(
            [sys.executable, "-m", "fedsim", "compare", *flags, *grid],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def stop_when(rows: Path, number: int) -> tuple[int, str]:
        process = start()
        deadline = time.monotonic() + PATIENCE
        while not rows.exists() or not rows.read_bytes():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=PATIENCE)
        return process.returncode, err

    def nothing_runs() -> bool:
        return not [
            p
            for p in psutil.process_iter(["pid", "environ"])
            if (p.info["environ"] or {}).get("TMPDIR") == str(folder)
        ]

    try:
        code, err = stop_when(first, signal.SIGINT)
        assert code == 130
        assert err.splitlines()[-1] == (
            "fedsim: interrupted; the finished rounds are kept in grid, and the same command "
            "continues"
        )
        assert nothing_runs()
        code, _ = stop_when(second, signal.SIGKILL)
        assert code == -signal.SIGKILL
        before = first.read_bytes()
        out, err = start().communicate(timeout=PATIENCE)
        assert err == ""
        begun = "loading    torch, Flower and Ray\npreparing  2 cells\n"
        assert out.startswith(f"{begun}2 cells, 1 of them done before, ")
        assert first.read_bytes() == before
        assert table(folder / "grid") == table(tmp_path / "whole")
        deadline = time.monotonic() + PATIENCE
        while not nothing_runs():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        for rows in (first, second):
            assert verify(rows.parent).violations == []
    finally:
        shutil.rmtree(folder, ignore_errors=True)
