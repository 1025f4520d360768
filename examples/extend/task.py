"""A model, data and a loss in one file: `python examples/extend/task.py`.

Handwritten digits as 64 grey values, a small perceptron, and a loss with smoothed labels. On the
command line: `fedsim run --task examples/extend/task.py:Digits`.
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import fedsim
from fedsim.core.columns import ColumnData
from fedsim.core.task import Columns, Sum, Tensors


class Digits:
    """A `Task`; what is called before training is in the order of a run."""

    merge_single = False

    def __init__(self) -> None:
        found = load_digits()
        columns = {"grey": torch.tensor(found.data, dtype=torch.float32),
                   "digit": torch.tensor(found.target, dtype=torch.int64)}  # fmt: skip
        self._data = ColumnData.split("digits-64", columns, label="digit", test=300)
        self.spec = self._data.spec

    def model(self) -> nn.Module:
        """Build the perceptron."""
        return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def data(self) -> ColumnData:
        """Give the data."""
        return self._data

    def batch(self, examples: Columns, draw: np.random.Generator | None) -> Tensors:
        """Scale the grey values; nothing is augmented."""
        return {"grey": examples["grey"] / 16, "digit": examples["digit"]}

    def loss(self, model: nn.Module, batch: Tensors) -> torch.Tensor:
        """Give the mean cross-entropy with smoothed labels."""
        scores = model(batch["grey"])
        return nn.functional.cross_entropy(scores, batch["digit"], label_smoothing=0.1)

    def metrics(self, model: nn.Module, batch: Tensors) -> dict[str, Sum]:
        """Sum up the loss and the correct predictions."""
        right = (model(batch["grey"]).argmax(dim=1) == batch["digit"]).sum()
        count = len(batch["digit"])
        return {"loss": Sum(total=self.loss(model, batch) * count, count=count),
                "accuracy": Sum(total=right, count=count)}  # fmt: skip


CONFIG = {"task": f"{__file__}:Digits", "rounds": 3, "local-epochs": 5, "capture": "all"}

if __name__ == "__main__":
    print(fedsim.simulate(CONFIG).rounds()[["round", "global_loss", "global_accuracy"]])
