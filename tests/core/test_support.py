from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedsim.core.support import (
    count_nonzero,
    join_taps,
    live_taps,
    pack,
    packed_shape,
    packed_size,
    unpack,
)
from fedsim.tasks.vision.models import LiveTapConv2d

INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def bits(tensor):
    return tensor.contiguous().view(INTEGERS[tensor.dtype]).tolist()


def same_bits(left, right):
    return (left.dtype, left.shape) == (right.dtype, right.shape) and bits(left) == bits(right)


def from_bits(pattern, shape=()):
    return torch.tensor(pattern, dtype=torch.int64).to(torch.int32).view(torch.float32).view(shape)


def kernel(*live, shape=(2, 3, 3, 3), seed=1):
    """Draw a gradient of a kernel whose other taps are zero."""
    gradient = torch.zeros(shape)
    draw = torch.Generator().manual_seed(seed)
    for tap in live:
        plane = torch.randn(shape[:2], generator=draw)
        gradient.flatten(2)[:, :, tap] = plane
    return gradient


def gradient_on_maps(size, stride, kernel_size=3, padding=1, make=nn.Conv2d):
    draw = torch.Generator().manual_seed(3)
    layer = make(4, 5, kernel_size, stride=stride, padding=padding, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=draw))
    maps = torch.randn((2, 4, size, size), generator=draw)
    layer(maps).square().sum().backward()
    return layer.weight.grad


@pytest.mark.parametrize("make", [nn.Conv2d, LiveTapConv2d])
@pytest.mark.parametrize(
    ("size", "stride", "taps"),
    [
        # On a map of one pixel a kernel of 3x3 meets it with its centre alone.
        (1, 1, (4,)),
        (1, 2, (4,)),
        # With a stride of 2 the one window on 2x2 pixels begins in the padding.
        (2, 2, (4, 5, 7, 8)),
        (2, 1, None),
        (4, 2, None),
        (8, 1, None),
    ],
)
def test_a_kernel_larger_than_its_map_has_dead_taps(size, stride, taps, make):
    assert live_taps(gradient_on_maps(size, stride, make=make)) == taps


def test_a_kernel_of_one_tap_has_none_to_leave_out():
    assert live_taps(gradient_on_maps(4, 1, kernel_size=1, padding=0)) is None


def test_taps_are_positions_in_the_flattened_kernel():
    assert live_taps(kernel(0, 3, 8)) == (0, 3, 8)
    assert live_taps(kernel(1, 5, shape=(2, 3, 2, 3))) == (1, 5)
    assert live_taps(kernel(2, shape=(4, 2, 5))) == (2,)
    assert live_taps(kernel(7, 11, shape=(2, 2, 2, 3, 2))) == (7, 11)


def test_a_kernel_without_any_gradient_has_no_live_tap():
    assert live_taps(torch.zeros(2, 3, 3, 3)) == ()
    assert live_taps(torch.zeros(2, 3, 1, 1)) == ()


def test_a_kernel_with_every_tap_alive_has_nothing_to_leave_out():
    assert live_taps(kernel(*range(9))) is None
    assert live_taps(torch.ones(1, 1, 1, 1)) is None


@pytest.mark.parametrize("shape", [(), (5,), (5, 7)])
def test_what_is_no_kernel_has_no_taps_even_where_it_is_zero(shape):
    assert live_taps(torch.zeros(shape)) is None
    assert live_taps(torch.ones(shape)) is None


# A zero with a sign, the smallest number, and not-a-number with two payloads.
SPECIAL = [0x80000000, 0x00000001, 0x7FC00001, 0xFFA00000, 0xFF800000]


@pytest.mark.parametrize("pattern", SPECIAL)
def test_a_tap_with_a_single_entry_that_is_not_plus_zero_is_alive(pattern):
    gradient = torch.zeros(2, 3, 3, 3)
    gradient[1, 2, 0, 1] = from_bits([pattern], ())
    assert live_taps(gradient) == (1,)
    assert count_nonzero(gradient) == 1
    assert same_bits(unpack(pack(gradient, (1,)), gradient.shape, (1,)), gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_entry_but_plus_zero_is_counted(dtype):
    tensor = torch.tensor([[0.0, -0.0, 1.5], [float("nan"), 0.0, float("-inf")]], dtype=dtype)
    assert count_nonzero(tensor) == 4
    assert count_nonzero(tensor.T) == 4
    assert count_nonzero(tensor[:, 1:]) == 3
    assert count_nonzero(torch.zeros(0, dtype=dtype)) == 0
    assert count_nonzero(torch.zeros((), dtype=dtype)) == 0
    assert type(count_nonzero(tensor)) is int


def test_a_parameter_with_a_gradient_function_is_counted():
    assert count_nonzero(torch.ones(3, requires_grad=True)) == 3
    assert live_taps(kernel(4).requires_grad_()) == (4,)


@pytest.mark.parametrize(
    ("first", "second", "joined"),
    [
        ((4,), (4,), (4,)),
        ((4,), (0, 8), (0, 4, 8)),
        ((0, 8), (3, 8), (0, 3, 8)),
        ((), (2,), (2,)),
        ((), (), ()),
        (None, (4,), None),
        (None, (), None),
        (None, None, None),
    ],
)
def test_joined_taps_are_live_in_one_of_two(first, second, joined):
    assert join_taps(first, second) == joined
    assert join_taps(second, first) == joined


def test_joined_taps_hold_both_gradients():
    left, right = kernel(1, 4, seed=1), kernel(4, 7, seed=2)
    taps = join_taps(live_taps(left), live_taps(right))
    assert taps == (1, 4, 7)
    for gradient in (left, right):
        assert same_bits(unpack(pack(gradient, taps), gradient.shape, taps), gradient)


@pytest.mark.parametrize(
    ("shape", "taps", "packed"),
    [
        ((2, 3, 3, 3), (4,), (1, 2, 3)),
        ((2, 3, 3, 3), (0, 4, 8), (3, 2, 3)),
        ((2, 3, 3, 3), (), (0, 2, 3)),
        ((2, 3, 3, 3), None, (2, 3, 3, 3)),
        ((7, 1, 5), (1, 2), (2, 7, 1)),
        ((5, 7), None, (5, 7)),
        ((5,), None, (5,)),
        ((), None, ()),
    ],
)
def test_a_packed_gradient_has_a_plane_for_each_live_tap(shape, taps, packed):
    assert packed_shape(shape, taps) == packed
    assert packed_size(shape, taps) == int(np.prod(packed))
    assert tuple(pack(torch.zeros(shape), taps).shape) == packed
    assert packed_shape(list(shape), taps) == packed


def test_planes_are_the_taps_in_row_major_order_of_the_kernel():
    gradient = torch.arange(2 * 3 * 3 * 3, dtype=torch.float32).view(2, 3, 3, 3)
    packed = pack(gradient, (0, 5, 6))
    assert packed[0].tolist() == gradient[:, :, 0, 0].tolist()
    assert packed[1].tolist() == gradient[:, :, 1, 2].tolist()
    assert packed[2].tolist() == gradient[:, :, 2, 0].tolist()


def test_without_taps_nothing_is_copied():
    gradient = torch.ones(2, 3, 3, 3)
    assert pack(gradient, None) is gradient
    assert unpack(gradient, gradient.shape, None) is gradient


def test_packing_leaves_the_gradient_alone_and_copies_its_planes():
    gradient = kernel(1, 4)
    before = gradient.clone()
    packed = pack(gradient, (1, 4))
    packed.zero_()
    assert same_bits(gradient, before)
    back = unpack(packed, gradient.shape, (1, 4))
    back.fill_(1)
    assert packed.tolist() == torch.zeros(2, 2, 3).tolist()


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g.to(memory_format=torch.channels_last),
        lambda g: g.flip(0),
        lambda g: g.transpose(0, 1),
        lambda g: torch.cat([g, g])[::2],
    ],
    ids=["channels last", "flipped", "transposed", "strided"],
)
def test_a_gradient_may_lie_in_memory_as_it_likes(change):
    gradient = change(kernel(1, 4, shape=(4, 4, 3, 3)))
    assert live_taps(gradient) == (1, 4)
    assert count_nonzero(gradient) == 2 * 16
    packed = pack(gradient, (1, 4))
    assert packed.is_contiguous()
    assert same_bits(unpack(packed, gradient.shape, (1, 4)), gradient.contiguous())


def test_an_earlier_result_takes_the_next_gradient_of_the_same_taps():
    first, second = kernel(1, 4, seed=1), kernel(1, 4, seed=2)
    place = unpack(pack(first, (1, 4)), first.shape, (1, 4))
    assert unpack(pack(second, (1, 4)), second.shape, (1, 4), out=place) is place
    assert same_bits(place, second)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_packing_and_unpacking_gives_every_bit_back(data):
    sides = data.draw(st.lists(st.integers(1, 4), min_size=3, max_size=5))
    taps_there = int(np.prod(sides[2:]))
    dead = data.draw(st.sets(st.integers(0, taps_there - 1)))
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    dtype = data.draw(st.sampled_from(list(INTEGERS)))
    width = torch.empty(0, dtype=dtype).element_size()
    raw = draw.integers(0, 256, (*sides, width), dtype=np.uint8)
    # Any pattern of bits: numbers that are not finite, zeros with a sign, the smallest.
    raw[draw.random(sides) < 0.3] = 0
    signed_zero = np.zeros(width, np.uint8)
    signed_zero[-1] = 0x80
    raw[draw.random(sides) < 0.1] = signed_zero
    raw.reshape(*sides[:2], taps_there, width)[:, :, sorted(dead)] = 0
    gradient = torch.from_numpy(raw).view(dtype).view(sides)

    taps = live_taps(gradient)
    there = set(range(taps_there)) if taps is None else set(taps)
    assert there <= set(range(taps_there)) - dead
    assert there == {
        tap for tap in range(taps_there) if any(map(any, bits(gradient.flatten(2)[:, :, tap])))
    }
    wider = join_taps(taps, tuple(sorted(data.draw(st.sets(st.sampled_from(range(taps_there)))))))
    for chosen in (taps, wider):
        packed = pack(gradient, chosen)
        assert tuple(packed.shape) == packed_shape(sides, chosen)
        assert packed.numel() == packed_size(sides, chosen)
        assert count_nonzero(packed) == count_nonzero(gradient)
        assert same_bits(unpack(packed, sides, chosen), gradient)


def test_a_plane_that_is_left_out_by_mistake_shows_in_the_count():
    gradient = kernel(1, 4, 7)
    for taps in itertools.combinations((1, 4, 7), 2):
        assert count_nonzero(pack(gradient, taps)) < count_nonzero(gradient)
