"""MLflow: a run of an experiment at its tracking URI."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsim.tracking import PROJECT, run_id_of


class MLflow:
    """A run in the experiment ``fedsim`` (or ``MLFLOW_EXPERIMENT_NAME``) at the tracking URI."""

    package = "mlflow-skinny"

    def __init__(self) -> None:
        import mlflow

        self._mlflow = mlflow

    def start(self, path: Path, config: Mapping[str, Any], step: int) -> None:
        """Find the run of this run directory, or create it with the configuration as parameters."""
        self._client = self._mlflow.MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        number = (
            self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        )
        tag = run_id_of(path)
        found = self._client.search_runs([number], f"tags.fedsim_id = '{tag}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        tags = {"fedsim_id": tag, "fedsim_path": str(path.absolute())}
        self._id = self._client.create_run(number, tags=tags, run_name=path.name).info.run_id
        entities = self._mlflow.entities
        # MLflow takes up to 6000 characters of a parameter.
        params = [entities.Param(key, str(value)[:6000]) for key, value in config.items()]
        self._client.log_batch(self._id, params=params)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log all figures in one request."""
        now = int(time.time() * 1000)
        entities = self._mlflow.entities
        metrics = [entities.Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def finish(self, succeeded: bool) -> None:
        """Set the status."""
        self._client.set_terminated(self._id, "FINISHED" if succeeded else "FAILED")


make = MLflow
