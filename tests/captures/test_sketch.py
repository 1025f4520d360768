from __future__ import annotations

import functools
import tracemalloc

import numpy as np
import pytest
import torch

from fedsim.captures.sketch import Sketcher
from fedsim.core.rng import Purpose, generator
from fedsim.core.support import pack

# Planes of 15 entries each (four taps), one of 40 and one of 3, smaller than any sketch here.
SHAPES = {"kernel": (3, 5, 2, 2), "weight": (10, 4), "bias": (3,)}
POSITIONS = {name: position for position, name in enumerate(SHAPES)}
DENSE = dict.fromkeys(SHAPES)
SIZE = 60 + 40 + 3


def split(vector):
    """Cut a vector of all entries into the parameters."""
    parts = np.split(np.asarray(vector, np.float32), [60, 100])
    return {
        name: torch.from_numpy(part.copy()).view(shape)
        for (name, shape), part in zip(SHAPES.items(), parts, strict=True)
    }


def draw_vector(seed):
    return np.random.default_rng(seed).standard_normal(SIZE).astype(np.float32)


def sketch(vector, *, seed=42, size=8):
    return Sketcher(seed, size, POSITIONS).sketch(split(vector), DENSE)


def planes_of(name, tensor):
    array = tensor.numpy()
    if array.ndim < 3:
        return {0: array.reshape(-1)}
    flat = array.reshape(*array.shape[:2], -1)
    return {tap: flat[:, :, tap].reshape(-1) for tap in range(flat.shape[2])}


def by_the_formula(vector, *, seed=42, size=8):
    """Sum sign * rotate(signs * row, shift) over the rows of all planes, in float64."""
    signs = 1 - 2 * generator(seed, Purpose.PROJECTION).integers(0, 2, size=size)
    total = np.zeros(size)
    for name, tensor in split(vector).items():
        for tap, plane in planes_of(name, tensor).items():
            rows = -(-len(plane) // size)
            draw = generator(seed, Purpose.PROJECTION, 1 + POSITIONS[name], tap)
            shifts = draw.integers(0, size, size=rows)
            row_signs = 1 - 2 * draw.integers(0, 2, size=rows)
            padded = np.zeros(rows * size)
            padded[: len(plane)] = plane
            for row, shift, sign in zip(padded.reshape(rows, size), shifts, row_signs, strict=True):
                total += sign * np.roll(signs * row, shift)
    return total


@pytest.mark.parametrize("size", [1, 3, 8, 15, 16, 40, 64])
def test_a_sketch_is_the_sum_of_rotated_rows_with_signs(size):
    vector = draw_vector(1)
    found = sketch(vector, size=size)
    assert (found.dtype, found.shape) == (np.float32, (size,))
    np.testing.assert_allclose(found, by_the_formula(vector, size=size), rtol=0, atol=1e-5)


def test_more_rows_than_fit_a_block_are_summed_like_the_first():
    # 700 rows of 3 entries, and 2 entries left over.
    plane = np.random.default_rng(5).integers(-9, 9, 2102).astype(np.float32)
    found = Sketcher(7, 3, {"w": 4}).sketch({"w": torch.from_numpy(plane)}, {"w": None})
    signs = 1 - 2 * generator(7, Purpose.PROJECTION).integers(0, 2, size=3)
    draw = generator(7, Purpose.PROJECTION, 5, 0)
    shifts, minus = draw.integers(0, 3, size=701), draw.integers(0, 2, size=701)
    rows = np.append(plane, 0).reshape(701, 3)
    expected = sum(
        (1 - 2 * m) * np.roll(signs * row, s) for row, s, m in zip(rows, shifts, minus, strict=True)
    )
    assert found.tolist() == expected.tolist()


def test_every_entry_goes_into_one_bucket_and_no_two_of_a_row_share_it():
    columns = np.stack([sketch(basis) for basis in np.eye(SIZE)], axis=1)
    assert set(np.unique(columns)) == {-1.0, 0.0, 1.0}
    assert (np.count_nonzero(columns, axis=0) == 1).all()
    buckets = np.abs(columns).argmax(axis=0)
    for name, tensor in split(np.arange(SIZE)).items():
        for plane in planes_of(name, tensor).values():
            for start in range(0, len(plane), 8):
                row = buckets[plane[start : start + 8].astype(int)]
                assert len(set(row.tolist())) == len(row)


def test_the_same_seed_gives_the_same_sketch_in_any_process_or_order():
    vector = draw_vector(1)
    first = sketch(vector)
    assert sketch(vector).tobytes() == first.tobytes()
    # Frozen: runs of the same seed have the same projection for ever.
    assert sketch(np.arange(SIZE), size=4).tolist() == [103.0, 185.0, -333.0, 270.0]
    sketcher = Sketcher(42, 8, POSITIONS)
    sketcher.sketch(split(draw_vector(9)), DENSE)
    assert sketcher.sketch(split(vector), DENSE).tobytes() == first.tobytes()


def test_each_call_gives_a_vector_of_its_own():
    sketcher = Sketcher(42, 8, POSITIONS)
    first = sketcher.sketch(split(draw_vector(1)), DENSE)
    before = first.copy()
    sketcher.sketch(split(draw_vector(2)), DENSE)
    assert first.tobytes() == before.tobytes()


def test_the_seed_the_size_and_the_position_each_change_the_projection():
    vector = draw_vector(1)
    base = sketch(vector)
    assert not np.array_equal(sketch(vector, seed=43), base)
    moved = {name: position + 1 for name, position in POSITIONS.items()}
    assert not np.array_equal(Sketcher(42, 8, moved).sketch(split(vector), DENSE), base)
    # A name is only a name.
    parts, where = split(vector), POSITIONS["bias"]
    renamed = Sketcher(42, 8, {"b": where}).sketch({"b": parts["bias"]}, {"b": None})
    alone = Sketcher(42, 8, POSITIONS).sketch({"bias": parts["bias"]}, DENSE)
    assert np.array_equal(renamed, alone)


def test_a_sketch_of_some_parameters_is_that_of_the_others_being_zero():
    parts = split(draw_vector(1))
    some = {name: parts[name] for name in ("weight", "bias")}
    zero = {**parts, "kernel": torch.zeros(SHAPES["kernel"])}
    sketcher = Sketcher(42, 8, POSITIONS)
    assert np.array_equal(sketcher.sketch(some, DENSE), sketcher.sketch(zero, DENSE))


def test_a_sketch_is_linear():
    x, y = draw_vector(1), draw_vector(2)
    np.testing.assert_allclose(
        sketch(3 * x - 0.5 * y), 3 * sketch(x) - 0.5 * sketch(y), rtol=0, atol=2e-5
    )
    # Doubling and turning the sign round nothing.
    assert np.array_equal(sketch(-2 * x), -2 * sketch(x))
    assert not sketch(np.zeros(SIZE)).any()


@pytest.mark.parametrize("live", [(), (0,), (3,), (1, 2), (0, 2, 3), (0, 1, 2, 3)])
def test_a_packed_gradient_has_the_sketch_of_the_dense_one_to_the_bit(live):
    parts = split(draw_vector(3))
    dead = [tap for tap in range(4) if tap not in live]
    parts["kernel"].flatten(2)[:, :, dead] = 0
    sketcher = Sketcher(42, 8, POSITIONS)
    dense = sketcher.sketch(parts, DENSE)
    for taps in (live, tuple(sorted({*live, 1})), (0, 1, 2, 3)):
        packed = {**parts, "kernel": pack(parts["kernel"], taps)}
        found = sketcher.sketch(packed, {**DENSE, "kernel": taps})
        assert np.array_equal(found, dense)
    assert dense.any()


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (5, 7, 4)])
def test_kernels_of_any_shape_are_sketched_alike_packed_and_dense(shape):
    gradient = torch.zeros(shape)
    draw = torch.Generator().manual_seed(1)
    for tap in (1, 3):
        gradient.flatten(2)[:, :, tap] = torch.randn(shape[:2], generator=draw)
    sketcher = Sketcher(1, 5, {"w": 0})
    packed = sketcher.sketch({"w": pack(gradient, (1, 3))}, {"w": (1, 3)})
    assert packed.any()
    assert np.array_equal(packed, sketcher.sketch({"w": gradient}, {"w": None}))


def test_a_gradient_may_lie_in_memory_as_it_likes():
    sketcher = Sketcher(1, 5, {"w": 0})
    gradient = torch.randn((6, 4, 3, 3), generator=torch.Generator().manual_seed(1))
    expected = sketcher.sketch({"w": gradient}, {"w": None})
    other = gradient.to(memory_format=torch.channels_last)
    assert np.array_equal(sketcher.sketch({"w": other}, {"w": None}), expected)


def test_sketches_of_steps_with_different_supports_belong_together():
    left, right = split(draw_vector(4)), split(draw_vector(5))
    left["kernel"].flatten(2)[:, :, (1, 3)] = 0
    right["kernel"].flatten(2)[:, :, (0, 1)] = 0
    sketcher = Sketcher(42, 8, POSITIONS)
    sketches = [
        sketcher.sketch({**parts, "kernel": pack(parts["kernel"], taps)}, {**DENSE, "kernel": taps})
        for parts, taps in ((left, (0, 2)), (right, (2, 3)))
    ]
    difference = {name: left[name] - right[name] for name in left}
    np.testing.assert_allclose(
        sketches[0] - sketches[1], sketcher.sketch(difference, DENSE), rtol=0, atol=1e-5
    )


SEEDS = 4000


@functools.cache
def sketches_of_seeds(size):
    """Sketch two vectors of the same length at a right angle with many seeds."""
    x, other = draw_vector(11), draw_vector(12)
    other -= x * (np.dot(x, other) / np.dot(x, x))
    other *= np.linalg.norm(x) / np.linalg.norm(other)
    sketches = np.empty((2, SEEDS, size))
    parts = split(x), split(other)
    for seed in range(SEEDS):
        sketcher = Sketcher(seed, size, POSITIONS)
        sketches[:, seed] = [sketcher.sketch(p, DENSE) for p in parts]
    return x.astype(np.float64), other.astype(np.float64), *sketches


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("cosine", [0.8, 0.0, -0.5, 1.0])
def test_inner_products_are_unbiased_with_the_stated_variance(size, cosine):
    x, other, x_sketches, other_sketches = sketches_of_seeds(size)
    sine = np.sqrt(1 - cosine**2)
    y, y_sketches = cosine * x + sine * other, cosine * x_sketches + sine * other_sketches
    exact = np.dot(x, y)
    assert exact == pytest.approx(cosine * np.dot(x, x), abs=1e-3)
    found = (x_sketches * y_sketches).sum(axis=1)
    stated = (np.dot(x, x) * np.dot(y, y) + exact**2) / size
    # Four standard errors of the mean of so many seeds.
    assert abs(found.mean() - exact) < 4 * np.sqrt(stated / SEEDS)
    # Entries of one row never meet, which the formula neglects: with 15 rows that is 7 %.
    assert 0.8 < found.var() / stated < 1.1


@pytest.mark.parametrize(
    "entries",
    [
        # One entry in each of two rows of a plane, which meet once in K.
        [60, 60 + 8],
        # Of two planes and of two parameters.
        [0, 1, 102],
        range(SIZE),
    ],
)
def test_a_few_large_entries_stay_within_the_bound_on_the_variance(entries):
    x = np.eye(SIZE)[list(entries)].sum(axis=0)
    parts, square = split(x), np.dot(x, x)
    found = np.empty(1500)
    for seed in range(len(found)):
        vector = Sketcher(seed, 8, POSITIONS).sketch(parts, DENSE)
        found[seed] = np.dot(vector, vector)
    bound = 6 * square**2 / 8
    assert 0 < found.var() < bound
    assert abs(found.mean() - square) < 4 * np.sqrt(bound / len(found))


def test_cosines_of_a_larger_sketch_are_within_a_few_of_their_error():
    draw = np.random.default_rng(1)
    x = draw.standard_normal(50_000).astype(np.float32)
    noise = draw.standard_normal(50_000).astype(np.float32)
    sketcher = Sketcher(3, 1000, {"w": 0})

    def project(vector):
        return sketcher.sketch({"w": torch.from_numpy(vector)}, {"w": None}).astype(np.float64)

    def cosine(left, right):
        return np.dot(left, right) / np.linalg.norm(left) / np.linalg.norm(right)

    for share in (-1.0, -0.3, 0.0, 0.3, 2.0):
        y = share * x + noise
        assert abs(cosine(project(x), project(y)) - cosine(x, y)) < 3.5 / np.sqrt(1000)


@pytest.mark.parametrize("packed", [True, False])
def test_the_matrix_is_never_built(packed):
    # 590,000 entries; the matrix of 4096 rows in float32 would take 9.7 GB.
    gradient = torch.zeros(256, 256, 3, 3)
    gradient.normal_(generator=torch.Generator().manual_seed(1))
    taps = tuple(range(9)) if packed else None
    tensor = pack(gradient, taps)
    tracemalloc.start()
    try:
        sketcher = Sketcher(42, 4096, {"w": 0})
        sketcher.sketch({"w": tensor}, {"w": taps})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # 32 rows and the sketch, twice as wide, in float32; the gradient itself takes 2.4 MB.
    assert peak < 4 * 4096 * (32 + 8)


def test_a_kernel_without_any_live_tap_adds_nothing():
    sketcher = Sketcher(42, 8, POSITIONS)
    parts = split(draw_vector(1))
    without = {name: parts[name] for name in ("weight", "bias")}
    empty = {**without, "kernel": pack(torch.zeros(SHAPES["kernel"]), ())}
    found = sketcher.sketch(empty, {**DENSE, "kernel": ()})
    assert np.array_equal(found, sketcher.sketch(without, DENSE))


def test_what_is_not_finite_shows_in_the_sketch():
    vector = draw_vector(1)
    vector[70] = np.nan
    assert np.isnan(sketch(vector)).sum() == 1
