"""What ``flwr run`` loads: the server's app with its lines on the terminal."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsim.core.errors import ConfigError
from fedsim.core.plan import RunPlan
from fedsim.flower.run_config import config_from_run_config
from fedsim.flower.server_app import check_output, default_output, execute
from fedsim.report.terminal import TerminalObserver

server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run what ``flwr run --run-config`` describes; an error fails the run in Flower too."""
    config = config_from_run_config(context.run_config)
    if config.cluster is not None:
        raise ConfigError(
            "ray-address", config.ray_address, "'local' with `flwr run`, which places the clients"
        )
    plan = RunPlan.prepare(config)
    output = Path(config.output) if config.output else Path.cwd() / default_output()
    check_output(output, plan)
    observer = TerminalObserver()
    # Flower sizes the workers here; this bounds the messages under way, and so our memory.
    workers = config.workers or min(config.num_participants(1), os.cpu_count() or 1)
    try:
        execute(grid, plan, output, observer=observer, workers=workers, stop=threading.Event())
    finally:
        observer.close()
