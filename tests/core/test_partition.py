from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.core.partition import (
    PartitionScheme,
    class_counts,
    fold_order,
    make_partition,
    partition_sha256,
)

# The sizes that the published split printed.
PUBLISHED = [
    *(2309, 2647, 2243, 2492, 2185, 3039, 2303, 2767, 3159, 2351),
    *(2476, 2130, 2687, 2019, 2317, 2234, 2780, 1822, 3040, 3000),
]


def deal(labels, scheme="dirichlet", *, clients=20, alpha=0.5, min_samples=10, seed=42):
    return make_partition(
        np.asarray(labels, dtype=np.int64),
        PartitionScheme.parse(scheme),
        clients=clients,
        alpha=alpha,
        min_samples=min_samples,
        seed=seed,
    )


def sizes_of(partition):
    return [len(indices) for indices in partition]


def label_sorted_shards(labels, count):
    return [set(s.tolist()) for s in np.array_split(np.argsort(labels, kind="stable"), count)]


def test_dirichlet_reproduces_the_published_sizes():
    partition = deal(np.repeat(np.arange(100), 500))
    assert sizes_of(partition) == PUBLISHED
    assert (
        partition_sha256(partition)
        == "33aad8f4121e198e60e41d64d9ee5cc64713fff5983eb23fbee893c4a9218236"
    )


def test_dirichlet_split_of_cifar100_is_pinned(cifar100):
    partition = deal(cifar100.train_labels.numpy())
    assert sizes_of(partition) == PUBLISHED
    assert (
        partition_sha256(partition)
        == "84dfa0c004fd61d3ec1a2909ecbc926b2b9a2a7fc327b6049e7cbe5b35bf7546"
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_every_scheme_covers_the_samples_once_and_keeps_the_minimum(data):
    samples = data.draw(st.integers(1, 300), "samples")
    clients = data.draw(st.integers(1, min(samples, 25)), "clients")
    minimum = data.draw(st.integers(0, samples // clients), "min_samples")
    alpha = data.draw(st.floats(0.01, 100), "alpha")
    classes = data.draw(st.integers(1, 12), "classes")
    seed = data.draw(st.integers(0, 2**32 - 1), "seed")
    shards = data.draw(st.integers(1, samples // clients), "shards")
    labels = np.random.default_rng(seed).integers(0, classes, samples)
    for scheme in ("dirichlet", "iid", f"shards:{shards}"):
        partition = deal(
            labels, scheme, clients=clients, alpha=alpha, min_samples=minimum, seed=seed
        )
        assert len(partition) == clients
        assert sorted(np.concatenate(partition).tolist()) == list(range(samples))
        assert min(sizes_of(partition)) >= minimum
        for indices in partition:
            assert indices.dtype == np.int64
            assert (np.diff(indices) > 0).all()


@pytest.mark.parametrize("scheme", ["dirichlet", "iid", "shards"])
def test_the_same_seed_deals_the_same_and_another_seed_differently(scheme):
    labels = np.repeat(np.arange(10), 50)
    hashes = [
        partition_sha256(deal(labels, scheme, clients=5, min_samples=60, seed=seed))
        for seed in (42, 42, 43)
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_small_alpha_skews_and_large_alpha_balances_the_classes():
    labels = np.repeat(np.arange(10), 200)
    skewed = class_counts(deal(labels, clients=5, alpha=0.05, min_samples=1), labels, 10)
    even = class_counts(deal(labels, clients=5, alpha=1e4, min_samples=1), labels, 10)
    assert np.abs(even - 40).max() <= 3
    assert skewed.max(axis=0).mean() > 120


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("alpha", [1e-2, 1e-4, 1e-6, 1e-300])
def test_a_tiny_alpha_gives_a_class_to_one_client(alpha):
    labels = np.repeat(np.arange(100), 50)
    counts = class_counts(deal(labels, alpha=alpha, min_samples=0), labels, 100)
    assert (counts.max(axis=0) / 50).mean() > 0.9
    # Not always to the same one.
    assert len(set(counts.argmax(axis=0))) > 10


@pytest.mark.parametrize("alpha", [1e17, 1e300, 1.7e308])
def test_a_huge_alpha_gives_every_client_the_same_share_of_a_class(alpha):
    labels = np.repeat(np.arange(10), 60)
    counts = class_counts(deal(labels, clients=6, alpha=alpha, min_samples=0), labels, 10)
    assert abs(counts - 10).max() <= 1


@pytest.mark.parametrize("alpha", [1e-6, 1e-300, 1e300])
def test_an_extreme_alpha_still_covers_every_sample(alpha):
    partition = deal(np.repeat(np.arange(10), 30), clients=6, alpha=alpha, min_samples=5)
    assert sorted(np.concatenate(partition).tolist()) == list(range(300))
    assert min(sizes_of(partition)) >= 5


@pytest.mark.parametrize(
    ("samples", "clients", "expected"),
    [(100, 4, [25] * 4), (103, 4, [26, 26, 26, 25]), (5, 5, [1] * 5)],
)
def test_iid_sizes_differ_by_at_most_one(samples, clients, expected):
    labels = np.arange(samples) % 7
    assert sizes_of(deal(labels, "iid", clients=clients, min_samples=1)) == expected


def test_iid_deals_every_class_to_every_client():
    labels = np.repeat(np.arange(10), 200)
    counts = class_counts(deal(labels, "iid", clients=5), labels, 10)
    # Hypergeometric: mean 40, deviation 5.7.
    assert counts.min() > 17
    assert counts.max() < 63


@pytest.mark.parametrize("k", [1, 2, 4, 5])
def test_shards_that_fit_the_classes_give_a_client_at_most_k_classes(k):
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(10), 60))
    partition = deal(labels, f"shards:{k}", clients=20 // k, min_samples=1)
    held = (class_counts(partition, labels, 10) > 0).sum(axis=1)
    assert held.max() <= k
    assert sizes_of(partition) == [30 * k] * (20 // k)


def test_a_shard_across_a_border_adds_one_class_only():
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(10), 60))
    partition = deal(labels, "shards:1", clients=18, min_samples=1)
    held = (class_counts(partition, labels, 10) > 0).sum(axis=1)
    assert held.max() == 2
    assert held.sum() <= 18 + 9


@pytest.mark.parametrize(("k", "clients"), [(1, 7), (2, 10), (3, 5), (4, 25)])
def test_each_client_holds_exactly_k_label_sorted_shards(k, clients):
    labels = np.random.default_rng(2).integers(0, 10, 500)
    shards = label_sorted_shards(labels, k * clients)
    dealt = []
    for indices in deal(labels, f"shards:{k}", clients=clients, min_samples=1):
        mine = [n for n, shard in enumerate(shards) if shard <= set(indices.tolist())]
        assert len(mine) == k
        assert sum(len(shards[n]) for n in mine) == len(indices)
        dealt += mine
    assert sorted(dealt) == list(range(k * clients))
    assert dealt != sorted(dealt)


def test_plain_shards_means_two_a_client():
    assert PartitionScheme.parse("shards") == PartitionScheme.parse("shards:2")
    assert PartitionScheme.parse("shards:2").shards_per_client == 2


def test_clients_below_the_minimum_take_from_the_largest_client():
    labels = np.repeat(np.arange(10), 100)
    raw = deal(labels, clients=20, alpha=0.1, min_samples=0)
    filled = deal(labels, clients=20, alpha=0.1, min_samples=30)
    expected = sizes_of(raw)
    assert min(expected) < 10
    for client in range(20):
        while expected[client] < 30:
            expected[expected.index(max(expected))] -= 1
            expected[client] += 1
    assert sizes_of(filled) == expected
    for before, after in zip(raw, filled, strict=True):
        if len(before) >= 30:
            assert set(after) <= set(before)
        else:
            assert set(before) <= set(after)


def test_moved_samples_are_of_many_classes():
    labels = np.repeat(np.arange(10), 100)
    raw = deal(labels, clients=2, alpha=1e-3, min_samples=0, seed=6)
    filled = deal(labels, clients=2, alpha=1e-3, min_samples=450, seed=6)
    small = int(np.argmin(sizes_of(raw)))
    moved = np.setdiff1d(filled[small], raw[small])
    given_away = np.unique(labels[raw[1 - small]])
    assert len(moved) == 450 - len(raw[small]) > 20
    assert np.unique(labels[moved]).tolist() == given_away.tolist()


def test_enough_samples_everywhere_moves_none():
    labels = np.repeat(np.arange(100), 500)
    assert partition_sha256(deal(labels, min_samples=0)) == partition_sha256(
        deal(labels, min_samples=1822)
    )


@pytest.mark.parametrize(
    "text",
    ["", "Dirichlet", "iid:2", "shards:", "shards:0", "shards:-1", "shards:x", "shards:1.5", "x"],
)
def test_an_unknown_scheme_is_refused_with_the_allowed_ones(text):
    allowed = "dirichlet, iid, shards, shards:K with a whole K of 1 or more, or nodes"
    with pytest.raises(ValueError, match=f"^{allowed}$"):
        PartitionScheme.parse(text)


def test_class_counts_are_samples_by_client_and_class():
    labels = np.array([0, 2, 2, 1, 0, 2])
    counts = class_counts([np.array([0, 1, 2]), np.array([4, 5]), np.array([3])], labels, 4)
    assert counts.tolist() == [[1, 0, 2, 0], [1, 0, 1, 0], [0, 1, 0, 0]]
    assert counts.dtype == np.int64


def sha256_by_hand(partition):
    digest = hashlib.sha256()
    for number in sorted(partition):
        indices = partition[number]
        digest.update(struct.pack(f"<qq{len(indices)}q", number, len(indices), *indices))
    return digest.hexdigest()


def test_partition_sha256_is_over_id_size_and_indices():
    dealt = {0: [1, 4], 1: [], 2: [0, 2, 3, 2**40]}
    arrays = [np.array(dealt[n], dtype=np.int64) for n in range(3)]
    expected = "89a2b47d38218d4ca402b1ecfa31cfcbcfe989510bab12124105697c5fd6789a"
    assert partition_sha256(arrays) == sha256_by_hand(dealt) == expected
    assert partition_sha256({2: arrays[2], 0: arrays[0], 1: arrays[1]}) == expected
    assert partition_sha256([a.astype(">i8") for a in arrays]) == expected


def test_partition_sha256_tells_apart_who_holds_what():
    partitions = [
        {0: [1, 2], 1: [3]},
        {0: [1], 1: [2, 3]},
        {0: [3], 1: [1, 2]},
        {0: [2, 1], 1: [3]},
        {0: [1, 2], 2: [3]},
        {0: [1, 2, 3]},
    ]
    hashes = {partition_sha256({n: np.array(i) for n, i in p.items()}) for p in partitions}
    assert len(hashes) == len(partitions)


def test_fold_order_is_largest_first():
    assert fold_order([9, 7, 2, 0, 6], PUBLISHED) == [7, 9, 0, 6, 2]


def test_fold_order_breaks_ties_by_id_and_forgets_the_order_given():
    sizes = [5, 8, 5, 8, 1]
    assert fold_order([4, 3, 2, 1, 0], sizes) == [1, 3, 0, 2, 4]
    assert fold_order([2, 0, 1, 4, 3], sizes) == [1, 3, 0, 2, 4]
