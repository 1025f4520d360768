"""Everything about a run that is known before it starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.core import registry
from fedsim.core.algorithm import Algorithm, Setup, make_algorithm
from fedsim.core.behavior import behavior_of
from fedsim.core.capture import Capture, is_own
from fedsim.core.config import RunConfig
from fedsim.core.errors import ConfigError
from fedsim.core.partition import PartitionScheme, make_partition, partition_sha256
from fedsim.core.rng import Purpose, generator
from fedsim.core.support import Taps, live_taps
from fedsim.core.task import (
    FederatedData,
    Task,
    initial_model,
    labels_of,
    rows_of,
    task_of,
)
from fedsim.core.training import Arrays, Batch, load_batches, state_arrays
from fedsim.core.units import format_bytes

_ENTRY_BYTES = 512
"""Most bytes of what is written about one tensor: in a header, an index, a line about its step."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A configuration with its data, partition and initial model.

    Parameters
    ----------
    config : RunConfig
        The configuration.
    dataset : FederatedData
        Mapped, not copied.
    partition : list of ndarray of int64
        Indices into the training split, by partition id; into the data of each node where those
        have their own, and empty until they have been asked.
    parameters : dict of str to tuple of int
        Shapes of the model's parameters, in ``model.parameters()`` order; all float32.
    initial_state : dict of str to ndarray
        The untrained model, ``state_dict`` names.
    nodes : list of dict
        ``sha256`` and ``classes`` of each node's own data, by partition id.
    done : int
        The last round of the run that is there already; -1 of one that is still to be made.
    """

    config: RunConfig
    dataset: FederatedData
    partition: list[NDArray[np.int64]]
    parameters: dict[str, tuple[int, ...]]
    initial_state: Arrays
    nodes: list[dict[str, Any]] = field(default_factory=list)
    done: int = -1

    @classmethod
    def prepare(cls, config: RunConfig, *, download: bool = True, trust: bool = True) -> Self:
        """Load the data, deal the partition and draw the initial weights.

        Parameters
        ----------
        config : RunConfig
            The configuration.
        download : bool
            Whether data that is not there may be downloaded.
        trust : bool
            Whether the user named the code that the configuration names, and it may be loaded.

        Raises
        ------
        InputError
            When the data cannot be had, or no parameter matches ``capture-layers``.
        """
        if trust:
            registry.trust(config.code)
        dataset = task_of(config, download=download).data()
        partition: list[NDArray[np.int64]] = []
        if not config.own_data:
            partition = deal_partition(config, dataset)
        model = initial_model(config)
        parameters = {n: tuple(p.shape) for n, p in model.named_parameters()}
        # A class of the user's may capture other things, and is loaded only where that was allowed.
        policy = None if is_own(config.capture) else config.policy
        if policy is not None and policy.keeps_files and not policy.layers_of(parameters):
            raise ConfigError(
                "capture-layers",
                list(config.capture_layers),
                f"globs that match a parameter of {config.arch}, like {next(iter(parameters))!r}",
            )
        return cls(
            config=config,
            dataset=dataset,
            partition=partition,
            parameters=parameters,
            initial_state=state_arrays(model),
        )

    def of_nodes(self, samples: Sequence[int], nodes: Sequence[dict[str, Any]]) -> Self:
        """Take what nodes with data of their own have reported, by partition id."""
        partition = [np.arange(count, dtype=np.int64) for count in samples]
        return replace(self, partition=partition, nodes=list(nodes))

    @cached_property
    def task(self) -> Task:
        """What clients learn."""
        return task_of(self.config)

    @cached_property
    def sizes(self) -> list[int]:
        """Training samples of each client, by partition id."""
        return [len(indices) for indices in self.partition]

    @cached_property
    def partition_sha256(self) -> str:
        """Hash of the whole partition."""
        return partition_sha256(self.partition)

    @cached_property
    def state_bytes(self) -> int:
        """Bytes of one state, and of one delta."""
        return sum(array.nbytes for array in self.initial_state.values())

    @cached_property
    def algorithm(self) -> Algorithm | None:
        """The strategy; None for a class of the user's."""
        return make_algorithm(self.config.strategy, Setup.of(self.config, self.parameters))

    @cached_property
    def strategy_bytes(self) -> int:
        """Bytes of what the strategy keeps from a round to the next."""
        return sum(spec.nbytes for spec in self.algorithm.keeps().values()) if self.algorithm else 0

    @cached_property
    def control_bytes(self) -> int:
        """Bytes of what the strategy keeps of one client in one round."""
        kept = self.algorithm.keeps_of_client() if self.algorithm else {}
        return sum(spec.nbytes for spec in kept.values())

    @cached_property
    def supports(self) -> dict[str, Taps | None]:
        """Live taps of each parameter in one step of the initial model.

        What a run will find, unless a gradient leaves it: taps are live or dead by the sizes of
        the maps they work on. The recorder never relies on it.
        """
        model = initial_model(self.config)
        batch = self.task.batch(rows_of(self.dataset.train(), slice(2)), None)
        loss = self.task.loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return {
            n: None if p.grad is None else live_taps(p.grad) for n, p in model.named_parameters()
        }

    @cached_property
    def step_bytes(self) -> int:
        """Bytes of one captured step, as far as the first gradients tell."""
        return self.config.policy.step_bytes(self)

    def steps_of(self, partition: int) -> int:
        """Count the local steps of one client in a round."""
        return self.config.training_of(partition).num_steps(self.sizes[partition])

    def most_files_of(self, partition: int) -> int:
        """Bound the files that one client records in a round: a shard for each step, and two."""
        return len(self.config.policy.kept_steps(self.steps_of(partition))) + 2

    def most_bytes_of(self, partition: int) -> int:
        """Bound the bytes of these files from above, for any gradients.

        No more than about twice what the densest gradients take: a client that lists more did not
        write it.
        """
        policy, steps = self.config.policy, self.steps_of(partition)
        training = self.config.training_of(partition)
        kept = len(policy.kept_steps(steps))
        most = policy.most_step_bytes(self)
        entries = _ENTRY_BYTES * (1 + len(self.parameters))
        samples = 1 + min(training.batch_size, self.sizes[partition])
        # Twice, since a shard that is closed early keeps room for the names of all of its steps.
        return 2 * kept * (most + entries) + steps * (entries + 16 * samples) + 2**20

    @cached_property
    def _local_steps(self) -> list[int]:
        return [self.steps_of(p) for p in range(self.config.clients)]

    @cached_property
    def _times_drawn(self) -> Counter[int]:
        rounds = range(1, self.config.rounds + 1)
        return Counter(p for r in rounds for p in self.config.participants_of(r))

    def captured_bytes(self, policy: Capture | None = None) -> int:
        """Count the bytes of gradients that the run will keep, by its own policy or another."""
        policy = policy or self.config.policy
        steps = sum(
            times * len(policy.kept_steps(self._local_steps[partition]))
            for partition, times in self._times_drawn.items()
        )
        return steps * policy.step_bytes(self)

    def fitting_change(self, room: int) -> str | None:
        """Find the smallest change that keeps no more than `room` bytes of gradients.

        What loses nothing is smaller than what loses precision, and that smaller than leaving
        out steps, of which as few as possible are left out.

        Returns
        -------
        str or None
            Like ``capture = 'every:3'``; None where not even ``capture = none`` helps.
        """
        policy = self.config.policy
        if room < 0:
            return None

        def fits(capture: Capture) -> bool:
            return self.captured_bytes(capture) <= room

        for change, smaller in policy.smaller():
            if fits(smaller):
                return change
        fewer = policy.fewer(max(self._local_steps), fits)
        return f"capture = {str(fewer or 'none')!r}"

    def check_budget(self) -> None:
        """Refuse a run that would keep more bytes of gradients than ``capture-budget``.

        Raises
        ------
        ConfigError
            With what is needed and the smallest change that would fit.
        """
        budget = self.config.budget
        if budget is None or (needed := self.captured_bytes()) <= budget:
            return
        raise ConfigError(
            "capture-budget",
            self.config.capture_budget,
            f"at least {needed:,} bytes ({format_bytes(needed)}) for capture = "
            f"{self.config.capture!r}; "
            f"{self.fitting_change(budget)} would fit",
        )

    def round_bytes(self, round_number: int) -> int:
        """Count the bytes that a round will write, but for its rows."""
        participants = self.config.participants_of(round_number)
        kept = self.config.policy.kept_steps
        steps = sum(len(kept(self._local_steps[p])) for p in participants)
        states = len(participants) + 2
        kept_bytes = self.strategy_bytes + len(participants) * self.control_bytes
        return steps * self.step_bytes + states * self.state_bytes + kept_bytes

    def bytes_after(self, round_number: int) -> int:
        """Count the bytes that are still to be written after a round; after -1, all of them."""
        if round_number < 0:
            return self.run_bytes
        return sum(self.round_bytes(r) for r in range(round_number + 1, self.config.rounds + 1))

    @cached_property
    def run_bytes(self) -> int:
        """Count the bytes that the run will write, but for its rows."""
        states = 1 + 2 * self.config.rounds + self._times_drawn.total()
        kept = self.config.rounds * self.strategy_bytes
        kept += self._times_drawn.total() * self.control_bytes
        return self.captured_bytes() + states * self.state_bytes + kept


def deal_partition(config: RunConfig, data: FederatedData) -> list[NDArray[np.int64]]:
    """Deal the training samples to the clients, the same way whenever asked.

    Parameters
    ----------
    config : RunConfig
        The run's; its data must not be the nodes' own.
    data : FederatedData
        Its data.

    Returns
    -------
    list of ndarray of int64
        Positions in the training split, by client.

    Raises
    ------
    ConfigError
        When there are fewer samples than the clients need, or no label to deal them by.
    """
    config.check_samples(data.spec.train_size)
    if data.spec.label is None and config.partition != "iid":
        raise ConfigError("partition", config.partition, "'iid': the data has no label")
    return make_partition(
        labels_of(data),
        PartitionScheme.parse(config.partition),
        clients=config.clients,
        alpha=config.alpha,
        min_samples=config.min_samples,
        seed=config.seed,
    )


def batches_of_round(
    config: RunConfig,
    task: Task,
    data: FederatedData,
    indices: NDArray[np.int64],
    *,
    round_number: int,
    partition: int,
    device: torch.device,
) -> Iterator[Batch]:
    """Yield the batches that a client trains on in a round, the same ones whenever asked.

    Parameters
    ----------
    config : RunConfig
        The run's.
    task : Task
        What the client learns.
    data : FederatedData
        Its data.
    indices : ndarray of int64
        The client's positions in the training split.
    round_number, partition : int
        The round and the client.
    device : torch.device
        Where batches are made.
    """
    return load_batches(
        task,
        data.train(),
        indices,
        config.training_of(partition),
        order=generator(config.seed, Purpose.BATCHES, round_number, partition),
        augmentation=generator(config.seed, Purpose.AUGMENTATION, round_number, partition),
        device=device,
        examples_of=behavior_of(config, partition, round_number).examples,
    )
