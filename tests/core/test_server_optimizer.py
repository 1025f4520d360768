import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from fedsim.core.rng import Purpose, global_seed
from fedsim.core.server_optimizer import (
    KEEPS,
    Range,
    clipping_norms_after,
    kept_after,
    mean_weights,
    moved_to,
    sent_by,
    server_step,
)
from fedsim.core.strategies import strategy_table
from strategies.registry import FLOWERS
from tests.strategies.replies import reply

PARAMETERS = {"w": np.array([1, -2], np.float32), "scale": np.array(4, np.float32)}
M = {"w": np.array([0.5, -0.25], np.float32), "scale": np.array(2, np.float32)}
V = {"w": np.array([0.25, 0], np.float32), "scale": np.array(4, np.float32)}


def test_momentum_is_taken_off_because_it_points_against_the_update():
    moved = server_step(strategy_table("fedavgm"), PARAMETERS, {"momentum": M}, 7)
    np.testing.assert_array_equal(moved["w"], np.array([0.5, -1.75], np.float32))
    np.testing.assert_array_equal(moved["scale"], np.array(2, np.float32))


@pytest.mark.parametrize(
    ("strategy", "number", "rate"),
    [
        ("fedadagrad", 1, 0.1),
        ("fedyogi", 1, 0.01),
        ("fedadam", 1, 0.1 * (1 - 0.99**2) ** 0.5 / (1 - 0.9**2)),
        ("fedadam", 9, 0.1 * (1 - 0.99**10) ** 0.5 / (1 - 0.9**10)),
    ],
)
def test_moments_give_the_step_by_hand(strategy, number, rate):
    moved = server_step(strategy_table(strategy), PARAMETERS, {"m": M, "v": V}, number)
    expected = [1 + rate * 0.5 / 0.501, -2 - rate * 0.25 / 0.001]
    np.testing.assert_allclose(moved["w"], expected, rtol=1e-6)
    np.testing.assert_allclose(moved["scale"], 4 + rate * 2 / 2.001, rtol=1e-6)


@pytest.mark.parametrize("strategy", KEEPS)
def test_dtypes_and_shapes_are_kept(strategy):
    kept = dict.fromkeys(KEEPS[strategy], V)
    moved = server_step(strategy_table(strategy), PARAMETERS, kept, 1)
    assert {n: (a.dtype, a.shape) for n, a in moved.items()} == {
        "w": (np.float32, (2,)),
        "scale": (np.float32, ()),
    }


def sent(array: np.ndarray, reference: np.ndarray) -> Range:
    return sent_by(array - reference, reference)


def test_a_delta_tells_what_was_sent_or_between_what_it_lies():
    draw = np.random.default_rng(0)
    reference = draw.standard_normal(2000).astype(np.float32)
    near = reference + np.float32(1e-3) * draw.standard_normal(2000).astype(np.float32)
    far = np.exp(6 * draw.standard_normal(2000)).astype(np.float32)
    local = np.where(draw.random(2000) < 0.5, near, np.where(far < 1, -far, far))
    local[:2], reference[1:3] = 0, 0
    delta = local - reference
    found = sent_by(delta, reference)
    assert found.holds(local)
    for end, outward in ((found.low, -np.inf), (found.high, np.inf)):
        np.testing.assert_array_equal(end - reference, delta)
        beyond = np.nextafter(end, np.float32(outward))
        assert (beyond - reference != delta).all()
    assert 0.5 < (found.low == found.high).mean() < 1
    with pytest.raises(ValueError, match="the difference of no two states"):
        sent_by(np.float32([1e-9]), np.float32([1]))
    with pytest.raises(ValueError, match="not finite"):
        sent_by(np.float32([np.nan]), np.float32([1]))


@pytest.mark.parametrize("strategy", KEEPS)
def test_what_flower_keeps_is_in_the_range_and_mostly_all_of_it(strategy):
    draw = np.random.default_rng(1)
    settings = strategy_table(strategy)
    live = FLOWERS[strategy](**settings.own)
    parameter = draw.standard_normal(500).astype(np.float32)
    kept: dict[str, np.ndarray] = {}
    for number in (1, 2, 3):
        states = [
            parameter + draw.standard_normal(500).astype(np.float32) * np.float32(scale)
            for scale in (0.01, 0.3, 3)
        ]
        state = ArrayRecord({"w": Array(parameter)})
        live.current_arrays = state if strategy == "fedavgm" else {"w": parameter}
        replies = [
            reply(client, state={"w": array}, num_examples=samples)
            for client, (array, samples) in enumerate(zip(states, (7, 5, 2), strict=True))
        ]
        moved, _ = live.aggregate_train(number, replies)
        mean = mean_weights(
            zip([sent(array, parameter) for array in states], (7, 5, 2), strict=True), 14
        )
        expected = kept_after(settings, kept, parameter, mean)
        if strategy == "fedavgm":
            kept = {"momentum": live.momentum_vector[0]}
        else:
            kept = {"m": live.m_t["w"], "v": live.v_t["w"]}
        assert list(expected) == list(KEEPS[strategy])
        for what, found in expected.items():
            assert found.holds(kept[what])
            assert (found.low == found.high).mean() > 0.5
            other = kept[what].copy()
            alone = int(np.flatnonzero(found.low == found.high)[0])
            other[alone] = np.nextafter(other[alone], np.float32(9))
            assert not found.holds(other)
        parameter = np.asarray(moved["w"].numpy(), np.float32)


def test_yogis_moment_is_in_its_range_where_the_square_may_be_on_either_side():
    settings = strategy_table("fedyogi")
    v, zero = np.float32([0.25]), np.zeros(1, np.float32)
    mean = Range(np.float32([0.4]), np.float32([0.6]))
    found = kept_after(settings, {"m": zero, "v": v}, zero, mean)["v"]
    for value in np.linspace(0.4, 0.6, 101, dtype=np.float32):
        one = kept_after(
            settings, {"m": zero, "v": v}, zero, Range(np.float32([value]), np.float32([value]))
        )["v"]
        assert one.is_one
        assert found.holds(one.low)


def test_plain_averages_and_a_rate_of_the_server_move_to_a_range():
    parameter = np.float32([1, 2])
    mean = Range(np.float32([1.5, 1]), np.float32([1.75, 1]))
    moved = moved_to(strategy_table("fedavg"), parameter, mean)
    assert moved == mean
    table = {"name": "fedavgm", "server-momentum": 0.0, "server-learning-rate": 0.5}
    moved = moved_to(strategy_table(table), parameter, mean)
    np.testing.assert_array_equal([moved.low, moved.high], [[1.25, 1.5], [1.375, 1.5]])
    assert moved_to(strategy_table("fedmedian"), parameter, mean) is None


def test_a_clipping_norm_moves_by_the_share_that_was_not_clipped():
    norms = clipping_norms_after(
        0.5, noise_multiplier=0.0, sampled=4, told=2, seed=3, round_number=1
    )
    np.testing.assert_allclose(norms, [0.5 * np.exp(-0.1), 0.5, 0.5 * np.exp(0.1)], rtol=1e-15)
    noisy = clipping_norms_after(
        0.5, noise_multiplier=0.1, sampled=4, told=2, seed=3, round_number=1
    )
    with global_seed(3, Purpose.NOISE, 1):
        share = np.random.normal(1, 0.2) / 2
    assert noisy[1] == 0.5 * np.exp(-0.2 * (1 - share - 0.5))
