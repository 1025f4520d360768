"""Federated averaging that you can replay.

`simulate` makes a run, as the ``fedsim`` command does; `load_run` opens the record of one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsim.api import Run, load_run, simulate

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "load_run", "simulate"]


def __getattr__(name: str) -> Any:
    # Lazily: the command line and Flower's workers import fedsim without reading a run.
    if name in ("Run", "load_run", "simulate"):
        from fedsim import api

        return getattr(api, name)
    raise AttributeError(f"module 'fedsim' has no attribute {name!r}")
