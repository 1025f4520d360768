"""The task of images, for tests of what stands below it."""

from __future__ import annotations

from fedsim.tasks.vision.datasets import DatasetSpec, parse_name
from fedsim.tasks.vision.task import Vision


def vision(spec: DatasetSpec, arch: str = "cnn", seed: int = 42) -> Vision:
    """Make the task of a dataset."""
    return Vision(spec=spec, arch=arch, norm="batch", data_root=None, seed=seed, download=False)


DIGITS = vision(parse_name("digits"))
