from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array

from fedsim.flower import messages as wire

ARRAYS = [
    np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    np.array(7, dtype=np.int64),
    np.zeros((0, 3), dtype=np.float64),
    np.array([True, False]),
]


@pytest.mark.parametrize("array", ARRAYS)
def test_an_array_travels_in_the_very_bytes_of_flowers_own(array: np.ndarray) -> None:
    record = wire.array_record({"a": array})
    ours, theirs = record["a"], Array(array)
    assert (ours.dtype, ours.shape, ours.stype) == (theirs.dtype, theirs.shape, theirs.stype)
    assert ours.data == theirs.data


@pytest.mark.parametrize("array", [*ARRAYS, np.asfortranarray(np.arange(6.0).reshape(2, 3))])
def test_a_decoded_state_is_fresh_and_writable_whoever_encoded_it(array: np.ndarray) -> None:
    for record in (wire.array_record({"a": array}), {"a": Array(array)}):
        found = wire.state_of(record)["a"]
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert np.array_equal(found, array)
        assert found.flags.writeable
        found[...] = 1
        assert np.array_equal(wire.state_of(record)["a"], array)
