"""The golden run: three rounds of the small model on digits, its rows as JSON on stdout.

It is started in a process of its own, with the environment of `PORTABLE`: kernels that every
x86-64 processor has, so that the hashes do not depend on the machine.
"""

import json
import sys
import threading
from pathlib import Path

import torch

from fedsim.core.config import RunConfig
from fedsim.core.plan import RunPlan
from fedsim.flower.client_app import app
from fedsim.flower.server_app import execute
from fedsim.recording.reader import load_run
from tests.local_grid import LocalGrid
from tests.observers import Memory

PORTABLE = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_CBWR": "COMPATIBLE",
    "OMP_NUM_THREADS": "1",
}

CONFIG = {
    "dataset": "digits",
    "model": "cnn",
    "clients": 8,
    "clients-per-round": 4,
    "rounds": 3,
    "local-epochs": 2,
    "learning-rate": 0.05,
    "batch-size": [16, 32],
    "capture": "first:1",
    "device": "cpu",
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    plan = RunPlan.prepare(RunConfig.from_mapping(CONFIG))
    output = Path(sys.argv[1])
    execute(
        LocalGrid(app, plan.config.clients, recordings=output.parent),
        plan,
        output,
        observer=Memory(),
        workers=2,
        stop=threading.Event(),
    )
    keys = ("round", "participants", "global_loss", "global_accuracy", "state_sha256")
    rows = [{key: row[key] for key in keys} for row in load_run(output).round_rows]
    print(json.dumps({"torch": torch.__version__.partition("+")[0], "rounds": rows}))
