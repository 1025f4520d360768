"""Evaluating a model on a split."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsim.core.datasets import DatasetSpec
from fedsim.core.images import normalise


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Mean cross-entropy and share of correct predictions over `num_samples`."""

    loss: float
    accuracy: float
    num_samples: int


@torch.no_grad()
def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    spec: DatasetSpec,
    *,
    device: torch.device,
    batch_size: int = 250,
) -> Evaluation:
    """Evaluate a model as it stands, in evaluation mode.

    Parameters
    ----------
    model : torch.nn.Module
        On `device`.
    images : Tensor of uint8, shape (samples, 3, 32, 32)
    labels : Tensor of int64, shape (samples,)
    spec : DatasetSpec
        Normalisation.
    device : torch.device
        Where batches are evaluated.
    batch_size : int
        Samples at a time.

    Returns
    -------
    Evaluation
        Batches are summed up in float64; a diverged model gives a non-finite loss, not an error.
    """
    model.eval()
    loss = torch.zeros((), dtype=torch.float64)
    correct = 0
    for start in range(0, len(labels), batch_size):
        targets = labels[start : start + batch_size].to(device)
        outputs = model(
            normalise(images[start : start + batch_size].to(device), spec.mean, spec.std)
        )
        loss += nn.functional.cross_entropy(outputs, targets, reduction="sum").double().cpu()
        correct += int((outputs.argmax(dim=1) == targets).sum())
    return Evaluation(
        loss=float(loss) / len(labels), accuracy=correct / len(labels), num_samples=len(labels)
    )
