from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim.core.config import RunConfig
from fedsim.core.plan import RunPlan
from fedsim.flower.client_app import app
from fedsim.flower.server_app import execute
from tests.local_grid import LocalGrid
from tests.observers import Memory

SMALL = {
    "dataset": "digits",
    "model": "cnn",
    "clients": 6,
    "clients-per-round": 3,
    "rounds": 3,
    "batch-size": 32,
    "capture": "first:3",
    "device": "cpu",
}

MakeRun = Callable[..., Path]


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """Record a run over the in-process grid; clients in `failing` raise."""

    def make(
        name: str = "run",
        *,
        failing: tuple[int, ...] = (),
        stop_after: int = 0,
        observer: Any = None,
        told: Callable[[Path], None] = lambda path: None,
        **values: Any,
    ) -> Path:
        keys = {key.replace("_", "-"): value for key, value in values.items()}
        plan = RunPlan.prepare(RunConfig.from_mapping({**SMALL, **keys}))
        path = tmp_path_factory.mktemp("runs") / name
        told(path)

        def before(partition: int, message: Any) -> None:
            if message.metadata.message_type != "train":
                return
            number = int(message.content.config_records["config"]["server-round"])
            if partition in failing or (stop_after and number > stop_after):
                raise ValueError("enough")

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            execute(
                LocalGrid(app, plan.config.clients, before=before, recordings=path.parent),
                plan,
                path,
                observer=observer or Memory(),
                workers=2,
                stop=threading.Event(),
            )
        finally:
            torch.set_num_threads(threads)
        return path

    return make


@pytest.fixture(scope="session")
def small(make_run: MakeRun) -> Path:
    """Three rounds of three of six clients, three steps captured. Never write into it."""
    return make_run("small")


@pytest.fixture(scope="session")
def other(make_run: MakeRun) -> Path:
    """Two rounds of the same clients with sketches, in both of which client 3 fails."""
    return make_run("other", failing=(3,), capture="sketch:512", max_failures=3, rounds=2)
