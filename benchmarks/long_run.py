"""Whether a run of many rounds stays as it began: memory, files and overhead, round by round.

Runs ``fedsim run`` with the small model and two workers on a real Ray engine and looks at it from
outside whenever a round's row appears: at the server's process, at each worker and, together, at
Ray's own processes. Prints least-squares slopes over the rounds after a warm-up, in which imports,
buffers and allocators reach their size.

Three numbers for memory, because pages of files and of Ray's shared memory blur the first two:

- ``anonymous`` (``RssAnon``): what a process has allocated and nobody else shares. A leak is here.
- ``unique`` (USS): what would be free if it ended; with it, pages of shared memory that no other
  process has touched yet, which grows while Ray's store is filled for the first time.
- ``resident`` (RSS): with all mapped files and shared memory.

Overhead is a round's time without the evaluation and without the clients' own seconds, shared
by the workers: drawing, messages, folding, writing. A machine with other work stretches it, so
processor time tells more: what each process spends on a round. Slopes of both are those of medians
of ten rounds.

    python benchmarks/long_run.py [--rounds 300] [--warm-up 50] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
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
LIMIT_KB = 50.0
"""Most that the anonymous memory of a process may grow in a round."""
BLOCK = 10

Figures = dict[str, float]
MEMORY = ("anonymous", "unique", "resident")
FIGURES = (*MEMORY, "files", "threads", "processor")


def figures_of(process: psutil.Process) -> Figures:
    """Read a process: bytes of memory, open file descriptors, threads."""
    smaps = _kilobytes(Path(f"/proc/{process.pid}/smaps_rollup"))
    status = _kilobytes(Path(f"/proc/{process.pid}/status"))
    return {
        "anonymous": 1024 * status["RssAnon"],
        "unique": 1024 * (smaps["Private_Clean"] + smaps["Private_Dirty"]),
        "resident": 1024 * status["VmRSS"],
        "files": process.num_fds(),
        "threads": process.num_threads(),
        "processor": sum(process.cpu_times()[:2]),
    }


def _kilobytes(path: Path) -> dict[str, int]:
    fields = (line.partition(":") for line in path.read_text().splitlines())
    return {name: int(rest.split()[0]) for name, _, rest in fields if rest.endswith(" kB")}


def family_of(server: psutil.Process) -> dict[str, list[psutil.Process]]:
    """Sort the server's processes: itself, each worker, and Ray's own."""
    groups: dict[str, list[psutil.Process]] = {"server": [server]}
    engine: list[psutil.Process] = []
    for process in server.children(recursive=True):
        if "ray::ClientApp" in " ".join(process.cmdline()):
            groups[f"worker {len(groups)}"] = [process]
        else:
            engine.append(process)
    return groups | {"Ray": engine}


def watch(folder: Path, rounds: int, flags: Sequence[str]) -> dict[str, Any]:
    """Run `rounds` rounds and sample the processes after each."""
    run = folder / "run"
    options = (
        f"--model cnn --dataset digits --clients 6 --clients-per-round 4 --rounds {rounds} "
        f"--capture first:1 --workers {WORKERS} --device cpu --output {run}"
    )
    command = subprocess.Popen(
        [sys.executable, "-m", "fedsim", "run", *options.split(), *flags],
        cwd=ROOT,
        env={**os.environ, "FEDSIM_CACHE": str(folder / "cache")},
        stdout=subprocess.DEVNULL,
    )
    samples: dict[str, list[Figures]] = {}
    groups: dict[str, list[psutil.Process]] = {}
    numbers: list[int] = []
    rows, size = run / "rounds.jsonl", 0
    while command.poll() is None:
        time.sleep(0.005)
        if not rows.exists() or rows.stat().st_size == size:
            continue
        size = rows.stat().st_size
        number = rows.read_bytes().count(b"\n") - 1
        if not 1 <= number < rounds:
            continue  # before the workers are there, or while they are being ended
        groups = groups or family_of(psutil.Process(command.pid))
        try:
            seen = {name: [figures_of(p) for p in members] for name, members in groups.items()}
        except (OSError, KeyError, psutil.NoSuchProcess) as error:
            raise SystemExit(f"a process ended before round {rounds}: {error}") from None
        numbers.append(number)
        for name, found in seen.items():
            total = {figure: sum(one[figure] for one in found) for figure in FIGURES}
            samples.setdefault(name, []).append(total)
    if command.wait() != 0:
        raise SystemExit(f"the run ended with {command.returncode}")
    if len(groups) != WORKERS + 2:
        raise SystemExit(f"{len(groups) - 2} workers were found in place of {WORKERS}")
    return {"rounds": numbers, "processes": samples, "overhead": overhead_of(run)}


def overhead_of(run: Path) -> list[float]:
    """Give the seconds of each round that are neither training nor evaluation."""
    training: dict[int, float] = {}
    for line in (run / "clients.jsonl").read_text().splitlines():
        row = json.loads(line)
        training[row["round"]] = training.get(row["round"], 0.0) + row["seconds"]["total"]
    rows = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    return [
        row["seconds"]["total"] - row["seconds"]["evaluate"] - training[row["round"]] / WORKERS
        for row in rows[1:]
    ]


def slope(positions: Sequence[float], values: Sequence[float]) -> float:
    """Fit a line by least squares and give its rise for each round."""
    return float(np.polyfit(np.asarray(positions, float), np.asarray(values, float), 1)[0])


def summarise(found: dict[str, Any], warm_up: int) -> dict[str, Any]:
    """Give the slopes after the warm-up."""
    kept = [i for i, number in enumerate(found["rounds"]) if number > warm_up]
    positions = [found["rounds"][i] for i in kept]
    processes: dict[str, Figures] = {}
    for name, series in found["processes"].items():
        by_figure = {figure: [series[i][figure] for i in kept] for figure in FIGURES}
        row = {
            f"{figure}_kb_a_round": slope(positions, by_figure[figure]) / 1e3 for figure in MEMORY
        }
        row["anonymous_mb"] = by_figure["anonymous"][-1] / 1e6
        spent = zip(positions, by_figure["processor"], strict=True)
        row |= _trend(
            "processor",
            [
                (after - before) / (number - former)
                for (former, before), (number, after) in itertools.pairwise(spent)
            ],
        )
        for figure in ("files", "threads"):
            first, *_, last = by_figure[figure]
            row |= {f"{figure}_first": first, f"{figure}_last": last}
        processes[name] = row
    return {"processes": processes, **_trend("overhead", found["overhead"][warm_up:])}


def _trend(name: str, seconds: Sequence[float]) -> Figures:
    blocks = [statistics.median(seconds[i : i + BLOCK]) for i in range(0, len(seconds), BLOCK)]
    centres = [BLOCK * (i + 0.5) for i in range(len(blocks))]
    return {
        f"{name}_ms": 1e3 * statistics.median(seconds),
        f"{name}_ms_a_100_rounds": 1e5 * slope(centres, blocks),
    }


def main() -> None:
    """Run, print the table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="What follows -- goes to `fedsim run`, like -- --capture none.",
    )
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--warm-up", type=int, default=50, help="rounds left out of the slopes")
    parser.add_argument("--folder", type=Path, help="where to run (default: temporary)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("flags", nargs="*", help="more flags of `fedsim run`")
    chosen = parser.parse_args()
    if chosen.rounds < chosen.warm_up + 2 * BLOCK:
        parser.error(f"--rounds needs {2 * BLOCK} more than --warm-up")
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        found = watch(Path(folder), chosen.rounds, chosen.flags)
    result = summarise(found, chosen.warm_up)
    columns: tuple[str, ...] = (*MEMORY, "anonymous", "open files", "threads")
    columns += ("a round", "100 rounds")
    print(f"{'':<10}{'kB a round':>33}{'MB':>11}{'first, last':>22}{'processor, ms':>22}")
    print(f"{'':<10}" + "".join(f"{column:>11}" for column in columns))
    for name, row in result["processes"].items():
        slopes = "".join(f"{row[f'{figure}_kb_a_round']:>+11.1f}" for figure in MEMORY)
        counts = "".join(
            "{:.0f}, {:.0f}".format(row[f"{kind}_first"], row[f"{kind}_last"]).rjust(11)
            for kind in ("files", "threads")
        )
        spent = f"{row['processor_ms']:>11.1f}{row['processor_ms_a_100_rounds']:>+11.2f}"
        print(f"{name:<10}{slopes}{row['anonymous_mb']:>11.1f}{counts}{spent}")
    print(
        f"\noverhead {result['overhead_ms']:.0f} ms a round, "
        f"{result['overhead_ms_a_100_rounds']:+.1f} ms in 100 rounds"
    )
    watched = [row for name, row in result["processes"].items() if name != "Ray"]
    steepest = max(row["anonymous_kb_a_round"] for row in watched)
    verdict = "below" if steepest < LIMIT_KB else "NOT below"
    print(f"steepest {steepest:+.1f} kB a round, {verdict} {LIMIT_KB:.0f}")
    if chosen.json:
        chosen.json.write_text(json.dumps({"summary": result, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
