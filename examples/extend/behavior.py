"""A malicious client in a file of its own: `python examples/extend/behavior.py`.

It calls every digit by the name of another and sends its update enlarged. In a configuration:

    [behavior."examples/extend/behavior.py:Attack"]
    clients = [0, 1]
    factor = 3.0
"""

import fedsim
from fedsim.core.behavior import ClientContext
from fedsim.core.task import Columns
from fedsim.core.training import Arrays


class Attack:
    """Trains on mirrored labels, and sends `factor` times what it learned."""

    def __init__(self, factor: float) -> None:
        self._factor = factor

    def examples(self, about: ClientContext, honest: Columns) -> Columns:
        """Mirror the labels of a step: 0 is called 9."""
        return {**honest, "labels": 9 - honest["labels"]}

    def update(self, about: ClientContext, start: Arrays, honest: Arrays) -> Arrays:
        """Go `factor` times as far from the global state."""
        sent = {}
        for name, before in start.items():
            moved = before + self._factor * (honest[name] - before)
            sent[name] = moved.astype(before.dtype)
        return sent

    def explain(self, about: ClientContext) -> str:
        """Name it in the row of the client."""
        return f"mirrors its labels and sends {self._factor} times its update"


CONFIG = {
    "dataset": "digits",
    "model": "cnn",
    "rounds": 3,
    "capture": "all",
    "behavior": {f"{__file__}:Attack": {"clients": [0, 1], "factor": 3.0}},
}

if __name__ == "__main__":
    run = fedsim.simulate(CONFIG)
    print(run.telemetry()[["round", "partition", "local_loss"]])
