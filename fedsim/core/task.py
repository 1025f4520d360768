"""What clients learn: the protocols of a task and its data, and how a configuration names them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsim.core import registry
from fedsim.core.errors import ConfigError
from fedsim.core.own_data import OwnData
from fedsim.core.rng import torch_seed

if TYPE_CHECKING:
    from fedsim.core.config import RunConfig

Columns = Mapping[str, Tensor]
"""Named tensors with one leading length, that of the samples: images, tokens, labels."""
Tensors = Mapping[str, Tensor]
"""What a task's model and loss take of one batch, by name, on the device that trains."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of the data.

    Parameters
    ----------
    dtype : str
        As torch calls it: ``uint8``, ``int64``, ``float32``.
    shape : tuple of int
        Shape of one entry; empty of a number.
    values : int or None
        Of a column of categories, how many there are: its entries are 0 to ``values - 1``.
    """

    dtype: str
    shape: tuple[int, ...] = ()
    values: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Describe the column for ``run.json``."""
        described = {"dtype": self.dtype, "shape": list(self.shape)}
        return described if self.values is None else {**described, "values": self.values}


class DataSpec(Protocol):
    """What is known of data before it is loaded."""

    @property
    def name(self) -> str:
        """The configuration's ``dataset``."""
        ...

    @property
    def columns(self) -> Mapping[str, Column]:
        """What each sample has."""
        ...

    @property
    def label(self) -> str | None:
        """The column of categories by which samples are dealt to clients and counted."""
        ...

    @property
    def train_size(self) -> int:
        """Samples of the training split."""
        ...

    @property
    def test_size(self) -> int:
        """Samples of the test split."""
        ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """What else ``run.json`` says of the data, as JSON values."""
        ...

    @property
    def official_sha256(self) -> str | None:
        """The fingerprint of data that is the same for everybody."""
        ...


class FederatedData(Protocol):
    """The data of a task, in memory or mapped from a file."""

    @property
    def spec(self) -> DataSpec:
        """Sizes and columns."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of both splits, the same wherever the data is the same."""
        ...

    def train(self) -> Columns:
        """Give the training split, which is dealt to the clients."""
        ...

    def test(self) -> Columns:
        """Give the test split, on which the server evaluates."""
        ...

    def check_official(self) -> None:
        """Refuse data that has the name of public data and not its samples.

        Raises
        ------
        InputError
            Naming the file.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Sum:
    """One metric over a batch, ready to be added to that of another.

    Parameters
    ----------
    total : Tensor, shape ()
        Sum over the batch.
    count : int
        What its mean is taken over: samples, tokens, pixels.
    """

    total: Tensor
    count: int


class Task(Protocol):
    """What clients learn: a model, data, a loss and metrics."""

    @property
    def spec(self) -> DataSpec:
        """Of its data, known before that is loaded."""
        ...

    @property
    def merge_single(self) -> bool:
        """Whether a last batch of one sample joins the one before it.

        Batch normalisation cannot take statistics of one value.
        """
        ...

    def model(self) -> nn.Module:
        """Build the untrained model, on the CPU.

        Called under the run's seed: its weights may be drawn from torch's global generator, and
        from nothing else.
        """
        ...

    def data(self) -> FederatedData:
        """Load the data.

        Raises
        ------
        InputError
            When it cannot be had.
        """
        ...

    def batch(self, examples: Columns, draw: np.random.Generator | None) -> Tensors:
        """Make the batch that `loss` and `metrics` take, on the device of the samples.

        Parameters
        ----------
        examples : mapping of str to Tensor
            Rows of the columns.
        draw : numpy.random.Generator or None
            For augmentation, which draws from nothing else; None for none, as in evaluation.
        """
        ...

    def loss(self, model: nn.Module, batch: Tensors) -> Tensor:
        """Compute the mean loss over a batch, shape ()."""
        ...

    def metrics(self, model: nn.Module, batch: Tensors) -> Mapping[str, Sum]:
        """Sum up the metrics over a batch in evaluation mode; ``loss`` is one of them.

        Called once for a batch, without gradients.
        """
        ...


@runtime_checkable
class KeepsOwnData(Protocol):
    """Data in which a node's own samples can take the place of the training split."""

    def with_own(self, own: OwnData) -> FederatedData:
        """Put them in its place, mapped from the cache."""
        ...


@runtime_checkable
class StoresData(Protocol):
    """A task whose data can be sent to machines that lack it."""

    def store(self, tensors: Mapping[str, Tensor]) -> FederatedData:
        """Put the tensors of `tensors_of` into this machine's cache, and map them from there."""
        ...


_MEMBERS = ("spec", "merge_single", "model", "data", "batch", "loss", "metrics")


def task_of(config: RunConfig, *, data_root: str | None = None, download: bool = True) -> Task:
    """Make the task of a configuration.

    Parameters
    ----------
    config : RunConfig
        Names it, and has its settings.
    data_root : str, optional
        Where archives of its data are, in place of the configuration's own.
    download : bool
        Whether data that is not there may be downloaded.

    Raises
    ------
    ConfigError
        When the configuration has settings that the task does not take.
    InputError
        When it is code that the user did not name to this process.
    """
    if data_root is not None:
        config = config.model_copy(update={"data_root": data_root})
    if registry.is_code(config.task):
        found = registry.users_task(config.task)
        if missing := [name for name in _MEMBERS if not hasattr(found, name)]:
            raise ConfigError(
                "task", config.task, f"a callable that returns a task with {missing[0]}"
            )
        return cast(Task, found)
    if config.task not in registry.TASKS:
        names = ", ".join(map(repr, registry.TASKS))
        raise ConfigError("task", config.task, f"one of {names}, or your own as module:NAME")
    return cast(Task, registry.task_module(config.task, "task").make(config, download))


class TaskKey(NamedTuple):
    """What a task of ours says of a key of the configuration that it takes.

    Parameters
    ----------
    help : str
        What the key is, in a phrase.
    choices : tuple of str
        What it may be; empty where that is no list.
    """

    help: str
    choices: tuple[str, ...] = ()


def keys_of_tasks() -> Mapping[str, TaskKey]:
    """Give the keys that tasks of ours take, by their names."""
    keys: dict[str, TaskKey] = {}
    for task in registry.TASKS:
        keys.update(registry.task_module(task, "task").KEYS)
    return keys


def initial_model(config: RunConfig) -> nn.Module:
    """Build the model of a run with the initial weights that follow from its seed.

    Returns
    -------
    torch.nn.Module
        On the CPU, in training mode.
    """
    task = task_of(config)
    with torch_seed(config.seed):
        return task.model()


def rows_of(columns: Columns, rows: Tensor | slice) -> dict[str, Tensor]:
    """Take the same rows of all columns."""
    return {name: column[rows] for name, column in columns.items()}


def tensors_of(data: FederatedData) -> dict[str, Tensor]:
    """List all columns of both splits as ``train_<column>`` and ``test_<column>``, in order."""
    splits = {"train": data.train(), "test": data.test()}
    return {f"{split}_{name}": c for split, cs in splits.items() for name, c in cs.items()}


def labels_of(data: FederatedData) -> NDArray[np.int64]:
    """Give the category of every training sample; zeros where data has no label."""
    if data.spec.label is None:
        return np.zeros(data.spec.train_size, np.int64)
    return cast(NDArray[np.int64], data.train()[data.spec.label].numpy())


def classes_of(spec: DataSpec) -> int:
    """Count the categories of the label; 1 where data has no label."""
    return 1 if spec.label is None else spec.columns[spec.label].values or 1


def describe(spec: DataSpec) -> dict[str, Any]:
    """Describe data for ``run.json``, all but its hash."""
    return {
        "name": spec.name,
        "classes": classes_of(spec),
        "columns": {name: column.to_json() for name, column in spec.columns.items()},
        "label": spec.label,
        **spec.facts,
        "train_size": spec.train_size,
        "test_size": spec.test_size,
    }
