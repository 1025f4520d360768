"""Starting Flower's Ray engine on this machine, and ending it for certain."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

# Flower and Ray read these when they are imported.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
import torch
from flwr.app import Context
from flwr.server.superlink.fleet.vce.backend import raybackend
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from flwr.simulation.ray_transport.ray_actor import BasicActorPool
from ray._private import worker as ray_worker

from fedsim.core.allocator import keep_freed_memory
from fedsim.core.config import RunConfig
from fedsim.core.errors import ConfigError, FedsimError, RunFailedError
from fedsim.core.models import resolve_device
from fedsim.core.plan import RunPlan
from fedsim.flower.client_app import app as client_app
from fedsim.flower.rounds import RunObserver
from fedsim.flower.server_app import execute
from fedsim.recording.writer import mark_failed

_RETRIES = 2
_PATIENCE = 10.0
"""Seconds that the server's thread has to notice a stop."""


class _KillablePool(BasicActorPool):
    """Flower's pool of workers, but for its end: workers are killed, busy or not.

    Flower asks idle workers to leave by a method call, which Ray takes for a crash and, because
    our workers may be restarted, announces to repeat; busy ones it waits for.
    """

    _latest: ClassVar[_KillablePool | None] = None

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._everyone: list[Any] = []
        _KillablePool._latest = self

    def add_actors_to_pool(self, num_actors: int) -> None:
        """Start workers and remember them."""
        super().add_actors_to_pool(num_actors)
        self._everyone.extend(self.pool[-num_actors:])

    def terminate_all_actors(self) -> None:
        """Kill the workers."""
        for actor in self._everyone:
            ray.kill(actor, no_restart=True)
        self._everyone.clear()

    @classmethod
    def kill_latest(cls) -> None:
        """Kill the workers of the pool made last, if there is one."""
        if cls._latest is not None:
            cls._latest.terminate_all_actors()


@dataclass(frozen=True, kw_only=True)
class WorkerPool:
    """What is asked of Ray.

    Parameters
    ----------
    workers : int
        Processes that train at the same time.
    cpus : int
        CPU cores, and torch threads, of each.
    gpus : float
        Share of a GPU, or whole GPUs, of each.
    """

    workers: int
    cpus: int
    gpus: float


def size_pool(config: RunConfig, *, machine_cpus: int, machine_gpus: int) -> WorkerPool:
    """Fit the workers to the machine.

    Parameters
    ----------
    config : RunConfig
        ``workers``, ``client-cpus`` and ``client-gpus``; what is unset is chosen: as many
        workers as there are cores and participants, sharing the GPUs equally.
    machine_cpus, machine_gpus : int
        What this machine has.

    Returns
    -------
    WorkerPool

    Raises
    ------
    ConfigError
        When the machine does not have what is asked for.
    """
    if config.client_cpus > machine_cpus:
        raise ConfigError(
            "client-cpus", config.client_cpus, f"1 to the {machine_cpus} CPU cores of this machine"
        )
    if config.client_gpus == 0 and machine_gpus:
        raise ConfigError(
            "client-gpus", 0, "a share above 0, or any with device = 'cpu': training runs on GPUs"
        )
    if config.client_gpus and config.client_gpus > machine_gpus:
        has = f"at most {machine_gpus}, the GPUs here" if machine_gpus else "0: no GPU is here"
        raise ConfigError("client-gpus", config.client_gpus, has)
    # Flower hands out work from min(32, cores + 4) threads; more workers would idle.
    most = min(32, machine_cpus + 4)
    if config.workers is not None and config.workers > most:
        raise ConfigError("workers", config.workers, f"1 to {most} on this machine")
    participants = max(config.num_participants(r) for r in range(1, config.rounds + 1))
    fitting = min(machine_cpus // config.client_cpus, participants, most)
    if config.client_gpus:
        slots = _gpu_slots(machine_gpus, config.client_gpus)
        if config.workers is not None and config.workers > slots:
            raise ConfigError(
                "workers", config.workers, f"1 to {slots} with client-gpus = {config.client_gpus}"
            )
        fitting = min(fitting, slots)
    workers = config.workers or max(1, fitting)
    gpus = config.client_gpus
    if gpus is None:
        gpus = _equal_share(machine_gpus, workers)
    return WorkerPool(workers=workers, cpus=config.client_cpus, gpus=gpus)


def _gpu_slots(machine_gpus: int, share: float) -> int:
    # A fraction lives on one GPU: two workers of 0.6 do not fit on one.
    return machine_gpus * int(1 / share + 1e-9) if share <= 1 else int(machine_gpus // share)


def _equal_share(machine_gpus: int, workers: int) -> float:
    if machine_gpus == 0:
        return 0.0
    per_gpu = -(-workers // machine_gpus)
    return int(10_000 / per_gpu) / 10_000


def machine_gpus(config: RunConfig) -> int:
    """Count the GPUs that the run's device can use."""
    return torch.cuda.device_count() if resolve_device(config.device).type == "cuda" else 0


def simulate(
    plan: RunPlan,
    output: Path,
    pool: WorkerPool,
    *,
    observer: RunObserver,
    stop: threading.Event,
    verbose: bool = False,
    ray_gpus: int | None = None,
    resume: bool = False,
) -> None:
    """Run a plan on a private Ray engine on this machine.

    Parameters
    ----------
    plan : RunPlan
        What to run.
    output : Path
        The run directory to make.
    pool : WorkerPool
        From `size_pool`.
    observer : RunObserver
        Who watches; called from the server's thread.
    stop : threading.Event
        Set it to end the run early.
    verbose : bool
        Let Flower and Ray log.
    ray_gpus : int, optional
        GPUs that Ray is told of; by default as many as the pool uses. A machine without a GPU
        can be told of some to test how fractions are scheduled.
    resume : bool
        Continue the run directory instead of making it.

    Raises
    ------
    FedsimError
        What ended the run early.
    """
    _quieten(verbose)
    keep_freed_memory()
    outcome: list[BaseException | None] = []
    ended = threading.Event()
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            execute(
                grid,
                plan,
                output,
                observer=observer,
                workers=pool.workers,
                stop=stop,
                resume=resume,
            )
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)
            # Workers may be minutes from the end of clients that nobody waits for now.
            _KillablePool.kill_latest()
        finally:
            ended.set()

    # Flower has no hook for its pool: its engine finds this class under the name it imported.
    setattr(raybackend, "BasicActorPool", _KillablePool)  # noqa: B010
    scratch = tempfile.mkdtemp(prefix="fedsim-")
    try:
        run_simulation(
            server_app=server_app,
            client_app=client_app,
            num_supernodes=plan.config.clients,
            backend_config=_backend(pool, scratch, verbose=verbose, ray_gpus=ray_gpus),
            verbose_logging=verbose,
        )
    except Exception as error:
        # The engine could not start: the server's thread still waits for clients.
        if not outcome:
            stop.set()
            ended.wait(_PATIENCE)
            cause = f"Flower's Ray engine could not run: {_root_of(error)}"
            mark_failed(output, cause)
            raise RunFailedError(cause) from error
    finally:
        stop.set()
        ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)
    if not outcome:
        raise RunFailedError("Flower's Ray engine ended before the run did")
    if (failure := outcome[0]) is not None:
        if isinstance(failure, FedsimError):
            raise failure
        raise RunFailedError(f"{type(failure).__name__}: {failure}") from failure


def _root_of(error: BaseException) -> BaseException:
    # Flower wraps what went wrong in "An error was encountered", twice.
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _backend(
    pool: WorkerPool, scratch: str, *, verbose: bool, ray_gpus: int | None
) -> dict[str, Any]:
    if ray_gpus is None:
        ray_gpus = torch.cuda.device_count() if pool.gpus else 0
    return {
        "client_resources": {
            "num_cpus": pool.cpus,
            "num_gpus": pool.gpus,
            # A worker that dies is started again and its client retried; without these Flower
            # puts the dead worker back into its pool, where it swallows the clients to come.
            "max_restarts": -1,
            "max_task_retries": _RETRIES,
        },
        "init_args": {
            # A cluster of our own: Ray otherwise joins any that it finds.
            "address": "local",
            "num_cpus": pool.workers * pool.cpus,
            "num_gpus": ray_gpus,
            "_temp_dir": scratch,
            "log_to_driver": verbose,
            "logging_level": "INFO" if verbose else "ERROR",
        },
    }


def _quieten(verbose: bool) -> None:
    # Flower logs every error that it also reports in a reply; the observer tells those.
    logging.getLogger("flwr").setLevel(logging.DEBUG if verbose else logging.CRITICAL + 1)
    if not verbose:
        # Ray announces retries and deaths of workers on stdout, whatever it is told to log.
        setattr(ray_worker, "print_to_stdstream", lambda *_, **__: None)  # noqa: B010
