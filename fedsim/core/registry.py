"""What fedsim has more than one of, found by the name of its file."""

from __future__ import annotations

import importlib
from types import ModuleType

TASKS = ("vision",)
"""The packages of ``fedsim.tasks``; the first is the one that a configuration means."""


def task_module(task: str, part: str) -> ModuleType:
    """Import one module of a task: ``task``, or ``own_data``, which does without torch."""
    return importlib.import_module(f"fedsim.tasks.{task}.{part}")
