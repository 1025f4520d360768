"""From a run to a figure of client drift: `python examples/drift.py [PAGE]`."""

import sys
from pathlib import Path

import fedsim

page = Path(sys.argv[1] if len(sys.argv) > 1 else "drift.html")
# Without an "output", each run gets a folder of its own in runs/.
run = fedsim.simulate({"model": "cnn", "rounds": 3, "alpha": 0.1})
print(run.telemetry()[["round", "partition", "num_samples", "local_loss"]])
run.plot.drift().write_html(page)
print(f"written: {page}")
