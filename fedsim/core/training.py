"""Local training: one client, one round, a function of its inputs alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsim.core.schedule import Rates
from fedsim.core.task import Columns, Task, Tensors

Arrays = dict[str, NDArray[np.generic]]
Autocast = Literal["none", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """A local optimizer.

    Parameters
    ----------
    name : {"sgd", "adam"}
        torch's SGD or Adam.
    learning_rate : float
        Above 0.
    momentum, nesterov : float, bool
        Of SGD.
    weight_decay : float
        L2 penalty, added to the gradient by the optimizer.
    """

    name: Literal["sgd", "adam"]
    learning_rate: float
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How one client trains in a round.

    Parameters
    ----------
    batch_size : int
        Samples in a step.
    local_epochs : int
        Passes over the client's samples.
    local_steps : int or None
        Exact number of steps, in as many passes as that takes; replaces `local_epochs`.
    merge_single : bool
        Let a last batch of one sample join the larger one before it: batch normalisation
        cannot take statistics of one value.
    optimizer : OptimizerSettings
        A fresh one each round.
    """

    batch_size: int
    local_epochs: int
    local_steps: int | None
    merge_single: bool
    optimizer: OptimizerSettings

    def batches_per_epoch(self, num_samples: int) -> list[int]:
        """Give the sizes of the batches of one pass over `num_samples`."""
        full, rest = divmod(num_samples, self.batch_size)
        sizes = [self.batch_size] * full + ([rest] if rest else [])
        if self.merge_single and len(sizes) > 1 and sizes[-1] == 1 < self.batch_size:
            sizes[-2:] = [sizes[-2] + 1]
        return sizes

    def num_steps(self, num_samples: int) -> int:
        """Count the local steps of a round."""
        if self.local_steps is not None:
            return self.local_steps
        return self.local_epochs * len(self.batches_per_epoch(num_samples))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One batch of a client.

    Parameters
    ----------
    epoch : int
        Pass over the client's samples, from 0.
    indices : ndarray of int64, shape (batch,)
        Positions in the training split.
    tensors : mapping of str to Tensor
        What the task makes of these samples, for its loss.
    """

    epoch: int
    indices: NDArray[np.int64]
    tensors: Tensors


class Objective:
    """What a client minimises: its data loss, and what strategies add to it.

    A proximal term is ``mu / 2 * |w - w_global|^2`` (Li et al. 2020, eq. 2); its gradient is
    ``mu * (w - w_global)``. A correction is added to the gradient as it is.
    Each operation is rounded by itself, one entry at a time, so that a replay has the same bits
    with any number of threads and any layout of its tensors.

    Parameters
    ----------
    start : mapping of str to Tensor
        The global parameters. Kept, not copied.
    proximal_mu : float
        Factor of the term; 0 for none.
    correction : mapping of str to Tensor, optional
        By the name of the parameter, like the server's control variate less the client's
        (Karimireddy et al. 2020).
    """

    def __init__(
        self,
        start: Mapping[str, Tensor],
        proximal_mu: float,
        correction: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._start = start
        self._mu = proximal_mu
        self._correction = correction

    def gradient(self, name: str, gradient: Tensor, parameter: Tensor) -> Tensor:
        """Add to a gradient of the data loss that of the term; a new tensor where there is one."""
        whole = gradient
        if self._mu:
            whole = (parameter - self._start[name]).mul_(self._mu).add_(gradient)
        return whole if self._correction is None else whole + self._correction[name]

    def term(self, parameters: Mapping[str, Tensor]) -> Tensor | None:
        """Give the value of the proximal term, shape (), or None if the objective has none."""
        if self._mu == 0:
            return None
        norms = [torch.linalg.vector_norm(p - self._start[n]) for n, p in parameters.items()]
        return torch.stack(norms).square().sum() * (self._mu / 2)


@dataclass(frozen=True, kw_only=True)
class Step:
    """What an observer of local training sees after the backward pass of a step.

    Parameters
    ----------
    index : int
        Local step of the round, from 0.
    epoch : int
        Pass over the client's samples, from 0.
    indices : ndarray of int64, shape (batch,)
        Positions in the training split.
    loss : Tensor of float32, shape ()
        Mean loss of the batch before the update; reading its value waits for the device.
    learning_rate : float
        Rate of the update that follows.
    gradients : mapping of str to Tensor
        Parameter name to d(mean loss)/dp, in ``model.parameters()`` order, without weight
        decay. The tensors are the step's own: keeping them is safe, changing them is not.
    proximal : Tensor of float32, shape (), or None
        Value of the proximal term that is minimised in addition to the loss, where there is one.
    objective_norm : Tensor of float32, shape (), or None
        Euclidean norm of the gradient of both together, without weight decay.
    """

    index: int
    epoch: int
    indices: NDArray[np.int64]
    loss: Tensor
    learning_rate: float
    gradients: Mapping[str, Tensor]
    proximal: Tensor | None = None
    objective_norm: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class LocalResult:
    """The outcome of local training.

    Parameters
    ----------
    state : dict of str to ndarray
        The local model, ``state_dict`` names and order.
    losses : list of float
        Mean loss of each step.
    batch_sizes : list of int
        Samples of each step.
    num_updates : int
        Steps that changed the model; with float16 those that overflowed did not.
    seconds : dict of str to float
        Wall time of ``load`` (batches), ``train`` and ``capture`` (the observer).
    """

    state: Arrays
    losses: list[float]
    batch_sizes: list[int]
    num_updates: int
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def mean_loss(self) -> float:
        """Mean loss over the samples of all steps."""
        return float(np.average(self.losses, weights=self.batch_sizes))


def schedule(
    num_samples: int, settings: TrainingSettings, draw: np.random.Generator
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield the epoch and the sample positions (0 to `num_samples` - 1) of every step.

    Each pass visits the samples in a fresh permutation from `draw`.
    """
    remaining = settings.num_steps(num_samples)
    sizes = settings.batches_per_epoch(num_samples)
    epoch = 0
    while remaining > 0:
        order = draw.permutation(num_samples)
        for stop, size in zip(np.cumsum(sizes), sizes, strict=True):
            if remaining == 0:
                return
            yield epoch, order[stop - size : stop]
            remaining -= 1
        epoch += 1


def load_batches(
    task: Task,
    columns: Columns,
    indices: NDArray[np.int64],
    settings: TrainingSettings,
    *,
    order: np.random.Generator,
    augmentation: np.random.Generator,
    device: torch.device,
    examples_of: Callable[[Columns], Columns] | None = None,
) -> Iterator[Batch]:
    """Yield a client's batches of a round.

    Parameters
    ----------
    task : Task
        Makes a batch of samples.
    columns : mapping of str to Tensor
        The whole training split.
    indices : ndarray of int64
        The client's positions in the training split.
    settings : TrainingSettings
        Batch size, epochs or steps.
    order, augmentation : numpy.random.Generator
        Of this round and client.
    device : torch.device
        Where batches are made.
    examples_of : callable, optional
        What a client makes of the samples of a step, where it does not take them as they are.
    """
    for epoch, positions in schedule(len(indices), settings, order):
        chosen = indices[positions]
        rows = torch.from_numpy(chosen)
        examples: Columns = {name: column[rows].to(device) for name, column in columns.items()}
        if examples_of is not None:
            examples = examples_of(examples)
        yield Batch(epoch=epoch, indices=chosen, tensors=task.batch(examples, augmentation))


def make_optimizer(
    parameters: Sequence[nn.Parameter], settings: OptimizerSettings
) -> torch.optim.Optimizer:
    """Make the local optimizer; replaying recorded gradients uses the same one."""
    # The fused kernels pass over parameter, gradient and momentum once: 1.2 times the plain
    # loop on a CPU, where the update is a tenth of a step.
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    if settings.name == "adam":
        return torch.optim.Adam(
            parameters,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=fused,
        )
    return torch.optim.SGD(
        parameters,
        lr=settings.learning_rate,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        weight_decay=settings.weight_decay,
        fused=fused,
    )


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def precision_of(autocast: Autocast, device: torch.device) -> torch.autocast:
    """Give the context that a forward pass of training runs in."""
    return torch.autocast(
        device.type,
        dtype=torch.float16 if autocast == "float16" else torch.bfloat16,
        enabled=autocast != "none",
    )


def local_train(
    task: Task,
    model: nn.Module,
    state: Mapping[str, NDArray[np.generic]],
    batches: Iterator[Batch],
    optimizer: OptimizerSettings,
    on_step: Callable[[Step], None] | None = None,
    *,
    autocast: Autocast = "none",
    proximal_mu: float = 0.0,
    correction: Mapping[str, NDArray[np.generic]] | None = None,
    rates: Rates | None = None,
) -> LocalResult:
    """Train from `state` on `batches`, minimising the task's mean loss.

    Parameters
    ----------
    task : Task
        Has the loss.
    model : torch.nn.Module
        Workspace on its device; all of its state is overwritten.
    state : mapping of str to ndarray
        The global model, ``state_dict`` names.
    batches : iterator of Batch
        The client's batches of the round.
    optimizer : OptimizerSettings
        A fresh optimizer is made from it.
    on_step : callable, optional
        Called with each `Step` between the backward pass and the update.
    autocast : {"none", "bfloat16", "float16"}
        Precision of the forward pass where torch finds it safe. With float16 the loss is scaled
        up before the backward pass and the gradients down after it (Micikevicius et al. 2018):
        observers see them as they are, and a step that overflows makes no update.
    proximal_mu, correction : float, mapping of str to ndarray
        Of an `Objective`: observers see the gradient of the loss, the update takes that
        of the whole.
    rates : callable, optional
        Rate of each local step; that of `optimizer` without it.

    Returns
    -------
    LocalResult
        The local state and what happened on the way.
    """
    load_state(model, state)
    model.train()
    named = dict(model.named_parameters())
    torch_optimizer = make_optimizer(list(named.values()), optimizer)
    device = next(iter(named.values())).device
    whole: _Whole | None = None
    if proximal_mu or correction is not None:
        start = {name: p.detach().clone() for name, p in named.items()}
        added = None if correction is None else _tensors(correction, named, device)
        whole = _Whole(Objective(start, proximal_mu, added), named)
    scaler = torch.amp.grad_scaler.GradScaler(device.type, enabled=autocast == "float16")
    precision = precision_of(autocast, device)
    losses: list[Tensor] = []
    batch_sizes: list[int] = []
    num_updates = 0
    seconds = {"load": 0.0, "train": 0.0, "capture": 0.0}
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        seconds[name] += now - clock
        clock = now

    for index, batch in enumerate(batches):
        lap("load")
        rate = optimizer.learning_rate if rates is None else rates(index)
        # Dropping the gradients makes backward allocate fresh ones: an observer may keep them.
        torch_optimizer.zero_grad(set_to_none=True)
        with precision:
            loss = task.loss(model, batch.tensors)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.unscale_(torch_optimizer)
        losses.append(loss.detach())
        batch_sizes.append(len(batch.indices))
        gradients = {n: p.grad for n, p in named.items() if p.grad is not None}
        about = {} if whole is None else whole.replace_gradients()
        if on_step is not None:
            lap("train")
            on_step(
                Step(
                    index=index,
                    epoch=batch.epoch,
                    indices=batch.indices,
                    loss=losses[-1],
                    learning_rate=rate,
                    gradients=gradients,
                    **about,
                )
            )
            lap("capture")
        del gradients
        # Not scaler.step: with fused SGD a first step that it skips leaves momentum in memory that
        # nothing was written to, and the next step goes on from there.
        if autocast != "float16" or _are_finite(p.grad for p in named.values()):
            _set_rate(torch_optimizer, rate)
            torch_optimizer.step()
            num_updates += 1
        scaler.update()
        lap("train")
    return LocalResult(
        state=state_arrays(model),
        losses=[float(value) for value in losses],
        batch_sizes=batch_sizes,
        num_updates=num_updates,
        seconds=seconds,
    )


def _tensors(
    arrays: Mapping[str, NDArray[np.generic]], names: Iterable[str], device: torch.device
) -> dict[str, Tensor]:
    # np.array: what comes from a message is read-only, which torch warns of.
    return {name: torch.from_numpy(np.array(arrays[name])).to(device) for name in names}


class _Whole:
    """Gradients of a whole objective in place of those of its data loss."""

    def __init__(self, objective: Objective, named: Mapping[str, nn.Parameter]) -> None:
        self._objective = objective
        self._named = named

    @torch.no_grad()
    def replace_gradients(self) -> dict[str, Tensor | None]:
        """Replace them, leaving the tensors as they are, and give what a `Step` tells."""
        term = self._objective.term(self._named)
        norms = []
        for name, parameter in self._named.items():
            if parameter.grad is not None:
                whole = self._objective.gradient(name, parameter.grad, parameter)
                norms.append(torch.linalg.vector_norm(whole))
                parameter.grad = whole
        return {"proximal": term, "objective_norm": torch.linalg.vector_norm(torch.stack(norms))}


def _are_finite(gradients: Iterable[Tensor | None]) -> bool:
    """Say whether no entry overflowed, waiting for the gradients' device once."""
    found = [gradient.isfinite().all() for gradient in gradients if gradient is not None]
    return bool(torch.stack(found).all())


class Replay:
    """The local optimizer, run again over gradients that are known.

    Parameters
    ----------
    start : mapping of str to Tensor
        The global state that training began with.
    names : sequence of str
        The parameters to follow.
    optimizer : OptimizerSettings
        The client's.
    autocast : {"none", "bfloat16", "float16"}
        That of the training: with float16, a step whose gradient overflowed made no update.
    proximal_mu, correction : float, mapping of str to Tensor
        Those of the training.
    rates : callable, optional
        Those of the training; without, the rate of `optimizer`.

    Attributes
    ----------
    parameters : dict of str to Tensor
        Their present values; they change in place.
    num_updates : int
        Steps that changed them.
    """

    def __init__(
        self,
        start: Mapping[str, Tensor],
        names: Sequence[str],
        optimizer: OptimizerSettings,
        autocast: Autocast = "none",
        proximal_mu: float = 0.0,
        correction: Mapping[str, Tensor] | None = None,
        rates: Rates | None = None,
    ) -> None:
        self._leaves = {n: nn.Parameter(start[n].clone()) for n in names}
        self._objective = Objective(start, proximal_mu, correction)
        self._optimizer = make_optimizer(list(self._leaves.values()), optimizer)
        self._may_skip = autocast == "float16"
        self.parameters = {name: leaf.data for name, leaf in self._leaves.items()}
        self.num_updates = 0
        self._rates = rates
        self._num_steps = 0

    def step(self, gradient: Mapping[str, Tensor]) -> None:
        """Make the update of one local step."""
        if self._rates is not None:
            _set_rate(self._optimizer, self._rates(self._num_steps))
        self._num_steps += 1
        gradients = {
            name: self._objective.gradient(name, gradient[name].contiguous(), leaf.data)
            for name, leaf in self._leaves.items()
        }
        if self._may_skip and not _are_finite(gradients.values()):
            return
        for name, leaf in self._leaves.items():
            leaf.grad = gradients[name]
        self._optimizer.step()
        self.num_updates += 1


def state_arrays(model: nn.Module) -> Arrays:
    """Copy a model's state to CPU arrays, ``state_dict`` names and order."""
    return {n: t.detach().cpu().numpy().copy() for n, t in model.state_dict().items()}


def load_state(model: nn.Module, state: Mapping[str, NDArray[np.generic]]) -> None:
    """Copy `state` into a model, requiring exactly the same names and shapes."""
    model.load_state_dict({n: torch.from_numpy(np.asarray(a)) for n, a in state.items()})
