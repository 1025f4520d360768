"""A driver of a cluster, told what to do by its arguments; what it sees goes to stdout as JSON."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from fedsim.core.config import RunConfig
from fedsim.core.plan import RunPlan
from fedsim.flower.simulation import fit_pool, simulate
from fedsim.plugins.cluster import cluster
from tests.observers import Memory
from tests.patience import PATIENCE


class Killer(Memory):
    """Kills a raylet while a worker of it trains a client."""

    def __init__(self, victim: int) -> None:
        super().__init__()
        self._victim = psutil.Process(victim)
        self.killed_in_round = 0

    def _workers(self) -> list[str]:
        titles = []
        for child in self._victim.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                titles += [t for t in child.cmdline()[:1] if t.startswith("ray::ClientAppWorker")]
        return titles

    def round_started(self, round_number: int, participants: Sequence[int]) -> None:
        deadline = time.monotonic() + PATIENCE
        while round_number == 1 and not self._workers() and time.monotonic() < deadline:
            time.sleep(0.05)

    def client_finished(self, row: Mapping[str, Any]) -> None:
        if self.killed_in_round or row["round"] < 2:
            return
        if any(title.strip().endswith(".run") for title in self._workers()):
            self.killed_in_round = row["round"]
            self._victim.kill()


def run(config: RunConfig, output: Path, victim: int) -> dict[str, Any]:
    """Run, killing a raylet in the middle of a round."""
    observer = Killer(victim)
    pool = fit_pool(config)
    simulate(RunPlan.prepare(config), output, pool, observer=observer, stop=threading.Event())
    return {"workers": pool.workers, "killed": observer.killed_in_round}


def prepare(config: RunConfig, output: Path) -> dict[str, Any]:
    """Prepare the nodes, twice."""
    assert config.cluster is not None
    with cluster.connected(config.cluster):
        nodes = cluster.present_nodes()
        plan = RunPlan.prepare(config)
        seen = []
        for _ in range(2):
            with cluster.prepared(plan, output, nodes) as duty:
                checked = duty.checked == {node.id for node in nodes}
                seen.append([checked, len(duty.sharing), duty.data is not None])
        return {"cpus": [node.cpus for node in nodes], "seen": seen}


if __name__ == "__main__":
    # The actors find this module's package by its name, not as __main__.
    asked = RunConfig.from_json(sys.argv[2])
    what = {"run": run, "prepare": prepare}[sys.argv[1]]
    told = what(asked, Path(sys.argv[3]), *map(int, sys.argv[4:]))  # type: ignore[operator]
    sys.stdout.write(json.dumps(told))
    sys.stdout.flush()
    os._exit(0)
