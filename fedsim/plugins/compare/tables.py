"""From the runs of a grid to one table: figures of each run, mean and deviation over seeds."""

from __future__ import annotations

import csv
import io
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fedsim.core.units import format_bytes
from fedsim.plugins.compare.cells import Cell, shown
from fedsim.recording.files import ITEM_BYTES
from fedsim.recording.reader import Run
from fedsim.terminal import format_seconds, printable, round_line

CellStatus = Literal["finished", "diverged", "failed", "unfinished"]
_FIGURES = (
    "final_accuracy",
    "best_accuracy",
    "final_loss",
    "up_bytes",
    "down_bytes",
    "seconds",
)


@dataclass(frozen=True, kw_only=True)
class CellFigures:
    """What one run of a grid came to; None is what there is not.

    Parameters
    ----------
    status : str
        ``finished``; ``diverged`` when its model was no longer finite; ``failed`` for any
        other reason; ``unfinished`` when nothing has gone wrong yet.
    error : str
        Why it failed or diverged.
    rounds_done : int
        Finished rounds, without round 0.
    final_accuracy, final_loss : float or None
        Of the last round, on the test split; accuracy is a share. Only of a run with all rounds.
    best_accuracy : float or None
        The highest of all evaluated rounds, round 0 included.
    best_round : int or None
        The first round that had it.
    rounds_to_target : int or None
        The first round whose accuracy was the target or more.
    up_bytes, down_bytes : int
        Bytes of the states that clients returned, and of those that were sent to them, over all
        finished rounds.
    seconds : float
        Wall time of the finished rounds.
    """

    status: CellStatus
    error: str = ""
    rounds_done: int = 0
    final_accuracy: float | None = None
    final_loss: float | None = None
    best_accuracy: float | None = None
    best_round: int | None = None
    rounds_to_target: int | None = None
    up_bytes: int = 0
    down_bytes: int = 0
    seconds: float = 0.0


def figures_of(run: Run, *, rounds: int, target: float | None, error: str = "") -> CellFigures:
    """Take the figures of a run from its rows.

    Parameters
    ----------
    run : Run
        A run directory of any status.
    rounds : int
        How many rounds it is to have.
    target : float, optional
        The accuracy to reach.
    error : str
        Why it did not go on, where ``run.json`` does not say so.
    """
    state_bytes = sum(
        math.prod(shape) * ITEM_BYTES[dtype] for dtype, shape in run.described.values()
    )
    corrects = run.algorithm is not None and run.algorithm.corrects
    correction = sum(math.prod(shape) * ITEM_BYTES["F32"] for shape in run.shapes.values())
    return figures_of_rows(
        run.round_rows,
        up_bytes=state_bytes,
        down_bytes=state_bytes + corrects * correction,
        rounds=rounds,
        target=target,
        error=error or str(run.manifest.get("error", "")),
        diverged=bool(run.manifest.get("diverged", False)),
    )


def figures_of_rows(
    rows: Sequence[Mapping[str, Any]],
    *,
    up_bytes: int,
    down_bytes: int,
    rounds: int,
    target: float | None = None,
    error: str = "",
    diverged: bool = False,
) -> CellFigures:
    """Take the figures of a run from the lines of its ``rounds.jsonl``.

    Parameters
    ----------
    rows : sequence of mapping
        The lines, in their order.
    up_bytes, down_bytes : int
        Bytes that a client returns, and that are sent to it.
    rounds : int
        How many rounds the run is to have.
    target : float, optional
        The accuracy to reach.
    error : str
        Why it did not go on; empty where nothing went wrong.
    diverged : bool
        Whether it stopped because of values that are not finite.
    """
    evaluated = [row for row in rows if row["global_accuracy"] is not None]
    best = max(evaluated, key=lambda row: float(row["global_accuracy"]), default=None)
    reached = [
        row["round"] for row in evaluated if target is not None and row["global_accuracy"] >= target
    ]
    complete = bool(rows) and rows[-1]["round"] >= rounds
    last = evaluated[-1] if complete and evaluated else None
    status: CellStatus = "failed" if error else "unfinished"
    # With allow-divergence, a run goes to its end with a loss that is not a number.
    if diverged or (last is not None and last["global_loss"] is None):
        status = "diverged"
    elif complete:
        status = "finished"
    return CellFigures(
        status=status,
        error="" if status == "finished" else error,
        rounds_done=rows[-1]["round"] if rows else 0,
        final_accuracy=None if last is None else last["global_accuracy"],
        final_loss=None if last is None else last["global_loss"],
        best_accuracy=None if best is None else best["global_accuracy"],
        best_round=None if best is None else best["round"],
        rounds_to_target=reached[0] if reached else None,
        up_bytes=up_bytes * sum(len(r["participants"]) - len(r["failed"]) for r in rows),
        down_bytes=down_bytes * sum(len(r["participants"]) for r in rows),
        seconds=sum(row["seconds"]["total"] for row in rows),
    )


def cell_rows(
    cells: Sequence[Cell], figures: Mapping[str, CellFigures], *, target: float | None
) -> list[dict[str, Any]]:
    """Give a flat row for each cell: its name, its values and its figures."""
    rows = []
    for cell in cells:
        row = {"cell": cell.name, **cell.values, **vars(figures[cell.name])}
        if target is None:
            del row["rounds_to_target"]
        rows.append(row)
    return rows


def group_rows(
    cells: Sequence[Cell], figures: Mapping[str, CellFigures], *, target: float | None
) -> list[dict[str, Any]]:
    """Give a flat row for each combination of values but the seed.

    Means and deviations are over its finished cells. The deviation is that of a sample (divided
    by n - 1), and None where there is but one.
    """
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(repr(_without_seed(cell)), []).append(cell)
    rows = []
    for members in groups.values():
        of_members = [figures[cell.name] for cell in members]
        finished = [f for f in of_members if f.status == "finished"]
        row: dict[str, Any] = {**_without_seed(members[0]), "cells": len(members)}
        for status in ("finished", "diverged", "failed", "unfinished"):
            row[status] = sum(f.status == status for f in of_members)
        for name in _FIGURES:
            row |= _mean_and_deviation(name, (getattr(f, name) for f in finished))
        if target is not None:
            reached = [f.rounds_to_target for f in finished if f.rounds_to_target is not None]
            row["reached_target"] = len(reached)
            row |= _mean_and_deviation("rounds_to_target", reached)
        rows.append(row)
    return rows


def _without_seed(cell: Cell) -> dict[str, Any]:
    return {key: value for key, value in cell.values.items() if key != "seed"}


def _mean_and_deviation(name: str, values: Iterable[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    return {
        f"{name}_mean": statistics.fmean(known) if known else None,
        f"{name}_std": statistics.stdev(known) if len(known) > 1 else None,
    }


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write flat rows as CSV: a head line, blanks for what is not there, lists as in names."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {k: shown(v) if isinstance(v, list | dict | bool) else v for k, v in row.items()}
        )
    return text.getvalue()


def print_comparison(
    console: Console, rows: Sequence[Mapping[str, Any]], *, target: float | None
) -> None:
    """Print the rows of `group_rows`, deviations after a plus-minus sign."""
    axes = list(rows[0])[: list(rows[0]).index("cells")]
    table = Table(box=None, pad_edge=False)
    for axis in axes:
        table.add_column(axis)
    table.add_column("finished", justify="right")
    troubles = [name for name in ("diverged", "failed", "unfinished") if any(r[name] for r in rows)]
    columns = [*troubles, "final accuracy", "best accuracy"]
    columns += [] if target is None else [f"rounds to {target:g}"]
    for name in (*columns, "up", "down", "time"):
        table.add_column(name, justify="right")
    for row in rows:
        cells = [*(printable(shown(row[axis])) for axis in axes)]
        cells.append(f"{row['finished']} of {row['cells']}")
        cells += [str(row[name] or "") for name in troubles]
        cells += [_spread(row, name, ".4f") for name in ("final_accuracy", "best_accuracy")]
        if target is not None:
            cells.append(_to_target(row))
        for name in ("up_bytes", "down_bytes"):
            mean = row[f"{name}_mean"]
            cells.append("" if mean is None else format_bytes(round(mean)))
        seconds = row["seconds_mean"]
        cells.append("" if seconds is None else format_seconds(seconds))
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)
    if any(row["cells"] > 1 for row in rows):
        console.print("mean ± standard deviation over the finished seeds")


def _to_target(row: Mapping[str, Any]) -> str:
    if not row["reached_target"]:
        return "never" if row["finished"] else ""
    text = _spread(row, "rounds_to_target", ".1f")
    missed = row["reached_target"] < row["finished"]
    return f"{text} ({row['reached_target']} of {row['finished']})" if missed else text


def _spread(row: Mapping[str, Any], name: str, form: str) -> str:
    mean, deviation = row[f"{name}_mean"], row[f"{name}_std"]
    if mean is None:
        return ""
    return format(mean, form) + ("" if deviation is None else f" ± {deviation:{form}}")


class GridProgress:
    """Tells a comparison to a person: a bar over all rounds of all cells, and lines.

    Parameters
    ----------
    console : rich.console.Console
        Where to write; the bar is drawn on a terminal only.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} rounds"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._number = self._to_do = self._rounds = 0
        self._done = self._done_before = self._end_of_cell = 0

    def grid_started(self, cells: int, to_do: int, rounds: int, done: int, path: Path) -> None:
        """Print what is there and what is left, and start the bar."""
        there = f", {cells - to_do} of them done before" if cells > to_do else ""
        self._line(f"{cells} cells{there}, {rounds - done} rounds to run into {path}")
        self._to_do, self._done, self._done_before = to_do, done, done
        self._started = time.perf_counter()
        self._task = self._bar.add_task("starting", total=rounds, completed=done, left="")
        self._bar.start()

    def cell_started(self, name: str, rounds: int, done: int) -> None:
        """Print the name of the cell."""
        self._number += 1
        self._rounds = rounds
        self._end_of_cell = self._done + rounds - done
        where = f", continuing after round {done}" if done else ""
        self._line(f"cell {self._number}/{self._to_do}  {name}{where}")
        self._bar.update(self._task, description=f"cell {self._number}/{self._to_do}")

    def round_finished(self, row: Mapping[str, Any]) -> None:
        """Print the line of the round and move the bar."""
        self._line(f"  {round_line(row, self._rounds)}")
        self._move(self._done + (row["round"] > 0))

    def cell_finished(self, figures: CellFigures) -> None:
        """Print why the cell has not all of its rounds, where that is so."""
        if figures.status != "finished":
            self._line(f"  {figures.status}: {figures.error}", "red")
        self._move(self._end_of_cell)

    def close(self) -> None:
        """Remove the bar; call it however the comparison ends."""
        self._bar.stop()

    def _line(self, text: str, style: str = "") -> None:
        self._console.print(Text(printable(text), style), soft_wrap=True)

    def _move(self, done: int) -> None:
        self._done = done
        left = ""
        if (here := done - self._done_before) and self._number:
            total = self._bar.tasks[self._task].total or 0
            spent = time.perf_counter() - self._started
            left = f"{format_seconds(spent / here * (total - done))} left"
        self._bar.update(self._task, completed=done, left=left)
