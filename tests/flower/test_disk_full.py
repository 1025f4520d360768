from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedsim.core.config import RunConfig
from fedsim.core.errors import DiskFullError
from fedsim.core.plan import RunPlan
from fedsim.flower.client_app import app
from fedsim.flower.server_app import execute
from fedsim.recording.files import read_lines
from fedsim.recording.verify import verify
from tests.faults import Fault
from tests.local_grid import LocalGrid
from tests.observers import Memory
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]
DISK = 4 * 2**20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk takes more rights than this user has")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def plan_of(**changes: Any) -> RunPlan:
    values = {
        "dataset": "synthetic:240:10",
        "model": "cnn",
        "clients": 4,
        "clients-per-round": 3,
        "rounds": 20,
        "batch-size": 10,
        "max-failures": 3,
        "device": "cpu",
    }
    return RunPlan.prepare(RunConfig.from_mapping({**values, **changes}))


# A round keeps three clients, 19 steps of 78 kB in all with capture = all, and states and deltas
# of 80 kB each: about 1.9 MB; without gradients 0.4 MB.
@pytest.mark.parametrize(
    ("capture", "cause"),
    [("all", "has no room for its gradients"), ("none", "No space left on device")],
)
def test_a_full_disk_stops_the_run_and_keeps_what_was_finished(
    disk: Path, capture: str, cause: str
) -> None:
    plan = plan_of(capture=capture)
    run = disk / "run"
    observer = Memory()
    grid = LocalGrid(app, 4, recordings=disk)
    with pytest.raises(DiskFullError, match=f"the disk of {run} is full: .*{cause}"):
        execute(grid, plan, run, observer=observer, workers=2, stop=threading.Event())
    rounds = [row["round"] for row in read_lines(run / "rounds.jsonl")]
    assert rounds == list(range(len(rounds)))
    assert 2 <= len(rounds) < 20
    assert observer.of("round finished") == [("round finished", r) for r in rounds]
    manifest = json.loads((run / "run.json").read_bytes())
    assert manifest["status"] == "failed"
    assert cause in manifest["error"]
    assert sorted(p.name for p in (run / "rounds").iterdir()) == [f"{r:04d}" for r in rounds]
    assert list(run.rglob("*.partial")) == []
    findings = verify(run)
    assert findings.violations == []
    assert findings.checks["state"].proven == len(rounds)


@pytest.mark.matrix
@pytest.mark.slow
def test_a_full_disk_ends_the_command_with_one_sentence(disk: Path, tmp_path: Path) -> None:
    flags = (
        "--model cnn --clients 4 --clients-per-round 3 --rounds 1 --capture all --max-failures 3 "
        f"--device cpu --output {disk}/run"
    )
    # The check before the first round would refuse a disk that is full from the start.
    full = Fault("disk full", "before training", 1)
    (tmp_path / "marks").mkdir()
    process = subprocess.run(
        [
            *(sys.executable, "-m", "tests.faults", str(full), str(tmp_path / "marks")),
            *("run", *flags.split()),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    err = process.stderr
    assert process.returncode == 1
    assert err.startswith(f"fedsim: the disk of {disk}/run is full: ")
    assert err.count("\n") == 1
    assert verify(disk / "run").violations == []
    # A client that was still training may leave files of round 1, which a resume removes.
    assert [row["round"] for row in read_lines(disk / "run" / "rounds.jsonl")] == [0]
