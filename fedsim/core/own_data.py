"""A node's own data, as reported to the server; without torch, so that nodes answer at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from fedsim.core import registry
from fedsim.core.errors import InputError, shorten

MOST_NAME = 255
"""Characters in the name of a class."""


@dataclass(frozen=True, kw_only=True)
class OwnData:
    """What a node holds.

    Parameters
    ----------
    file : Path
        Its columns, in the cache.
    samples : int
        How many.
    classes : tuple of str
        Names of the classes, by label.
    sha256 : str
        Hash of names and columns.
    """

    file: Path
    samples: int
    classes: tuple[str, ...]
    sha256: str


def find_own_data(folder: Path) -> OwnData:
    """Find the data of a node, converting it into the cache when it is new or has changed.

    Raises
    ------
    InputError
        When there is none, or something in it cannot be used.
    """
    return cast(OwnData, registry.task_module(registry.TASKS[0], "own_data").find(folder))


def check_classes(found: int, allowed: int, dataset: str) -> None:
    """Refuse own data with another number of classes than the dataset of the federation.

    Raises
    ------
    InputError
        With both numbers.
    """
    if found != allowed:
        raise InputError(
            f"the data of this node has {found} classes; expected {allowed}, those of "
            f"dataset = {shorten(dataset)}"
        )
