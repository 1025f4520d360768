import numpy as np
import pytest
from flwr.app import Array

from strategies.folding import view_of


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
        np.array(7, dtype=np.int64),
        np.zeros((0, 3), dtype=np.float32),
    ],
)
def test_arrays_of_a_message_are_viewed_without_a_copy(array):
    sent = Array(array)
    seen = view_of(sent)
    assert (seen.dtype, seen.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(seen, array)
    assert not seen.flags.owndata
    assert not seen.flags.writeable
