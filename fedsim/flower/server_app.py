"""The server's app: a run directory around the round loop."""

from __future__ import annotations

import contextlib
import datetime
import math
import shutil
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from flwr.serverapp import Grid

from fedsim.core import registry
from fedsim.core.behavior import check_clients
from fedsim.core.config import RunConfig
from fedsim.core.determinism import use_deterministic
from fedsim.core.device import resolve_device
from fedsim.core.errors import ConfigError, DiskFullError, DivergedError, InputError
from fedsim.core.plan import RunPlan
from fedsim.core.plugins import provider
from fedsim.core.task import describe
from fedsim.core.units import format_bytes
from fedsim.flower.inventory import ask_data
from fedsim.flower.machine import device_of, versions
from fedsim.flower.membership import KnownMembership, KnowsPartitions
from fedsim.flower.preflight import check_can_be_made, check_can_be_written
from fedsim.flower.rounds import RoundLoop, RunObserver
from fedsim.recording.files import DISK_FULL, read_lines
from fedsim.recording.layout import format_of
from fedsim.recording.places import dated_name
from fedsim.recording.reader import Run, load_run
from fedsim.recording.recovery import Recovery, find_recovery
from fedsim.recording.writer import RunWriter, is_being_written
from strategies.build import build_strategy, check_strategy


class Mirror(Protocol):
    """Keeps a copy of a run at a URL; a plugin provides it as ``mirror``."""

    def check_new(self, url: str, root: Path) -> None:
        """Refuse a URL for a run directory that is yet to be made, with `ConfigError`."""

    def check_same(self, url: str, root: Path) -> None:
        """Refuse a URL that holds another run than the directory does, with `ConfigError`."""

    def kept(
        self, url: str, root: Path, *, tell: Callable[[str], None], stop: threading.Event
    ) -> AbstractContextManager[Callable[[], None]]:
        """Keep the copy up to date; yields what is called when the run has something new."""


def _mirror() -> Mirror:
    mirror: Mirror = provider("mirror", "mirror")
    return mirror


def default_output() -> Path:
    """Name a run directory as no other is named, by the present time, under ``runs/``."""
    return Path("runs") / dated_name()


def check_output(path: Path, plan: RunPlan) -> None:
    """Refuse a directory that exists, a strategy that cannot be made, false data, and no room.

    Raises
    ------
    InputError
        Naming the folder or the budget, both numbers and the smallest change that would fit.
    """
    check_strategy(plan.config)
    check_clients(plan.config)
    plan.dataset.check_official()
    try:
        path.lstat()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise InputError(f"output = {str(path)!r} cannot be made: {error.strerror}") from None
    else:
        raise InputError(
            f"output = {str(path)!r} exists already; expected a new folder, since a "
            "run is never overwritten"
        )
    check_can_be_made(path)
    # What clients with data of their own will write is not known before they have been asked.
    if not plan.config.own_data:
        _check_room(path, plan)
    if plan.config.mirror:
        _mirror().check_new(plan.config.mirror, path)


def _check_room(path: Path, plan: RunPlan) -> None:
    plan.check_budget()
    needed, free = plan.run_bytes, free_bytes(path)
    if needed > free:
        change = plan.fitting_change(free - (needed - plan.captured_bytes()))
        raise InputError(
            f"output = {str(path)!r} needs {format_bytes(needed)} and its disk has "
            f"{format_bytes(free)} free; "
            + (f"{change} would fit" if change else "its states and deltas alone do not fit")
        )


MAY_CHANGE = (
    "rounds",
    "workers",
    "ray-address",
    "data-root",
    "max-failures",
    "client-timeout",
    "node-timeout",
    "allow-divergence",
    "capture-budget",
    "output",
    "mirror",
)
"""Keys whose values may change when a run is resumed: none of them affects a round."""


def check_resume(run: Run, plan: RunPlan, *, allow_changed_code: bool = False) -> Recovery:
    """Refuse to continue a run that is complete, or with anything that would change its rounds.

    Parameters
    ----------
    run : Run
        The run.
    plan : RunPlan
        The plan to go on with.
    allow_changed_code : bool
        Go on although the source of the user's own code has changed.

    Returns
    -------
    Recovery
        The round to continue after.

    Raises
    ------
    InputError
        Naming the key, the file or the disk.
    """
    recorded, asked = run.config.to_mapping(), plan.config.to_mapping()
    for key, value in asked.items():
        if value != recorded[key] and key not in MAY_CHANGE:
            raise ConfigError(key, value, f"{recorded[key]!r}, with which the run was recorded")
    check_strategy(plan.config)
    check_clients(plan.config)
    plan.dataset.check_official()
    if plan.dataset.fingerprint != run.entry("dataset")["sha256"]:
        raise ConfigError("dataset", plan.config.dataset, "the data of the run: hashes differ")
    if not plan.config.own_data and plan.partition_sha256 != run.entry("partition")["sha256"]:
        raise InputError(f"{run.path} has another partition than follows from its configuration")
    check_can_be_written(run.path)
    if is_being_written(run.path):
        raise InputError(f"{run.path} is being written by another process; wait until that ends")
    recovery = find_recovery(run.path)
    last = recovery.round
    if not allow_changed_code:
        _check_code(run, plan.config, last)
    # One that was killed before it could say that it is finished has that left to do.
    ended = run.status == "finished" or last > plan.config.rounds
    if last >= plan.config.rounds and ended:
        raise ConfigError(
            "rounds", plan.config.rounds, f"{last + 1} or more: the rounds before exist"
        )
    if last == plan.config.rounds and not _is_evaluated(run, last):
        allowed = f"{last + 1} or more: round {last} was not evaluated (evaluate-every = "
        raise ConfigError("rounds", last, f"{allowed}{plan.config.evaluate_every})")
    if not plan.config.own_data:
        _check_room_left(run, plan, last)
    if plan.config.mirror:
        _mirror().check_same(plan.config.mirror, run.path)
    return recovery


def _check_code(run: Run, config: RunConfig, last: int) -> None:
    """Refuse code of the user's whose source is not the one that made the run's last round."""
    recorded = run.code_of(last)
    for name, found in registry.sources(config.all_code).items():
        if (told := recorded.get(name, found)) != found:
            raise InputError(
                f"{name} has changed since {run.path} was recorded: its source has sha256 "
                f"{found[:16]}..., not {told[:16]}...; bring that source back, or "
                "`--allow-changed-code` of `fedsim resume` goes on with the changed one"
            )


def _check_room_left(run: Run, plan: RunPlan, last: int) -> None:
    plan.check_budget()
    needed = plan.bytes_after(last)
    if needed > (free := free_bytes(run.path)):
        raise InputError(
            f"{run.path} needs {format_bytes(needed)} more and its disk has {format_bytes(free)} "
            "free; use fewer rounds, or make room"
        )


def _is_evaluated(run: Run, number: int) -> bool:
    # Rows beyond the whole rounds may be anything.
    row = next(row for row in read_lines(run.layout.rounds) if row["round"] == number)
    return row["global_accuracy"] is not None


def may_vary(config: RunConfig) -> bool:
    """Say whether two runs of the configuration on this machine may differ in their last bits."""
    return resolve_device(config.device).type != "cpu" and not config.deterministic


def free_bytes(path: Path) -> int:
    """Count the free bytes of the disk on which `path` is or would be."""
    parent = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    return shutil.disk_usage(parent).free


def execute(
    grid: Grid,
    plan: RunPlan,
    output: Path,
    *,
    observer: RunObserver,
    workers: int,
    stop: threading.Event,
    recovery: Recovery | None = None,
    on_open: Callable[[], None] = lambda: None,
    is_announced: bool = False,
    stop_after_round: threading.Event | None = None,
) -> None:
    """Run a plan over a grid into a run directory, and leave its true status there.

    Parameters
    ----------
    grid : Grid
        How to reach the clients.
    plan : RunPlan
        What to run.
    output : Path
        The run directory to make.
    observer : RunObserver
        Who watches.
    workers : int
        Clients that train at the same time.
    stop : threading.Event
        Set to end the run.
    recovery : Recovery, optional
        Continue the run directory after that round instead.
    on_open : callable
        Called once this process has made or reopened the run directory, before anything else.
    is_announced : bool
        Whether the observer knows already what will be run.
    stop_after_round : threading.Event, optional
        Set to end the run once the round under way is written.

    Raises
    ------
    FedsimError
        As `RunWriter.create` and `RoundLoop.run`, or `DiskFullError`; the run directory then
        says ``failed``.
    """
    if recovery is not None:
        plan = replace(plan, done=recovery.round)
    if plan.config.own_data:
        plan = ask_data(grid, plan, window=2 * workers, stop=stop, tell=observer.warned)
    if recovery is not None:
        if plan.nodes and plan.nodes != load_run(output).entry("partition").get("nodes"):
            raise InputError(f"{output} was recorded with other data at the nodes")
        if isinstance(grid, KnowsPartitions):
            # Without an engine to go on with, the run stays what it is.
            clients = plan.config.clients
            KnownMembership(grid, grid, clients=clients, stop=stop).wait_for_all(math.inf)
        writer = RunWriter.reopen(
            output,
            plan.config.to_mapping(),
            plan.partition,
            recovery,
            versions(),
            device_of(plan),
            registry.sources(plan.config.all_code),
        )
    else:
        writer = RunWriter.create(output, manifest_of(plan), plan.partition)
    on_open()
    # The copy is told of the end, too: it ends last.
    with contextlib.ExitStack() as copying:
        try:
            if plan.config.deterministic:
                use_deterministic(True)
            if plan.config.mirror:
                kept = _mirror().kept(plan.config.mirror, output, tell=observer.warned, stop=stop)
                writer.on_change = copying.enter_context(kept)
            writer.on_change()
            if not is_announced:
                observer.run_started(plan, workers, output)
            if may_vary(plan.config):
                observer.warned(
                    "deterministic = false on a GPU: the run will not repeat to the bit, and "
                    "`fedsim verify` can compute its steps again within a tolerance only"
                )
            loop = RoundLoop(
                plan,
                grid=grid,
                strategy=build_strategy(plan.config, plan.parameters, writer),
                writer=writer,
                observer=observer,
                workers=workers,
                stop=stop,
                stop_after_round=stop_after_round,
            )
            loop.run(after=None if recovery is None or recovery.round < 0 else recovery.round)
        except BaseException as error:
            failure = error
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                failure = DiskFullError(f"the disk of {output} is full: {error}")
            # A round without a row is nothing; and where the disk is full, this makes room for the
            # word that the run failed.
            with contextlib.suppress(Exception):
                writer.drop_unfinished_round()
            # The user must hear what ended the run, not that this cannot be written, or what
            # another program made of the files meanwhile.
            with contextlib.suppress(Exception):
                writer.finish(
                    "failed",
                    str(failure) or type(failure).__name__,
                    diverged=isinstance(failure, DivergedError),
                )
            raise failure from None if failure is error else error
        else:
            writer.finish("finished")
            observer.run_finished(output)
        finally:
            writer.close()


def manifest_of(plan: RunPlan) -> dict[str, Any]:
    """Describe a run for ``run.json``: everything but its status."""
    data = plan.dataset
    rounds = range(1, plan.config.rounds + 1)
    buffers = {n: a for n, a in plan.initial_state.items() if n not in plan.parameters}
    return {
        "format": format_of(max(map(plan.config.num_participants, rounds))),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": plan.config.to_mapping(),
        "seed": plan.config.seed,
        "versions": versions(),
        "device": device_of(plan),
        "model": {
            "arch": plan.config.arch,
            "parameters": [
                {"name": n, "shape": list(s), "dtype": "float32"}
                for n, s in plan.parameters.items()
            ],
            "buffers": [
                {"name": n, "shape": list(a.shape), "dtype": a.dtype.name}
                for n, a in buffers.items()
            ],
        },
        "dataset": {**describe(data.spec), "sha256": data.fingerprint},
        "partition": {
            "sha256": plan.partition_sha256,
            "sizes": plan.sizes,
            **({"nodes": plan.nodes} if plan.nodes else {}),
        },
        **({"code": registry.sources(named)} if (named := plan.config.all_code) else {}),
    }
