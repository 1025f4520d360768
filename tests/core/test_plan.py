from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedsim.core.config import RunConfig, read_config_file
from fedsim.core.errors import ConfigError
from fedsim.core.models import build_model
from fedsim.core.partition import PartitionScheme, make_partition
from fedsim.core.plan import RunPlan
from fedsim.core.training import state_arrays

# Weights of three convolutions, their norms (weight, bias) and the classifier, at 10 classes.
CNN_PARAMETERS = (432 + 2 * 16) + (4608 + 2 * 32) + (9216 + 2 * 32) + (5120 + 10)
# A running mean and variance for each channel, and three 64-bit counters.
CNN_BUFFER_BYTES = 4 * 2 * (16 + 32 + 32) + 8 * 3


def prepare(**values):
    named = {"model": "cnn", **{n.replace("_", "-"): v for n, v in values.items()}}
    return RunPlan.prepare(RunConfig.from_mapping(named))


def test_a_plan_holds_the_data_the_split_and_the_initial_model(digits):
    plan = prepare()
    expected = make_partition(
        digits.train_labels.numpy(),
        PartitionScheme(name="dirichlet"),
        clients=10,
        alpha=0.5,
        min_samples=10,
        seed=42,
    )
    assert plan.dataset.sha256() == digits.sha256()
    assert [p.tolist() for p in plan.partition] == [p.tolist() for p in expected]
    assert plan.sizes == [len(p) for p in expected]
    assert sum(plan.sizes) == 1438
    model = build_model("cnn", classes=10, norm="batch", seed=42)
    assert list(plan.parameters.items()) == [
        (n, tuple(p.shape)) for n, p in model.named_parameters()
    ]
    state = state_arrays(model)
    assert list(plan.initial_state) == list(state)
    assert all(np.array_equal(plan.initial_state[n], state[n]) for n in state)


def test_every_setting_of_the_split_and_the_model_reaches_the_plan():
    base = prepare()
    for change in (
        {"seed": 43},
        {"alpha": 5.0},
        {"partition": "iid"},
        {"clients": 9},
        {"min_samples": 100},
    ):
        assert prepare(**change).sizes != base.sizes
    assert not np.array_equal(
        prepare(seed=43).initial_state["0.weight"], base.initial_state["0.weight"]
    )
    assert list(prepare(norm="group").initial_state) == list(base.parameters)


def test_bytes_of_a_step_and_a_state_are_those_of_their_tensors():
    plan = prepare()
    assert plan.step_bytes == 4 * CNN_PARAMETERS == 78_184
    assert plan.state_bytes == 4 * CNN_PARAMETERS + CNN_BUFFER_BYTES == 78_848
    assert prepare(norm="group").state_bytes == 78_184
    assert prepare(capture_layers=["13.*"]).step_bytes == 4 * 5130
    assert prepare(capture_layers=["13.bias", "0.weight"]).step_bytes == 4 * 442


def test_resnet18_of_100_classes_takes_44_9_megabytes_a_step():
    plan = prepare(dataset="synthetic:500:100", model="resnet18")
    assert plan.step_bytes == 44_911_248
    assert plan.state_bytes == 44_911_248 + 4 * 2 * 4_800 + 8 * 20


def steps_by_hand(size, batch_size, epochs):
    steps = -(-size // batch_size)
    if size % batch_size == 1 and steps > 1:
        steps -= 1
    return epochs * steps


@pytest.mark.parametrize(
    ("capture", "kept"),
    [
        ("none", lambda steps: 0),
        ("all", lambda steps: steps),
        ("first:3", lambda steps: min(3, steps)),
        ("every:4", lambda steps: len(range(0, steps, 4))),
    ],
)
def test_round_and_run_bytes_equal_a_count_by_hand(capture, kept):
    plan = prepare(
        capture=capture,
        local_epochs=2,
        batch_size=16,
        rounds=3,
        client={"2": {"batch-size": 4}, "5": {"local-steps": 11}},
    )
    steps = [steps_by_hand(size, 16, 2) for size in plan.sizes]
    steps[2] = steps_by_hand(plan.sizes[2], 4, 2)
    steps[5] = 11
    assert [plan.steps_of(p) for p in range(10)] == steps
    total = 78_848
    for number in (1, 2, 3):
        participants = plan.config.participants_of(number)
        gradients = sum(kept(steps[p]) for p in participants) * 78_184
        # A delta of each participant, the aggregate and the new global state.
        expected = gradients + (4 + 2) * 78_848
        assert plan.round_bytes(number) == expected
        total += expected
    assert plan.run_bytes == total


def test_a_single_sample_left_over_is_no_step_of_its_own():
    plan = prepare(partition="iid", clients=2, clients_per_round=2, batch_size=359)
    assert plan.sizes == [719, 719]
    assert plan.steps_of(0) == 2
    assert (
        prepare(
            partition="iid", clients=2, clients_per_round=2, batch_size=359, norm="group"
        ).steps_of(0)
        == 3
    )


def test_listed_participants_of_different_numbers_are_counted_as_listed():
    plan = prepare(participants=[[0], [1, 2, 3]], rounds=2, local_steps=5, capture="all")
    assert plan.round_bytes(1) == 5 * 78_184 + 3 * 78_848
    assert plan.round_bytes(2) == 15 * 78_184 + 5 * 78_848
    assert plan.run_bytes == 20 * 78_184 + 9 * 78_848


def test_capture_layers_that_match_nothing_are_refused():
    with pytest.raises(ConfigError) as caught:
        prepare(capture_layers=["fc.*", "head.*"])
    assert str(caught.value) == (
        "capture-layers = ['fc.*', 'head.*'] cannot be used; allowed is globs that match a "
        "parameter of cnn, like '0.weight'"
    )
    assert prepare(capture_layers=["fc.*"], capture="none").round_bytes(1) == 6 * 78_848


def test_a_round_of_the_notebook_that_keeps_everything_takes_17_gigabytes(cifar100, cifar_root):
    values = read_config_file(Path(__file__).parents[2] / "configs" / "notebook.toml")
    plan = RunPlan.prepare(
        RunConfig.from_mapping({**values, "data-root": cifar_root, "capture": "all"})
    )
    assert [plan.steps_of(p) for p in (9, 7, 2, 0, 6)] == [74, 87, 71, 73, 72]
    assert plan.round_bytes(1) == 377 * 44_911_248 + 7 * 44_949_808
