"""Which arithmetic a machine has: what its kernels round to, in a few hexadecimal digits.

Two machines with the same versions may still round differently: libraries choose kernels by the
processor, the number of threads and the device. Names of processors do not settle it, so the
arithmetic itself is asked: a fixed calculation through the model of a run, of which every bit
is hashed. Where two machines agree on it, results are expected to be equal to the bit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fedsim.core.task import Column, Task, Tensors
from fedsim.core.training import Autocast, precision_of

MOST_SAMPLES = 64
"""Larger batches are not asked about: they would cost a worker seconds at its start."""


def training_arithmetic(
    task: Task,
    model: nn.Module,
    *,
    batch_size: int,
    autocast: Autocast,
    device: torch.device,
) -> str:
    """Hash the loss, the gradients and the state that one training step on fixed data gives.

    Parameters
    ----------
    task : Task
        Whose columns the data has.
    model : torch.nn.Module
        On `device`, with its initial state, which the step changes; left without gradients.
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
    batch = _batch(task, min(max(batch_size, 2), MOST_SAMPLES), device)
    model.train()
    model.zero_grad(set_to_none=True)
    with precision_of(autocast, device):
        loss = task.loss(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    digits = _hash([loss.detach(), *gradients, *model.buffers()], device)
    model.zero_grad(set_to_none=True)
    return digits


@torch.no_grad()
def evaluation_arithmetic(task: Task, model: nn.Module, *, device: torch.device) -> str:
    """Hash the outputs and the loss of fixed data in evaluation mode.

    Parameters
    ----------
    task : Task
        Whose columns the data has, of as many samples as its test split at most.
    model : torch.nn.Module
        On `device`, with its initial state.
    device : torch.device
        Where the model is.

    Returns
    -------
    str
        16 hexadecimal digits.
    """
    batch = _batch(task, min(task.spec.test_size, MOST_SAMPLES), device)
    model.eval()
    outputs: list[Tensor] = []
    hook = model.register_forward_hook(lambda module, inputs, output: outputs.extend(_in(output)))
    try:
        loss = task.metrics(model, batch)["loss"].total
    finally:
        hook.remove()
    return _hash([*outputs, loss], device)


def _in(output: object) -> Iterable[Tensor]:
    """List the tensors that a model returns: a tensor, or lists and tables of them."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    return [t for o in output for t in _in(o)] if isinstance(output, list | tuple) else []


def _batch(task: Task, count: int, device: torch.device) -> Tensors:
    columns = task.spec.columns.items()
    return task.batch({name: _fixed(column, count, device) for name, column in columns}, None)


def _fixed(column: Column, count: int, device: torch.device) -> Tensor:
    # Integer arithmetic, and a division by a power of two: the same everywhere.
    dtype: torch.dtype = getattr(torch, column.dtype)
    numbers = torch.arange(count * math.prod(column.shape), device=device)
    if column.values is not None:
        return (numbers % column.values).to(dtype).reshape(count, *column.shape)
    numbers = numbers * 2654435761 % 4099 % 256
    if dtype not in (torch.uint8, torch.bool) and not dtype.is_floating_point:
        # Every vocabulary has 0 and 1.
        numbers = numbers % 2
    fixed = numbers / 256 if dtype.is_floating_point else numbers
    return fixed.to(dtype).reshape(count, *column.shape)


def _hash(tensors: list[Tensor], device: torch.device) -> str:
    digest = hashlib.sha256(torch.__version__.encode())
    digest.update(torch.backends.cpu.get_cpu_capability().encode())
    if device.type == "cuda":
        digest.update(torch.cuda.get_device_name(device).encode())
    for tensor in tensors:
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
