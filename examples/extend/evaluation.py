"""An evaluation on clients in a file of its own: `python examples/extend/evaluation.py`.

Each client tells how well the global model knows each digit, on its own samples and before it
trains. On the command line:
`fedsim run --client-evaluation examples/extend/evaluation.py:by_digit`.
"""

import torch
from torch import nn

import fedsim
from fedsim.core.behavior import ClientContext
from fedsim.core.task import Columns, Task


def by_digit(
    about: ClientContext, task: Task, model: nn.Module, examples: Columns
) -> dict[str, float]:
    """Give the share of right answers for each digit that the client has."""
    device = next(model.parameters()).device
    batch = task.batch({name: rows.to(device) for name, rows in examples.items()}, None)
    digits = batch["targets"]
    right = (model(batch["inputs"]).argmax(1) == digits).double()
    return {f"digit {d}": float(right[digits == d].mean()) for d in torch.unique(digits).tolist()}


CONFIG = {
    "dataset": "digits",
    "model": "cnn",
    "rounds": 3,
    "capture": "all",
    "client-evaluation": f"{__file__}:by_digit",
}

if __name__ == "__main__":
    run = fedsim.simulate(CONFIG)
    for client in run.round(3).clients.values():
        print(client.partition, client.telemetry["evaluation"])
