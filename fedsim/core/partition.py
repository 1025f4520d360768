"""Splitting the training samples over clients: a disjoint cover, the same for the same seed."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from fedsim.core.rng import Purpose, generator
from fedsim.core.units import parse_count

Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class PartitionScheme:
    """How samples are dealt to clients.

    Parameters
    ----------
    name : {"dirichlet", "iid", "shards", "nodes"}
        The rule; with ``nodes`` nothing is dealt, since each node has data of its own.
    shards_per_client : int
        Shards of label-sorted samples that each client gets under ``shards``.
    """

    name: Literal["dirichlet", "iid", "shards", "nodes"]
    shards_per_client: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``dirichlet``, ``iid``, ``shards`` (2 a client), ``shards:K`` or ``nodes``.

        Raises
        ------
        ValueError
            With the allowed forms, when `text` is not one of them.
        """
        if text in ("dirichlet", "iid", "nodes"):
            return cls(name=text)  # type: ignore[arg-type]
        name, colon, count = text.partition(":")
        if name == "shards" and not colon:
            return cls(name="shards", shards_per_client=2)
        if name == "shards" and (shards := parse_count(count)):
            return cls(name="shards", shards_per_client=shards)
        raise ValueError("dirichlet, iid, shards, shards:K with a whole K of 1 or more, or nodes")


def make_partition(
    labels: NDArray[np.int64],
    scheme: PartitionScheme,
    *,
    clients: int,
    alpha: float,
    min_samples: int,
    seed: int,
) -> list[Indices]:
    """Deal every training sample to exactly one client.

    Parameters
    ----------
    labels : ndarray of int64, shape (samples,)
        Class of each training sample.
    scheme : PartitionScheme
        The rule.
    clients : int
        How many clients; partition ids are 0 to `clients` - 1.
    alpha : float
        Concentration of the Dirichlet distribution; only ``dirichlet`` uses it.
    min_samples : int
        Clients below it take samples from the largest client.
    seed : int
        The run's seed.

    Returns
    -------
    list of ndarray of int64
        The sample indices of each client, ascending.
    """
    match scheme.name:
        case "dirichlet":
            dealt = _dirichlet(labels, clients, alpha, seed)
        case "iid":
            order = generator(seed, Purpose.PARTITION).permutation(len(labels))
            dealt = np.array_split(order, clients)
        case "nodes":
            raise ValueError("with partition = 'nodes' there is nothing to deal")
        case "shards":
            dealt = _shards(labels, clients, scheme.shards_per_client, seed)
    filled = _raise_to_minimum([list(d) for d in dealt], min_samples, seed)
    return [np.sort(np.asarray(indices, dtype=np.int64)) for indices in filled]


def _dirichlet(labels: NDArray[np.int64], clients: int, alpha: float, seed: int) -> list[Indices]:
    """Split each class by one Dirichlet draw over the clients (Hsu et al. 2019).

    The legacy `RandomState`, the order of its draws (all shuffles, then all Dirichlet vectors)
    and the truncated cumulative cuts reproduce a published split to the sample.
    """
    random = np.random.RandomState(seed)
    classes = [np.flatnonzero(labels == c) for c in range(int(labels.max()) + 1)]
    for members in classes:
        random.shuffle(members)
    dealt: list[list[Indices]] = [[] for _ in range(clients)]
    for members in classes:
        shares = random.dirichlet(np.full(clients, alpha))
        # Below an alpha of about 1e-3 every share of a draw can underflow; its limit is one
        # client that holds the whole class.
        if not np.isfinite(shares).all():
            shares = np.eye(clients)[random.randint(clients)]
        elif not shares.any():
            # Above 1e307 their sum overflows; the limit is equal shares.
            shares = np.full(clients, 1 / clients)
        cuts = (np.cumsum(shares) * len(members)).astype(int)[:-1]
        for indices, part in zip(dealt, np.split(members, cuts), strict=True):
            indices.append(part)
    return [np.concatenate(parts) for parts in dealt]


def _shards(labels: NDArray[np.int64], clients: int, per_client: int, seed: int) -> list[Indices]:
    """Sort by label, cut into equal shards, deal `per_client` to each (McMahan et al. 2017)."""
    shards = np.array_split(np.argsort(labels, kind="stable"), clients * per_client)
    order = generator(seed, Purpose.PARTITION).permutation(len(shards))
    return [
        np.concatenate([shards[s] for s in order[c * per_client : (c + 1) * per_client]])
        for c in range(clients)
    ]


def _raise_to_minimum(dealt: list[list[int]], minimum: int, seed: int) -> list[list[int]]:
    draw = generator(seed, Purpose.PARTITION)
    donors = [(-len(indices), client) for client, indices in enumerate(dealt)]
    heapq.heapify(donors)
    for indices in dealt:
        while len(indices) < minimum:
            size, donor = heapq.heappop(donors)
            if -size != len(dealt[donor]):
                heapq.heappush(donors, (-len(dealt[donor]), donor))
                continue
            # Any sample of the donor, not its last: those are all of the highest class.
            indices.append(dealt[donor].pop(int(draw.integers(len(dealt[donor])))))
            heapq.heappush(donors, (-len(dealt[donor]), donor))
    return dealt


def class_counts(
    partition: Sequence[Indices], labels: NDArray[np.int64], classes: int
) -> NDArray[np.int64]:
    """Count the samples of each class at each client.

    Returns
    -------
    ndarray of int64, shape (clients, classes)
    """
    return np.stack([np.bincount(labels[p], minlength=classes) for p in partition]).astype(np.int64)


def partition_sha256(partition: Mapping[int, Indices] | Sequence[Indices]) -> str:
    """Hash a partition: for each id, ascending, its id and size and indices as int64.

    Returns
    -------
    str
        Hexadecimal SHA-256 over little-endian ``id, size, indices...`` of every partition.
    """
    items = partition.items() if isinstance(partition, Mapping) else enumerate(partition)
    digest = hashlib.sha256()
    for number, indices in sorted(items, key=lambda item: item[0]):
        digest.update(np.array([number, len(indices)], dtype="<i8").tobytes())
        digest.update(np.ascontiguousarray(indices, dtype="<i8").tobytes())
    return digest.hexdigest()


def fold_order(participants: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """Order a round's clients: largest partition first, ties by id.

    Deltas are summed in this order, not in that in which replies arrive, so the sum is the same to
    the bit. Starting the longest work first also packs the workers best.
    """
    return sorted(participants, key=lambda p: (-sizes[p], p))
