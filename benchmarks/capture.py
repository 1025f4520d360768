"""What keeping gradients costs: time, bytes and memory, beside a run that keeps none.

ResNet18 on 3x32x32 images, batch 32, two workers of one thread each, in these ways:

- ``a``: nothing kept, gradients measured (the statistics of every step);
- ``a2``: nothing kept, nothing measured;
- ``a3``: nothing kept, gradients measured, ``deterministic = true``;
- ``b``: all steps, float32, dense;
- ``c``: all steps, float32, without dead taps (the default encoding);
- ``d``: all steps, bfloat16, without dead taps;
- ``e``: ``first:1``;
- ``f``: ``sketch:4096``;
- ``g``: the notebook's way: two bare processes clone the gradients of every step, without and
  with weight decay, into a list, and ``torch.save`` it at the end of the round. It is compared
  with ``g0``, the same loop that keeps nothing.

``a`` to ``f`` are whole runs. Time is ``seconds.clients`` of the steady rounds: the first one,
which loads the workers, is left out. It ends when the files are with the kernel, not when they are
on the disk: ``sync`` is how long an ``os.sync()`` takes that begins there, and ``time, synced``
counts it. It also waits for what the first round left behind, so that seconds with it are an upper
bound. Another one precedes each way.

Columns: ``time`` is relative to ``a``, ``g`` to ``g0``; ``ms a step`` is the time beyond that,
times two workers, for each captured step; ``GB`` and ``GB/s`` are captured bytes of the steady
rounds; ``of b`` compares the bytes of as many training steps; ``peak`` is the largest worker,
``more`` its difference to ``a``, of ``g`` to ``g0``; ``waiting`` is the share of the workers' time
in which they wait for the writer, of ``g`` in which it saves.

Each turn measures the disk too, with one file in the same folder. A run that captures can be no
faster than one that does not, and no faster than the disk: the last lines say how far it is from
the slower of the two.

Machines are noisy: the ways take turns, each turn begins with another, and every number is the
median over the turns, every ratio that of the turns' ratios.

    python benchmarks/capture.py [--turns 3] [--ways a,c,f] [--folder DISK] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import multiprocessing
import os
import queue
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BATCH = 32
WORKERS = 2
RATE, MOMENTUM, DECAY = 0.01, 0.9, 5e-4
STATE_BYTES = 45e6
"""Of ResNet18 with 100 classes, or of one dense gradient of it."""
BLOCK_BYTES = 16 * 2**20
MEMORY_SHARE = 0.6
"""Of the available memory, for the notebook's lists."""

Figures = dict[str, float]


@dataclass(frozen=True)
class Way:
    """A way to capture.

    Parameters
    ----------
    title : str
        What the table calls it.
    flags : str
        Of ``fedsim run``; empty for the notebook's loop.
    step_bytes : float
        Upper bound of what a training step writes, on average.
    """

    title: str
    flags: str = ""
    step_bytes: float = 0


WAYS = {
    "a": Way("none", "--capture none"),
    "a2": Way("none, no statistics", "--capture none --gradient-statistics false"),
    "a3": Way("none, deterministic", "--capture none --deterministic true"),
    "b": Way("all float32 dense", "--capture all --capture-encoding dense", STATE_BYTES),
    "c": Way("all float32", "--capture all --capture-encoding support", STATE_BYTES),
    "d": Way(
        "all bfloat16",
        "--capture all --capture-encoding support --capture-dtype bfloat16",
        STATE_BYTES / 2,
    ),
    "e": Way("first:1", "--capture first:1", STATE_BYTES),
    "f": Way("sketch:4096", "--capture sketch:4096", 4 * 4096),
    "g0": Way("bare loop"),
    "g": Way("bare loop, clones", step_bytes=2 * STATE_BYTES),
}


def measure_run(way: Way, clients: int, steps: int, rounds: int, folder: Path) -> Figures:
    """Run a simulation and add up its steady rounds."""
    require_disk(folder, rounds * clients * (steps * way.step_bytes + 2 * STATE_BYTES))
    run = folder / "run"
    samples = max(500, clients * steps * BATCH)  # five of each class, or fedsim refuses
    flags = (
        f"--dataset synthetic:{samples}:100 --partition iid --clients {clients} "
        f"--clients-per-round {clients} --rounds {rounds} --evaluate-every {rounds} "
        f"--local-steps {steps} --model resnet18 --batch-size {BATCH} --learning-rate {RATE} "
        f"--momentum {MOMENTUM} --weight-decay {DECAY} --workers {WORKERS} --client-cpus 1 "
        f"--device cpu {way.flags} --output {run}"
    )
    os.sync()
    process = subprocess.Popen(
        [sys.executable, "-m", "fedsim", "run", *flags.split()],
        cwd=ROOT,
        env={**os.environ, "FEDSIM_CACHE": str(folder / "cache")},
        stdout=subprocess.DEVNULL,
    )
    found: Figures = {}
    try:
        # The state of a round is written last: what is dirty then, the round leaves to the disk.
        wait_for(run / "rounds/0001/global.safetensors", process)
        found["dirty_bytes_before"] = dirty_bytes()
        wait_for(run / f"rounds/{rounds:04d}/global.safetensors", process)
        found["dirty_bytes_after"] = dirty_bytes()
        found["sync_seconds"] = timed(os.sync)
    finally:
        code = process.wait()
    if code != 0:
        raise SystemExit(f"the run with {way.flags} ended with {code}")
    round_rows, client_rows = (
        [json.loads(line) for line in (run / name).read_text().splitlines()]
        for name in ("rounds.jsonl", "clients.jsonl")
    )
    # Row 0 is the untrained model.
    steady = [row["seconds"]["clients"] for row in round_rows[2:]]
    ours = [row for row in client_rows if row["round"] > 1]
    assert len(steady) == rounds - 1  # noqa: S101
    assert len(ours) == clients * (rounds - 1)  # noqa: S101
    found.update(
        seconds=sum(steady),
        steps=sum(row["num_steps"] for row in ours),
        samples=sum(sum(row["batch_sizes"]) for row in ours),
        captured_steps=sum(row["num_steps_captured"] for row in ours),
        captured_bytes=sum(row["bytes_captured"] for row in ours),
        peak_bytes=max(row["peak_memory"]["process"] for row in client_rows),
        waiting_share=sum(row["seconds"]["write"] for row in ours)
        / sum(row["seconds"]["total"] for row in ours),
    )
    shutil.rmtree(run)
    os.sync()
    return found


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    """Return once a file is there, or the process is not."""
    while not path.exists() and process.poll() is None:
        time.sleep(0.02)


def _notebook(keep: bool, steps: int, path: Path, ready: Barrier, results: Any) -> None:
    """Train on one batch that is already there, and keep gradients as the notebook did."""
    import torch

    from fedsim.core.allocator import keep_freed_memory
    from fedsim.tasks.vision.models import build_model

    torch.set_num_threads(1)
    keep_freed_memory()
    model = build_model("resnet18", classes=100, norm="batch", seed=0)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY, fused=True
    )
    inputs, targets = torch.randn(BATCH, 3, 32, 32), torch.randint(0, 100, (BATCH,))
    named = dict(model.named_parameters())
    kept: list[dict[str, dict[str, torch.Tensor]]] = []

    def step(keep: bool) -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(model(inputs), targets).backward()
        if keep:
            raw, decayed = {}, {}
            for name, parameter in named.items():
                assert parameter.grad is not None  # noqa: S101
                raw[name] = parameter.grad.detach().clone()
                decayed[name] = parameter.grad.detach() + DECAY * parameter.detach()
            kept.append({"raw": raw, "decayed": decayed})
        optimizer.step()

    for _ in range(3):
        step(keep=False)
    ready.wait()
    started = time.perf_counter()
    for _ in range(steps):
        step(keep)
    trained = time.perf_counter()
    if keep:
        torch.save(kept, path)
    ended = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    results.put((ended - started, ended - trained, peak))


def measure_notebook(way: Way, steps: int, folder: Path) -> Figures:
    """Run the notebook's loop in two processes that start together."""
    require_disk(folder, WORKERS * steps * way.step_bytes)
    os.sync()
    keep = way.step_bytes > 0
    context = multiprocessing.get_context("spawn")
    ready, results = context.Barrier(WORKERS), context.Queue()
    paths = [folder / f"worker-{worker}.pt" for worker in range(WORKERS)]
    processes = [
        context.Process(target=_notebook, args=(keep, steps, path, ready, results))
        for path in paths
    ]
    for process in processes:
        process.start()
    figures: list[tuple[float, float, float]] = []
    while len(figures) < WORKERS:
        with contextlib.suppress(queue.Empty):
            figures.append(results.get(timeout=0.1))
        if any(process.exitcode for process in processes):
            for process in processes:
                process.kill()
            raise SystemExit("a process of the notebook's loop died; try fewer --notebook-steps")
    sync_seconds = timed(os.sync)
    for process in processes:
        process.join()
    spent, saving, peaks = zip(*figures, strict=True)
    found: Figures = {
        "seconds": max(spent),
        "steps": WORKERS * steps,
        "samples": WORKERS * steps * BATCH,
        "captured_steps": WORKERS * steps if keep else 0,
        "captured_bytes": sum(path.stat().st_size for path in paths if path.exists()),
        "peak_bytes": max(peaks),
        "waiting_share": sum(saving) / sum(spent),
        "sync_seconds": sync_seconds,
    }
    for path in paths:
        path.unlink(missing_ok=True)
    os.sync()
    return found


def measure_disk(folder: Path, size: float) -> dict[str, float | None]:
    """Measure bytes a second of one file, written and read from its beginning to its end."""
    require_disk(folder, size)
    path = folder / "disk"
    # Mapped memory is aligned as O_DIRECT wants it; random bytes do not compress.
    block = mmap.mmap(-1, BLOCK_BYTES)
    block.write(os.urandom(BLOCK_BYTES))
    blocks = max(1, round(size / BLOCK_BYTES))

    def write(flags: int) -> float:
        os.sync()
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | flags)
        try:
            started = time.perf_counter()
            written = sum(os.write(file, block) for _ in range(blocks))
            os.fsync(file)
            return written / (time.perf_counter() - started)
        finally:
            os.close(file)

    def read() -> float:
        file = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            taken, started = 0, time.perf_counter()
            while count := os.readv(file, [block]):
                taken += count
            return taken / (time.perf_counter() - started)
        finally:
            os.close(file)

    direct = None
    with contextlib.suppress(OSError):
        direct = write(os.O_DIRECT)
    path.unlink(missing_ok=True)
    found = {"write_fsync": write(0), "write_direct": direct, "read": read()}
    path.unlink()
    os.sync()
    return found


def require_disk(folder: Path, needed: float) -> None:
    """Refuse to begin what the disk has no room for."""
    if shutil.disk_usage(folder).free < 1.2 * needed + 1e9:
        raise SystemExit(f"{folder} has no room for {needed / 1e9:.0f} GB")


def memory_info(*names: str) -> float:
    """Add up lines of ``/proc/meminfo``, in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.split(":")[0] in names)


def dirty_bytes() -> float:
    """Count what files hold that is not on a disk yet."""
    return memory_info("Dirty", "Writeback")


def timed(action: Callable[[], None]) -> float:
    """Do it and give the seconds."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


Turn = dict[str, Any]
Formula = Callable[[Figures, Figures, Turn], float | None]


def _relative_bytes(own: Figures, _: Figures, turn: Turn) -> float | None:
    dense: Figures | None = turn.get("b")
    if dense is None:
        return None
    return own["captured_bytes"] / own["steps"] / (dense["captured_bytes"] / dense["steps"])


def _milliseconds(own: Figures, base: Figures, _: Turn) -> float | None:
    if not own["captured_steps"]:
        return None
    return 1e3 * (own["seconds"] - base["seconds"]) * WORKERS / own["captured_steps"]


def _synced(own: Figures, base: Figures, _: Turn) -> float:
    return (own["seconds"] + own["sync_seconds"]) / (base["seconds"] + base["sync_seconds"])


COLUMNS: dict[str, tuple[str, Formula]] = {
    "samples/s": (".0f", lambda own, base, turn: own["samples"] / own["seconds"]),
    "time": (".3f", lambda own, base, turn: own["seconds"] / base["seconds"]),
    "ms a step": (".2f", _milliseconds),
    "GB": (".3f", lambda own, base, turn: own["captured_bytes"] / 1e9),
    "of b": (".3f", _relative_bytes),
    "GB/s": (".3f", lambda own, base, turn: own["captured_bytes"] / own["seconds"] / 1e9),
    "peak MB": (".0f", lambda own, base, turn: own["peak_bytes"] / 1e6),
    "more MB": ("+.0f", lambda own, base, turn: (own["peak_bytes"] - base["peak_bytes"]) / 1e6),
    "waiting": (".1%", lambda own, base, turn: own["waiting_share"]),
    "sync s": (".2f", lambda own, base, turn: own["sync_seconds"]),
    "time, synced": (".3f", _synced),
}


def summarise(turns: list[Turn]) -> dict[str, dict[str, float | None]]:
    """Give the median of every column, by way."""
    rows: dict[str, dict[str, float | None]] = {}
    for name in (name for name in WAYS if name in turns[0]):
        base = "g0" if name in ("g0", "g") else "a"
        rows[name] = {
            column: _median([formula(turn[name], turn[base], turn) for turn in turns])
            for column, (_, formula) in COLUMNS.items()
        }
    return rows


def accept(turns: list[Turn], name: str, bandwidth: str) -> dict[str, float | None]:
    """Relate a way's time to the slower of the run without capture and the disk."""
    plain: list[float | None] = []
    synced: list[float | None] = []
    for turn in turns:
        own, speed = turn[name], turn["disk"][bandwidth]
        if speed is None:
            continue
        limit = max(turn["a"]["seconds"], own["captured_bytes"] / speed)
        plain.append(own["seconds"] / limit)
        synced.append((own["seconds"] + own["sync_seconds"]) / limit)
    return {"ratio": _median(plain), "ratio_with_sync": _median(synced)}


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _ways(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in WAYS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {','.join(WAYS)}")
    # What the others are compared with is always measured.
    bases = {"g0" if name in ("g0", "g") else "a" for name in names}
    return [name for name in WAYS if name in {*names, *bases, "a"}]


def _notebook_steps(asked: int) -> int:
    room = MEMORY_SHARE * memory_info("MemAvailable")
    fitting = int(room / (WORKERS * WAYS["g"].step_bytes))
    if fitting < 1:
        raise SystemExit("the memory has no room for one step of the notebook's loop")
    return min(asked, fitting)


def _at_least(least: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return value

    return count


def main() -> None:
    """Take turns, print the tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=_at_least(1), default=3)
    parser.add_argument("--clients", type=_at_least(1), default=4, help="in each round")
    parser.add_argument("--steps", type=_at_least(1), default=50, help="of a client in a round")
    parser.add_argument("--rounds", type=_at_least(2), default=2, help="of a run, 2 or more")
    parser.add_argument("--ways", type=_ways, default=list(WAYS), help="like a,c,f (default: all)")
    parser.add_argument("--folder", type=Path, help="on the disk to write to (default: temporary)")
    parser.add_argument(
        "--notebook-steps", type=_at_least(1), default=40, help="of a process, as memory allows"
    )
    parser.add_argument("--disk-gb", type=float, default=4.0, help="of the file on the disk")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    turns: list[Turn] = []
    with tempfile.TemporaryDirectory(dir=chosen.folder) as temporary:
        folder = Path(temporary)
        for number in range(chosen.turns):
            turn: Turn = {"disk": measure_disk(folder, chosen.disk_gb * 1e9)}
            turns.append(turn)
            shift = number * len(chosen.ways) // chosen.turns
            # One number for both loops: they are compared.
            notebook_steps = _notebook_steps(chosen.notebook_steps)
            for way in chosen.ways[shift:] + chosen.ways[:shift]:
                turn[way] = (
                    measure_run(WAYS[way], chosen.clients, chosen.steps, chosen.rounds, folder)
                    if WAYS[way].flags
                    else measure_notebook(WAYS[way], notebook_steps, folder)
                )
                rate = turn[way]["samples"] / turn[way]["seconds"]
                print(f"turn {number + 1}: {way} {rate:.0f} samples/s", flush=True)
    rows = summarise(turns)
    print()
    width = {column: max(9, len(column) + 2) for column in COLUMNS}
    print(f"{'':<26}" + "".join(f"{column:>{width[column]}}" for column in COLUMNS))
    for way, row in rows.items():
        cells = (f"{_shown(row[c], form):>{width[c]}}" for c, (form, _) in COLUMNS.items())
        print(f"{way:<3}{WAYS[way].title:<23}" + "".join(cells))
    print()
    disk = {name: _median([turn["disk"][name] for turn in turns]) for name in turns[0]["disk"]}
    for name, speed in disk.items():
        print(f"disk, {name:<13}{_shown(speed and speed / 1e9, '.3f'):>7} GB/s")
    limits = {
        way: {kind: accept(turns, way, kind) for kind in ("write_fsync", "write_direct")}
        for way in ("b", "c", "d")
        if way in rows
    }
    if limits:
        print("\ntime / max(time of a, bytes / disk)          (sync counted)")
    for way, ratios in limits.items():
        for kind, found in ratios.items():
            plain, synced = (_shown(value, ".3f") for value in found.values())
            print(f"{way:<3}{WAYS[way].title:<19}{kind:<15}{plain:>7}{synced:>17}")
    if chosen.json:
        options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(chosen).items()}
        result = {
            "options": options,
            "turns": turns,
            "medians": rows,
            "disk": disk,
            "acceptance": limits,
        }
        chosen.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
