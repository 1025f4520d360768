from __future__ import annotations

import copy
import functools
import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.transforms import functional

from fedsim.core import training as core_training
from fedsim.core.rng import Purpose, generator
from fedsim.core.support import live_taps
from fedsim.core.training import (
    Objective,
    OptimizerSettings,
    Replay,
    TrainingSettings,
    load_batches,
    load_state,
    make_optimizer,
    schedule,
    state_arrays,
)
from fedsim.tasks.vision.models import LiveTapConv2d, build_model
from tests.vision import DIGITS, vision

CPU = torch.device("cpu")
SGD = OptimizerSettings(name="sgd", learning_rate=0.05, momentum=0.9, weight_decay=5e-4)
NESTEROV = replace(SGD, nesterov=True)
PLAIN = OptimizerSettings(name="sgd", learning_rate=0.05)
ADAM = OptimizerSettings(name="adam", learning_rate=0.01, weight_decay=5e-4)
OPTIMIZERS = pytest.mark.parametrize(
    "optimizer", [SGD, NESTEROV, PLAIN, ADAM], ids=["sgd", "nesterov", "plain", "adam"]
)


local_train = functools.partial(core_training.local_train, DIGITS)


def training(batch_size=32, epochs=1, steps=None, merge=True, optimizer=SGD):
    return TrainingSettings(
        batch_size=batch_size,
        local_epochs=epochs,
        local_steps=steps,
        merge_single=merge,
        optimizer=optimizer,
    )


def batches_of(data, indices, settings_of_client, *, round_number=1, partition=3):
    return load_batches(
        vision(data.spec),
        data.train(),
        np.asarray(indices, dtype=np.int64),
        settings_of_client,
        order=generator(42, Purpose.BATCHES, round_number, partition),
        augmentation=generator(42, Purpose.AUGMENTATION, round_number, partition),
        device=CPU,
    )


def build(name="cnn", seed=42):
    return build_model(name, classes=10, norm="batch", seed=seed)


def plain_optimizer(model, optimizer, *, fused):
    if optimizer.name == "adam":
        return torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-4, fused=fused)
    return torch.optim.SGD(
        model.parameters(),
        lr=0.05,
        momentum=optimizer.momentum,
        weight_decay=optimizer.weight_decay,
        nesterov=optimizer.nesterov,
        fused=fused,
    )


def plain_loop(model, batches, optimizer, *, fused=True):
    """Train as any PyTorch tutorial does; returns the losses."""
    optimiser = plain_optimizer(model, optimizer, fused=fused)
    losses = []
    model.train()
    for batch in batches:
        optimiser.zero_grad()
        loss = nn.CrossEntropyLoss()(model(batch.tensors["inputs"]), batch.tensors["targets"])
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def assert_same_state(found, expected):
    assert list(found) == list(expected)
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        assert np.array_equal(found[name], expected[name]), name


class Keeper:
    """An observer that keeps the tensors it is shown, and copies of them."""

    def __init__(self):
        self.steps = []
        self.copies = []

    def __call__(self, step):
        self.steps.append(step)
        self.copies.append({n: g.clone() for n, g in step.gradients.items()})


@OPTIMIZERS
def test_local_train_equals_a_plain_loop_to_the_bit(digits, optimizer):
    client = training(epochs=2, optimizer=optimizer)
    state = state_arrays(build())
    found = local_train(build(seed=1), state, batches_of(digits, range(150), client), optimizer)
    model = build()
    losses = plain_loop(model, batches_of(digits, range(150), client), optimizer)
    assert_same_state(found.state, state_arrays(model))
    assert found.losses == losses
    assert found.batch_sizes == [32, 32, 32, 32, 22] * 2


def test_two_steps_of_resnet18_equal_a_plain_loop_to_the_bit(digits):
    client = training(steps=2)
    state = state_arrays(build("resnet18"))
    workspace = build("resnet18", seed=1)
    found = local_train(workspace, state, batches_of(digits, range(100), client), SGD)
    model = build("resnet18")
    losses = plain_loop(model, batches_of(digits, range(100), client), SGD)
    assert_same_state(found.state, state_arrays(model))
    assert found.losses == losses


def test_the_fused_optimiser_is_the_unfused_one_up_to_rounding(digits):
    client = training()
    state = state_arrays(build())
    found = local_train(build(), state, batches_of(digits, range(150), client), SGD).state
    model = build()
    plain_loop(model, batches_of(digits, range(150), client), SGD, fused=False)
    for name, expected in state_arrays(model).items():
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-5, err_msg=name)


def test_local_train_starts_from_the_state_whatever_the_workspace_held(digits):
    client = training(steps=3)
    state = state_arrays(build())
    fresh = build()
    used = build(seed=7)
    plain_loop(used, batches_of(digits, range(200, 300), client), SGD)
    used.eval()
    results = [
        local_train(model, state, batches_of(digits, range(100), client), SGD).state
        for model in (fresh, used, used)
    ]
    assert_same_state(results[1], results[0])
    assert_same_state(results[2], results[0])


def test_local_train_leaves_the_state_it_was_given_alone(digits):
    state = state_arrays(build())
    before = copy.deepcopy(state)
    client = training(steps=2)
    found = local_train(build(), state, batches_of(digits, range(100), client), SGD)
    assert_same_state(state, before)
    assert not np.array_equal(found.state["0.weight"], state["0.weight"])


def test_every_step_shows_autograds_gradient_of_the_mean_loss(digits):
    client = training(batch_size=16, epochs=2)
    batches = list(batches_of(digits, range(50), client))
    model = build()
    twin = build(seed=5)
    names = [n for n, _ in model.named_parameters()]
    seen = []

    def compare(step):
        batch = batches[step.index]
        twin.load_state_dict(model.state_dict())
        twin.train()
        loss = nn.functional.cross_entropy(twin(batch.tensors["inputs"]), batch.tensors["targets"])
        expected = torch.autograd.grad(loss, list(twin.parameters()))
        assert list(step.gradients) == names
        for name, gradient in zip(names, expected, strict=True):
            assert torch.equal(step.gradients[name], gradient), name
        assert step.loss.item() == loss.item()
        assert step.indices.tolist() == batch.indices.tolist()
        seen.append((step.index, step.epoch, step.learning_rate))

    found = local_train(model, state_arrays(model), iter(batches), SGD, compare)
    assert seen == [(n, n // 4, 0.05) for n in range(8)]
    assert len(set(found.losses)) == 8


@OPTIMIZERS
def test_kept_gradients_are_each_steps_own_and_never_change(digits, optimizer):
    keeper = Keeper()
    client = training(steps=4, optimizer=optimizer)
    local_train(
        build(),
        state_arrays(build()),
        batches_of(digits, range(100), client),
        optimizer,
        keeper,
    )
    for step, copies in zip(keeper.steps, keeper.copies, strict=True):
        for name, copied in copies.items():
            assert torch.equal(step.gradients[name], copied), name
    addresses = [g.data_ptr() for step in keeper.steps for g in step.gradients.values()]
    assert len(set(addresses)) == len(addresses) == 4 * 11
    first, second = keeper.copies[:2]
    assert not any(torch.equal(first[name], second[name]) for name in first)


def test_an_observer_changes_nothing(digits):
    client = training(epochs=2)
    results = [
        local_train(
            build(), state_arrays(build()), batches_of(digits, range(90), client), SGD, on_step
        )
        for on_step in (None, Keeper())
    ]
    assert_same_state(results[1].state, results[0].state)
    assert results[1].losses == results[0].losses
    assert results[1].batch_sizes == results[0].batch_sizes


@OPTIMIZERS
def test_replaying_the_optimiser_over_the_gradients_lands_on_the_parameters(digits, optimizer):
    keeper = Keeper()
    client = training(epochs=2, optimizer=optimizer)
    start = state_arrays(build())
    found = local_train(build(), start, batches_of(digits, range(150), client), optimizer, keeper)
    replayed = {
        name: nn.Parameter(torch.from_numpy(start[name].copy())) for name in keeper.copies[0]
    }
    optimiser = make_optimizer(list(replayed.values()), optimizer)
    for gradients in keeper.copies:
        for name, parameter in replayed.items():
            parameter.grad = gradients[name].clone()
        optimiser.step()
    assert len(keeper.copies) == 10
    for name, parameter in replayed.items():
        assert np.array_equal(parameter.detach().numpy(), found.state[name]), name


class Follower(Keeper):
    """An observer that keeps copies of a model's parameters too, as they are before the update."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.parameters = []

    def __call__(self, step):
        super().__call__(step)
        self.parameters.append({n: p.detach().clone() for n, p in self.model.named_parameters()})


def follow(state, batches, optimizer, **settings):
    model = build(seed=1)
    follower = Follower(model)
    found = local_train(model, state, iter(batches), optimizer, follower, **settings)
    return follower, found


def tensors_of(state):
    return {name: torch.from_numpy(array) for name, array in state.items()}


@OPTIMIZERS
def test_a_replay_passes_every_parameter_of_the_training_to_the_bit(digits, optimizer):
    start = state_arrays(build())
    before = copy.deepcopy(start)
    client = training(epochs=2, optimizer=optimizer)
    follower, found = follow(start, batches_of(digits, range(150), client), optimizer)
    replay = Replay(tensors_of(start), list(follower.copies[0]), optimizer)
    held = dict(replay.parameters)
    assert len(follower.copies) == 10
    for gradients, parameters in zip(follower.copies, follower.parameters, strict=True):
        assert list(replay.parameters) == list(parameters)
        assert all(torch.equal(replay.parameters[n], parameters[n]) for n in parameters)
        replay.step(gradients)
    for name, tensor in replay.parameters.items():
        assert np.array_equal(tensor.numpy(), found.state[name]), name
        # The very tensors change; the state that it began with does not.
        assert tensor is held[name]
    assert_same_state(start, before)


def test_a_replay_of_some_parameters_needs_no_others(digits):
    start = state_arrays(build())
    names = ["13.bias", "0.weight"]
    follower, found = follow(start, batches_of(digits, range(150), training()), SGD)
    replay = Replay({n: torch.from_numpy(start[n]) for n in names}, names, SGD)
    for gradients in follower.copies:
        replay.step({name: gradients[name] for name in names})
    assert list(replay.parameters) == names
    assert all(np.array_equal(replay.parameters[n].numpy(), found.state[n]) for n in names)


def test_a_replay_takes_gradients_that_lie_in_memory_as_they_like():
    start = {"w": torch.arange(24.0).view(2, 3, 2, 2)}
    gradient = torch.arange(24.0).view(2, 2, 2, 3).permute(0, 3, 1, 2)
    assert not gradient.is_contiguous()
    replays = [Replay(start, ["w"], SGD) for _ in range(2)]
    for replay, given_gradient in zip(replays, (gradient, gradient.contiguous()), strict=True):
        replay.step({"w": given_gradient})
        replay.step({"w": given_gradient})
    first, second = (replay.parameters["w"] for replay in replays)
    assert torch.equal(first, second)
    assert not torch.equal(first, start["w"])


@pytest.mark.parametrize(
    ("autocast", "skips"), [("float16", True), ("bfloat16", False), ("none", False)]
)
def test_only_with_float16_a_gradient_that_is_not_finite_makes_no_update(autocast, skips):
    start = {"a": torch.ones(3), "b": torch.ones(2)}
    replay = Replay(start, ["a", "b"], ADAM, autocast)
    replay.step({"a": torch.tensor([1.0, float("inf"), 1.0]), "b": torch.ones(2)})
    assert torch.equal(replay.parameters["b"], start["b"]) == skips
    assert bool(replay.parameters["a"].isfinite().all()) == skips


def close_to(gradient, expected):
    """Whether two gradients have about the same length and direction."""
    left, right = gradient.double().flatten(), expected.double().flatten()
    lengths = left.norm() * right.norm()
    return 0.8 < left.norm() / right.norm() < 1.25 and torch.dot(left, right) / lengths > 0.95


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_with_autocast_observers_see_unscaled_float32_gradients(digits, precision):
    start = state_arrays(build())
    batches = list(batches_of(digits, range(100), training()))[:1]
    exact, full = follow(start, batches, PLAIN)
    found, half = follow(start, batches, PLAIN, autocast=precision)
    assert list(found.copies[0]) == list(exact.copies[0])
    for name, gradient in found.copies[0].items():
        assert gradient.dtype == torch.float32
        assert close_to(gradient, exact.copies[0][name]), name
        # But the forward pass was another.
        assert not torch.equal(gradient, exact.copies[0][name]), name
        updated = start[name] - 0.05 * gradient.numpy()
        np.testing.assert_allclose(half.state[name], updated, rtol=0, atol=1e-6)
    assert found.steps[0].loss.dtype == torch.float32
    assert half.losses == pytest.approx(full.losses, rel=0.02)
    assert half.losses != full.losses


def test_without_autocast_nothing_is_rounded(digits):
    start = state_arrays(build())
    batches = list(batches_of(digits, range(100), training()))
    plain, named = (follow(start, batches, SGD, **s)[1] for s in ({}, {"autocast": "none"}))
    assert_same_state(plain.state, named.state)


@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["sgd", "adam"])
def test_a_float16_step_that_overflows_makes_no_update_and_the_next_has_a_smaller_scale(
    digits, optimizer
):
    start = state_arrays(build())
    # Large enough for gradients to overflow at the first scales, and for losses not to.
    start["13.weight"] = 10 * start["13.weight"]
    batch = next(batches_of(digits, range(100), training(batch_size=4)))
    follower, found = follow(start, [batch] * 9, optimizer, autocast="float16")
    finite = [all(bool(g.isfinite().all()) for g in c.values()) for c in follower.copies]
    assert np.isfinite(found.losses).all()
    first = finite.index(True)
    assert 1 <= first < 8
    for parameters in follower.parameters[: first + 1]:
        assert all(np.array_equal(p.numpy(), start[n]) for n, p in parameters.items())
    after = follower.parameters[first + 1]
    assert not any(np.array_equal(p.numpy(), start[n]) for n, p in after.items())
    (exact,) = follow(start, [batch], optimizer)[0].copies
    assert all(close_to(g, exact[n]) for n, g in follower.copies[first].items())
    # Momentum, decay and the count of steps know of updates alone.
    replay = Replay(tensors_of(start), list(exact), optimizer, "float16")
    for gradients, parameters in zip(follower.copies, follower.parameters, strict=True):
        assert all(torch.equal(replay.parameters[n], p) for n, p in parameters.items())
        replay.step(gradients)
    assert all(np.array_equal(p.numpy(), found.state[n]) for n, p in replay.parameters.items())


class Small(nn.Module):
    """A convolution, and one whose kernel is larger than its map of one pixel."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(7)
        self.stem = nn.Conv2d(3, 6, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.tip = LiveTapConv2d(6, 8, 3, padding=1, bias=False)
        self.head = nn.Linear(8, 10)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))

    def forward(self, inputs):
        maps = torch.relu(self.norm(self.stem(inputs)))
        maps = torch.relu(self.tip(nn.functional.avg_pool2d(maps, 15)))
        return self.head(maps.flatten(1))


def test_a_model_compiled_in_place_has_the_same_names_and_gradients(digits):
    graphs = []
    backend = torch._dynamo.lookup_backend("aot_eager")

    def counting(graph, inputs):
        graphs.append(graph)
        return backend(graph, inputs)

    start = state_arrays(Small())
    batches = list(batches_of(digits, range(96), training()))
    plain, compiled = Small(), Small()
    compiled.compile(backend=counting)
    results = []
    for model in (plain, compiled):
        follower = Follower(model)
        results.append((follower, local_train(model, start, iter(batches), SGD, follower)))
    (expected, plain_result), (found, compiled_result) = results
    assert len(graphs) == 1
    assert_same_state(compiled_result.state, plain_result.state)
    assert compiled_result.losses == plain_result.losses
    for ours, theirs in zip(found.copies, expected.copies, strict=True):
        assert list(ours) == list(theirs) == [n for n, _ in Small().named_parameters()]
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert live_taps(ours["tip.weight"]) == (4,)


def test_momentum_and_weight_decay_follow_their_formula(digits):
    keeper = Keeper()
    start = state_arrays(build())
    found = local_train(
        build(), start, batches_of(digits, range(150), training()), SGD, keeper
    ).state
    for name in keeper.copies[0]:
        value, velocity = start[name].astype(np.float64), 0.0
        for gradients in keeper.copies:
            velocity = 0.9 * velocity + gradients[name].double().numpy() + 5e-4 * value
            value = value - 0.05 * velocity
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-6, err_msg=name)


def test_batch_norm_statistics_come_from_training_mode(digits):
    client = training(steps=3)
    batches = list(batches_of(digits, range(96), client))
    found = local_train(build(), state_arrays(build()), iter(batches), PLAIN).state
    assert found["1.num_batches_tracked"] == 3
    assert found["1.num_batches_tracked"].shape == ()
    first = local_train(build(), state_arrays(build()), iter(batches[:1]), PLAIN).state
    with torch.no_grad():
        maps = build()[0](batches[0].tensors["inputs"])
    np.testing.assert_allclose(
        first["1.running_mean"], 0.1 * maps.mean(dim=(0, 2, 3)).numpy(), rtol=1e-4, atol=1e-6
    )


def test_seconds_are_split_into_load_train_and_capture(digits):
    def slow_batches():
        for batch in batches_of(digits, range(64), training()):
            time.sleep(0.05)
            yield batch

    state = state_arrays(build())
    watched = local_train(build(), state, slow_batches(), SGD, lambda step: time.sleep(0.03))
    assert set(watched.seconds) == {"load", "train", "capture"}
    assert watched.seconds["load"] >= 0.1
    assert watched.seconds["capture"] >= 0.06
    assert watched.seconds["train"] > 0
    alone = local_train(build(), state, batches_of(digits, range(64), training()), SGD)
    assert alone.seconds["capture"] == 0.0


@pytest.mark.parametrize(
    ("samples", "batch_size", "merge", "sizes"),
    [
        (33, 32, True, [33]),
        (65, 32, True, [32, 33]),
        (33, 32, False, [32, 1]),
        (65, 32, False, [32, 32, 1]),
        (64, 32, True, [32, 32]),
        (66, 32, True, [32, 32, 2]),
        (10, 32, True, [10]),
        (1, 32, True, [1]),
        (32, 32, True, [32]),
        (5, 2, True, [2, 3]),
    ],
)
def test_a_last_batch_of_one_joins_the_one_before_where_asked(samples, batch_size, merge, sizes):
    client = training(batch_size=batch_size, merge=merge)
    assert client.batches_per_epoch(samples) == sizes
    assert client.num_steps(samples) == len(sizes)
    assert replace(client, local_epochs=3).num_steps(samples) == 3 * len(sizes)
    assert replace(client, local_epochs=3, local_steps=7).num_steps(samples) == 7


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_every_epoch_is_a_permutation_and_no_batch_is_single(data):
    samples = data.draw(st.integers(2, 120))
    client = training(batch_size=data.draw(st.integers(2, 40)), epochs=data.draw(st.integers(1, 4)))
    steps = list(schedule(samples, client, generator(data.draw(st.integers(0, 99)), 2)))
    assert len(steps) == client.num_steps(samples)
    assert min(len(positions) for _, positions in steps) >= 2
    epochs = [
        np.concatenate([positions for _, positions in group])
        for _, group in itertools.groupby(steps, key=lambda step: step[0])
    ]
    assert [epoch for epoch, _ in itertools.groupby(steps, key=lambda step: step[0])] == list(
        range(client.local_epochs)
    )
    for order in epochs:
        assert sorted(order.tolist()) == list(range(samples))


def test_epochs_are_fresh_permutations_of_the_generator():
    draw = generator(42, Purpose.BATCHES, 1, 3)
    expected = [draw.permutation(50).tolist() for _ in range(2)]
    steps = list(schedule(50, training(epochs=2), generator(42, Purpose.BATCHES, 1, 3)))
    found = [np.concatenate([p for e, p in steps if e == epoch]).tolist() for epoch in (0, 1)]
    assert found == expected
    assert expected[0] != expected[1]


def test_local_steps_cut_and_cycle_the_passes_exactly():
    client = training(batch_size=4, epochs=1, steps=7)
    steps = list(schedule(10, client, generator(42, Purpose.BATCHES)))
    assert [len(positions) for _, positions in steps] == [4, 4, 2, 4, 4, 2, 4]
    assert [epoch for epoch, _ in steps] == [0, 0, 0, 1, 1, 1, 2]
    assert len(list(schedule(10, replace(client, local_steps=2), generator(42, 2)))) == 2
    by_epochs = list(schedule(10, training(batch_size=4, epochs=3), generator(42, 2)))
    for (_, found), (_, expected) in zip(steps, by_epochs, strict=False):
        assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("flip", [False, True])
def test_batches_are_the_right_samples_cropped_and_normalised(digits, flip):
    spec = replace(digits.spec, flip=flip, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    data = replace(digits, spec=spec)
    indices = np.arange(700, 740)
    order = generator(42, Purpose.BATCHES, 1, 3).permutation(40)
    draw = generator(42, Purpose.AUGMENTATION, 1, 3)
    batches = list(batches_of(data, indices, training(batch_size=25)))
    assert [len(b.indices) for b in batches] == [25, 15]
    assert np.concatenate([b.indices for b in batches]).tolist() == indices[order].tolist()
    for batch in batches:
        tops, lefts = draw.integers(0, 9, size=(2, len(batch.indices)))
        coins = draw.random(len(batch.indices)) < 0.5
        for n, index in enumerate(batch.indices):
            image = functional.pad(digits.train_images[index], [4, 4, 4, 4])
            image = functional.crop(image, int(tops[n]), int(lefts[n]), 32, 32)
            if flip and coins[n]:
                image = functional.hflip(image)
            expected = functional.normalize(image.float() / 255, spec.mean, spec.std)
            torch.testing.assert_close(batch.tensors["inputs"][n], expected, rtol=0, atol=1e-6)
        assert batch.tensors["targets"].tolist() == digits.train_labels[batch.indices].tolist()
        assert (batch.tensors["inputs"].dtype, batch.tensors["targets"].dtype) == (
            torch.float32,
            torch.int64,
        )


def test_batches_are_the_same_for_the_same_round_and_partition_only(digits):
    def stream(**numbers):
        batches = batches_of(digits, range(60), training(epochs=2), **numbers)
        return [(b.epoch, b.indices.tolist(), b.tensors["inputs"].sum().item()) for b in batches]

    base = stream(round_number=1, partition=3)
    assert stream(round_number=1, partition=3) == base
    assert stream(round_number=2, partition=3) != base
    assert stream(round_number=1, partition=4) != base


def test_batches_read_the_images_without_changing_them(digits):
    before = digits.fingerprint
    for batch in batches_of(digits, range(40), training()):
        batch.tensors["inputs"].zero_()
    assert digits.fingerprint == before


def test_33_samples_train_resnet18_with_batch_norm(digits):
    client = training(epochs=2)
    model = build("resnet18")
    found = local_train(model, state_arrays(model), batches_of(digits, range(33), client), SGD)
    assert found.batch_sizes == [33, 33]
    assert np.isfinite(found.losses).all()


def test_state_arrays_are_copies_under_the_names_of_state_dict():
    model = build("resnet18")
    arrays = state_arrays(model)
    assert list(arrays) == list(model.state_dict())
    assert arrays["bn1.num_batches_tracked"].shape == ()
    assert arrays["bn1.num_batches_tracked"].dtype == np.int64
    before = arrays["fc.weight"].copy()
    with torch.no_grad():
        model.fc.weight.zero_()
    assert np.array_equal(arrays["fc.weight"], before)


def test_load_state_copies_any_memory_layout():
    arrays = state_arrays(build(seed=1))
    model = build(seed=2)
    load_state(model, {n: np.array(a, order="F") for n, a in arrays.items()})
    assert_same_state(state_arrays(model), arrays)
    arrays["13.bias"][:] = 9
    assert not (model[13].bias == 9).any()


def test_load_state_refuses_other_names_and_shapes():
    arrays = state_arrays(build())
    missing = {n: a for n, a in arrays.items() if n != "13.bias"}
    with pytest.raises(RuntimeError, match=r"Missing key.*13\.bias"):
        load_state(build(), missing)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*more"):
        load_state(build(), {**arrays, "more": arrays["13.bias"]})
    with pytest.raises(RuntimeError, match=r"size mismatch for 13\.bias"):
        load_state(build(), {**arrays, "13.bias": np.zeros(11, np.float32)})


def test_training_learns_digits(digits):
    client = training(epochs=2)
    state = state_arrays(build())
    found = local_train(build(), state, batches_of(digits, range(800), client), SGD)
    assert found.losses[0] == pytest.approx(np.log(10), abs=0.6)
    assert np.mean(found.losses[-5:]) < 0.8


MU = 0.3


class Objectives:
    """Copies what an observer is told of the whole objective, and the parameters at the time."""

    def __init__(self, model):
        self.model = model
        self.steps = []

    def __call__(self, step):
        gradients = {n: g.clone() for n, g in step.gradients.items()}
        parameters = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.steps.append((step, gradients, parameters))


def proximal_training(digits, optimizer, mu=MU, **settings):
    model = build(seed=1)
    observer = Objectives(model)
    batches = batches_of(digits, range(150), training(epochs=2, optimizer=optimizer))
    start = state_arrays(build())
    found = local_train(model, start, batches, optimizer, observer, proximal_mu=mu, **settings)
    return start, observer.steps, found


def test_the_proximal_term_is_that_of_the_paper_and_observers_see_the_data_loss_alone(digits):
    start, steps, found = proximal_training(digits, PLAIN)
    # Li et al. 2020, eq. 2, left to autograd.
    model, origin = build(), tensors_of(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=PLAIN.learning_rate)
    batches = batches_of(digits, range(150), training(epochs=2, optimizer=PLAIN))
    for batch, (step, gradients, _) in zip(batches, steps, strict=True):
        named = dict(model.named_parameters())
        data = nn.functional.cross_entropy(model(batch.tensors["inputs"]), batch.tensors["targets"])
        term = MU / 2 * sum((p - origin[n]).square().sum() for n, p in named.items())
        optimizer.zero_grad()
        alone = torch.autograd.grad(data, list(named.values()), retain_graph=True)
        (data + term).backward()
        for (name, parameter), expected in zip(named.items(), alone, strict=True):
            torch.testing.assert_close(gradients[name], expected, rtol=1e-3, atol=1e-5)
            assert parameter.grad is not None
        whole = torch.cat([p.grad.flatten() for p in named.values()])
        assert float(step.loss) == pytest.approx(data.item(), rel=1e-4)
        assert float(step.proximal) == pytest.approx(term.item(), rel=1e-3, abs=1e-9)
        assert float(step.objective_norm) == pytest.approx(float(whole.norm()), rel=1e-3)
        optimizer.step()
    assert float(steps[0][0].proximal) == 0
    assert float(steps[-1][0].proximal) > 0
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(found.state[name], parameter.detach(), rtol=1e-3, atol=1e-5)


@OPTIMIZERS
def test_a_replay_with_the_proximal_term_lands_on_the_very_bits(digits, optimizer):
    start, steps, found = proximal_training(digits, optimizer)
    names = list(steps[0][1])
    replay = Replay(tensors_of(start), names, optimizer, "none", MU)
    without = Replay(tensors_of(start), names, optimizer)
    for _, gradients, parameters in steps:
        assert all(torch.equal(replay.parameters[n], parameters[n]) for n in names)
        replay.step(gradients)
        without.step(gradients)
    for name in names:
        assert np.array_equal(replay.parameters[name].numpy(), found.state[name])
        assert not np.array_equal(without.parameters[name].numpy(), found.state[name])


def test_a_correction_is_added_to_every_gradient_and_observers_see_the_data_loss_alone(digits):
    """Karimireddy et al. 2020, eq. 3, in a plain loop."""
    draw = torch.Generator().manual_seed(0)
    model, start = build(seed=1), state_arrays(build())
    correction = {n: torch.randn(p.shape, generator=draw) / 10 for n, p in model.named_parameters()}
    observer = Objectives(model)
    client = training(epochs=2, optimizer=PLAIN)
    found = local_train(
        model,
        start,
        batches_of(digits, range(150), client),
        PLAIN,
        observer,
        correction={name: tensor.numpy() for name, tensor in correction.items()},
    )
    plain = build()
    optimizer = torch.optim.SGD(plain.parameters(), lr=PLAIN.learning_rate)
    batches = batches_of(digits, range(150), client)
    for batch, (step, gradients, _) in zip(batches, observer.steps, strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(
            plain(batch.tensors["inputs"]), batch.tensors["targets"]
        ).backward()
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5)
            parameter.grad += correction[name]
        whole = torch.cat([p.grad.flatten() for p in plain.parameters()])
        assert step.proximal is None
        assert float(step.objective_norm) == pytest.approx(float(whole.norm()), rel=1e-3)
        optimizer.step()
    for name, parameter in plain.named_parameters():
        np.testing.assert_allclose(found.state[name], parameter.detach(), rtol=1e-3, atol=1e-5)


def test_the_term_has_the_same_bits_in_any_layout_and_in_any_parts():
    draw = torch.Generator().manual_seed(0)
    gradient, parameter, start = (torch.randn(7, 5, 3, 3, generator=draw) for _ in range(3))
    expected = Objective({"w": start}, MU).gradient("w", gradient, parameter)
    assert torch.equal(expected, MU * (parameter - start) + gradient)
    spread = gradient.to(memory_format=torch.channels_last)
    assert torch.equal(Objective({"w": start}, MU).gradient("w", spread, parameter), expected)
    one = [
        Objective({"w": start[i]}, MU).gradient("w", gradient[i], parameter[i]) for i in range(7)
    ]
    assert torch.equal(torch.stack(one), expected)


def test_without_a_term_nothing_is_told_of_one_and_nothing_changes(digits):
    start, steps, found = proximal_training(digits, SGD, mu=0.0)
    assert {(step.proximal, step.objective_norm) for step, _, _ in steps} == {(None, None)}
    client = training(epochs=2)
    plain = local_train(build(), start, batches_of(digits, range(150), client), SGD)
    assert_same_state(found.state, plain.state)


def test_a_term_pulls_back_to_the_global_model(digits):
    def moved(mu):
        start, _, found = proximal_training(digits, PLAIN, mu=mu)
        return sum(
            float(np.square(found.state[n] - start[n]).sum()) for n in ("0.weight", "13.bias")
        )

    assert moved(10.0) < moved(1.0) < moved(0.0)
