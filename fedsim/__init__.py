"""Federated averaging that you can replay.

`load_run` opens the record of a run; the ``fedsim`` command makes one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsim.recording.reader import Run, load_run

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "load_run"]


def __getattr__(name: str) -> Any:
    # Lazily: the command line and Flower's workers import fedsim without reading a run.
    if name in ("Run", "load_run"):
        from fedsim.recording import reader

        return getattr(reader, name)
    raise AttributeError(f"module 'fedsim' has no attribute {name!r}")
