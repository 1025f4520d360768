from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fedsim.core.config import RunConfig
from fedsim.core.plan import RunPlan
from fedsim.flower.client_app import app
from fedsim.flower.server_app import execute
from fedsim.recording.recovery import find_recovery
from tests.local_grid import LocalGrid
from tests.observers import Memory


@pytest.fixture(scope="session")
def plan(cache: Path) -> RunPlan:
    # Partitions of 263, 227, 615 and 333 samples; a step of the model has 78,184 bytes.
    return RunPlan.prepare(
        RunConfig.from_mapping(
            {
                "dataset": "digits",
                "model": "cnn",
                "clients": 4,
                "clients-per-round": 3,
                "rounds": 2,
                "batch-size": 64,
                "client": {"1": {"batch-size": 113, "local-epochs": 2, "learning-rate": 0.02}},
                "capture": "all",
                "device": "cpu",
            }
        )
    )


@dataclass
class Recorded:
    """A run directory, and what was in it when the run told something."""

    path: Path
    plan: RunPlan
    moments: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    killed: Path = Path()


class Photographer:
    """Keeps the contents of the run directory at every call; copies it in mid-round."""

    def __init__(self, recorded: Recorded) -> None:
        self._recorded = recorded

    def _keep(self, moment: str) -> None:
        root = self._recorded.path
        files = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        self._recorded.moments.append((moment, files))

    def run_started(self, plan: RunPlan, workers: int, path: Path) -> None:
        self._keep("run started")

    def warned(self, text: str) -> None:
        raise AssertionError(text)

    def round_started(self, round_number: int, participants: Sequence[int]) -> None:
        self._keep(f"round {round_number} started")

    def client_finished(self, row: Mapping[str, Any]) -> None:
        moment = f"client {row['partition']} finished in round {row['round']}"
        self._keep(moment)
        if moment == "client 3 finished in round 2":
            shutil.copytree(self._recorded.path, self._recorded.killed)

    def client_failed(self, round_number: int, partition: int, reason: str) -> None:
        raise AssertionError(reason)

    def round_finished(self, row: Mapping[str, Any]) -> None:
        self._keep(f"round {row['round']} finished")

    def run_finished(self, path: Path) -> None:
        self._keep("run finished")


@pytest.fixture(scope="session")
def recorded(plan: RunPlan, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Two rounds of the plan, every step captured. Never write into it: copy it."""
    folder = tmp_path_factory.mktemp("recorded")
    recorded = Recorded(path=folder / "run", plan=plan, killed=folder / "killed")
    execute(
        LocalGrid(app, plan.config.clients, recordings=folder),
        plan,
        recorded.path,
        observer=Photographer(recorded),
        workers=2,
        stop=threading.Event(),
    )
    return recorded


@pytest.fixture
def copied(recorded: Recorded, tmp_path: Path) -> Path:
    """A copy of the run directory to break."""
    return Path(shutil.copytree(recorded.path, tmp_path / "run"))


def own_folder(nodes: Path) -> Callable[[int], dict[str, Any]]:
    """Let each client record into a folder of its own below `nodes`."""
    return lambda partition: {"recordings": str(nodes / str(partition)), "capture": True}


def record(
    plan: RunPlan, path: Path, node_config: Callable[[int], dict[str, Any]], *, resume: bool = False
) -> None:
    """Run a plan over the in-process grid, each node configured by its client."""
    execute(
        LocalGrid(app, plan.config.clients, node_config=node_config),
        plan,
        path,
        observer=Memory(),
        workers=2,
        stop=threading.Event(),
        recovery=find_recovery(path) if resume else None,
    )
