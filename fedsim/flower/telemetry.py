"""What a client reports of its round: the row that ``clients.jsonl`` keeps."""

from __future__ import annotations

import resource
import sys
from typing import Any

import numpy as np
import torch

from fedsim.core.task import classes_of, labels_of
from fedsim.core.training import LocalResult
from fedsim.flower.recorder import ClientRecorder
from fedsim.flower.workplace import Workplace


def telemetry(
    workplace: Workplace,
    client: int,
    result: LocalResult,
    recorder: ClientRecorder,
    *,
    proximal_mu: float,
    behavior: str | None,
    evaluation: dict[str, float | None] | None,
    seconds: float,
) -> dict[str, Any]:
    """Build the telemetry of a client that has trained, as ``docs/format.md`` describes it.

    Parameters
    ----------
    workplace : Workplace
        Of the run; its model is changed.
    client : int
        The client.
    result : LocalResult
        What local training gave.
    recorder : ClientRecorder
        What was recorded of it, closed.
    proximal_mu : float
        The factor of the proximal term; 0 where there is none.
    behavior : str or None
        What a client that is not honest, or not able, says of it.
    evaluation : dict of str to (float or None), or None
        What it measured of the model that it got, if anything.
    seconds : float
        From the first batch to the last file.
    """
    plan, config = workplace.plan, workplace.plan.config
    indices, settings = plan.partition[client], config.training_of(client)
    measured = recorder.measured()
    row = {
        "partition": client,
        "status": "ok",
        "num_samples": len(indices),
        "local_epochs": settings.local_epochs,
        "local_steps": settings.local_steps,
        "batch_size": settings.batch_size,
        "learning_rate": settings.optimizer.learning_rate,
        "loss_history": result.losses,
        "local_loss": result.mean_loss,
        "batch_sizes": result.batch_sizes,
        "gradient_norm": measured["gradient_norm"],
        "per_layer_norms": measured["per_layer_norms"],
        "num_steps": len(result.losses),
        "num_steps_captured": measured["num_steps_captured"],
        "bytes_captured": measured["bytes_captured"],
        "files": measured["files"],
        "class_distribution": np.bincount(
            labels_of(plan.dataset)[indices], minlength=classes_of(plan.dataset.spec)
        ).tolist(),
        "seconds": {**recorder.split(result.seconds), "total": seconds},
        "peak_memory": _peak_memory(workplace.device),
    }
    if not config.compile:
        # What the compiler makes differs from machine to machine, and its first call is dear.
        row["arithmetic"] = workplace.arithmetic(settings.batch_size)
    if config.autocast == "float16":
        row["num_updates"] = result.num_updates
    if proximal_mu:
        row["proximal_mu"] = proximal_mu
    if behavior is not None:
        row["behavior"] = behavior
    if evaluation is not None:
        row["evaluation"] = evaluation
    return row | recorder.about()


def _peak_memory(device: torch.device) -> dict[str, int]:
    """Peak bytes of this worker process so far, and of its GPU where it has one."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak
