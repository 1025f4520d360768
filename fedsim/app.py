"""What ``flwr run`` loads: the server's app with its lines on the terminal."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsim.core.allowance import usable_cpus
from fedsim.core.config import RunConfig
from fedsim.core.errors import ConfigError
from fedsim.core.plan import RunPlan
from fedsim.flower.run_config import check_paths, config_from_run_config
from fedsim.flower.server_app import check_output, check_resume, default_output, execute
from fedsim.recording.reader import load_run
from fedsim.recording.recovery import Recovery, check_continuable
from fedsim.terminal import TerminalObserver

server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run what ``flwr run --run-config`` describes, or go on with the run that ``resume`` names.

    An error fails the run in Flower too.
    """
    # The terminal is ours; Flower's strategies print every round, and warn of what we do.
    logging.getLogger("flwr").setLevel(logging.ERROR)
    if resumed := context.run_config.get("resume"):
        plan, output, recovery = _resumed(Path(str(resumed)), context)
    else:
        plan = RunPlan.prepare(_checked(config_from_run_config(context.run_config)))
        named = plan.config.output
        output, recovery = Path(named) if named else Path.cwd() / default_output(), None
        check_output(output, plan)
    config = plan.config
    observer = TerminalObserver()
    # Flower sizes the workers here; this bounds the messages under way, and so our memory.
    workers = config.workers or min(config.num_participants(1), usable_cpus())
    try:
        execute(
            grid,
            plan,
            output,
            observer=observer,
            workers=workers,
            stop=threading.Event(),
            recovery=recovery,
        )
    finally:
        observer.close()


def _resumed(path: Path, context: Context) -> tuple[RunPlan, Path, Recovery]:
    check_paths(context.run_config)
    run = load_run(path)
    check_continuable(run)
    # Nothing is downloaded to where a run from elsewhere says that its data was.
    plan = RunPlan.prepare(
        _checked(config_from_run_config(context.run_config, run.config.to_mapping())),
        download=bool(context.run_config.get("data-root")),
    )
    return plan, path, check_resume(run, plan)


def _checked(config: RunConfig) -> RunConfig:
    if config.cluster is not None:
        raise ConfigError(
            "ray-address", config.ray_address, "'local' with `flwr run`, which places the clients"
        )
    return config
