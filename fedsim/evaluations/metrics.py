"""The task's own metrics, over all samples of the client."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from fedsim.core.behavior import ClientContext
from fedsim.core.evaluation import evaluate
from fedsim.core.task import Columns, Task


def make(
    about: ClientContext, task: Task, model: nn.Module, examples: Columns
) -> Mapping[str, float]:
    """Give the mean of each metric."""
    device = next(model.parameters()).device
    return evaluate(task, model, examples, device=device).means
