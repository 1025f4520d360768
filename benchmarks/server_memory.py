"""Peak memory of the server at 10 and at 100 clients a round, of a 44.9 MB model.

Runs ``fedsim run`` with ResNet18 (100 classes, 44.9 MB a state) and one local step a client, for
as many rounds as give the same number of replies in all. Takes the peak resident memory of the
server's process, shared memory included: its own high-water mark, read from ``/proc`` while it
runs. The server folds replies as they come, so the peak should not depend on how many there are.

    python benchmarks/server_memory.py [--clients 10 100] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MODEL_MB = 44.9


def peak_of(clients: int, rounds: int) -> dict[str, float]:
    """Run `clients` clients a round and watch the server's high-water mark."""
    with tempfile.TemporaryDirectory() as folder:
        need = (clients * rounds + 3 * rounds) * MODEL_MB * 1e6
        if shutil.disk_usage(folder).free < 2 * need:
            raise SystemExit(f"{folder} has no room for {2 * need / 1e9:.0f} GB")
        started = time.perf_counter()
        flags = (
            "--dataset synthetic:20000:100 --partition iid --min-samples 32 "
            f"--clients {clients} --clients-per-round {clients} --rounds {rounds} "
            f"--local-steps 1 --capture none --device cpu --output {folder}/run"
        )
        server = subprocess.Popen(
            [sys.executable, "-m", "fedsim", "run", *flags.split()],
            cwd=ROOT,
            env={**os.environ, "FEDSIM_CACHE": f"{folder}/cache"},
            stdout=subprocess.DEVNULL,
        )
        peak = 0
        while server.poll() is None:
            try:
                status = Path(f"/proc/{server.pid}/status").read_text()
            except OSError:
                break
            marks = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
            peak = max([peak, *map(int, marks)])
            time.sleep(0.05)
        if server.wait() != 0:
            raise SystemExit(f"the run with {clients} clients ended with {server.returncode}")
        return {"peak_mb": peak * 1024 / 1e6, "seconds": time.perf_counter() - started}


def main() -> None:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--replies", type=int, default=200, help="in each run, over all rounds")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    result: dict[str, Any] = {}
    print(f"{'clients a round':>15}{'server peak':>14}{'more than first':>18}{'wall':>9}")
    for clients in chosen.clients:
        result[str(clients)] = found = peak_of(clients, chosen.replies // clients)
        more = found["peak_mb"] - result[str(chosen.clients[0])]["peak_mb"]
        models = f"{more:+.0f} MB"
        print(
            f"{clients:>15}{found['peak_mb']:>11.0f} MB{models:>18}{found['seconds']:>7.0f} s",
            flush=True,
        )
    if chosen.json:
        chosen.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
