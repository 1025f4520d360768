from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from fedsim.core.aggregation import (
    DeltaMean,
    apply_delta,
    delta_of,
    local_work,
    state_sha256,
)
from fedsim.core.training import state_arrays
from fedsim.tasks.vision.models import build_model


def f32(*values):
    return np.array(values, dtype=np.float32)


def mean_of(*weighted):
    total = DeltaMean()
    for delta, weight in weighted:
        total.add(delta, weight)
    return total.mean()


def test_a_delta_is_local_minus_global_in_each_arrays_own_dtype():
    reference = {"w": f32(1, 2), "n": np.array(7, np.int64), "h": np.array([1], np.float16)}
    local = {"w": f32(1.5, 1), "n": np.array(10, np.int64), "h": np.array([3], np.float16)}
    delta = delta_of(local, reference)
    assert list(delta) == ["w", "n", "h"]
    assert delta["w"].tolist() == [0.5, -1.0]
    assert delta["n"] == 3
    assert delta["h"].tolist() == [2.0]
    assert [delta[n].dtype.name for n in delta] == ["float32", "int64", "float16"]
    assert delta["n"].shape == ()
    assert all(isinstance(array, np.ndarray) for array in delta.values())


@pytest.mark.parametrize(
    ("local", "named"),
    [
        ({"a": f32(1)}, "b"),
        ({"a": f32(1), "b": f32(1), "c": f32(1)}, "c"),
        ({"a": f32(1), "B": f32(1)}, "B"),
        ({"b": f32(1), "a": f32(1)}, "their order"),
        ({"a": f32(1), "b": f32(1, 2)}, r"b has shape \(2,\)"),
        ({"a": np.array(1, np.float32), "b": f32(1)}, r"a has shape \(\)"),
        ({"a": f32(1), "b": np.array([1.0])}, "b has shape .* float64"),
    ],
    ids=["fewer", "more", "renamed", "order", "shape", "scalar", "dtype"],
)
def test_a_delta_of_other_names_shapes_or_dtypes_is_refused_by_name(local, named):
    with pytest.raises(ValueError, match=named):
        delta_of(local, {"a": f32(1), "b": f32(1)})


def test_the_mean_is_weighted_by_samples():
    mean = mean_of(({"w": f32(1, -2)}, 10), ({"w": f32(4, 2)}, 30))
    assert mean["w"].tolist() == [3.25, 1.0]
    assert mean["w"].dtype == np.float32


def test_the_mean_of_one_client_is_its_delta():
    delta = {"w": f32(0.1, 1e-30, -3e30), "n": np.array(5, np.int64)}
    mean = mean_of((delta, 2309))
    assert mean["w"].tolist() == delta["w"].tolist()
    assert mean["n"] == 5


def test_sums_are_kept_in_float64():
    # In float32, 16777216 + 1 is 16777216 again.
    deltas = [f32(16777216), f32(1), f32(1)]
    total = deltas[0] + deltas[1] + deltas[2]
    assert (total / np.float32(3)).tolist() == [5592405.5]
    assert mean_of(*(({"w": d}, 1) for d in deltas))["w"].tolist() == [5592406.0]


def test_weighted_products_are_kept_in_float64():
    deltas = [(f32(0.1), 3), (f32(0.7), 2767), (f32(-0.3), 2309)]
    exact = sum(float(d[0]) * w for d, w in deltas) / (3 + 2767 + 2309)
    in_float32 = sum((d * np.float32(w) for d, w in deltas), f32(0)) / np.float32(5079)
    mean = mean_of(*(({"w": d}, w) for d, w in deltas))["w"]
    assert mean.tolist() == f32(exact).tolist()
    assert mean.tolist() != in_float32.tolist()


@pytest.mark.parametrize(
    ("values", "expected"),
    [((1, 2), 2), ((2, 3), 2), ((3, 4), 4), ((-1, -2), -2), ((-3, 0), -2), ((1, 1), 1)],
)
def test_an_integer_buffers_mean_rounds_half_to_even_and_keeps_dtype_and_shape(values, expected):
    for shape in ((), (1,), (2, 2)):
        for dtype in (np.int64, np.int32):
            deltas = [{"n": np.full(shape, v, dtype)} for v in values]
            mean = mean_of((deltas[0], 1), (deltas[1], 1))["n"]
            assert isinstance(mean, np.ndarray)
            assert mean.shape == shape
            assert mean.dtype == dtype
            assert np.array_equal(mean, np.full(shape, expected, dtype))


def test_integer_buffers_are_weighted_too():
    assert mean_of(({"n": np.array(72)}, 2309), ({"n": np.array(87)}, 2767))["n"] == 80


def test_shapes_survive_the_mean():
    delta = {"scalar": np.array(2, np.float32), "matrix": np.ones((2, 3), np.float32)}
    mean = mean_of((delta, 1), (delta, 2))
    assert {n: a.shape for n, a in mean.items()} == {"scalar": (), "matrix": (2, 3)}
    assert mean["matrix"].tolist() == [[1.0] * 3] * 2


def test_folding_copies_the_delta_and_leaves_it_alone():
    delta = {"w": f32(1, 2)}
    total = DeltaMean()
    total.add(delta, 3)
    assert delta["w"].tolist() == [1, 2]
    delta["w"][:] = 100
    assert total.mean()["w"].tolist() == [1, 2]
    assert total.weight == 3


@pytest.mark.parametrize("weight", [0, -1])
def test_a_weight_below_one_is_refused(weight):
    total = DeltaMean()
    with pytest.raises(ValueError, match=f"weight of 1 or more, not {weight}"):
        total.add({"w": f32(1)}, weight)
    assert total.weight == 0


def test_the_mean_is_read_without_ending_the_sum():
    total = DeltaMean()
    total.add({"w": f32(2)}, 1)
    assert total.mean()["w"].tolist() == [2]
    total.add({"w": f32(5)}, 2)
    assert total.mean()["w"].tolist() == [4]


def test_applying_a_delta_adds_it_in_each_arrays_own_dtype():
    state = {"w": f32(1, 2), "n": np.array(7, np.int64)}
    new = apply_delta(state, {"n": np.array(-2, np.int64), "w": f32(0.5, -1)})
    assert list(new) == ["w", "n"]
    assert new["w"].tolist() == [1.5, 1.0]
    assert new["n"] == 5
    assert (new["w"].dtype, new["n"].dtype, new["n"].shape) == (np.float32, np.int64, ())
    assert all(isinstance(array, np.ndarray) for array in new.values())
    assert state["w"].tolist() == [1, 2]


def sha256_by_hand(state):
    digest = hashlib.sha256()
    for name, array in sorted(state.items()):
        little = array.astype(array.dtype.newbyteorder("<"))
        fields = (name, array.dtype.name, ",".join(map(str, array.shape)))
        digest.update(b"".join(f.encode() + b"\0" for f in fields) + little.tobytes(order="C"))
    return digest.hexdigest()


SMALL = {
    "w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a.n": np.array(7, np.int64),
    "h": np.array([1.5], np.float16),
    "empty": np.zeros((0, 3), np.float32),
}


def test_state_sha256_is_over_names_dtypes_shapes_and_bytes():
    expected = "f81c6be6bb748a0148c89e9b0eaba099aa420b8d903ed7f80ab94d10d3ae4443"
    assert state_sha256(SMALL) == sha256_by_hand(SMALL) == expected


def test_state_sha256_of_a_whole_model_equals_the_one_by_hand():
    state = state_arrays(build_model("cnn", classes=10, norm="batch", seed=42))
    assert state_sha256(state) == sha256_by_hand(state)


@pytest.mark.parametrize(
    "change",
    [
        {"w": SMALL["w"].astype(np.float64)},
        {"w": SMALL["w"].view(np.int32)},
        {"w": SMALL["w"].reshape(3, 2)},
        {"w": SMALL["w"].reshape(6)},
        {"w": np.nextafter(SMALL["w"], np.float32(9))},
        {"w": SMALL["w"].T.copy().reshape(2, 3)},
        {"a.n": np.array([7], np.int64)},
        {"a.n": np.array(7, np.int32)},
        {"new": f32()},
    ],
)
def test_state_sha256_sees_every_change_of_dtype_shape_value_and_name(change):
    assert state_sha256({**SMALL, **change}) != state_sha256(SMALL)


def test_state_sha256_sees_a_changed_or_swapped_name():
    renamed = {("v" if n == "w" else n): a for n, a in SMALL.items()}
    assert state_sha256(renamed) != state_sha256(SMALL)
    swapped = {"a": f32(1), "b": f32(2)}
    assert state_sha256(swapped) != state_sha256({"b": f32(1), "a": f32(2)})


def test_state_sha256_is_blind_to_order_and_memory_layout():
    expected = state_sha256(SMALL)
    assert state_sha256(dict(reversed(SMALL.items()))) == expected
    assert state_sha256({n: np.array(a, order="F") for n, a in SMALL.items()}) == expected
    big_endian = {n: a.astype(a.dtype.newbyteorder(">")) for n, a in SMALL.items()}
    assert state_sha256(big_endian) == expected
    spread = np.zeros((2, 6), np.float32)
    spread[:, ::2] = SMALL["w"]
    assert state_sha256({**SMALL, "w": spread[:, ::2]}) == expected
    assert state_sha256({**SMALL, "a.n": np.int64(7)}) == expected


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_local_work_is_the_papers_norm_of_accumulated_gradients(steps, momentum):
    # Wang et al. 2020, sec. 4.1: SGD with momentum.
    expected = float(steps)
    if momentum:
        lost = momentum * (1 - momentum**steps) / (1 - momentum)
        expected = (steps - lost) / (1 - momentum)
    assert local_work(steps, learning_rate=0.1, momentum=momentum) == pytest.approx(0.1 * expected)


@pytest.mark.parametrize("nesterov", [False, True])
def test_local_work_is_how_far_torchs_sgd_goes(nesterov):
    parameter = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    sgd = torch.optim.SGD([parameter], lr=0.5, momentum=0.75, nesterov=nesterov)
    for steps in range(1, 6):
        parameter.grad = torch.ones(1, dtype=torch.float64)
        sgd.step()
        work = local_work(steps, learning_rate=0.5, momentum=0.75, nesterov=nesterov)
        assert work == pytest.approx(-parameter.item(), rel=1e-12)
