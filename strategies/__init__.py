"""Aggregation strategies, one file each; `registry` names them, and `build` makes them Flower's."""

import importlib
from typing import Any

_IN = {"DeltaFedAvg": "flower_strategy", "Recorded": "recorded", "RoundExporter": "folding"}
__all__ = ["DeltaFedAvg", "Recorded", "RoundExporter"]


def __getattr__(name: str) -> Any:
    # Flower is slow to import, and settings and proofs do without it.
    if name in _IN:
        return getattr(importlib.import_module(f"strategies.{_IN[name]}"), name)
    raise AttributeError(f"module 'strategies' has no attribute {name!r}")
