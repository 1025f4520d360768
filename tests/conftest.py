"""What all tests share: a cache of their own, and torch on one thread where a file asks for it."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsim.tasks.vision.datasets import load_dataset


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Converted datasets of this session, never the user's."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDSIM_CACHE", str(folder))
        yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Keep torch's threads out of the way of processes that the tests start."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


@pytest.fixture
def global_generators():
    """Read the state of every global generator, as a value that can be compared."""

    def read():
        name, keys, *rest = np.random.get_state()
        return torch.get_rng_state().tolist(), (name, keys.tolist(), *rest), random.getstate()

    return read
