"""What all tests share: a cache of their own, torch on one thread, small runs."""

from __future__ import annotations

import gc
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.tasks.vision.datasets import load_dataset


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Let what tests start take SIGINT, which a shell's background job would inherit ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Converted datasets of this session, never the user's."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDSIM_CACHE", str(folder))
        yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session", autouse=True)
def frozen() -> None:
    """Keep what imports made out of collections, which some of Flower's strategies ask for."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Two threads for steps of milliseconds wait for each other where cores are busy."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits(cache):
    return load_dataset("digits", data_root=None, seed=42)


@pytest.fixture(scope="session")
def cifar_root():
    root = os.environ.get("FEDSIM_DATA_ROOT")
    if not root:
        pytest.skip("FEDSIM_DATA_ROOT, the folder of the CIFAR archives, is not set")
    if not Path(root, "cifar-100-python").is_dir():
        pytest.skip("FEDSIM_DATA_ROOT holds no folder cifar-100-python")
    return root


@pytest.fixture(scope="session")
def cifar100(cache, cifar_root):
    return load_dataset("cifar100", data_root=cifar_root, seed=42)


@pytest.fixture
def global_generators():
    """Read the state of every global generator, as a value that can be compared."""

    def read():
        name, keys, *rest = np.random.get_state()
        return torch.get_rng_state().tolist(), (name, keys.tolist(), *rest), random.getstate()

    return read


# --- small runs, for what reads runs

SMALL = {
    "dataset": "synthetic:480:10",
    "model": "cnn",
    "clients": 6,
    "clients-per-round": 3,
    "rounds": 3,
    "batch-size": 8,
    "capture": "first:3",
    "device": "cpu",
}

MakeRun = Callable[..., Path]


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """Record a run over the in-process grid; clients in `failing` raise."""
    # Here: tests of core need none of these.
    from fedsim.core.config import RunConfig
    from fedsim.core.plan import RunPlan
    from fedsim.flower.client_app import app
    from fedsim.flower.server_app import execute
    from tests.local_grid import LocalGrid
    from tests.observers import Memory

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

        execute(
            LocalGrid(app, plan.config.clients, before=before, recordings=path.parent),
            plan,
            path,
            observer=observer or Memory(),
            workers=2,
            stop=threading.Event(),
        )
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
