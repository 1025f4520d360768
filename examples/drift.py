"""From a run to a figure of client drift: `python examples/drift.py [FOLDER]`."""

import sys
from pathlib import Path

import fedsim

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "drift")
skewed = {"model": "cnn", "rounds": 3, "alpha": 0.1, "output": str(folder / "run")}
run = fedsim.simulate(skewed)
print(run.telemetry()[["round", "partition", "num_samples", "local_loss"]])
run.plot.drift().write_html(folder / "drift.html")
