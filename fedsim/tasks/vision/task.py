"""The task of images in classes: one loss, one batch maker, two metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from fedsim.core.config import RunConfig
from fedsim.core.errors import ConfigError
from fedsim.core.fields import one_of
from fedsim.core.task import Columns, Sum, TaskKey, Tensors
from fedsim.tasks.vision import models
from fedsim.tasks.vision.datasets import (
    Dataset,
    DatasetSpec,
    load_dataset,
    parse_name,
    store_dataset,
)
from fedsim.tasks.vision.images import augment, normalise

KEYS = {
    "dataset": TaskKey(
        "images in classes",
        ("digits", "cifar10", "cifar100", "synthetic[:SAMPLES[:CLASSES]]"),
    ),
    "data-root": TaskKey("folder of the CIFAR archives (default: FEDSIM_DATA_ROOT or the cache)"),
    "model": TaskKey("resnet18 is torchvision's, resnet18-cifar has a 3x3 stem", models.ARCHS),
    "norm": TaskKey("normalisation layers", models.NORMS),
}
"""The keys of the configuration that are about this task alone."""


@dataclass(frozen=True, kw_only=True)
class Vision:
    """A `Task`: cross-entropy over the classes of images.

    A batch is ``inputs``, float32 of shape (batch, 3, 32, 32), normalised, and ``targets``, int64
    of shape (batch,).

    Parameters
    ----------
    spec : DatasetSpec
        Of the dataset.
    arch, norm : str
        As `models.build_model` takes them.
    data_root : str or None
        Folder of the CIFAR archives.
    seed : int
        ``synthetic`` is generated from it.
    download : bool
        Whether CIFAR may be downloaded.
    """

    spec: DatasetSpec
    arch: str
    norm: str
    data_root: str | None
    seed: int
    download: bool

    @property
    def merge_single(self) -> bool:
        """Whether normalisation is over the batch, which takes two samples."""
        return self.norm == "batch"

    def model(self) -> nn.Module:
        """Build the untrained model."""
        return models.build_model(
            self.arch, classes=self.spec.classes, norm=self.norm, seed=self.seed
        )

    def data(self) -> Dataset:
        """Load the dataset, converting it into the cache on first use."""
        return load_dataset(
            self.spec.name, data_root=self.data_root, seed=self.seed, download=self.download
        )

    def store(self, tensors: Mapping[str, Tensor]) -> Dataset:
        """Put the dataset into this machine's cache."""
        return store_dataset(self.spec.name, tensors, seed=self.seed)

    def batch(self, examples: Columns, draw: np.random.Generator | None) -> Tensors:
        """Augment where there are draws, and normalise."""
        pixels = examples["images"]
        if draw is not None:
            pixels = augment(pixels, draw, flip=self.spec.flip)
        inputs = normalise(pixels, self.spec.mean, self.spec.std)
        return {"inputs": inputs, "targets": examples["labels"]}

    def loss(self, model: nn.Module, batch: Tensors) -> Tensor:
        """Give the mean cross-entropy."""
        return nn.functional.cross_entropy(model(batch["inputs"]), batch["targets"])

    def metrics(self, model: nn.Module, batch: Tensors) -> Mapping[str, Sum]:
        """Sum up the cross-entropy (``loss``) and the correct predictions (``accuracy``)."""
        outputs, targets = model(batch["inputs"]), batch["targets"]
        loss = nn.functional.cross_entropy(outputs, targets, reduction="sum")
        correct = (outputs.argmax(dim=1) == targets).sum()
        return {"loss": Sum(total=loss, count=len(targets)),
                "accuracy": Sum(total=correct, count=len(targets))}  # fmt: skip


def make(config: RunConfig, download: bool) -> Vision:
    """Make the task from the keys ``dataset``, ``data-root``, ``model``, ``norm`` and ``seed``.

    Raises
    ------
    ConfigError
        Naming the key that cannot be used, alone or together with others.
    """
    try:
        spec = parse_name(config.dataset)
    except ValueError as error:
        raise ConfigError("dataset", config.dataset, str(error)) from None
    for key, value in (("model", config.model), ("norm", config.norm)):
        if value not in KEYS[key].choices:
            raise ConfigError(key, value, one_of(KEYS[key].choices))
    if config.compile and config.model == "cnn":
        # torch compiles nothing of a plain sequence of layers, and does not say so.
        raise ConfigError("compile", True, "false with model = 'cnn', or another model")
    needs_two = models.needs_two_samples(config.model, config.norm)
    if needs_two:
        _check_two_samples(config)
    config.check_samples(spec.train_size, 2 if needs_two else 1)
    return Vision(
        spec=spec,
        arch=config.model,
        norm=config.norm,
        data_root=config.data_root,
        seed=config.seed,
        download=download,
    )


def _check_two_samples(config: RunConfig) -> None:
    why = f"2 or more: norm = 'batch' cannot normalise one sample in {config.model}'s last stage"
    sizes = config.batch_size if isinstance(config.batch_size, tuple) else (config.batch_size,)
    tables = [(f"client.{p}.batch-size", c.batch_size) for p, c in config.client.items()]
    for field, size in [*(("batch-size", s) for s in sizes), *tables]:
        if size is not None and size < 2:
            raise ConfigError(field, size, why)
    if config.min_samples < 2:
        raise ConfigError("min-samples", config.min_samples, why)
