"""Running a grid of configurations, one after another, so that it can be stopped at any moment.

Each cell is a run of its own in a folder of its own, made by `fedsim run` or continued by `fedsim
resume` in a process of its own: when one ends early, the others are not affected. What is left to
do is read from the folders alone, so a second call goes on where the first one stopped.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from fedsim.cell import start_cell
from fedsim.core.behavior import check_clients
from fedsim.core.config import RunConfig, flag_text
from fedsim.core.errors import ConfigError, InputError, RunInterruptedError
from fedsim.core.inputs import parse_json, read_text_bytes
from fedsim.core.plan import RunPlan
from fedsim.core.units import format_bytes
from fedsim.flower.server_app import MAY_CHANGE, check_resume, free_bytes
from fedsim.plugins.compare.cells import Cell
from fedsim.plugins.compare.tables import (
    CellFigures,
    cell_rows,
    figures_of,
    group_rows,
    to_csv,
)
from fedsim.recording.files import TEMPORARY, temporary, write_json
from fedsim.recording.places import dated_name
from fedsim.recording.reader import Run, load_run
from fedsim.recording.recovery import check_continuable
from fedsim.recording.runs import COMPARISON
from strategies.build import check_strategy

FORMAT = 1
_GRID, _LOCK, _CONFIGS, _LOGS = COMPARISON, "lock", "configs", "logs"
_POLL, _PATIENCE = 0.2, 60.0
"""Seconds between looks at a cell, and that one has to end after an interrupt."""


@dataclass(frozen=True)
class Work:
    """What is left to do for a cell.

    Parameters
    ----------
    cell : Cell
        Which one.
    path : Path
        Its run directory.
    action : str
        ``run`` it, ``resume`` it, or ``none``: it is finished, or diverged as it would again.
    rounds_done : int
        Whole rounds that it has, without round 0.
    needed_bytes : int
        What it will write.
    """

    cell: Cell
    path: Path
    action: Literal["run", "resume", "none"]
    rounds_done: int = 0
    needed_bytes: int = 0


class Launcher(Protocol):
    """Runs a cell."""

    def __call__(self, work: Work, stop: threading.Event, watch: Callable[[], None]) -> str:
        """Run or resume a cell to its end.

        Parameters
        ----------
        work : Work
            What to do.
        stop : threading.Event
            Set to end it early.
        watch : callable
            To be called now and then.

        Returns
        -------
        str
            Why it did not succeed; empty where it did.
        """


class GridObserver(Protocol):
    """Someone who watches a comparison."""

    def grid_started(self, cells: int, to_do: int, rounds: int, done: int, path: Path) -> None:
        """Tell how many cells and rounds there are, and how many cells are left and rounds done."""

    def cell_started(self, name: str, rounds: int, done: int) -> None:
        """Tell which cell comes now, how many rounds it will have and how many it has."""

    def round_finished(self, row: Mapping[str, Any]) -> None:
        """Tell the row of a round that the cell has just finished."""

    def cell_finished(self, figures: CellFigures) -> None:
        """Report the result of the cell."""


def default_output() -> Path:
    """Name a comparison as no other is named, by the present time, under ``runs/``."""
    return Path("runs") / f"compare-{dated_name()}"


def check_grid(output: Path, cells: Sequence[Cell]) -> None:
    """Refuse a folder that is not a comparison, or the comparison of another grid.

    Cells may be added; those that are there stay, with their configuration.

    Raises
    ------
    InputError
        Naming what differs.
    """
    if not os.path.lexists(output):
        return
    try:
        recorded = parse_json(read_text_bytes(output / _GRID))
        number = recorded["format"]
        known = {cell["name"]: (list(cell["values"]), cell["config"]) for cell in recorded["cells"]}
    except FileNotFoundError:
        if not _is_begun(output, (_LOCK,)):
            raise InputError(
                f"output = {str(output)!r} exists already and is not a comparison; expected "
                "a comparison or a new folder"
            ) from None
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or "it is not what was written"
        raise InputError(f"{output / _GRID} cannot be read: {reason}") from None
    if number != FORMAT:
        raise InputError(f"{output / _GRID} has format {number!r}; this version reads {FORMAT}")
    asked = {cell.name: cell for cell in cells}
    axes = list(cells[0].values)
    for name, (keys, config) in known.items():
        if keys != axes:
            raise InputError(
                f"output = {str(output)!r} compares by {', '.join(keys)}, not by "
                f"{', '.join(axes)}; expected the same keys"
            )
        if name not in asked:
            raise InputError(
                f"output = {str(output)!r} has a cell {name} that the grid lacks; expected "
                "the same grid, or one with more values"
            )
        _check_same(asked[name], config)


def _is_begun(folder: Path, names: Sequence[str]) -> bool:
    """Say whether a folder holds only what is there before its first whole file."""
    try:
        there = {entry.name for entry in os.scandir(folder)}
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from None
    return all(name in names or name.endswith(TEMPORARY) for name in there)


def _check_same(cell: Cell, recorded: Mapping[str, Any]) -> None:
    for key, value in cell.config.to_mapping().items():
        if key not in MAY_CHANGE and value != recorded.get(key):
            error = ConfigError(
                key, value, f"{recorded.get(key)!r}, with which the comparison was begun"
            )
            raise InputError(f"cell {cell.name}: {error}")


def find_work(
    output: Path, cells: Sequence[Cell], check_machine: Callable[[RunConfig], object]
) -> list[Work]:
    """Find what is left to do for every cell, and check all of it before any is started.

    Parameters
    ----------
    output : Path
        The folder of the comparison.
    cells : sequence of Cell
        The grid.
    check_machine : callable
        Raises an `InputError` for a configuration that this machine has not the cores or GPUs for.

    Raises
    ------
    InputError
        Naming the cell that cannot be run, or the room that all of them need.
    """
    works = []
    for cell in cells:
        try:
            works.append(_work_of(output / cell.name, cell, check_machine))
        except InputError as error:
            raise InputError(f"cell {cell.name}: {error}") from None
    needed, free = sum(work.needed_bytes for work in works), free_bytes(output)
    if needed > free:
        count = sum(work.action != "none" for work in works)
        raise InputError(
            f"output = {str(output)!r} needs {format_bytes(needed)} for {count} cells and its disk "
            f"has {format_bytes(free)} free; use fewer cells, fewer rounds or less capture"
        )
    return works


def _work_of(path: Path, cell: Cell, check_machine: Callable[[RunConfig], object]) -> Work:
    run = _run_at(path)
    if run is not None:
        _check_same(cell, run.config.to_mapping())
        last = run.round_rows[-1]["round"] if run.round_rows else 0
        if last > cell.config.rounds:
            raise ConfigError(
                "rounds", cell.config.rounds, f"{last} or more: the rounds before exist"
            )
        # The same configuration diverges at the same round again.
        settled = run.manifest.get("diverged", False) and not cell.config.allow_divergence
        whole = run.round_rows and last == cell.config.rounds
        # One that was killed before it could say that it is finished has that left to do.
        if settled or (whole and run.status == "finished"):
            return Work(cell, path, "none", last)
    check_machine(cell.config)
    plan = RunPlan.prepare(_own_config(cell))
    check_clients(plan.config)
    plan.check_budget()
    if run is None:
        check_strategy(plan.config)
        return Work(cell, path, "run", 0, plan.run_bytes)
    check_continuable(run)
    done = max(check_resume(run, plan).round, 0)
    return Work(cell, path, "resume", done, plan.bytes_after(done))


def _own_config(cell: Cell) -> RunConfig:
    """Give the configuration of a cell with a copy of its own."""
    mirror = cell.config.mirror
    own = f"{mirror.rstrip('/')}/{cell.name}" if mirror else mirror
    return cell.config.model_copy(update={"mirror": own})


def _run_at(path: Path) -> Run | None:
    """Open the run of a cell, or give None if it has not begun or was only begun."""
    if not os.path.lexists(path):
        return None
    if not os.path.lexists(path / "run.json") and _is_begun(path, (_LOCK, "checksums.jsonl")):
        return None
    return load_run(path)


@contextlib.contextmanager
def begun(output: Path, works: Sequence[Work]) -> Iterator[None]:
    """Make the folder of a comparison and keep every other process out of it.

    Raises
    ------
    InputError
        When the folder cannot be made, or another process compares in it.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = (output / _LOCK).open("ab")
    except OSError as error:
        raise InputError(f"output = {str(output)!r} cannot be made: {error.strerror}") from None
    with lock:
        try:
            # The kernel gives the lock of a dead process back, however it died.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"{output} is in use by another comparison; wait until that ends"
            ) from None
        cells = [
            {"name": w.cell.name, "values": w.cell.values, "config": w.cell.config.to_mapping()}
            for w in works
        ]
        write_json(output / _GRID, {"format": FORMAT, "cells": cells})
        yield


def compare(
    works: Sequence[Work],
    output: Path,
    *,
    target: float | None,
    stop: threading.Event,
    launch: Launcher,
    observer: GridObserver,
) -> dict[str, CellFigures]:
    """Do the work of every cell, and keep the table up to date after each.

    Parameters
    ----------
    works : sequence of Work
        From `find_work`.
    output : Path
        The folder of the comparison.
    target : float, optional
        An accuracy; the rounds to reach it are counted.
    stop : threading.Event
        Set to end it.
    launch : Launcher
        Runs a cell.
    observer : GridObserver
        Who watches.

    Returns
    -------
    dict of str to CellFigures
        By the name of the cell.

    Raises
    ------
    RunInterruptedError
        Once the stop event is set.
    """
    figures = {work.cell.name: _figures(work, target) for work in works}
    to_do = [work for work in works if work.action != "none"]
    rounds = sum(work.rounds_done for work in works)
    observer.grid_started(
        len(works),
        len(to_do),
        rounds + sum(work.cell.config.rounds - work.rounds_done for work in to_do),
        rounds,
        output,
    )
    for work in to_do:
        observer.cell_started(work.cell.name, work.cell.config.rounds, work.rounds_done)
        if work.action == "run":
            shutil.rmtree(work.path, ignore_errors=True)
        rows = _RowWatcher(work, observer)
        error = launch(work, stop, rows)
        rows()
        if stop.is_set():
            raise RunInterruptedError("interrupted")
        figures[work.cell.name] = _figures(work, target, error)
        observer.cell_finished(figures[work.cell.name])
        write_tables(output, works, figures, target=target)
    write_tables(output, works, figures, target=target)
    return figures


def _figures(work: Work, target: float | None, error: str = "") -> CellFigures:
    run = _run_at(work.path)
    if run is None:
        return CellFigures(status="failed" if error else "unfinished", error=error)
    return figures_of(run, rounds=work.cell.config.rounds, target=target, error=error)


class _RowWatcher:
    """Tells the rows that another process adds to a run, as they come."""

    def __init__(self, work: Work, observer: GridObserver) -> None:
        self._observer = observer
        self._path = work.path / "rounds.jsonl"
        self._position = 0
        self._next = work.rounds_done + 1 if work.action == "resume" else 0

    def __call__(self) -> None:
        with contextlib.suppress(FileNotFoundError), self._path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < self._position:
                # A damaged round was cut off.
                self._position = 0
            file.seek(self._position)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._position += len(line)
                row = json.loads(line)
                if row["round"] == self._next:
                    self._next += 1
                    self._observer.round_finished(row)


def write_tables(
    output: Path,
    works: Sequence[Work],
    figures: Mapping[str, CellFigures],
    *,
    target: float | None,
) -> None:
    """Write ``cells.csv`` (a line for each cell), ``table.csv`` (over seeds) and ``table.json``."""
    cells = [work.cell for work in works]
    of_cells = cell_rows(cells, figures, target=target)
    groups = group_rows(cells, figures, target=target)
    for name, rows in (("cells.csv", of_cells), ("table.csv", groups)):
        with temporary(output / name) as unfinished:
            unfinished.write_text(to_csv(rows), encoding="utf-8")
    write_json(
        output / "table.json",
        {"format": FORMAT, "target": target, "table": groups, "cells": of_cells},
    )


@dataclass(frozen=True)
class ProcessLauncher:
    """Runs cells as processes of their own, whose output goes to ``logs/``.

    Parameters
    ----------
    output : Path
        The folder of the comparison.
    flags : sequence of str
        More flags of ``fedsim run`` and ``fedsim resume``.
    stop_after_round : threading.Event
        Set to end all of it once the round under way is written.
    """

    output: Path
    flags: Sequence[str] = ()
    stop_after_round: threading.Event = field(default_factory=threading.Event)

    def __call__(self, work: Work, stop: threading.Event, watch: Callable[[], None]) -> str:
        """Run or resume a cell; an interrupt reaches it as a Ctrl-C would."""
        log = self.output / _LOGS / f"{work.cell.name}.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("ab") as file:
            before = file.tell()
            process = start_cell(
                [*self._arguments(work), *self.flags], stdout=file, stderr=subprocess.STDOUT
            )
        try:
            return self._await(process, work, stop, watch, log, before)
        finally:
            process.kill()
            process.wait()

    def _await(
        self,
        process: subprocess.Popen[bytes],
        work: Work,
        stop: threading.Event,
        watch: Callable[[], None],
        log: Path,
        before: int,
    ) -> str:
        told = False
        while not stop.is_set():
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(_POLL)
                if self.stop_after_round.is_set():
                    stop.set()
                return "" if code == 0 else _reason(code, log, before)
            if self.stop_after_round.is_set() and not told:
                process.send_signal(signal.SIGUSR1)
                told = True
            watch()
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE)
        return "interrupted"

    def _arguments(self, work: Work) -> list[str]:
        config = _own_config(work.cell).to_mapping()
        # The class of a strategy is taken from no file of a run, ours included.
        strategy = f"--strategy={flag_text(config['strategy'])}"
        if work.action == "resume":
            # Also what is unset: the cell may have been recorded with a value of it.
            texts = [f"--{k}={flag_text(config[k])}" for k in MAY_CHANGE if k != "output"]
            return ["resume", str(work.path), strategy, *texts]
        file = self.output / _CONFIGS / f"{work.cell.name}.json"
        file.parent.mkdir(exist_ok=True)
        write_json(file, {"config": config})
        places = [
            strategy,
            f"--ray-address={config['ray-address']}",
            f"--output={work.path}",
        ]
        if config["mirror"]:
            places.append(f"--mirror={config['mirror']}")
        return ["run", str(file), *places]


def _reason(code: int, log: Path, before: int) -> str:
    """Give the sentence that a cell ended with, or how it ended without one."""
    with log.open("rb") as file:
        file.seek(max(before, file.seek(0, os.SEEK_END) - 8192))
        lines = file.read().decode(errors="replace").splitlines()
    sentences = [line.removeprefix("fedsim: ") for line in lines if line.startswith("fedsim: ")]
    if code < 0:
        return f"its process was ended by signal {-code}"
    return sentences[-1] if sentences else f"its process ended with exit code {code}; see {log}"
