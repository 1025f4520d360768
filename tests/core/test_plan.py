from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedsim.captures.gradients import Gradients
from fedsim.core.config import RunConfig, read_config_file
from fedsim.core.errors import ConfigError
from fedsim.core.partition import PartitionScheme, make_partition
from fedsim.core.plan import RunPlan
from fedsim.core.training import state_arrays
from fedsim.tasks.vision.models import build_model

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
    assert plan.dataset.fingerprint == digits.fingerprint
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
    assert prepare(capture_dtype="bfloat16").step_bytes == 2 * CNN_PARAMETERS
    assert prepare(capture_dtype="float16", capture_layers=["13.*"]).step_bytes == 2 * 5130


def test_a_sketch_takes_four_bytes_a_number_whatever_the_model_and_the_form():
    for form in ({}, {"capture_dtype": "bfloat16"}, {"capture_layers": ["13.*"]}):
        assert prepare(capture="sketch:100", **form).step_bytes == 400


@pytest.fixture(scope="module")
def resnet():
    return prepare(dataset="synthetic:500:100", model="resnet18", batch_size=10, capture="all")


# Kernels of the last stage, whose maps are 1x1: the first sees 2x2 maps with a stride of 2.
FOUR_TAPS = {"layer4.0.conv1.weight": (4, 5, 7, 8)}
ONE_TAP = {f"layer4.{n}.weight": (4,) for n in ("0.conv2", "1.conv1", "1.conv2")}


def test_resnet18_of_100_classes_takes_44_9_megabytes_a_step_and_17_1_of_them_are_live(resnet):
    policy = resnet.config.policy
    dead = 512 * 256 * 5 + 3 * 512 * 512 * 8
    dense = Gradients(steps="all", encoding="dense")
    assert dense.step_bytes(resnet) == 44_911_248
    assert resnet.step_bytes == policy.step_bytes(resnet) == 44_911_248 - 4 * dead == 17_123_984
    assert Gradients(steps="all", dtype="bfloat16").step_bytes(resnet) == 8_561_992
    assert Gradients(steps="all", layers=("*4.1.conv2*",)).step_bytes(resnet) == 4 * 512 * 512
    assert resnet.state_bytes == 44_911_248 + 4 * 2 * 4_800 + 8 * 20


def test_the_last_stage_of_resnet18_has_dead_taps_and_nothing_else_has(resnet):
    assert list(resnet.supports) == list(resnet.parameters)
    found = {name: taps for name, taps in resnet.supports.items() if taps is not None}
    assert found == FOUR_TAPS | ONE_TAP


@pytest.mark.parametrize("model", ["cnn", "resnet18-cifar"])
def test_other_models_have_no_dead_taps(model):
    plan = prepare(model=model)
    assert set(plan.supports.values()) == {None}
    assert plan.step_bytes == Gradients(steps="all", encoding="dense").step_bytes(plan)


def test_finding_the_supports_changes_nothing(resnet, global_generators):
    fresh = prepare(dataset="synthetic:500:100", model="resnet18", batch_size=10)
    before = global_generators()
    assert fresh.supports == resnet.supports
    assert global_generators() == before
    assert fresh.dataset.fingerprint == resnet.dataset.fingerprint
    for name, array in fresh.initial_state.items():
        assert np.array_equal(array, resnet.initial_state[name])


def steps_by_hand(size, batch_size, epochs):
    steps = -(-size // batch_size)
    if size % batch_size == 1 and steps > 1:
        steps -= 1
    return epochs * steps


@pytest.mark.parametrize(
    ("capture", "form", "kept", "step_bytes"),
    [
        ("none", {}, lambda steps: 0, 78_184),
        ("all", {}, lambda steps: steps, 78_184),
        ("first:3", {}, lambda steps: min(3, steps), 78_184),
        ("last:90", {}, lambda steps: min(90, steps), 78_184),
        ("every:4", {}, lambda steps: len(range(0, steps, 4)), 78_184),
        ("every:4", {"capture_dtype": "float16"}, lambda steps: -(-steps // 4), 39_092),
        ("sketch:25", {}, lambda steps: steps, 100),
    ],
)
def test_round_and_run_bytes_equal_a_count_by_hand(capture, form, kept, step_bytes):
    plan = prepare(
        capture=capture,
        **form,
        local_epochs=2,
        batch_size=16,
        rounds=3,
        client={"2": {"batch-size": 4}, "5": {"local-steps": 11}},
    )
    steps = [steps_by_hand(size, 16, 2) for size in plan.sizes]
    steps[2] = steps_by_hand(plan.sizes[2], 4, 2)
    steps[5] = 11
    assert [plan.steps_of(p) for p in range(10)] == steps
    captured = 0
    total = 78_848
    for number in (1, 2, 3):
        participants = plan.config.participants_of(number)
        gradients = sum(kept(steps[p]) for p in participants) * step_bytes
        captured += gradients
        # A delta of each participant, the aggregate and the new global state.
        expected = gradients + (4 + 2) * 78_848
        assert plan.round_bytes(number) == expected
        total += expected
    assert plan.captured_bytes() == captured
    assert plan.run_bytes == total
    other = prepare(
        capture="all",
        local_epochs=2,
        batch_size=16,
        rounds=3,
        client={"2": {"batch-size": 4}, "5": {"local-steps": 11}},
    )
    assert other.captured_bytes(plan.config.policy) == captured


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


@pytest.mark.parametrize(
    ("strategy", "kept"),
    [("delta-fedavg", 0), ("fedavgm", 1), ("fedadagrad", 2), ("fedadam", 2), ("fedyogi", 2)],
)
def test_what_a_strategy_keeps_of_the_parameters_is_counted_in_every_round(strategy, kept):
    plan, plain = (prepare(strategy=s, rounds=3) for s in (strategy, "delta-fedavg"))
    assert plan.strategy_bytes == kept * 4 * CNN_PARAMETERS
    assert plan.round_bytes(2) - plain.round_bytes(2) == plan.strategy_bytes
    assert plan.run_bytes - plain.run_bytes == 3 * plan.strategy_bytes


def test_control_variates_of_server_and_participants_are_counted():
    plan, plain = (prepare(strategy=s, rounds=3) for s in ("scaffold", "delta-fedavg"))
    one, participants = 4 * CNN_PARAMETERS, len(plan.config.participants_of(2))
    assert plan.round_bytes(2) - plain.round_bytes(2) == (1 + participants) * one
    assert plan.run_bytes - plain.run_bytes == 3 * (1 + participants) * one


def test_capture_layers_that_match_nothing_are_refused():
    with pytest.raises(ConfigError) as caught:
        prepare(capture_layers=["fc.*", "head.*"])
    assert str(caught.value) == (
        "capture-layers = ['fc.*', 'head.*'] cannot be used; expected globs that match a "
        "parameter of cnn, like '0.weight'"
    )
    assert prepare(capture_layers=["fc.*"], capture="none").round_bytes(1) == 6 * 78_848


FOUR_STEPS = {"partition": "iid", "clients": 2, "clients_per_round": 2, "rounds": 3}


def four_steps(**values):
    """Plan 3 rounds of 2 clients with 12 steps each: 72 steps in all."""
    return prepare(**FOUR_STEPS, local_steps=12, **values)


@pytest.mark.parametrize(
    ("capture", "form", "steps", "change"),
    [
        ("all", {}, 36, "capture-dtype = 'bfloat16'"),
        ("all", {}, 35, "capture = 'every:3'"),
        ("all", {"capture_dtype": "float16"}, 35, "capture = 'every:2'"),
        ("all", {}, 24, "capture = 'every:3'"),
        ("all", {}, 23, "capture = 'every:4'"),
        ("all", {}, 6, "capture = 'every:12'"),
        ("all", {}, 5, "capture = 'none'"),
        ("all", {}, 0, "capture = 'none'"),
        ("all", {}, -1, None),
        ("every:3", {}, 12, "capture-dtype = 'bfloat16'"),
        ("every:3", {}, 11, "capture = 'every:12'"),
        ("every:3", {"capture_dtype": "bfloat16"}, 11, "capture = 'every:4'"),
        ("first:8", {}, 24, "capture-dtype = 'bfloat16'"),
        ("first:8", {}, 23, "capture = 'first:3'"),
        ("last:8", {"capture_dtype": "float16"}, 23, "capture = 'last:7'"),
        ("last:8", {}, 5, "capture = 'none'"),
    ],
)
def test_the_smallest_change_that_fits_loses_precision_before_steps(capture, form, steps, change):
    plan = four_steps(capture=capture, **form)
    assert plan.fitting_change(steps * 78_184) == change


def test_a_smaller_sketch_fits_and_has_no_other_dtype_or_encoding():
    plan = four_steps(capture="sketch:1048576", capture_encoding="dense")
    assert plan.captured_bytes() == 72 * 4 * 2**20
    assert plan.fitting_change(72 * 4 * 1000) == "capture = 'sketch:1000'"
    assert plan.fitting_change(72 * 4 * 1000 - 1) == "capture = 'sketch:999'"
    assert plan.fitting_change(72 * 4 - 1) == "capture = 'none'"


def test_what_loses_nothing_is_the_smallest_change_of_all():
    plan = prepare(
        dataset="synthetic:500:100",
        model="resnet18",
        **{**FOUR_STEPS, "rounds": 1},
        local_steps=1,
        capture="all",
        capture_encoding="dense",
    )
    assert plan.captured_bytes() == 2 * 44_911_248
    assert plan.fitting_change(2 * 17_123_984) == "capture-encoding = 'support'"
    assert plan.fitting_change(2 * 17_123_984 - 1) == "capture = 'none'"


def test_a_budget_is_kept_to_the_byte():
    needed = 72 * 78_184
    four_steps(capture="all").check_budget()
    four_steps(capture="all", capture_budget=str(needed)).check_budget()
    tight = four_steps(capture="all", capture_budget=str(needed - 1))
    with pytest.raises(ConfigError) as caught:
        tight.check_budget()
    assert str(caught.value) == (
        "capture-budget = '5629247' cannot be used; expected at least 5,629,248 bytes (5.6 MB) "
        "for capture = 'all'; capture-dtype = 'bfloat16' would fit"
    )
    four_steps(
        capture="all", capture_budget=str(needed - 1), capture_dtype="bfloat16"
    ).check_budget()


def test_what_was_found_to_fit_is_let_through():
    for capture in ("every:3", "none"):
        plan = four_steps(capture=capture, capture_budget=str(24 * 78_184))
        plan.check_budget()


def test_a_round_of_the_notebook_that_keeps_everything_takes_17_gigabytes(cifar100, cifar_root):
    values = read_config_file(Path(__file__).parents[2] / "configs" / "notebook.toml")
    plan = RunPlan.prepare(
        RunConfig.from_mapping(
            {
                **values,
                "data-root": cifar_root,
                "capture": "all",
                "capture-dtype": "float32",
                "capture-encoding": "dense",
            }
        )
    )
    assert [plan.steps_of(p) for p in (9, 7, 2, 0, 6)] == [74, 87, 71, 73, 72]
    assert plan.round_bytes(1) == 377 * 44_911_248 + 7 * 44_949_808
