"""Evaluating a model on a split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsim.tasks.vision.datasets import DatasetSpec
from fedsim.tasks.vision.images import normalise

BATCH_SIZE = 250
"""Samples that are evaluated at a time."""


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
    batch_size: int = BATCH_SIZE,
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


@torch.no_grad()
def first_overflow(
    model: nn.Module,
    images: Tensor,
    spec: DatasetSpec,
    device: torch.device,
    *,
    batch_size: int = BATCH_SIZE,
) -> str | None:
    """Give the name of the first layer of a model whose output is not finite for some image.

    Parameters
    ----------
    model, images, spec, device, batch_size
        As for `evaluate`.

    Returns
    -------
    str or None
        A name from ``model.named_modules()``; None where all outputs are finite.
    """
    model.eval()
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(layer: nn.Module, inputs: object, output: Tensor) -> None:
            if not found and not bool(output.isfinite().all()):
                found.append(name)

        return hook

    layers = [(n, m) for n, m in model.named_modules() if not list(m.children())]
    hooks = [layer.register_forward_hook(look(name)) for name, layer in layers]
    try:
        for start in range(0, len(images), batch_size):
            model(normalise(images[start : start + batch_size].to(device), spec.mean, spec.std))
            if found:
                return found[0]
    finally:
        for handle in hooks:
            handle.remove()
    return None
