"""Files of workers on machines that see no run directory, without Ray."""

import io

import numpy as np
import pytest

from fedsim.core.errors import RunFailedError
from fedsim.plugins.cluster.duty import receive


def test_a_file_comes_whole_in_pieces_and_one_that_became_shorter_ends_it():
    there = np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8)
    here = io.BytesIO()
    receive(here, "steps.jsonl", 1000, lambda at: there[at : at + 300])
    assert here.getvalue() == there.tobytes()
    told = "steps.jsonl became shorter at its worker: 700 bytes, not 1000"
    with pytest.raises(RunFailedError, match=told):
        receive(io.BytesIO(), "steps.jsonl", 1000, lambda at: there[at : min(at + 300, 700)])
