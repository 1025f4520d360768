"""What ``run.json`` says of the machine and the programs that a run was computed with."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import torch

import fedsim
from fedsim.core.arithmetic import evaluation_arithmetic
from fedsim.core.device import resolve_device
from fedsim.core.plan import RunPlan
from fedsim.core.task import initial_model


def versions() -> dict[str, str]:
    """Give the versions of what decides the bits of a run."""
    names = ("flwr", "ray", "torch", "torchvision", "numpy")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "fedsim": fedsim.__version__,
    }


def device_of(plan: RunPlan) -> dict[str, Any]:
    """Describe for ``run.json`` what this machine computes a run on, and how it rounds.

    Raises
    ------
    ConfigError
        When this machine has not the run's device.
    """
    config = plan.config
    device = resolve_device(config.device)
    model = initial_model(config).to(device)
    return {
        "type": device.type,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "worker_threads": config.client_cpus,
        "server_threads": torch.get_num_threads(),
        "arithmetic": evaluation_arithmetic(plan.task, model, device=device),
    }
