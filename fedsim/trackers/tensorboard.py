"""TensorBoard: event files in the run directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class TensorBoard:
    """Event files in the run directory, under ``tensorboard/``."""

    package = "tensorboard"

    def __init__(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._open = SummaryWriter

    def start(self, path: Path, config: Mapping[str, Any], step: int) -> None:
        """Open an event file; what an earlier one says of `step` and later rounds is hidden."""
        self._writer = self._open(str(path / "tensorboard"), purge_step=step or None, flush_secs=2)
        # As a block of code in Markdown.
        lines = json.dumps(config, indent=2, sort_keys=True).splitlines()
        self._writer.add_text("config", "\n".join(f"    {line}" for line in lines), step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write a scalar for each figure."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, succeeded: bool) -> None:
        """Write out what is left."""
        self._writer.close()


make = TensorBoard
