"""Starting Ray with Flower's actors, here or on a cluster, and ending it for certain."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

# Flower and Ray read these when they are imported.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import psutil
import ray
import torch

from fedsim.core import registry
from fedsim.core.allocator import keep_freed_memory
from fedsim.core.allowance import usable_cpus, usable_memory
from fedsim.core.config import RunConfig
from fedsim.core.device import resolve_device
from fedsim.core.errors import ConfigError, FedsimError, RunFailedError, RunInterruptedError
from fedsim.core.plan import RunPlan
from fedsim.core.plugins import provider
from fedsim.flower.actor import Duty
from fedsim.flower.client_app import app as client_app
from fedsim.flower.engine import RayGrid
from fedsim.flower.patches import reclaim_sigterm, server_identity, silent_workers
from fedsim.flower.preflight import check_machine
from fedsim.flower.rounds import RunObserver
from fedsim.flower.scratch import Scratch
from fedsim.flower.server_app import execute
from fedsim.flower.workers import Workers
from fedsim.recording.recovery import Recovery
from fedsim.recording.writer import mark_failed

_POLL, _PATIENCE, _TEARDOWN, _START = 0.5, 10.0, 60.0, 600.0
"""Seconds between looks at Ray's processes, to notice a stop, to end the engine and to start it."""
_WORKER_BYTES, _AMPLE = 2**30, 2**62
"""What a worker takes that trains a small model (0.7 GB and what it reads), and no bound at all."""
_ENGINE = ("gcs_server", "raylet")
"""Names of the processes that Ray cannot do without."""


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


class Cluster(Protocol):
    """Places workers on the nodes of a Ray cluster; a plugin provides it as ``cluster``."""

    def fit_pool(self, config: RunConfig) -> WorkerPool:
        """Fit the workers to what the cluster at ``ray-address`` has free."""

    def joined(
        self, plan: RunPlan, output: Path, pool: WorkerPool, *, verbose: bool
    ) -> AbstractContextManager[tuple[Duty, Callable[[], str | None]]]:
        """Join the cluster and check its nodes for a run.

        Gives the duty of the workers, and a function that says what has died that they need.
        """


def _cluster() -> Cluster:
    cluster: Cluster = provider("cluster", "ray-address")
    return cluster


def size_pool(
    config: RunConfig, *, cpus: int, machine_gpus: int, memory: int = _AMPLE
) -> WorkerPool:
    """Fit the workers to what this process may use of the machine.

    Parameters
    ----------
    config : RunConfig
        ``workers``, ``client-cpus`` and ``client-gpus``; what is unset is chosen: as many
        workers as there are cores, participants and memory for, sharing the GPUs equally.
    cpus, memory : int
        CPU cores and bytes that this process may use.
    machine_gpus : int
        GPUs of this machine.

    Returns
    -------
    WorkerPool

    Raises
    ------
    ConfigError
        When the machine does not have what is asked for.
    """
    if config.own_data:
        raise ConfigError(
            "partition",
            config.partition,
            "a split of the dataset: data of their own is for clients on nodes of their own",
        )
    if config.client_cpus > cpus:
        raise ConfigError(
            "client-cpus", config.client_cpus, f"1 to {cpus}, the CPU cores that may be used here"
        )
    if config.client_gpus == 0 and machine_gpus:
        raise ConfigError(
            "client-gpus", 0, "a share above 0, or any with device = 'cpu': training runs on GPUs"
        )
    if config.client_gpus and config.client_gpus > machine_gpus:
        has = f"at most {machine_gpus}, the GPUs here" if machine_gpus else "0: no GPU is here"
        raise ConfigError("client-gpus", config.client_gpus, has)
    # More only take turns: some are enough to keep every core busy while others write.
    most = cpus + 4
    if config.workers is not None and config.workers > most:
        cores = "1 CPU core" if cpus == 1 else f"{cpus} CPU cores"
        raise ConfigError("workers", config.workers, f"1 to {most} with the {cores} for use here")
    # The server needs memory as well.
    room = memory // _WORKER_BYTES - 1
    fitting = min(cpus // config.client_cpus, most_participants(config), room)
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


def fit_pool(config: RunConfig) -> WorkerPool:
    """Fit the workers to where the run will be: this machine, or the cluster at ``ray-address``.

    Raises
    ------
    ConfigError
        As `size_pool`, or when there is no such cluster, or it has no room.
    """
    if config.cluster is None:
        pool = size_pool(
            config,
            cpus=usable_cpus(),
            machine_gpus=machine_gpus(config),
            memory=usable_memory(),
        )
        check_machine(pool.workers)
        return pool
    return _cluster().fit_pool(config)


def most_participants(config: RunConfig) -> int:
    """Count the clients of the largest round."""
    return max(config.num_participants(r) for r in range(1, config.rounds + 1))


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
    recovery: Recovery | None = None,
    stop_after_round: threading.Event | None = None,
) -> None:
    """Run a plan on a private Ray engine on this machine, or on the cluster at ``ray-address``.

    Parameters
    ----------
    plan : RunPlan
        What to run.
    output : Path
        The run directory to make.
    pool : WorkerPool
        From `fit_pool`.
    observer : RunObserver
        Who watches; called from the server's thread.
    stop : threading.Event
        Set it to end the run early.
    verbose : bool
        Let Flower and Ray log.
    ray_gpus : int, optional
        GPUs that Ray is told of; by default as many as the pool uses. A machine without a GPU
        can be told of some to test how fractions are scheduled.
    recovery : Recovery, optional
        Continue the run directory after that round instead of making it.
    stop_after_round : threading.Event, optional
        Set it to end the run once the round under way is written.

    Raises
    ------
    FedsimError
        What ended the run early.
    """
    keep_freed_memory()
    if recovery is not None:
        plan = replace(plan, done=recovery.round)
    # The engine takes some seconds to start.
    observer.run_started(plan, pool.workers, output)
    opened = threading.Event()
    resources = {"num_cpus": pool.cpus, "num_gpus": pool.gpus}
    with contextlib.ExitStack() as stack:
        stack.enter_context(server_identity())
        if not verbose:
            stack.enter_context(_quiet())
        start: Callable[[], Any] = lambda: None  # noqa: E731
        broken: Callable[[], str | None]
        if plan.config.cluster is None:
            scratch = stack.enter_context(Scratch())
            stack.enter_context(_environment(node_environment(plan.config, output)))
            settings = _ray_settings(pool, str(scratch.short), verbose=verbose, ray_gpus=ray_gpus)
            start = partial(ray.init, **settings)
            broken = _OwnProcesses().broken
            duty = Duty()
        else:
            joined = _cluster().joined(plan, output, pool, verbose=verbose)
            duty, broken = stack.enter_context(joined)

        def engage() -> RayGrid:
            start()
            workers = Workers(
                client_app,
                resources,
                most=pool.workers,
                client_timeout=plan.config.client_timeout,
                duty=duty,
            )
            return RayGrid(workers, plan.config.clients)

        def serve(grid: RayGrid) -> None:
            execute(
                grid,
                plan,
                output,
                observer=observer,
                workers=pool.workers,
                stop=stop,
                recovery=recovery,
                on_open=opened.set,
                is_announced=True,
                stop_after_round=stop_after_round,
            )

        failure = _Engine(engage, broken).run(serve, stop)
    if isinstance(failure, EngineError) and opened.is_set():
        # In place of what followed from it.
        mark_failed(output, str(failure))
    if isinstance(failure, FedsimError):
        raise failure
    if failure is not None:
        raise RunFailedError(f"{type(failure).__name__}: {failure}") from failure


def node_environment(config: RunConfig, output: Path) -> dict[str, str]:
    """Give what tells the processes of a run on this machine where data is and where to record.

    Only what starts a process says where it may write, never a message.
    """
    environment = {
        "FEDSIM_RECORDINGS": str(output.resolve().parent),
        "FEDSIM_CAPTURE": "true",
        registry.TRUSTED: ",".join(config.code),
        registry.EXPECTED: json.dumps(registry.sources(config.code)),
        # What this process can import, those that it starts can; an empty entry is this folder.
        "PYTHONPATH": os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path),
    }
    if config.data_root is not None:
        environment["FEDSIM_DATA_ROOT"] = str(Path(config.data_root).resolve())
    return environment


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, which processes started within inherit."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


class EngineError(RunFailedError):
    """What runs the clients did not start, or died."""


class _Engine:
    """Ray and its workers in a thread of their own, so that their death is nobody else's.

    Parameters
    ----------
    engage : callable
        Starts the engine and gives its grid.
    broken : callable
        Says what has died that Ray cannot do without; None as long as nothing has.
    """

    def __init__(self, engage: Callable[[], RayGrid], broken: Callable[[], str | None]) -> None:
        self._engage = engage
        self._broken = broken
        self._is_engaged = threading.Event()
        self._has_workers = threading.Event()
        self._ended = threading.Event()
        self._outcome: BaseException | None = None

    def run(self, server: Callable[[RayGrid], None], stop: threading.Event) -> BaseException | None:
        """Run a server's part to its end and give the error that it ended with."""
        thread = threading.Thread(target=self._serve, args=[server, stop], daemon=True)
        thread.start()
        has_reclaimed = threading.current_thread() is not threading.main_thread()
        while not self._ended.wait(_POLL):
            if self._is_engaged.is_set() and not has_reclaimed:
                reclaim_sigterm()
                has_reclaimed = True
            if cause := self._dead():
                # The server's thread still waits for clients.
                stop.set()
                self._ended.wait(_PATIENCE)
                return cause
            if stop.is_set() and not self._has_workers.is_set():
                # An engine that has not started by now may never do so; the janitor ends it.
                return RunInterruptedError("interrupted")
        if not isinstance(self._outcome, EngineError):
            thread.join(_TEARDOWN)
        if not thread.is_alive():
            ray.shutdown()
        return self._outcome

    def _serve(self, server: Callable[[RayGrid], None], stop: threading.Event) -> None:
        # Threads and processes started from here never see it: a batch system sends it to all.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        grid: RayGrid | None = None
        try:
            try:
                grid = self._engage()
                self._is_engaged.set()
            except Exception as error:
                raise EngineError(f"Flower's Ray engine could not run: {error}") from error
            # An engine that does not start leaves no run directory behind.
            grid.await_worker(stop, _START)
            self._has_workers.set()
            server(grid)
        except BaseException as error:
            self._outcome = self._dead() or error
        self._ended.set()
        if grid is not None and not isinstance(self._outcome, EngineError):
            # Workers may be minutes from the end of clients that nobody waits for now.
            grid.close()
            # Ray ends sooner in the thread that began it.
            ray.shutdown()

    def _dead(self) -> EngineError | None:
        """Say what has died that Ray cannot do without."""
        cause = self._broken()
        return None if cause is None else EngineError(cause)


class _OwnProcesses:
    """Watches the processes of an engine of our own."""

    def __init__(self) -> None:
        self._processes: dict[str, psutil.Process] = {}

    def broken(self) -> str | None:
        """Say which process has died that Ray cannot do without."""
        if len(self._processes) < len(_ENGINE):
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.Error):
                    if (name := child.name()) in _ENGINE:
                        self._processes[name] = child
        for name, process in self._processes.items():
            # Ray leaves the cluster before it ends the processes of its own accord.
            if not is_alive(process) and ray.is_initialized():
                return f"Ray's process {name} died, and with it the workers"
        return None


def is_alive(process: psutil.Process) -> bool:
    """Say whether a process still runs."""
    with contextlib.suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def _ray_settings(
    pool: WorkerPool, scratch: str, *, verbose: bool, ray_gpus: int | None
) -> dict[str, Any]:
    if ray_gpus is None:
        ray_gpus = torch.cuda.device_count() if pool.gpus else 0
    return {
        # A cluster of our own: Ray otherwise joins any that it finds.
        "address": "local",
        "num_cpus": pool.workers * pool.cpus,
        "num_gpus": ray_gpus,
        **_memory_for_ray(),
        "_temp_dir": scratch,
        "include_dashboard": False,
        # Its own 15 leaves workers a fiftieth of a core beside another busy process.
        "_system_config": {"worker_niceness": 0},
        "log_to_driver": verbose,
        "logging_level": "INFO" if verbose else "ERROR",
    }


def _memory_for_ray() -> dict[str, int]:
    """Divide what this process may use between Ray's object store and everything else."""
    memory = usable_memory()
    # Ray's own share. It reads the limit of the topmost group only, and refuses a store of more
    # than 10 GB where shared memory has no room for it.
    store = min(int(0.3 * memory), 200 * 10**9)
    with contextlib.suppress(OSError):
        store = min(store, max(int(0.95 * shutil.disk_usage("/dev/shm").free), 10**10))  # noqa: S108
    return {"object_store_memory": store, "_memory": memory - store}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("flwr")
    before = logger.level
    # Flower logs every error that it also reports in a reply; the observer tells those.
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with silent_workers():
            yield
    finally:
        logger.setLevel(before)
