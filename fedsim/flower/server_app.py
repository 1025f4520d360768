"""The server's app: a run directory around the round loop."""

from __future__ import annotations

import datetime
import platform
import shutil
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from flwr.serverapp import Grid

import fedsim
from fedsim.core.errors import InputError
from fedsim.core.models import resolve_device
from fedsim.core.partition import partition_sha256
from fedsim.core.plan import RunPlan
from fedsim.flower.rounds import RoundLoop, RunObserver
from fedsim.recording.writer import RunWriter
from strategies.registry import build_strategy


def default_output() -> Path:
    """Name a run directory by the present time, under ``runs/``."""
    return Path("runs") / datetime.datetime.now().strftime("%Y%m%d-%H%M%S")


def check_output(path: Path, needed_bytes: int) -> None:
    """Refuse a run directory that exists, or a disk that cannot hold the run.

    Raises
    ------
    InputError
        Naming the folder and, for a full disk, both numbers.
    """
    if path.exists() or path.is_symlink():
        raise InputError(
            f"output = {str(path)!r} exists already; allowed is a folder that does not, since a "
            "run is never overwritten"
        )
    parent = next(p for p in path.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if needed_bytes > free:
        raise InputError(
            f"output = {str(path)!r} needs {needed_bytes / 1e9:.1f} GB and its disk has "
            f"{free / 1e9:.1f} GB free; capture fewer steps or layers, or name another disk"
        )


def execute(
    grid: Grid,
    plan: RunPlan,
    output: Path,
    *,
    observer: RunObserver,
    workers: int,
    stop: threading.Event,
) -> None:
    """Run a plan over a grid into a new run directory, and leave its true status there.

    Parameters
    ----------
    grid : Grid
        How to reach the clients.
    plan : RunPlan
        What to run.
    output : Path
        The run directory to make.
    observer : RunObserver
        Who watches.
    workers : int
        Clients that train at the same time.
    stop : threading.Event
        Set by whoever wants the run to end.

    Raises
    ------
    FedsimError
        As `RunWriter.create` and `RoundLoop.run`; the run directory then says ``failed``.
    """
    writer = RunWriter.create(output, manifest_of(plan), plan.partition)
    try:
        observer.run_started(plan, workers, output)
        loop = RoundLoop(
            plan,
            grid=grid,
            strategy=build_strategy(plan.config.strategy, writer),
            writer=writer,
            observer=observer,
            workers=workers,
            stop=stop,
        )
        loop.run()
    except BaseException as error:
        writer.finish("failed", str(error) or type(error).__name__)
        raise
    writer.finish("finished")
    observer.run_finished(output)


def manifest_of(plan: RunPlan) -> dict[str, Any]:
    """Describe a run for ``run.json``: everything but its format and status."""
    data = plan.dataset
    buffers = {n: a for n, a in plan.initial_state.items() if n not in plan.parameters}
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": plan.config.to_mapping(),
        "seed": plan.config.seed,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("flwr", "ray", "torch", "torchvision", "numpy")},
            "fedsim": fedsim.__version__,
        },
        "device": {
            "type": resolve_device(plan.config.device).type,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "worker_threads": plan.config.client_cpus,
        },
        "model": {
            "arch": plan.config.model,
            "parameters": [
                {"name": n, "shape": list(s), "dtype": "float32"}
                for n, s in plan.parameters.items()
            ],
            "buffers": [
                {"name": n, "shape": list(a.shape), "dtype": a.dtype.name}
                for n, a in buffers.items()
            ],
        },
        "dataset": {
            "name": data.spec.name,
            "classes": data.spec.classes,
            "mean": list(data.spec.mean),
            "std": list(data.spec.std),
            "train_size": data.spec.train_size,
            "test_size": data.spec.test_size,
            "sha256": data.sha256(),
        },
        "partition": {"sha256": partition_sha256(plan.partition), "sizes": plan.sizes},
    }
