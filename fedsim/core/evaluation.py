"""Evaluating a model on a split."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsim.core.task import Columns, Task, Tensors, rows_of

BATCH_SIZE = 250
"""Samples that are evaluated at a time."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The mean of each of a task's metrics over `num_samples`."""

    means: Mapping[str, float]
    num_samples: int

    @property
    def loss(self) -> float:
        """Mean loss."""
        return self.means["loss"]

    @property
    def accuracy(self) -> float | None:
        """Share of correct predictions; None of a task that predicts no classes."""
        return self.means.get("accuracy")


@torch.no_grad()
def evaluate(
    task: Task,
    model: nn.Module,
    columns: Columns,
    *,
    device: torch.device,
    batch_size: int = BATCH_SIZE,
) -> Evaluation:
    """Evaluate a model as it stands, in evaluation mode.

    Parameters
    ----------
    task : Task
        Makes the batches, and has the metrics.
    model : torch.nn.Module
        On `device`.
    columns : mapping of str to Tensor
        A split, or some of its rows.
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
    totals: dict[str, float] = {}
    counts: dict[str, int] = {}
    for batch in _batches(task, columns, device, batch_size):
        for name, part in task.metrics(model, batch).items():
            totals[name] = totals.get(name, 0.0) + float(part.total)
            counts[name] = counts.get(name, 0) + part.count
    means = {name: total / counts[name] for name, total in totals.items()}
    return Evaluation(means=means, num_samples=_length(columns))


@torch.no_grad()
def first_overflow(
    task: Task,
    model: nn.Module,
    columns: Columns,
    device: torch.device,
    *,
    batch_size: int = BATCH_SIZE,
) -> str | None:
    """Give the name of the first layer of a model whose output is not finite for some sample.

    Parameters
    ----------
    task, model, columns, device, batch_size
        As for `evaluate`.

    Returns
    -------
    str or None
        A name from ``model.named_modules()``; None where all outputs are finite.
    """
    model.eval()
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(layer: nn.Module, inputs: object, output: object) -> None:
            if found or not isinstance(output, Tensor):
                return
            if not bool(output.isfinite().all()):
                found.append(name)

        return hook

    layers = [(n, m) for n, m in model.named_modules() if not list(m.children())]
    hooks = [layer.register_forward_hook(look(name)) for name, layer in layers]
    try:
        for batch in _batches(task, columns, device, batch_size):
            task.metrics(model, batch)
            if found:
                return found[0]
    finally:
        for handle in hooks:
            handle.remove()
    return None


def _length(columns: Columns) -> int:
    return len(next(iter(columns.values())))


def _batches(
    task: Task, columns: Columns, device: torch.device, batch_size: int
) -> Iterator[Tensors]:
    for start in range(0, _length(columns), batch_size):
        rows = rows_of(columns, slice(start, start + batch_size))
        yield task.batch({name: row.to(device) for name, row in rows.items()}, None)
