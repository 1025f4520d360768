"""What a client-round of the small model costs beside its training, at 1,000 and 10,000 clients.

Runs ``fedsim run`` with the small model, two workers and a real Ray engine, and looks at it from
outside. The baseline of the same run is what one cannot do without: two bare processes that train
the very same clients on the very same batches one after the other, with nothing sent, folded,
measured or written.

- ``wall``: seconds of the rounds, evaluation left out, times two workers, less the clients' own
  seconds of training and loading, for each client-round. On a machine with two cores the
  server has no core of its own: what it computes is in there, and so is all waiting.
- ``over bare``: the same, less the wall of the bare processes in place of the clients' own seconds.
  The server's work stretches the clients' seconds on two cores, so this is the stricter one.
- ``server``, ``workers``, ``Ray``: processor time of the processes during the rounds, for each
  client-round; ``bare`` that of the baseline. They tell most where other work is on the machine.
- ``start``: from the command to the row of round 0, without its evaluation.
- ``server MB``: what the server has allocated and nobody shares (``RssAnon``), at the first and the
  last round that was seen, and its rise for each round in between, by least squares.
- files and bytes of the run directory for each client-round; seconds of ``fedsim verify``, of
  ``load_run`` with all rows, and of ``fedsim report``.

    python benchmarks/scale.py [--sizes 1000:100 10000:1000] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).parents[1]
WORKERS = 2
SAMPLES, BATCH_SIZE = 10, 5
"""Training samples of a client, and of a step: two local steps."""


def command_of(name: str, *flags: str) -> list[str]:
    """Give the command line of a command of fedsim."""
    return [sys.executable, "-m", "fedsim", name, *flags]


def options_of(clients: int, a_round: int, rounds: int) -> list[str]:
    """Give the flags of a run; the bare processes take the same configuration from its record."""
    return (
        f"--model cnn --dataset synthetic:{SAMPLES * clients}:10 --partition iid --min-samples 1 "
        f"--clients {clients} --clients-per-round {a_round} --rounds {rounds} "
        f"--batch-size {BATCH_SIZE} --capture none --device cpu --workers {WORKERS} "
        f"--evaluate-every {rounds}"
    ).split()


def spent(server: psutil.Process) -> dict[str, float]:
    """Read the processor seconds of the server, its workers and Ray's own processes."""
    seconds = {"server": sum(server.cpu_times()[:2]), "workers": 0.0, "Ray": 0.0}
    for process in server.children(recursive=True):
        kind = "workers" if "ray::ClientApp" in " ".join(process.cmdline()) else "Ray"
        seconds[kind] += sum(process.cpu_times()[:2])
    return seconds


def allocated(server: psutil.Process) -> float:
    """Read the megabytes that the server has allocated and nobody shares."""
    for line in Path(f"/proc/{server.pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024 / 1e6
    raise SystemExit("this system does not tell RssAnon")


def watch(run: Path, flags: Sequence[str], rounds: int) -> dict[str, Any]:
    """Run and sample the processes as each row appears."""
    started = time.perf_counter()
    command = subprocess.Popen(
        [*command_of("run"), *flags, "--output", str(run)], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    server = psutil.Process(command.pid)
    rows, seen, start = run / "rounds.jsonl", 0, 0.0
    samples: list[dict[str, float]] = []
    while command.poll() is None:
        time.sleep(0.005)
        found = rows.read_bytes().count(b"\n") if rows.exists() else 0
        if found == seen:
            continue
        seen = found
        start = start or time.perf_counter() - started
        if seen <= rounds:
            # Not the last one: its workers are being ended.
            samples.append({"round": seen - 1, "MB": allocated(server), **spent(server)})
    if command.wait() != 0:
        raise SystemExit(f"the run ended with {command.returncode}")
    return {"start": start, "wall": time.perf_counter() - started, "samples": samples}


def bare(run: Path) -> dict[str, float]:
    """Train the clients of a run in two bare processes; give their wall and processor seconds."""
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--bare", str(run), str(number)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(WORKERS)
    ]
    told = [json.loads(process.communicate()[0]) for process in processes]
    return {
        "wall": max(one["wall"] for one in told),
        "processor": sum(one["processor"] for one in told),
    }


def train_bare(run: Path, number: int) -> None:
    """Train every second client of a run, from the state that it was sent, and nothing else."""
    import torch

    from fedsim.core.allocator import keep_freed_memory
    from fedsim.core.config import RunConfig
    from fedsim.core.plan import RunPlan, batches_of_round
    from fedsim.core.task import initial_model
    from fedsim.core.training import local_train
    from fedsim.recording.reader import load_run

    recorded = load_run(run)
    config: RunConfig = recorded.config
    keep_freed_memory()
    torch.set_num_threads(config.client_cpus)
    plan = RunPlan.prepare(config)
    model = initial_model(config)
    work = [
        (row["round"], row["partition"]) for row in recorded.client_rows if row["status"] == "ok"
    ][number::WORKERS]
    settings = config.training_of(0)
    states = {
        r: {n: t.numpy() for n, t in recorded.round(r - 1).state.items()}
        for r in sorted({r for r, _ in work})
    }

    def train(round_number: int, partition: int) -> None:
        batches = batches_of_round(
            config,
            plan.task,
            plan.dataset,
            plan.partition[partition],
            round_number=round_number,
            partition=partition,
            device=torch.device("cpu"),
        )
        local_train(plan.task, model, states[round_number], batches, settings.optimizer)

    for position in work[:5]:
        train(*position)
    processor, wall = time.process_time(), time.perf_counter()
    for position in work:
        train(*position)
    seconds = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
    print(json.dumps(seconds))


def seconds_of(*command: str) -> float:
    """Take the time of a command."""
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def seconds_of_loading(run: Path) -> float:
    """Take the time of opening a run and reading all rows and one client of each round."""
    from fedsim.recording.reader import load_run

    started = time.perf_counter()
    opened = load_run(run)
    for row in opened.round_rows[1:]:
        client = next(iter(opened.round(row["round"]).clients.values()))
        _ = client.delta, client.steps
    return time.perf_counter() - started


def measure(folder: Path, clients: int, a_round: int, rounds: int) -> dict[str, Any]:
    """Run, train the same clients bare, and read what was written."""
    run = folder / f"run-{clients}-{a_round}"
    flags = options_of(clients, a_round, rounds)
    found = watch(run, flags, rounds)
    rows = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    told = [json.loads(line) for line in (run / "clients.jsonl").read_text().splitlines()]
    # Round 1 has the workers' own beginnings: data, model, first allocations.
    late = [row for row in rows if row["round"] > 1]
    count = a_round * len(late)
    wall = sum(row["seconds"]["total"] - row["seconds"]["evaluate"] for row in late)
    training = sum(
        row["seconds"]["load"] + row["seconds"]["train"] for row in told if row["round"] > 1
    )
    walls = [
        WORKERS * (row["seconds"]["total"] - row["seconds"]["evaluate"]) / a_round for row in late
    ]
    limit = bare(run)
    first, last = found["samples"][1], found["samples"][-1]
    between = a_round * (last["round"] - first["round"])
    files = [path for path in run.rglob("*") if path.is_file()]
    memory = [(sample["round"], sample["MB"]) for sample in found["samples"][1:]]
    return {
        "clients": clients,
        "a_round": a_round,
        "rounds": rounds,
        "wall_ms": 1e3 * (WORKERS * wall - training) / count,
        "over_bare_ms": 1e3 * (statistics.median(walls) - WORKERS * limit["wall"] / len(told)),
        "train_ms": 1e3 * training / count,
        "bare_wall_ms": 1e3 * WORKERS * limit["wall"] / len(told),
        "bare_ms": 1e3 * limit["processor"] / len(told),
        **{f"{k}_ms": 1e3 * (last[k] - first[k]) / between for k in ("server", "workers", "Ray")},
        "start_s": found["start"] - rows[0]["seconds"]["evaluate"],
        "whole_s": found["wall"],
        "server_first_mb": memory[0][1],
        "server_last_mb": memory[-1][1],
        "server_mb_a_round": float(np.polyfit(*zip(*memory, strict=True), 1)[0]),
        "files_a_client_round": len(files) / len(told),
        "kb_a_client_round": sum(path.stat().st_size for path in files) / 1e3 / len(told),
        "verify_s": seconds_of(*command_of("verify", str(run))),
        "load_s": seconds_of_loading(run),
        "report_s": seconds_of(*command_of("report", str(run), "--output", f"{run}.html")),
        "state_sha256": rows[-1]["state_sha256"],
    }


COLUMNS = {
    "wall": "wall_ms",
    "over bare": "over_bare_ms",
    "server": "server_ms",
    "workers": "workers_ms",
    "Ray": "Ray_ms",
    "bare": "bare_ms",
}
OTHERS = {
    "start, s": ("start_s", ".1f"),
    "server MB": ("server_last_mb", ".0f"),
    "MB a round": ("server_mb_a_round", "+.2f"),
    "files": ("files_a_client_round", ".3f"),
    "kB": ("kb_a_client_round", ".1f"),
    "verify, s": ("verify_s", ".1f"),
    "load, s": ("load_s", ".2f"),
    "report, s": ("report_s", ".1f"),
}


def main() -> None:
    """Measure, print the tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sizes", nargs="+", default=["1000:100", "10000:100", "10000:1000"], help="of:a round"
    )
    parser.add_argument("--client-rounds", type=int, default=2000, help="of each size")
    parser.add_argument("--folder", type=Path, help="where to run (default: temporary)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--bare", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.bare:
        train_bare(Path(chosen.bare[0]), int(chosen.bare[1]))
        return
    results = []
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        os.environ.setdefault("FEDSIM_CACHE", f"{folder}/cache")
        for size in chosen.sizes:
            clients, a_round = map(int, size.split(":"))
            rounds = max(4, chosen.client_rounds // a_round)
            results.append(measure(Path(folder), clients, a_round, rounds))
    print(f"{'ms a client-round':<20}" + "".join(f"{name:>11}" for name in COLUMNS))
    for row in results:
        name = f"{row['a_round']} of {row['clients']}"
        print(f"{name:<20}" + "".join(f"{row[key]:>11.1f}" for key in COLUMNS.values()))
    print(f"\n{'':<20}" + "".join(f"{name:>11}" for name in OTHERS))
    for row in results:
        name = f"{row['a_round']} of {row['clients']}"
        print(f"{name:<20}" + "".join(f"{row[k]:{f}}".rjust(11) for k, f in OTHERS.values()))
    if chosen.json:
        chosen.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
