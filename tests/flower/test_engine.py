"""The death of Ray's own processes, of the server and of the terminal."""

import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from fedsim.recording.reader import load_run
from fedsim.recording.verify import verify
from tests.flower.test_simulation import ROOT, SMALL, finish, folder, leftovers, start, wait_for
from tests.patience import PATIENCE

__all__ = ["folder"]

LONG = [*SMALL, "--rounds", "500", "--output", "run"]


def under_way(folder, process):
    rows = folder / "run" / "rounds.jsonl"
    wait_for(lambda: rows.exists() and rows.read_bytes().count(b"\n") >= 2, process)


def nothing_is_left(folder):
    deadline = time.monotonic() + PATIENCE
    while leftovers(folder) != ([], []):
        assert time.monotonic() < deadline, leftovers(folder)
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("gcs_server", marks=pytest.mark.matrix), "raylet"])
def test_the_death_of_the_engine_ends_the_run_with_that_cause(folder, name):
    process = start(LONG, folder)
    under_way(folder, process)
    children = psutil.Process(process.pid).children()
    next(child for child in children if child.name() == name).kill()
    code, _, err = finish(process)
    # Ray's own C++ may complain before.
    assert code == 1
    assert err.endswith(f"fedsim: Ray's process {name} died, and with it the workers\n")
    assert "Traceback" not in err
    nothing_is_left(folder)
    run = load_run(folder / "run")
    assert run.status == "failed"
    assert run.manifest["error"] == f"Ray's process {name} died, and with it the workers"
    assert verify(run.path).violations == []


@pytest.mark.slow
def test_a_finished_run_stays_finished_where_no_engine_starts_to_extend_it(folder, run_locally):
    path = run_locally(rounds=1, capture="none").path
    before = (path / "run.json").read_bytes()
    broken = (
        "import ray, sys\n"
        "def init(*_, **__): raise RuntimeError('no engine today')\n"
        "ray.init = init\n"
        "from fedsim import cli\n"
        "sys.exit(cli.run(sys.argv[1:]))\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", broken, "resume", str(path), "--rounds", "2", "--workers", "1"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert process.returncode == 1
    assert "fedsim: Flower's Ray engine could not run: no engine today" in process.stderr
    assert (path / "run.json").read_bytes() == before
    assert verify(path).violations == []


@pytest.fixture
def hangup():
    """Let children take SIGHUP, which they ignore where these tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.matrix
@pytest.mark.slow
@pytest.mark.usefixtures("hangup")
def test_a_closed_terminal_ends_a_run_like_an_interrupt(folder):
    process = start(LONG, folder)
    under_way(folder, process)
    process.send_signal(signal.SIGHUP)
    code, _, err = finish(process)
    assert code == 130
    assert "Traceback" not in err
    nothing_is_left(folder)
    assert verify(folder / "run").violations == []


@pytest.mark.matrix
@pytest.mark.slow
def test_workers_that_need_more_memory_than_there_is_end_the_run_with_that_cause(folder):
    process = start(
        LONG,
        folder,
        RAY_memory_usage_threshold="0.01",
        RAY_memory_monitor_refresh_ms="50",
    )
    code, _, err = finish(process)
    assert code == 1
    assert re.search(
        r"^fedsim: .*: (its worker|the last) was killed for want of memory with [\d.]+ of [\d.]+ "
        r"GB in use, at most 1% allowed; fewer workers need less$",
        err,
        re.MULTILINE,
    )
    assert "Traceback" not in err
    nothing_is_left(folder)


@pytest.mark.matrix
@pytest.mark.slow
def test_the_server_alone_can_be_killed_without_leaving_anything(folder):
    process = start(LONG, folder)
    under_way(folder, process)
    process.kill()
    code, _, _ = finish(process)
    assert code == -9
    nothing_is_left(folder)
    assert load_run(folder / "run").status == "running"
