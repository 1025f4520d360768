import pytest
import torch

from fedsim.core.arithmetic import _fixed
from fedsim.core.task import Column


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        # Recorded runs tell of the arithmetic by these.
        (Column(dtype="uint8", shape=(6,)), [0, 218, 180, 142, 101, 63]),
        (Column(dtype="float32", shape=(3,)), [0, 218 / 256, 180 / 256]),
        # Tokens of any vocabulary.
        (Column(dtype="int64", shape=(6,)), [0, 0, 0, 0, 1, 1]),
        (Column(dtype="int64", shape=(6,), values=4), [0, 1, 2, 3, 0, 1]),
    ],
)
def test_what_arithmetic_is_told_by_is_the_same_everywhere(column, expected):
    assert _fixed(column, 1, torch.device("cpu")).tolist() == [expected]
