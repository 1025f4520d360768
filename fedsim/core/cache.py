"""The folder of what is made once and mapped by every process from then on."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """Give the folder of converted and downloaded datasets.

    ``FEDSIM_CACHE`` names it; otherwise ``fedsim`` in ``XDG_CACHE_HOME`` or ``~/.cache``.
    """
    if named := os.environ.get("FEDSIM_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedsim"
