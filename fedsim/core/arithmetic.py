"""Which arithmetic a machine has: what its kernels round to, in a few hexadecimal digits.

Two machines with the same versions may still round differently: libraries choose kernels by the
processor, the number of threads and the device. Names of processors do not settle it, so the
arithmetic itself is asked: a fixed calculation through the very model of a run, of which every bit
is hashed. Where two machines agree on it, results are expected to be equal to the bit.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from fedsim.core.training import Autocast, precision_of
from fedsim.tasks.vision.datasets import DatasetSpec
from fedsim.tasks.vision.images import normalise

MOST_SAMPLES = 64
"""Larger batches are not asked about: they would cost a worker seconds at its start."""


def training_arithmetic(
    model: nn.Module,
    spec: DatasetSpec,
    *,
    batch_size: int,
    autocast: Autocast,
    device: torch.device,
) -> str:
    """Hash the loss, the gradients and the state that one training step on fixed images gives.

    Parameters
    ----------
    model : torch.nn.Module
        On `device`, with its initial state, which the step changes; left without gradients.
    spec : DatasetSpec
        Normalisation and classes.
    batch_size : int
        Samples of the step: from 2, which batch normalisation needs, to 64.
    autocast : {"none", "bfloat16", "float16"}
        Precision of the forward pass.
    device : torch.device
        Where the model is.

    Returns
    -------
    str
        16 hexadecimal digits.
    """
    inputs, targets = _batch(min(max(batch_size, 2), MOST_SAMPLES), spec, device)
    model.train()
    model.zero_grad(set_to_none=True)
    with precision_of(autocast, device):
        loss = nn.functional.cross_entropy(model(inputs), targets)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    digits = _hash([loss.detach(), *gradients, *model.buffers()], device)
    model.zero_grad(set_to_none=True)
    return digits


@torch.no_grad()
def evaluation_arithmetic(model: nn.Module, spec: DatasetSpec, *, device: torch.device) -> str:
    """Hash the outputs and the loss of fixed images in evaluation mode.

    Parameters
    ----------
    model : torch.nn.Module
        On `device`, with its initial state.
    spec : DatasetSpec
        Normalisation, classes, and how many test samples there are.
    device : torch.device
        Where the model is.

    Returns
    -------
    str
        16 hexadecimal digits.
    """
    inputs, targets = _batch(min(spec.test_size, MOST_SAMPLES), spec, device)
    model.eval()
    outputs = model(inputs)
    loss = nn.functional.cross_entropy(outputs, targets, reduction="sum")
    return _hash([outputs, loss], device)


def _batch(count: int, spec: DatasetSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    # Integer arithmetic alone: the images are the same everywhere.
    pixels = torch.arange(count * 3 * 32 * 32, device=device) * 2654435761 % 4099 % 256
    images = pixels.to(torch.uint8).reshape(count, 3, 32, 32)
    targets = torch.arange(count, device=device) % spec.classes
    return normalise(images, spec.mean, spec.std), targets


def _hash(tensors: list[Tensor], device: torch.device) -> str:
    digest = hashlib.sha256(torch.__version__.encode())
    digest.update(torch.backends.cpu.get_cpu_capability().encode())
    if device.type == "cuda":
        digest.update(torch.cuda.get_device_name(device).encode())
    for tensor in tensors:
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
