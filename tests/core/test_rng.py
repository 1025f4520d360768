from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.core.evaluation import evaluate
from fedsim.core.partition import PartitionScheme, make_partition
from fedsim.core.rng import Purpose, draw_participants, generator, global_seed, torch_seed
from fedsim.core.training import (
    OptimizerSettings,
    TrainingSettings,
    load_batches,
    local_train,
    state_arrays,
)
from fedsim.tasks.vision.datasets import load_dataset
from fedsim.tasks.vision.models import build_model
from tests.vision import DIGITS

BASE = (42, Purpose.BATCHES, 3, 5)


@pytest.mark.parametrize(
    "counted",
    [BASE, (0, Purpose.PARTICIPANTS, 0, 0), (2**32 - 1, Purpose.SYNTHETIC_DATA, 1000, 9999)],
)
def test_generator_is_pcg64_of_the_four_numbers(counted):
    seed, purpose, round_number, partition = counted
    sequence = np.random.SeedSequence([seed, int(purpose), round_number, partition])
    expected = np.random.Generator(np.random.PCG64(sequence))
    found = generator(seed, purpose, round_number, partition)
    assert found.bit_generator.state == expected.bit_generator.state
    assert found.random(5).tolist() == expected.random(5).tolist()


def test_round_and_partition_are_zero_when_left_out():
    left_out, zero = generator(42, Purpose.BATCHES), generator(42, Purpose.BATCHES, 0, 0)
    assert left_out.bit_generator.state == zero.bit_generator.state


def test_changing_or_swapping_any_one_number_changes_the_stream():
    others = [
        BASE,
        (43, Purpose.BATCHES, 3, 5),
        (42, Purpose.AUGMENTATION, 3, 5),
        (42, Purpose.BATCHES, 4, 5),
        (42, Purpose.BATCHES, 3, 6),
        (42, Purpose.BATCHES, 5, 3),
        (41, Purpose.BATCHES, 4, 5),
        (42, Purpose.BATCHES, 2, 6),
    ]
    streams = {tuple(generator(*numbers).integers(0, 2**63, 4).tolist()) for numbers in others}
    assert len(streams) == len(others)


def test_purpose_numbers_are_frozen():
    frozen = {
        "PARTICIPANTS": 1,
        "BATCHES": 2,
        "AUGMENTATION": 3,
        "CLIENT_SETTINGS": 4,
        "PARTITION": 5,
        "SYNTHETIC_DATA": 6,
        "PROJECTION": 7,
        "NOISE": 8,
    }
    numbers = {name: int(purpose) for name, purpose in Purpose.__members__.items()}
    assert frozen.items() <= numbers.items()
    assert len(set(numbers.values())) == len(numbers)


def test_participants_of_seed_42_are_these():
    assert [draw_participants(42, number, 20, 5) for number in (1, 2, 3)] == [
        [3, 11, 9, 10, 18],
        [11, 15, 14, 8, 0],
        [0, 8, 19, 18, 11],
    ]


def test_participants_are_numpys_choice_without_replacement():
    sequence = np.random.SeedSequence([42, 1, 1, 0])
    draw = np.random.Generator(np.random.PCG64(sequence))
    expected = draw.choice(20, size=5, replace=False).tolist()
    found = draw_participants(42, 1, 20, 5)
    assert found == expected
    assert {type(p) for p in found} == {int}


def test_rounds_7_and_8_draw_different_participants():
    assert draw_participants(42, 7, 20, 5) == [8, 6, 15, 14, 7]
    assert draw_participants(42, 8, 20, 5) == [6, 0, 19, 2, 17]


def test_seed_plus_round_is_not_the_seed():
    for seed, number in itertools.product(range(40, 44), range(1, 10)):
        assert draw_participants(seed, number + 1, 1000, 5) != draw_participants(
            seed + 1, number, 1000, 5
        )


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.data())
def test_participants_are_different_clients_of_the_run(data):
    clients = data.draw(st.integers(1, 200))
    per_round = data.draw(st.integers(1, clients))
    number = data.draw(st.integers(1, 10_000))
    found = draw_participants(data.draw(st.integers(0, 2**32 - 1)), number, clients, per_round)
    assert len(found) == len(set(found)) == per_round
    assert set(found) <= set(range(clients))


def test_every_client_takes_part_equally_often():
    draws = np.concatenate([draw_participants(42, number, 20, 5) for number in range(1, 1001)])
    times = np.bincount(draws, minlength=20)
    # 250 expected each with a deviation of 13.7.
    assert times.min() > 195
    assert times.max() < 305


def test_torch_seed_draws_what_manual_seed_draws_and_restores_the_generator(global_generators):
    before = global_generators()
    with torch_seed(42):
        found = torch.rand(5)
    assert global_generators() == before
    expected = torch.rand(5, generator=torch.Generator().manual_seed(42))
    assert found.tolist() == expected.tolist()


def test_torch_seed_restores_the_generator_after_an_error(global_generators):
    before = global_generators()
    with pytest.raises(TypeError), torch_seed(42):
        torch.rand(5).add_("not a number")
    assert global_generators() == before


@pytest.mark.parametrize("purpose", [Purpose.NOISE, Purpose.MESSAGES])
def test_global_seed_gives_each_round_its_draws_and_restores_them(purpose, global_generators):
    before, found = global_generators(), {}
    for number in (1, 2):
        with global_seed(42, purpose, number):
            found[number] = np.random.normal(size=4).tolist(), random.random()
        assert global_generators() == before
        draw = generator(42, purpose, number)
        numpys, pythons = (int(draw.integers(2**32)) for _ in range(2))
        assert found[number] == (
            np.random.RandomState(numpys).normal(size=4).tolist(),
            random.Random(pythons).random(),
        )
    assert found[1] != found[2]


def test_global_seed_restores_the_generator_after_an_error(global_generators):
    before = global_generators()
    with pytest.raises(ZeroDivisionError), global_seed(42, Purpose.NOISE, 1):
        raise ZeroDivisionError
    assert global_generators() == before


@pytest.mark.parametrize("name", ["resnet18", "resnet18-cifar", "cnn"])
def test_building_a_model_leaves_the_global_generators_alone(name, global_generators):
    before = global_generators()
    build_model(name, classes=10, norm="batch", seed=42)
    assert global_generators() == before


@pytest.mark.parametrize("scheme", ["dirichlet", "iid", "shards"])
def test_partitioning_leaves_the_global_generators_alone(scheme, global_generators):
    before = global_generators()
    make_partition(
        np.repeat(np.arange(10), 20),
        PartitionScheme.parse(scheme),
        clients=8,
        alpha=0.1,
        min_samples=15,
        seed=42,
    )
    assert global_generators() == before


def test_making_a_dataset_leaves_the_global_generators_alone(
    digits, global_generators, tmp_path, monkeypatch
):
    # `digits` has imported scikit-learn, which draws from `random` when it is imported.
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path))
    before = global_generators()
    load_dataset("synthetic:50:5", data_root=None, seed=42)
    load_dataset("digits", data_root=None, seed=42)
    assert global_generators() == before


def test_training_and_evaluating_leave_the_global_generators_alone(digits, global_generators):
    model = build_model("cnn", classes=10, norm="batch", seed=42)
    optimizer = OptimizerSettings(name="sgd", learning_rate=0.1, momentum=0.9)
    training = TrainingSettings(
        batch_size=16, local_epochs=2, local_steps=None, merge_single=True, optimizer=optimizer
    )
    cpu = torch.device("cpu")
    before = global_generators()
    batches = load_batches(
        DIGITS,
        digits.train(),
        np.arange(50),
        training,
        order=generator(42, Purpose.BATCHES, 1, 0),
        augmentation=generator(42, Purpose.AUGMENTATION, 1, 0),
        device=cpu,
    )
    local_train(DIGITS, model, state_arrays(model), batches, optimizer, on_step=lambda step: None)
    evaluate(DIGITS, model, digits.test(), device=cpu)
    assert global_generators() == before
