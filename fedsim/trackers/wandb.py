"""Weights & Biases: a run of a project."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsim.core.errors import InputError
from fedsim.tracking import PROJECT, run_id_of


class WeightsAndBiases:
    """A run in the project ``fedsim`` (or ``WANDBPROJECT``), grouped by the folder above it."""

    package = "wandb"

    def __init__(self) -> None:
        import wandb

        self._wandb = wandb
        # Its service must not count among the processes of the engine, which end with that.
        settings = self._wandb.setup().settings
        if settings.mode not in ("offline", "disabled") and not self._wandb.login(
            prompt=False, verify=False
        ):
            raise InputError(
                "tracker = 'wandb' has no key; run `wandb login` first, or set WANDB_MODE=offline"
            )

    def start(self, path: Path, config: Mapping[str, Any], step: int) -> None:
        """Begin the run, or take up the one of this run directory."""
        self._run = self._wandb.init(
            project=os.environ.get("WANDBPROJECT", PROJECT),
            name=path.name,
            group=path.absolute().parent.name,
            id=run_id_of(path),
            resume="allow" if step else None,
            config=dict(config),
            dir=str(path),
            # Our own output is not theirs to capture.
            settings=self._wandb.Settings(console="off"),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log all figures as one row."""
        self._run.log(dict(values), step=step)

    def finish(self, succeeded: bool) -> None:
        """Upload what is left."""
        self._run.finish(exit_code=0 if succeeded else 1)


make = WeightsAndBiases
