"""trackio: a run of its local project."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsim.tracking import PROJECT, run_id_of


class Trackio:
    """A run in trackio's local project ``fedsim``, grouped by the folder above it."""

    package = "trackio"

    def __init__(self) -> None:
        import trackio

        self._trackio = trackio

    def start(self, path: Path, config: Mapping[str, Any], step: int) -> None:
        """Begin the run, or take up the one of that name."""
        self._run = self._trackio.init(
            project=PROJECT,
            # It knows runs by their names alone, and cells of two comparisons have the same.
            name=f"{path.name}~{run_id_of(path)[:8]}",
            group=path.absolute().parent.name,
            config=dict(config),
            resume="allow" if step else "never",
            embed=False,
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log all figures as one row."""
        self._run.log(dict(values), step=step)

    def finish(self, succeeded: bool) -> None:
        """Write out what is left."""
        self._run.finish()


make = Trackio
