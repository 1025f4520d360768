"""Samples per second of a simulation, beside a sequential loop and beside the limit.

Five ways to train ResNet18 on 3x32x32 images, batch 32, SGD with momentum and weight decay:

- ``fedsim``: a whole run with one-thread workers, capture and statistics off; steady rounds (the
  first one, which loads the workers, is left out), from drawing the participants to the written
  state.
- ``sequential``: the loop that a user writes first: DataLoader, torchvision's transforms,
  torch.optim.SGD, one process with all threads.
- ``sequential, bare``: the same without any data pipeline and with the fused optimizer.
- ``limit``: bare processes of one thread, as many as fedsim has workers, that only train
  torchvision's model with the fused optimizer.
- ``limit, own model``: the same with fedsim's ResNet18, whose arithmetic skips what is always
  zero, and its allocator settings: what a simulation without any cost of its own would reach.

Machines are noisy: the ways take turns, and every ratio is the median over the turns.

    python benchmarks/throughput.py [--turns 3] [--seconds 20] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BATCH = 32
CLIENTS = 8
SAMPLES_PER_CLIENT = 2_400
RATE, MOMENTUM, DECAY = 0.01, 0.9, 5e-4


def _model(own: bool) -> Any:
    if own:
        from fedsim.core.allocator import keep_freed_memory
        from fedsim.tasks.vision.models import build_model

        keep_freed_memory()
        return build_model("resnet18", classes=100, norm="batch", seed=0)
    from torchvision.models import resnet18

    return resnet18(weights=None, num_classes=100)


def _optimizer(model: Any, *, fused: bool | None) -> Any:
    import torch

    return torch.optim.SGD(
        model.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY, fused=fused
    )


def _bare(threads: int, own: bool, seconds: float, ready: Barrier, results: Any) -> None:
    """Train on one batch that is already there."""
    import torch

    torch.set_num_threads(threads)
    model = _model(own)
    optimizer = _optimizer(model, fused=True)
    inputs, targets = torch.randn(BATCH, 3, 32, 32), torch.randint(0, 100, (BATCH,))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()

    for _ in range(3):
        step()
    ready.wait()
    steps, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds:
        step()
        steps += 1
    results.put(steps * BATCH / spent)


def _sequential(seconds: float, ready: Barrier, results: Any) -> None:
    """Train as a notebook does."""
    import torch
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms
    from torchvision.transforms.functional import to_pil_image

    from fedsim.core.allowance import usable_cpus

    torch.set_num_threads(usable_cpus())
    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.5,) * 3, (0.25,) * 3),
        ]
    )

    class Images(Dataset[Any]):
        def __init__(self) -> None:
            pixels = torch.randint(0, 256, (2_000, 3, 32, 32), dtype=torch.uint8)
            self.images = [to_pil_image(p) for p in pixels]

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, index: int) -> Any:
            return transform(self.images[index]), index % 100

    model = _model(own=False)
    optimizer = _optimizer(model, fused=None)
    loader = DataLoader(Images(), batch_size=BATCH, shuffle=True, drop_last=True)

    def train(limit: float) -> float:
        steps, started = 0, time.perf_counter()
        while True:
            for inputs, targets in loader:
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
                steps += 1
                if (spent := time.perf_counter() - started) >= limit:
                    return steps * BATCH / spent

    train(0.5)
    ready.wait()
    results.put(train(seconds))


def measure_processes(target: Any, arguments: tuple[Any, ...], processes: int) -> float:
    """Run `target` in fresh processes that start together; sum their samples per second."""
    context = multiprocessing.get_context("spawn")
    ready, results = context.Barrier(processes), context.Queue()
    started = [
        context.Process(target=target, args=(*arguments, ready, results)) for _ in range(processes)
    ]
    for process in started:
        process.start()
    total = sum(float(results.get()) for _ in started)
    for process in started:
        process.join()
    return total


def measure_fedsim(workers: int, rounds: int) -> float:
    """Run a simulation and take the samples per second of its steady rounds."""
    with tempfile.TemporaryDirectory() as folder:
        flags = (
            f"--dataset synthetic:{CLIENTS * SAMPLES_PER_CLIENT}:100 --partition iid "
            f"--clients {CLIENTS} --clients-per-round {CLIENTS} --rounds {rounds} "
            f"--evaluate-every {rounds} --capture none --gradient-statistics false "
            f"--model resnet18 --batch-size {BATCH} "
            f"--learning-rate {RATE} --momentum {MOMENTUM} --weight-decay {DECAY} "
            f"--workers {workers} --device cpu --output {folder}/run"
        )
        subprocess.run(
            [sys.executable, "-m", "fedsim", "run", *flags.split()],
            cwd=ROOT,
            env={**os.environ, "FEDSIM_CACHE": f"{folder}/cache"},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        lines = Path(folder, "run/rounds.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
    steady = [row["seconds"]["clients"] for row in rows[2:]]
    assert len(steady) == rounds - 1  # noqa: S101
    return CLIENTS * SAMPLES_PER_CLIENT * len(steady) / sum(steady)


def main() -> None:
    """Take turns, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each loop in a turn")
    parser.add_argument("--rounds", type=int, default=2, help="of fedsim in a turn, 2 or more")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    from fedsim.core.allowance import usable_cpus

    workers = usable_cpus()
    rates: dict[str, list[float]] = {
        "fedsim": [],
        "limit": [],
        "limit, own model": [],
        "sequential": [],
        "sequential, bare": [],
    }
    for turn in range(chosen.turns):
        rates["limit"].append(measure_processes(_bare, (1, False, chosen.seconds), workers))
        own = measure_processes(_bare, (1, True, chosen.seconds), workers)
        rates["limit, own model"].append(own)
        rates["fedsim"].append(measure_fedsim(workers, chosen.rounds))
        rates["sequential"].append(measure_processes(_sequential, (chosen.seconds,), 1))
        bare = measure_processes(_bare, (workers, False, chosen.seconds), 1)
        rates["sequential, bare"].append(bare)
        shown = ", ".join(f"{name} {rate[-1]:.0f}" for name, rate in rates.items())
        print(f"turn {turn + 1}: {shown} samples/s", flush=True)
    print()
    print(f"{'':<18}{'samples/s':>12}{'fedsim is':>14}")
    result: dict[str, Any] = {"workers": workers, "samples_per_second": rates, "ratio": {}}
    for name, rate in rates.items():
        ratio = statistics.median(f / r for f, r in zip(rates["fedsim"], rate, strict=True))
        result["ratio"][name] = ratio
        print(f"{name:<18}{statistics.median(rate):>12.0f}{ratio:>12.2f} x")
    if chosen.json:
        chosen.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
