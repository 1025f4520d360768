import numpy as np
import pytest
from flwr.serverapp import strategy as flower

from fedsim.core.algorithm import Range, Setup, Update, strategy_table
from fedsim.core.rng import Purpose, global_seed
from strategies.privacy import clipping_norms_after
from strategies.registry import STRATEGIES
from strategies.server_optimizer import Moments, mean_range, sent_by, weighted_mean
from tests.strategies.replies import KEEPS, reply, started

M = np.array([0.5, -0.25], np.float32)
V = np.array([0.25, 0], np.float32)


def made(table):
    settings = strategy_table(table)
    return STRATEGIES[settings.name](settings, Setup(shapes={"w": (2,)}))


def test_what_is_kept_has_a_name_for_each_parameter_but_without_momentum():
    for name in STRATEGIES:
        kinds = ("control",) if name == "scaffold" else KEEPS.get(name, ())
        assert list(made(name).keeps()) == [f"{kind}/w" for kind in kinds]
    assert made({"name": "fedavgm", "server-momentum": 0.0}).keeps() == {}


def test_momentum_is_taken_off_because_it_points_against_the_update():
    start = np.array([1, -2], np.float32)
    moved = made("fedavgm").moved(start, start, {"momentum": M}, 7)
    np.testing.assert_array_equal(moved, np.array([0.5, -1.75], np.float32))


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
    start = np.array([1, -2], np.float32)
    moved = made(strategy).moved(start, start, {"m": M, "v": V}, number)
    expected = [1 + rate * 0.5 / 0.501, -2 - rate * 0.25 / 0.001]
    np.testing.assert_allclose(moved, expected, rtol=1e-6)


def update(client, samples, delta):
    return Update(client, samples, {"w": delta}, work=float, kept=dict, keep=dict)


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
@pytest.mark.parametrize("shape", [(500,), ()])
def test_flower_keeps_the_same_to_the_bit_and_it_is_in_the_range_of_the_deltas(strategy, shape):
    draw = np.random.default_rng(1)
    ours = made(strategy)
    kinds = {kind: kind for kind in KEEPS[strategy]}
    theirs = getattr(flower, STRATEGIES[strategy].__name__)(**ours.settings.own)
    start = np.asarray(draw.standard_normal(shape), np.float32)
    kept: dict[str, np.ndarray] = {}
    exact = []
    for number in range(1, 6):
        states = [
            np.asarray(start + draw.standard_normal(shape).astype(np.float32) * np.float32(scale))
            for scale in (0.01, 0.3, 3)
        ]
        started(theirs, state={"w": start}, round_number=number)
        replies = [
            reply(client, state={"w": array}, num_examples=samples)
            for client, (array, samples) in enumerate(zip(states, (7, 5, 2), strict=True))
        ]
        moved, _ = theirs.aggregate_train(number, replies)
        mean = weighted_mean(zip(states, (7, 5, 2), strict=True), 14)
        found = ours.renewed(kept, start, mean)
        updates = [update(c, n, states[c] - start) for c, n in enumerate((7, 5, 2))]
        ranges = ours.renewed_range(kept, start, mean_range(updates, "w", start))
        assert ranges.keys() == found.keys() == kinds.keys()
        if strategy == "fedavgm":
            expected = {"momentum": theirs.momentum_vector[0]}
        else:
            expected = {"m": theirs.m_t["w"], "v": theirs.v_t["w"]}
        for kind, array in found.items():
            assert array.tobytes() == np.asarray(expected[kind]).tobytes()
            assert (array.dtype, array.shape) == (start.dtype, start.shape)
            assert ranges[kind].holds(array)
            alone = ranges[kind].low == ranges[kind].high
            exact.append(np.mean(alone))
            if alone.all():
                beyond = np.nextafter(array, np.float32(9))
                assert not ranges[kind].holds(beyond)
        kept = found
        start = np.asarray(ours.moved(start, mean, kept, number), np.float32)
        assert start.tobytes() == moved["w"].numpy().astype(np.float32).tobytes()
    assert np.mean(exact) > 0.5


def test_yogis_moment_is_in_its_range_where_the_square_may_be_on_either_side():
    yogi = made("fedyogi")
    v, zero = np.float32([0.25]), np.zeros(1, np.float32)
    mean = Range(np.float32([0.4]), np.float32([0.6]))
    found = yogi.renewed_range({"m": zero, "v": v}, zero, mean)["v"]
    points = np.linspace(0.4, 0.6, 101, dtype=np.float32)
    values = [yogi.renewed({"m": zero, "v": v}, zero, np.float32([p]))["v"] for p in points]
    assert all(found.holds(value) for value in values)
    # Nor is it much wider than what may come out.
    assert min(values) - found.low < 1e-4 > found.high - max(values)


def test_a_mean_that_may_be_the_start_may_leave_the_second_moment():
    zero = np.zeros(1, np.float32)
    mean = Range(np.float32([-0.5]), np.float32([0.25]))
    found = made("fedadagrad").renewed_range({"m": zero, "v": zero}, zero, mean)["v"]
    assert (found.low, found.high) == (0, 0.25)
    assert issubclass(STRATEGIES["fedadagrad"], Moments)


def test_a_rate_of_the_server_without_momentum_moves_a_part_of_the_way():
    start, mean = np.float32([1, 2]), np.float32([1.5, 1])
    plain = made({"name": "fedavgm", "server-momentum": 0.0})
    assert plain.moved(start, mean, {}, 1) is mean
    half = made({"name": "fedavgm", "server-momentum": 0.0, "server-learning-rate": 0.5})
    np.testing.assert_array_equal(half.moved(start, mean, {}, 1), [1.25, 1.5])


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
