"""Everything of a run that is known before it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fedsim.core.capture import CapturePolicy
from fedsim.core.config import RunConfig
from fedsim.core.datasets import Dataset, load_dataset
from fedsim.core.errors import ConfigError
from fedsim.core.models import build_model
from fedsim.core.partition import PartitionScheme, make_partition
from fedsim.core.training import Arrays, state_arrays


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A configuration with its data, partition and initial model.

    Parameters
    ----------
    config : RunConfig
        The configuration.
    dataset : Dataset
        Mapped, not copied.
    partition : list of ndarray of int64
        Indices into the training split, by partition id.
    parameters : dict of str to tuple of int
        Shapes of the model's parameters, in ``model.parameters()`` order; all float32.
    initial_state : dict of str to ndarray
        The untrained model, ``state_dict`` names.
    """

    config: RunConfig
    dataset: Dataset
    partition: list[NDArray[np.int64]]
    parameters: dict[str, tuple[int, ...]]
    initial_state: Arrays

    @classmethod
    def prepare(cls, config: RunConfig) -> Self:
        """Load the data, deal the partition and draw the initial weights.

        Raises
        ------
        InputError
            When the data cannot be had, or no parameter matches ``capture-layers``.
        """
        dataset = load_dataset(config.dataset, data_root=config.data_root, seed=config.seed)
        partition = make_partition(
            dataset.train_labels.numpy(),
            PartitionScheme.parse(config.partition),
            clients=config.clients,
            alpha=config.alpha,
            min_samples=config.min_samples,
            seed=config.seed,
        )
        model = build_model(
            config.model, classes=dataset.spec.classes, norm=config.norm, seed=config.seed
        )
        parameters = {n: tuple(p.shape) for n, p in model.named_parameters()}
        if config.capture != "none" and not config.policy.layers_of(parameters):
            raise ConfigError(
                "capture-layers",
                list(config.capture_layers),
                f"globs that match a parameter of {config.model}, like {next(iter(parameters))!r}",
            )
        return cls(
            config=config,
            dataset=dataset,
            partition=partition,
            parameters=parameters,
            initial_state=state_arrays(model),
        )

    @cached_property
    def sizes(self) -> list[int]:
        """Training samples of each client, by partition id."""
        return [len(indices) for indices in self.partition]

    @cached_property
    def state_bytes(self) -> int:
        """Bytes of one state, and of one delta."""
        return sum(array.nbytes for array in self.initial_state.values())

    @cached_property
    def step_bytes(self) -> int:
        """Bytes of one captured step."""
        layers = CapturePolicy.parse("all", self.config.capture_layers).layers_of(self.parameters)
        return 4 * sum(math.prod(self.parameters[name]) for name in layers)

    def steps_of(self, partition: int) -> int:
        """Count the local steps of one client in a round."""
        return self.config.training_of(partition).num_steps(self.sizes[partition])

    @cached_property
    def _captured_steps(self) -> list[int]:
        policy = self.config.policy
        return [policy.count_of(self.steps_of(p)) for p in range(self.config.clients)]

    def round_bytes(self, round_number: int) -> int:
        """Count the bytes that a round will write, but for its rows."""
        participants = self.config.participants_of(round_number)
        steps = sum(self._captured_steps[p] for p in participants)
        return steps * self.step_bytes + (len(participants) + 2) * self.state_bytes

    @property
    def run_bytes(self) -> int:
        """Count the bytes that the run will write, but for its rows."""
        rounds = range(1, self.config.rounds + 1)
        return self.state_bytes + sum(self.round_bytes(r) for r in rounds)
