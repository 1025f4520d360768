"""Data and settings that the tests of the core share."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsim.core.datasets import load_dataset


@pytest.fixture(scope="session")
def digits(cache):
    return load_dataset("digits", data_root=None, seed=42)


@pytest.fixture(scope="session")
def cifar_root():
    root = os.environ.get("FEDSIM_DATA_ROOT")
    if not root:
        pytest.skip("FEDSIM_DATA_ROOT, the folder of the CIFAR archives, is not set")
    if not Path(root, "cifar-100-python").is_dir():
        pytest.skip("FEDSIM_DATA_ROOT holds no folder cifar-100-python")
    return root


@pytest.fixture(scope="session")
def cifar100(cache, cifar_root):
    return load_dataset("cifar100", data_root=cifar_root, seed=42)


@pytest.fixture(scope="module")
def one_thread():
    """One torch thread: sums of floats then have one order, whatever the machine does besides."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def global_generators():
    """Read the state of every global generator, as a value that can be compared."""

    def read():
        name, keys, *rest = np.random.get_state()
        return torch.get_rng_state().tolist(), (name, keys.tolist(), *rest), random.getstate()

    return read
