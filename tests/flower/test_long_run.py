"""A round late in a run costs what an early one does: no memory, handle, thread or byte more."""

from __future__ import annotations

import concurrent.futures
import gc
import io
import itertools
import logging
import multiprocessing
import statistics
import threading
import tracemalloc
from collections.abc import Mapping
from dataclasses import dataclass, field
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
from fedsim.terminal import TerminalObserver
from tests.local_grid import LocalGrid

pytestmark = pytest.mark.matrix

ROUNDS = 220
TRACED, FIRST = 20, 100
"""Rounds from which memory is traced, and watched: what Python keeps to use again comes first."""
STRIDE = 20
MOST_BYTES = 1000
"""Of memory that a round may leave behind; a state has 80,000, telemetry 1,500."""


@dataclass
class Totals:
    """What the process of a run holds and has moved, after each round."""

    memory: list[int] = field(default_factory=list)
    handles: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    read: list[int] = field(default_factory=list)
    written: list[int] = field(default_factory=list)


class Meter(TerminalObserver):
    """Tells the run to a live terminal that nobody reads, and notes what the process holds."""

    def __init__(self) -> None:
        super().__init__(Console(file=io.StringIO(), force_terminal=True, width=100))
        self.process = psutil.Process()
        self.totals = Totals()

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
            self.totals.memory.append(tracemalloc.get_traced_memory()[0])
        self.totals.handles.append(self.process.num_fds())
        self.totals.threads.append(threading.active_count())
        counters = self.process.io_counters()
        self.totals.read.append(counters.read_chars)
        self.totals.written.append(counters.write_chars)


def in_a_round(totals: list[int], rounds: slice) -> float:
    """Give the usual growth from a round to the next."""
    kept = totals[rounds]
    return statistics.median(after - before for before, after in itertools.pairwise(kept))


def measure(output: Path) -> Totals:
    """Run as many rounds as it takes to see what each leaves behind."""
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
    meter = Meter()
    grid = LocalGrid(app, plan.config.clients, recordings=output.parent)
    execute(grid, plan, output, observer=meter, workers=2, stop=threading.Event())
    return meter.totals


@pytest.fixture(scope="module")
def totals(tmp_path_factory: pytest.TempPathFactory) -> Totals:
    # In a process of its own: what other tests leave behind may end at any moment.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, tmp_path_factory.mktemp("long") / "run").result()


def test_memory_is_flat(totals: Totals) -> None:
    half = len(totals.memory) // 2
    # The least of many: garbage that waits for its collection is no growth.
    growth = min(totals.memory[half:]) - min(totals.memory[:half])
    assert growth < MOST_BYTES * STRIDE * half


def test_no_round_leaves_a_file_open_or_a_thread(totals: Totals) -> None:
    assert len(set(totals.handles[1:])) == 1
    assert len(set(totals.threads[1:])) == 1


def test_a_late_round_reads_and_writes_what_an_early_one_does(totals: Totals) -> None:
    early, late = slice(10, 60), slice(-50, None)
    # Numbers of more digits make a row longer.
    assert abs(in_a_round(totals.read, late) - in_a_round(totals.read, early)) < 100
    assert abs(in_a_round(totals.written, late) - in_a_round(totals.written, early)) < 100
