"""Counted randomness: every generator follows from the seed, a purpose, a round and a partition.

No generator is carried from one step of a run to the next, so resuming a run, the order of
its clients and the number of its workers cannot change what is drawn.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """What a generator is for. The numbers are part of every run: never change one."""

    PARTICIPANTS = 1
    BATCHES = 2
    AUGMENTATION = 3
    CLIENT_SETTINGS = 4
    PARTITION = 5
    SYNTHETIC_DATA = 6
    PROJECTION = 7
    NOISE = 8
    MESSAGES = 9
    BEHAVIOR = 10


def generator(
    seed: int, purpose: Purpose, round_number: int = 0, partition: int = 0
) -> np.random.Generator:
    """Make the generator of one purpose in one round of one partition.

    Parameters
    ----------
    seed : int
        The run's seed, 0 or more.
    purpose : Purpose
        What the numbers are for.
    round_number : int
        Round, from 1; 0 where the draw belongs to no round. For a projection, the
        parameter's position.
    partition : int
        Partition id; 0 where the draw belongs to no client. For a projection, the kernel's tap.

    Returns
    -------
    numpy.random.Generator
        PCG64 seeded by ``SeedSequence([seed, purpose, round, partition])``.
    """
    entropy = [seed, int(purpose), round_number, partition]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))


@contextmanager
def torch_seed(seed: int) -> Iterator[None]:
    """Seed torch's global CPU generator for a block and restore it afterwards.

    torch's initialisers draw from the global generator and take no other.
    """
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: it seeds every GPU's generator as well, for good.
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def global_seed(seed: int, purpose: Purpose, round_number: int) -> Iterator[None]:
    """Seed numpy's and Python's global generators for a round, and put them back afterwards.

    Strategies draw from these and from no others: Flower's differential privacy draws its noise,
    its sampling the order of clients, and a user's own strategy anything it needs.
    """
    draw = generator(seed, purpose, round_number)
    ours, pythons = np.random.get_state(), random.getstate()  # noqa: NPY002
    np.random.seed(int(draw.integers(2**32)))  # noqa: NPY002
    random.seed(int(draw.integers(2**32)))
    try:
        yield
    finally:
        np.random.set_state(ours)  # noqa: NPY002
        random.setstate(pythons)


@contextmanager
def nothing_drawn() -> Iterator[None]:
    """Put Python's global generator back after a block, which others' imports may draw from."""
    before = random.getstate()
    try:
        yield
    finally:
        random.setstate(before)


def draw_participants(seed: int, round_number: int, clients: int, per_round: int) -> list[int]:
    """Draw the partitions that take part in a round, without replacement.

    Parameters
    ----------
    seed : int
        The run's seed.
    round_number : int
        Round, from 1.
    clients : int
        How many partitions there are.
    per_round : int
        How many take part, 1 to `clients`.

    Returns
    -------
    list of int
        `per_round` different partition ids in the order of the draw.
    """
    draw = generator(seed, Purpose.PARTICIPANTS, round_number)
    return [int(p) for p in draw.choice(clients, size=per_round, replace=False)]
