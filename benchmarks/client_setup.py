"""Seconds of a client's process for one message, on a host where Flower starts one for each.

A SuperNode starts a process for every message. Each process here does what that one does, without
the network: imports of Flower's runner, the app, the message, the reply. Processor time tells more
than wall time on a machine with other work; the least wall time of the turns is the nearest to one
without.

    python benchmarks/client_setup.py [--turns 5] [--tree FOLDER] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CASES = {
    "query": ("query", "cnn", "digits"),
    "train, cnn, digits": ("train", "cnn", "digits"),
    "train, resnet18, cifar100": ("train", "resnet18", "cifar100"),
}
CLIENT = """
import json, os, resource, sys, time

def now():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return time.time(), used.ru_utime + used.ru_stime

began = (float(sys.argv[1]), 0.0)
kind, folder = sys.argv[2:4]
from flwr.supernode.runtime import run_clientapp
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
import numpy as np

flower = now()
TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
from fedsim.flower.client_app import app

loaded = now()
content = RecordDict({"config": ConfigRecord(json.load(open(f"{folder}/config.json")))})
if kind == "train":
    state = np.load(f"{folder}/state.npz")
    content["arrays"] = ArrayRecord({name: Array(state[name]) for name in state.files})
message = Message(content, 1, kind)
message.metadata.__dict__.update(_message_id="1", _run_id=1, _src_node_id=1)
ready = now()
node = {"partition-id": 3, "num-partitions": 20}
reply = app(message, Context(1, 1, node, RecordDict(), {}))
assert not reply.has_error(), reply.error
done = now()
seconds = {}
for name, (before, after) in {
    "flower": (began, flower), "app": (flower, loaded), "message": (ready, done)
}.items():
    seconds[name] = [after[0] - before[0], after[1] - before[1]]
if kind == "train":
    told = json.loads(reply.content["telemetry"]["json"])["seconds"]
    seconds["training"] = [told["total"], 0.0]
print(json.dumps({**seconds, "all": [done[0] - began[0], done[1]]}))
"""
PREPARE = """
import json, sys
import numpy as np
from fedsim.core.config import RunConfig
from fedsim.core.plan import RunPlan

model, dataset, folder = sys.argv[1:]
config = RunConfig.from_mapping({
    "model": model, "dataset": dataset, "clients": 20, "local-steps": 1, "capture": "none",
    "device": "cpu",
})
np.savez(f"{folder}/state.npz", **RunPlan.prepare(config).initial_state)
values = {"config": config.to_json(), "server-round": 1, "partition": 3}
json.dump(values, open(f"{folder}/config.json", "w"))
"""


def measure(tree: Path, kind: str, folder: str) -> dict[str, list[float]]:
    """Run one client process; wall and processor seconds by what they went into."""
    from time import time

    command = [sys.executable, "-c", CLIENT, str(time()), kind, folder]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, check=True)
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print a table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tree", type=Path, default=ROOT, help="a checkout of fedsim")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = {}
    print(f"{'message':28} {'wall':>8} {'processor':>10}   of which flower, app, message")
    for case, (kind, model, dataset) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            prepare = [sys.executable, "-c", PREPARE, model, dataset, folder]
            environment = {**os.environ, "PYTHONPATH": str(options.tree)}
            subprocess.run(prepare, cwd=options.tree, env=environment, check=True)
            # The first one writes bytecode.
            measure(options.tree, kind, folder)
            turns = [measure(options.tree, kind, folder) for _ in range(options.turns)]
        wall = min(turn["all"][0] for turn in turns)
        parts = {p: statistics.median(turn[p][1] for turn in turns) for p in turns[0]}
        results[case] = {"wall": wall, "processor": parts, "turns": turns}
        split = ", ".join(f"{parts[p]:.2f}" for p in ("flower", "app", "message"))
        print(f"{case:28} {wall:6.2f} s {parts['all']:8.2f} s   {split}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
