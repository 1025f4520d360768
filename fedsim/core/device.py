"""The device that a run computes on."""

from __future__ import annotations

import torch

from fedsim.core.errors import ConfigError


def resolve_device(name: str) -> torch.device:
    """Turn the name of a device into the device; ``auto`` is CUDA where there is one, or the CPU.

    Raises
    ------
    ConfigError
        When this machine has no such device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", name, "'auto' or 'cpu': this machine has no CUDA device")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device", name, "'auto' or 'cpu': this machine has no MPS device")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)
