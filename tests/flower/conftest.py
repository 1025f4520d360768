import threading

import pytest

from fedsim.core.config import RunConfig
from fedsim.core.plan import RunPlan
from fedsim.flower.client_app import app
from fedsim.flower.server_app import execute
from fedsim.recording.reader import load_run
from tests.local_grid import LocalGrid
from tests.observers import Memory

SMALL = {
    "dataset": "synthetic:240:10",
    "model": "cnn",
    "clients": 6,
    "clients-per-round": 3,
    "rounds": 2,
    "batch-size": 16,
    "capture": "all",
    "device": "cpu",
}


@pytest.fixture
def run_locally(tmp_path):
    """Run a configuration over the in-process grid and open its record."""

    def run(
        name="run",
        *,
        workers=2,
        newest_first=False,
        before=None,
        observer=None,
        node_config=None,
        **values,
    ):
        keys = {key.replace("_", "-"): value for key, value in values.items()}
        plan = RunPlan.prepare(RunConfig.from_mapping({**SMALL, **keys}))
        grid = LocalGrid(
            app,
            plan.config.clients,
            newest_first=newest_first,
            before=before,
            recordings=tmp_path,
            node_config=node_config,
        )
        execute(
            grid,
            plan,
            tmp_path / name,
            observer=observer or Memory(),
            workers=workers,
            stop=threading.Event(),
        )
        run.most_waiting = grid.most_waiting
        return load_run(tmp_path / name)

    return run
