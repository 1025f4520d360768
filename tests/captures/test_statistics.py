from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedsim.captures.statistics import GradientStatistics
from fedsim.core.support import count_nonzero, join_taps, live_taps, pack

SHAPES = {"kernel": (4, 3, 3, 3), "weight": (5, 7), "bias": (5,), "scale": ()}
ENTRIES = 108 + 35 + 5 + 1


def gradient_of(seed, live=range(9)):
    draw = torch.Generator().manual_seed(seed)
    gradient = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    dead = [tap for tap in range(9) if tap not in live]
    gradient["kernel"].flatten(2)[:, :, dead] = 0
    return gradient


def measure(gradients, supports=None):
    """Follow steps, each packed with its own support; None keeps the taps that are live so far."""
    statistics = GradientStatistics()
    found = []
    taps = dict.fromkeys(SHAPES)
    for number, gradient in enumerate(gradients):
        if supports is not None:
            taps = {**taps, "kernel": supports[number]}
        elif number == 0:
            taps = {name: live_taps(tensor) for name, tensor in gradient.items()}
        else:
            taps = {name: join_taps(taps[name], live_taps(t)) for name, t in gradient.items()}
        packed = {name: pack(tensor, taps[name]) for name, tensor in gradient.items()}
        nonzero = sum(count_nonzero(tensor) for tensor in gradient.values())
        found.append(statistics.add(packed, taps, SHAPES, nonzero=nonzero))
    return found


def flat(gradient):
    return np.concatenate([gradient[n].double().numpy().reshape(-1) for n in SHAPES])


def cosine(left, right):
    lengths = np.linalg.norm(left) * np.linalg.norm(right)
    return float(np.dot(left, right) / lengths) if lengths else None


def assert_as_in_float64(found, gradients):
    vectors = [flat(gradient) for gradient in gradients]
    assert len(found) == len(vectors)
    for step, (figures, vector) in enumerate(zip(found, vectors, strict=True)):
        assert figures.norm == pytest.approx(np.linalg.norm(vector), rel=1e-6)
        norms = {n: np.linalg.norm(t.double().numpy()) for n, t in gradients[step].items()}
        assert list(figures.per_layer_norms) == list(SHAPES)
        assert figures.per_layer_norms == pytest.approx(norms, rel=1e-6)
        assert figures.zero_fraction == pytest.approx(1 - np.count_nonzero(vector) / ENTRIES)
        if step == 0:
            assert (figures.cosine_to_previous, figures.cosine_to_mean) == (None, None)
            continue
        expected = cosine(vector, vectors[step - 1])
        assert figures.cosine_to_previous == pytest.approx(expected, abs=1e-6)
        expected = cosine(vector, np.mean(vectors[:step], axis=0))
        assert figures.cosine_to_mean == pytest.approx(expected, abs=1e-6)


def test_figures_of_several_steps_are_those_of_float64():
    common = gradient_of(99)
    gradients = []
    for seed in range(7):
        own = gradient_of(seed)
        gradients.append({n: (seed - 2) * common[n] + own[n] for n in SHAPES})
    found = measure(gradients)
    assert_as_in_float64(found, gradients)
    # Not a trivial sequence: there are positive and negative cosines.
    signs = {math.copysign(1, f.cosine_to_previous) for f in found[1:]}
    assert signs == {1.0, -1.0}


@pytest.mark.parametrize(
    "live",
    [
        [(4,), (4,), (4,), (4,)],
        [(4,), (4,), (0, 4), (8,), tuple(range(9)), (4,)],
        [(), (4,), (), (2, 4)],
        [tuple(range(9)), (4,), (1,)],
    ],
    ids=["the same taps", "growing to all taps", "from no tap", "all taps from the start"],
)
def test_figures_do_not_depend_on_which_taps_are_packed(live):
    gradients = [gradient_of(seed, taps) for seed, taps in enumerate(live)]
    packed = measure(gradients)
    assert_as_in_float64(packed, gradients)
    dense = measure(gradients, supports=[None] * len(live))
    assert_as_in_float64(dense, gradients)


def test_taps_may_change_in_any_way_from_step_to_step():
    supports = [(1, 4), (0, 1, 4), None, tuple(range(9)), (1, 4), (1, 4, 5), (1, 2, 4, 8)]
    gradients = [gradient_of(seed, (1, 4)) for seed in range(len(supports))]
    assert_as_in_float64(measure(gradients, supports), gradients)


def scaled(gradient, factor):
    return {name: factor * tensor for name, tensor in gradient.items()}


def test_the_first_step_has_no_cosines():
    (found,) = measure([gradient_of(1)])
    assert (found.cosine_to_previous, found.cosine_to_mean) == (None, None)


def test_a_zero_gradient_has_no_cosines_and_no_part_in_the_mean():
    one, two = gradient_of(1), gradient_of(2)
    zero = scaled(one, 0.0)
    for name in zero:
        zero[name] = zero[name].abs()
    found = measure([one, zero, two])
    assert (found[1].norm, found[1].zero_fraction) == (0.0, 1.0)
    assert (found[1].cosine_to_previous, found[1].cosine_to_mean) == (None, None)
    assert found[2].cosine_to_previous is None
    expected = cosine(flat(two), flat(one))
    assert found[2].cosine_to_mean == pytest.approx(expected, abs=1e-6)


def test_steps_after_a_zero_first_one_are_measured():
    zero = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    one, two = gradient_of(1), gradient_of(2)
    found = measure([zero, one, two])
    assert [f.cosine_to_previous for f in found[:2]] == [None, None]
    assert [f.cosine_to_mean for f in found[:2]] == [None, None]
    for value in (found[2].cosine_to_previous, found[2].cosine_to_mean):
        assert value == pytest.approx(cosine(flat(two), flat(one)), abs=1e-6)


def test_gradients_that_cancel_leave_no_mean_to_compare_with():
    whole = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    found = measure([whole, scaled(whole, -1.0), scaled(whole, 3.0)])
    assert found[1].cosine_to_previous == pytest.approx(-1, abs=1e-6)
    assert found[2].cosine_to_previous == pytest.approx(-1, abs=1e-6)
    assert found[2].cosine_to_mean is None


def test_rounding_never_takes_a_cosine_past_its_ends():
    for seed in range(20):
        gradient = gradient_of(seed)
        found = measure([gradient, scaled(gradient, 3.0), scaled(gradient, -0.7)])
        assert 1 - 1e-6 < found[1].cosine_to_previous <= 1
        assert -1 <= found[2].cosine_to_previous < -1 + 1e-6
        assert -1 <= found[2].cosine_to_mean < -1 + 1e-6


def test_a_zero_with_a_sign_is_no_zero_of_the_zero_fraction():
    gradient = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    gradient["bias"][0] = -0.0
    gradient["weight"][0, :3] = 2.0
    (found,) = measure([gradient])
    assert found.zero_fraction == pytest.approx(1 - 4 / ENTRIES, rel=1e-12)
    assert found.norm == pytest.approx(math.sqrt(12), rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_measured_as_such_and_ends_with_its_step(bad):
    gradients = [gradient_of(seed) for seed in range(4)]
    gradients[1]["weight"][2, 3] = bad
    found = measure(gradients)
    assert not math.isfinite(found[1].norm)
    assert not math.isfinite(found[1].per_layer_norms["weight"])
    assert math.isfinite(found[1].per_layer_norms["kernel"])
    assert found[1].cosine_to_previous is None or math.isnan(found[1].cosine_to_previous)
    # The step after the next one knows nothing of it, but for the mean.
    assert found[3].norm == pytest.approx(np.linalg.norm(flat(gradients[3])), rel=1e-6)
    expected = cosine(flat(gradients[3]), flat(gradients[2]))
    assert found[3].cosine_to_previous == pytest.approx(expected, abs=1e-6)
    assert found[3].cosine_to_mean is None or math.isnan(found[3].cosine_to_mean)


def test_measuring_changes_no_gradient():
    gradients = [gradient_of(seed, (1, 4)) for seed in range(3)]
    before = [{n: t.clone() for n, t in gradient.items()} for gradient in gradients]
    measure(gradients)
    measure(gradients, supports=[None, (1, 4), (0, 1, 4)])
    for gradient, copies in zip(gradients, before, strict=True):
        assert all(torch.equal(gradient[name], copies[name]) for name in SHAPES)


def test_each_client_starts_anew():
    gradients = [gradient_of(seed) for seed in range(3)]
    assert measure(gradients) == measure(gradients)
