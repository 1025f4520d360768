"""What a report measures in a run: class counts, drift, conflict and noise, read as a stream."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.core.errors import InputError
from fedsim.core.partition import class_counts
from fedsim.core.task import classes_of, labels_of, task_of
from fedsim.core.units import format_bytes
from fedsim.plugins.report.figures import spread
from fedsim.plugins.report.geometry import (
    Layers,
    conflict_share,
    cosines,
    gram,
    noise_scale,
    pairs_of,
)
from fedsim.recording.files import ITEM_BYTES
from fedsim.recording.reader import Client, Run

DEFAULT_BUDGET = 20 * 10**9
"""Bytes of deltas and gradients that a report reads of one run."""
MOST_CELLS = 200_000
"""Of all matrices of a figure together: a page holds some megabytes."""
_MOST_MATRICES = 24
_MOST_STEPS = 16
_QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How the clients of one round moved.

    Parameters
    ----------
    round : int
        The round.
    clients : list of int
        Partition ids, ascending: the order of all that follows.
    lengths : ndarray of float64, shape (clients,)
        Euclidean norms of the deltas' parameters.
    to_movement : ndarray of float64, shape (clients,)
        Cosines to what the round did to the global parameters.
    quantiles : tuple of float, optional
        10 %, 50 % and 90 % of the cosines of all pairs; None where there is no pair.
    pairs : ndarray of float64, shape (clients, clients), optional
        Cosines of all pairs, in the rounds that are shown as a matrix.
    """

    round: int
    clients: list[int]
    lengths: NDArray[np.float64]
    to_movement: NDArray[np.float64]
    quantiles: tuple[float, ...] | None
    pairs: NDArray[np.float64] | None


@dataclass(frozen=True, kw_only=True)
class Conflict:
    """How the first gradients of the clients of one round point.

    Parameters
    ----------
    round : int
        The round.
    clients : int
        Clients whose first step was captured.
    share : float or None
        Share of pairs with a negative cosine.
    quantiles : tuple of float, optional
        As for `Drift`.
    """

    round: int
    clients: int
    share: float | None
    quantiles: tuple[float, ...] | None


@dataclass(frozen=True, kw_only=True)
class Noise:
    """How the gradients of one client's steps differ.

    Parameters
    ----------
    round, partition : int
        Which client in which round.
    steps : int
        Captured steps that were taken.
    scale : float or None
        Simple noise scale in samples; None where noise hides the signal.
    """

    round: int
    partition: int
    steps: int
    scale: float | None


class Study:
    """A run and what is measured in it, each thing when it is asked for and once.

    Parameters
    ----------
    run : Run
        The run.
    label : str
        What the run is called in figures.
    alone : bool
        Whether figures show this run only, and need not say so.
    budget : int
        Most bytes of deltas and gradients to read. Rounds are left out evenly to keep to it.
    data_root : str, optional
        Folder of the data, where it is not the one of the run.
    told : callable, optional
        Told of bytes as they have been read.

    Raises
    ------
    InputError
        When rows speak of clients or classes that the files do not hold.
    """

    def __init__(
        self,
        run: Run,
        label: str,
        *,
        alone: bool = True,
        budget: int = DEFAULT_BUDGET,
        data_root: str | None = None,
        told: Callable[[int], None] = lambda count: None,
    ) -> None:
        run.check_sizes()
        for row in run.client_rows:
            _check_row(run, row)
        for row in run.round_rows:
            for partition in row["participants"]:
                _check_partition(run, row, partition)
        self.run = run
        self.label = label
        self.alone = alone
        self._share = budget // 3
        self._data_root = data_root
        self._told = told

    @cached_property
    def ok_rows(self) -> list[dict[str, Any]]:
        """The telemetry of the clients that trained."""
        return [row for row in self.run.client_rows if row["status"] == "ok"]

    @cached_property
    def trained_rounds(self) -> list[int]:
        """The rounds that some client's work is in, ascending."""
        return sorted({row["round"] for row in self.ok_rows})

    # Classes

    @cached_property
    def class_counts(self) -> tuple[NDArray[np.float64], str]:
        """Count the samples of each class at each client; NaN and a reason where not known.

        Telemetry has the counts of the clients that trained; the others' follow from the labels
        of the data, where they are at hand and agree.
        """
        sizes = [len(indices) for indices in self.run.partition.values()]
        counts = np.full((len(sizes), _classes_of(self.run)), np.nan)
        for row in self.ok_rows:
            counts[row["partition"]] = row["class_distribution"]
        unknown = np.isnan(counts[:, 0])
        if not unknown.any():
            return counts, ""
        config = self.run.config
        if config.own_data:
            return counts, f"{unknown.sum()} clients have not trained yet and are blank."
        try:
            task = task_of(config, data_root=self._data_root, download=False)
            labels = labels_of(task.data())
            full = class_counts(list(self.run.partition.values()), labels, counts.shape[1])
            if np.array_equal(full[~unknown], counts[~unknown]):
                return full.astype(float), ""
            reason = "the data at hand is not that of the run"
        except InputError:
            reason = "the data is not at hand"
        return counts, f"{unknown.sum()} clients have not trained yet and are blank: {reason}."

    # Rounds within the budget

    @cached_property
    def _state_bytes(self) -> int:
        sizes = self.run.described.values()
        return sum(ITEM_BYTES.get(dtype, 4) * math.prod(shape) for dtype, shape in sizes)

    @cached_property
    def drift_rounds(self) -> list[int]:
        """The rounds whose deltas are read."""
        return _within(self._share, self.trained_rounds, self._drift_bytes)

    def _drift_bytes(self, number: int) -> int:
        # The state before is the one that the last round ended with, and was read then.
        return self._state_bytes * (1 + len(self.run.round(number).clients))

    @cached_property
    def first_step_rounds(self) -> list[int]:
        """The rounds in which the first step of a client was kept, in any form."""
        return sorted({row["round"] for row in self.ok_rows if 0 in self._kept_steps(row)})

    @cached_property
    def conflict_rounds(self) -> list[int]:
        """The rounds whose first gradients are read."""
        return _within(self._share, self.first_step_rounds, lambda n: self._step_bytes(n, 1))

    @cached_property
    def several_step_rounds(self) -> list[int]:
        """The rounds in which two full batches of a client were kept, in any form."""
        return sorted({row["round"] for row in self.ok_rows if len(self._full_steps(row)) > 1})

    @cached_property
    def _noise_plan(self) -> tuple[list[int], int]:
        """The rounds whose gradients are read for their noise, and how many steps of each."""
        rounds = self.several_step_rounds
        steps = _MOST_STEPS
        while steps > 4 and sum(self._step_bytes(n, steps) for n in rounds) > self._share:
            steps //= 2
        return _within(self._share, rounds, lambda n: self._step_bytes(n, steps)), steps

    @property
    def noise_rounds(self) -> list[int]:
        """The rounds whose gradients are read for their noise."""
        return self._noise_plan[0]

    @property
    def noise_steps(self) -> int:
        """The most captured steps of a client that are read for their noise."""
        return self._noise_plan[1]

    def _step_bytes(self, number: int, steps: int) -> int:
        return sum(
            row["bytes_captured"]
            // row["num_steps_captured"]
            * min(steps, row["num_steps_captured"])
            for row in self.run.client_rows_of(number)
            if row.get("num_steps_captured")
        )

    @property
    def bytes_to_read(self) -> int:
        """What all measurements together read."""
        return (
            sum(self._drift_bytes(n) for n in self.drift_rounds)
            + sum(self._step_bytes(n, 1) for n in self.conflict_rounds)
            + sum(self._step_bytes(n, self.noise_steps) for n in self.noise_rounds)
        )

    def left_out(self, read: Sequence[int], of: Sequence[int]) -> str:
        """Say which rounds were not read, and how to read them."""
        if len(read) == len(of):
            return ""
        return (
            f" Of {self.label}, {len(read)} of {len(of)} rounds were read to keep to "
            f"{format_bytes(3 * self._share)}; --read-budget allows more."
        )

    # Measurements

    @cached_property
    def matrix_rounds(self) -> list[int]:
        """The rounds whose pairs are shown as a matrix: as many as a page can hold."""
        cells = max((len(self.run.round(n).clients) ** 2 for n in self.drift_rounds), default=1)
        return spread(self.drift_rounds, min(_MOST_MATRICES, MOST_CELLS // cells))

    @cached_property
    def drift(self) -> list[Drift]:
        """Measure the deltas of each round that the budget allows.

        Raises
        ------
        InputError
            When a delta cannot be read.
        """
        return [self._drift_of(number) for number in self.drift_rounds]

    def _drift_of(self, number: int) -> Drift:
        this = self.run.round(number)
        clients = [this.clients[p] for p in sorted(this.clients)]
        vectors = [Layers(client.delta) for client in clients]
        products = gram([*vectors, Layers(this.movement)], list(self.run.shapes))
        angles = cosines(products)
        self._told(self._drift_bytes(number))
        return Drift(
            round=number,
            clients=[client.partition for client in clients],
            lengths=np.sqrt(np.diag(products)[:-1]),
            to_movement=angles[:-1, -1],
            quantiles=_quantiles(angles[:-1, :-1]),
            pairs=angles[:-1, :-1] if number in self.matrix_rounds else None,
        )

    @cached_property
    def conflict(self) -> list[Conflict]:
        """Compare the first gradients of the clients of each round.

        Raises
        ------
        InputError
            When a gradient cannot be read.
        """
        return [self._conflict_of(number) for number in self.conflict_rounds]

    def _conflict_of(self, number: int) -> Conflict:
        found = self.run.round(number).clients
        clients = [found[p] for p in sorted(found) if 0 in self._kept_steps(found[p].telemetry)]
        angles = cosines(self._products([(client, 0) for client in clients]))
        self._told(self._step_bytes(number, 1))
        return Conflict(
            round=number,
            clients=len(clients),
            share=conflict_share(angles),
            quantiles=_quantiles(angles),
        )

    @cached_property
    def noise(self) -> list[Noise]:
        """Compare the gradients of the steps of each client with two captured ones or more.

        Raises
        ------
        InputError
            When a gradient cannot be read.
        """
        return [noise for number in self.noise_rounds for noise in self._noise_of(number)]

    def _noise_of(self, number: int) -> Iterable[Noise]:
        for partition, client in sorted(self.run.round(number).clients.items()):
            steps = self._full_steps(client.telemetry)[: self.noise_steps]
            if len(steps) > 1:
                products = self._products([(client, step) for step in steps])
                scale = noise_scale(products, client.telemetry["batch_size"])
                yield Noise(round=number, partition=partition, steps=len(steps), scale=scale)
        self._told(self._step_bytes(number, self.noise_steps))

    def _kept_steps(self, row: dict[str, Any]) -> range:
        if row.get("not_captured") or not self.run.has_captured(row):
            return range(0)
        return self.run.config.policy.kept_steps(row["num_steps"])

    def _full_steps(self, row: dict[str, Any]) -> list[int]:
        # The last batch of an epoch may be smaller, and has other noise.
        sizes, full = row["batch_sizes"], row["batch_size"]
        return [step for step in self._kept_steps(row) if sizes[step] == full]

    def _products(self, steps: Sequence[tuple[Client, int]]) -> NDArray[np.float64]:
        policy, shapes = self.run.config.policy, self.run.shapes
        vectors = [policy.vector(client, step) for client, step in steps]
        return gram([v for v in vectors if v is not None], policy.vector_layers(shapes))


def _classes_of(run: Run) -> int:
    # Not what run.json claims: a table of that many classes may not fit into memory.
    return classes_of(task_of(run.config).spec)


def _check_partition(run: Run, row: dict[str, Any], partition: int) -> None:
    if partition not in run.partition:
        raise InputError(
            f"{run.path}: round {row['round']} names client {partition}; expected 0 to "
            f"{len(run.partition) - 1}"
        )


def _check_row(run: Run, row: dict[str, Any]) -> None:
    _check_partition(run, row, row["partition"])
    classes = _classes_of(run)
    if row["status"] == "ok" and len(row["class_distribution"]) != classes:
        raise InputError(
            f"{run.layout.clients}: class_distribution of client {row['partition']} in round "
            f"{row['round']} has {len(row['class_distribution'])} numbers; expected {classes}"
        )


def _quantiles(angles: NDArray[np.float64]) -> tuple[float, ...] | None:
    pairs = pairs_of(angles)
    return tuple(float(q) for q in np.quantile(pairs, _QUANTILES)) if len(pairs) else None


def _within(budget: int, rounds: Sequence[int], cost: Callable[[int], int]) -> list[int]:
    """Spread as many rounds as the budget allows."""
    count = len(rounds)
    chosen = list(rounds)
    while chosen and (total := sum(map(cost, chosen))) > budget:
        count = min(count - 1, count * budget // total)
        chosen = spread(rounds, count)
    return chosen
