"""A round late in a run costs what an early one does: no memory, handle, thread or byte more."""

from __future__ import annotations

import gc
import io
import itertools
import logging
import statistics
import threading
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.cells import cached_cell_len
from rich.console import Console

from fedsim.core.config import RunConfig
from fedsim.core.plan import RunPlan
from fedsim.flower.client_app import app
from fedsim.flower.server_app import execute
from fedsim.report.terminal import TerminalObserver
from tests.local_grid import LocalGrid

ROUNDS = 220
TRACED, FIRST = 20, 100
"""Rounds from which memory is traced, and watched: what Python keeps to use again comes first."""
STRIDE = 20
MOST_BYTES = 1000
"""Of memory that a round may leave behind; a state has 80,000, telemetry 1,500."""


class Meter(TerminalObserver):
    """Tells the run to a live terminal that nobody reads, and notes what the process holds."""

    def __init__(self) -> None:
        super().__init__(Console(file=io.StringIO(), force_terminal=True, width=100))
        self.process = psutil.Process()
        self.memory: list[int] = []
        self.handles: list[int] = []
        self.threads: list[int] = []
        self.read: list[int] = []
        self.written: list[int] = []

    def round_finished(self, row: Mapping[str, Any]) -> None:
        super().round_finished(row)
        # What was printed is the reader's, not the run's.
        stream = self._console.file
        stream.seek(0)
        stream.truncate()
        if row["round"] == TRACED:
            tracemalloc.start()
        elif row["round"] > FIRST and (row["round"] - FIRST) % STRIDE == 0:
            # Rich remembers the widths of the last few thousand texts.
            cached_cell_len.cache_clear()
            gc.collect()
            self.memory.append(tracemalloc.get_traced_memory()[0])
        self.handles.append(self.process.num_fds())
        self.threads.append(threading.active_count())
        counters = self.process.io_counters()
        self.read.append(counters.read_chars)
        self.written.append(counters.write_chars)


def in_a_round(totals: list[int], rounds: slice) -> float:
    """Give the usual growth from a round to the next."""
    kept = totals[rounds]
    return statistics.median(after - before for before, after in itertools.pairwise(kept))


@pytest.fixture(scope="module")
def meter(tmp_path_factory: pytest.TempPathFactory) -> Meter:
    # Flower logs every round, and pytest keeps what is logged.
    logging.getLogger("flwr").setLevel(logging.CRITICAL + 1)
    values = {
        "dataset": "synthetic:60:3",
        "model": "cnn",
        "clients": 4,
        "clients-per-round": 2,
        "rounds": ROUNDS,
        "min-samples": 5,
        "local-steps": 1,
        "batch-size": 4,
        "capture": "first:1",
        "device": "cpu",
    }
    plan = RunPlan.prepare(RunConfig.from_mapping(values))
    output: Path = tmp_path_factory.mktemp("long") / "run"
    found = Meter()
    try:
        grid = LocalGrid(app, plan.config.clients, recordings=output.parent)
        stop = threading.Event()
        execute(grid, plan, output, observer=found, workers=2, stop=stop)
    finally:
        tracemalloc.stop()
        logging.getLogger("flwr").setLevel(logging.NOTSET)
    return found


def test_memory_is_flat(meter: Meter) -> None:
    half = len(meter.memory) // 2
    # The least of many: garbage that waits for its collection is no growth.
    growth = min(meter.memory[half:]) - min(meter.memory[:half])
    assert growth < MOST_BYTES * STRIDE * half


def test_no_round_leaves_a_file_open_or_a_thread(meter: Meter) -> None:
    assert len(set(meter.handles[1:])) == 1
    assert len(set(meter.threads[1:])) == 1


def test_a_late_round_reads_and_writes_what_an_early_one_does(meter: Meter) -> None:
    early, late = slice(10, 60), slice(-50, None)
    # Numbers of more digits make a row longer.
    assert abs(in_a_round(meter.read, late) - in_a_round(meter.read, early)) < 100
    assert abs(in_a_round(meter.written, late) - in_a_round(meter.written, early)) < 100
