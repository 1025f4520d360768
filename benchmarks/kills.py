"""Kill all processes of a run at random moments, resume it, compare with an undisturbed run.

A run of ResNet18 on digits with every gradient captured is made once undisturbed. Then, for each
kill, it is started again, all of its processes are killed with SIGKILL at a moment drawn from the
length of the first run (the server, Ray's processes, the workers, the janitor), and
``fedsim resume`` brings it to its end. Every state hash and every recorded tensor must be those of
the first run, ``fedsim verify`` must accept it, and neither a process nor a file may be left in the
folder for temporary files.

    python benchmarks/kills.py [--kills 20] [--rounds 6] [--seed 1] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
FLAGS = (
    "--dataset digits --model resnet18 --clients 4 --clients-per-round 2 --batch-size 64 "
    "--capture all --device cpu"
)


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start the command with its own folder for temporary files."""
    return subprocess.Popen(
        [sys.executable, "-m", "fedsim", *arguments],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(folder / "tmp"), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], *, may_refuse: bool = False) -> None:
    """Wait for a clean end, or for the refusal to resume what is complete."""
    _, err = process.communicate()
    refused = process.returncode == 2 and "the others are there" in err
    if (process.returncode or err) and not (may_refuse and refused):
        raise SystemExit(f"exit code {process.returncode}: {err}")


def processes_of(folder: Path) -> list[psutil.Process]:
    """Find what was started with that folder for temporary files."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("TMPDIR") == str(folder / "tmp"):
                found.append(process)
    return found


def digests(path: Path) -> dict[str, str]:
    """Hash every recorded tensor file."""
    found = {}
    for file in sorted(path.rglob("*.safetensors")):
        with file.open("rb") as opened:
            found[str(file.relative_to(path))] = hashlib.file_digest(opened, "sha256").hexdigest()
    return found


def last_hash(path: Path) -> str:
    """Give the hash of the last state."""
    rows = (path / "rounds.jsonl").read_text().splitlines()
    return str(json.loads(rows[-1])["state_sha256"])


def main() -> None:
    """Kill, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parsed = parser.parse_args()
    draw = random.Random(parsed.seed)  # noqa: S311 - moments, not secrets
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="fk-") as name:
        folder = Path(name)
        (folder / "tmp").mkdir()
        flags = [*FLAGS.split(), "--rounds", str(parsed.rounds)]
        started = time.perf_counter()
        finish(start(folder, "run", *flags, "--output", f"{folder}/whole"))
        length = time.perf_counter() - started
        expected = digests(folder / "whole")
        print(f"undisturbed: {length:.0f} s, {last_hash(folder / 'whole')[:16]}", flush=True)
        path = folder / "run"
        for kill in range(parsed.kills):
            process = start(folder, "run", *flags, "--output", str(path))
            moment = draw.uniform(0.0, length)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moment)
            for member in processes_of(folder):
                with contextlib.suppress(psutil.Error):
                    member.kill()
            process.communicate()
            rows = path / "rounds.jsonl"
            whole = rows.read_bytes().count(b"\n") if rows.exists() else 0
            begun = (path / "run.json").exists()
            command = ["resume", str(path)] if begun else ["run", *flags, "--output", str(path)]
            finish(start(folder, *command), may_refuse=whole == parsed.rounds + 1)
            finish(start(folder, "verify", str(path)))
            same = digests(path) == expected
            left = [p.pid for p in processes_of(folder)]
            # Importing torchvision makes the empty folder of torch's compiler.
            files = [p for p in (folder / "tmp").iterdir() if not p.name.startswith("torchind")]
            partial = [p.name for p in path.rglob("*.partial")]
            outcome = {
                "moment": moment,
                "whole_rounds": whole,
                "then": command[0],
                "same": same,
                "left": [*left, *(str(file) for file in files), *partial],
            }
            outcomes.append(outcome)
            print(
                f"kill {kill + 1:2}: after {moment:5.1f} s with {whole} rows, then {command[0]}: "
                f"{'the same bytes' if same else 'OTHER BYTES'}, left: {outcome['left']}",
                flush=True,
            )
            shutil.rmtree(path)
    good = sum(bool(o["same"]) and not o["left"] for o in outcomes)
    print(f"{good} of {len(outcomes)} ended with the same bytes and nothing left")
    if parsed.json:
        parsed.json.write_text(json.dumps({"length": length, "kills": outcomes}, indent=2) + "\n")


if __name__ == "__main__":
    main()
