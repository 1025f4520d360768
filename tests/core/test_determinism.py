import subprocess
import sys

import torch

from fedsim.core.determinism import use_deterministic

ASK = """
import os, torch
from fedsim.core.determinism import use_deterministic
use_deterministic({})
print(torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic,
      torch.backends.cudnn.benchmark, torch.utils.deterministic.fill_uninitialized_memory,
      os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
"""


def settings_with(deterministic):
    finished = subprocess.run(
        [sys.executable, "-c", ASK.format(deterministic)],
        capture_output=True,
        text=True,
        check=True,
    )
    return finished.stdout.split()


def test_all_that_decides_repetition_is_set():
    assert settings_with(True) == ["True", "True", "False", "False", ":4096:8"]
    assert settings_with(False) == ["False", "False", "False", "False", "None"]


def test_it_changes_no_result_on_a_cpu():
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    weights = torch.rand(4, 3, 3, 3, generator=torch.Generator().manual_seed(2))
    before = torch.nn.functional.conv2d(images, weights)
    try:
        use_deterministic(True)
        assert torch.equal(torch.nn.functional.conv2d(images, weights), before)
    finally:
        use_deterministic(False)
