import numpy as np
import pytest

from fedsim.core.server_optimizer import KEEPS, server_step
from fedsim.core.strategies import strategy_table

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
