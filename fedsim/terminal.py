"""Telling a run on the terminal: summary, progress, a line per round, the end."""

from __future__ import annotations

import contextlib
import io
import math
import os
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from fedsim.core.characters import Shown
from fedsim.core.config import RunConfig
from fedsim.core.errors import RunFailedError
from fedsim.core.partition import class_counts
from fedsim.core.plan import RunPlan
from fedsim.core.task import classes_of, labels_of
from fedsim.core.units import format_bytes
from fedsim.recording.files import read_lines
from fedsim.recording.findings import Findings
from fedsim.recording.reader import Run
from fedsim.recording.runs import FoundRun
from fedsim.recording.writer import is_being_written

_SHADES = " ▁▂▃▄▅▆▇█"
_MOST_ROWS = 24
_MOST_COLUMNS = 20
_MOST_CLIENTS = 12
_MOST_LINES = 50


class _Facts(Table):
    """Two columns without lines; cells are printed as they are, even if they look like markup."""

    def __init__(self) -> None:
        super().__init__(show_header=False, box=None, pad_edge=False)

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*(Text(printable(str(cell))) for cell in cells), **options)


def printable(text: str) -> str:
    """Replace what a terminal would obey rather than print; a run may be a stranger's."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


class _StandardOutput(Console):
    """A console that ends no work when its reader is gone or its encoding lacks a character."""

    def __init__(self, *, lasting: bool, is_ours: bool, **options: Any) -> None:
        super().__init__(**options)
        self._lasting = lasting
        self._is_ours = is_ours

    @property
    def file(self) -> Any:
        """Where to write, as far as it can show what is written."""
        return Shown(Console.file.fget(self))  # type: ignore[attr-defined]

    @file.setter
    def file(self, new: IO[str]) -> None:
        Console.file.fset(self, new)  # type: ignore[attr-defined]

    def on_broken_pipe(self) -> None:
        self.quiet = True
        if not self._is_ours:
            return
        # What is still in Python's own buffer is written at the end. A test's has no number.
        with contextlib.suppress(io.UnsupportedOperation):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except (OSError, ValueError) as error:
            # A ValueError says that it is closed.
            if not self._lasting:
                reason = getattr(error, "strerror", None) or str(error)
                raise RunFailedError(f"standard output cannot be written: {reason}") from None
            self.on_broken_pipe()


def make_console(*, lasting: bool = False, is_ours: bool = True) -> Console:
    """Make a console on standard output; a pipe or a file gets lines wide enough for tables.

    Parameters
    ----------
    lasting : bool
        Whether the work matters more than its report: then errors of the output, a full disk
        too, are not told. Otherwise it is a `RunFailedError`, but for a reader
        who has gone away.
    is_ours : bool
        Whether standard output is this program's own, and not a caller's.
    """
    is_terminal = sys.stdout is not None and not sys.stdout.closed and sys.stdout.isatty()
    # One that is closed, or not there at all, shows nothing.
    quiet = sys.stdout is None or sys.stdout.closed
    options: dict[str, Any] = {"width": None if is_terminal else 140}
    if Console().is_jupyter:
        # Plain lines, as in a file: rich would make a display of each, and ask for ipywidgets.
        options = {"width": 140, "force_jupyter": False, "force_terminal": False}
    return _StandardOutput(
        lasting=lasting, is_ours=is_ours, highlight=False, quiet=quiet, **options
    )


def preparing_line(dataset: str) -> str:
    """Give the line about what is made before a run starts."""
    return f"preparing  {dataset}, the partition and the model"


class TerminalObserver:
    """Tells a run to a person: a live bar on a terminal, plain lines elsewhere.

    Parameters
    ----------
    console : rich.console.Console, optional
        Where to write; standard output by default.
    is_ours : bool
        Whether standard output is this program's own, and not a caller's. Then what others write
        there is printed above the bar, by something else in the place of `sys.stdout`.
    """

    def __init__(self, console: Console | None = None, *, is_ours: bool = True) -> None:
        self._console = console or make_console(lasting=True, is_ours=is_ours)
        self._redirect = is_ours
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._bytes = 0
        self._clients_trained = 0
        self._clients_failed = 0
        self._clients_total = 0
        self._rounds = 0
        self._rounds_trained = 0
        self._not_captured: set[int] = set()
        self._started = 0.0
        self._best: Mapping[str, Any] = {}
        self._last: Mapping[str, Any] = {}

    def preparing(self, dataset: str) -> None:
        """Say what is made before a run starts, which may take a download."""
        self._console.print(Text(preparing_line(dataset)))

    def run_started(self, plan: RunPlan, workers: int, path: Path) -> None:
        """Print what will be run and start the progress bar."""
        self.begin(summary_of(plan, workers, path), plan.config, path)

    def begin(self, summary: Summary, config: RunConfig, path: Path) -> None:
        """Do the same for a plan that another process has.

        Parameters
        ----------
        summary : Summary
            Of the plan.
        config : RunConfig
            Its configuration.
        path : Path
            The run directory.
        """
        summary.print(self._console)
        rows = path / "rounds.jsonl"
        for row in read_lines(rows) if rows.exists() else ():
            # Of the run that is resumed.
            self._know(row)
        self._rounds = config.rounds
        self._clients_of = config.num_participants
        self._clients_total = sum(self._clients_of(r) for r in range(1, self._rounds + 1))
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f} clients"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                console=self._console,
                transient=True,
                redirect_stdout=self._redirect,
                redirect_stderr=self._redirect,
            )
            self._progress.start()
            self._task = self._progress.add_task(
                "starting workers", total=self._clients_total, left=""
            )
            return
        # Nothing moves in a file or a pipe: what the next seconds are for is said beforehand.
        then = "" if self._last else ", then evaluating the untrained model"
        self._console.print(Text(f"waiting    for the workers{then}"))

    def pass_on(self, text: str) -> bool:
        """Print what others say above the bar; False where there is no bar to keep clear of."""
        if self._progress is None:
            return False
        self._console.print(Text(text.rstrip("\n")), soft_wrap=True)
        return True

    def warned(self, text: str) -> None:
        """Print it."""
        self._console.print(printable(text), style="yellow", markup=False, soft_wrap=True)

    def round_started(self, round_number: int, participants: Sequence[int]) -> None:
        """Move the bar to the round."""
        if not self._started:
            self._started = time.perf_counter()
            self._clients_total -= sum(self._clients_of(r) for r in range(1, round_number))
            if round_number > 1:
                self._console.print(Text(f"continuing after round {round_number - 1}"))
            if self._progress is not None and self._task is not None:
                self._progress.update(self._task, total=self._clients_total)
        self._update(f"round {round_number}/{self._rounds}")

    def client_finished(self, row: Mapping[str, Any]) -> None:
        """Count the client and its captured bytes; say once why there are none."""
        self._clients_trained += 1
        if (refusal := row.get("not_captured")) and row["partition"] not in self._not_captured:
            self._not_captured.add(row["partition"])
            text = printable(f"client {row['partition']}: {refusal}")
            self._console.print(Text(text), soft_wrap=True)
        self._bytes += int(row.get("bytes_captured", 0))
        self._update(None)

    def client_failed(self, round_number: int, partition: int, reason: str) -> None:
        """Print the client's own traceback."""
        self._clients_failed += 1
        self._console.print(Text(f"round {round_number}: client {partition} failed:", "red"))
        self._console.print(Text(textwrap.indent(reason, "    ")), soft_wrap=True)

    def round_finished(self, row: Mapping[str, Any]) -> None:
        """Print the line of the round."""
        self._know(row)
        self._rounds_trained += row["round"] > 0
        self._console.print(Text(round_line(row, self._rounds)))

    def run_finished(self, path: Path) -> None:
        """Print the closing table."""
        self.close()
        best, last = self._best, self._last
        failed = f", {self._clients_failed} failed" if self._clients_failed else ""
        table = _Facts()
        table.add_row("accuracy", f"{last['global_accuracy']:.4f} at the end")
        table.add_row("", f"{best['global_accuracy']:.4f} at best, in round {best['round']}")
        table.add_row("loss", f"{_number(last['global_loss'])} at the end")
        rounds = "1 round" if self._rounds_trained == 1 else f"{self._rounds_trained} rounds"
        trained = f"{self._clients_trained} trained in {rounds}"
        table.add_row("clients", trained + failed)
        table.add_row("captured", f"{format_bytes(self._bytes)} of gradients")
        seconds = time.perf_counter() - self._started if self._started else 0.0
        table.add_row("time", format_seconds(seconds))
        table.add_row("state", f"sha256 {last['state_sha256'][:16]}")
        table.add_row("run", str(path))
        self._console.print()
        self._console.print(table)

    def _know(self, row: Mapping[str, Any]) -> None:
        if row["global_accuracy"] is not None:
            self._last = row
            if not self._best or row["global_accuracy"] > self._best["global_accuracy"]:
                self._best = row

    def close(self) -> None:
        """Remove the progress bar; call it however the run ends."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _update(self, description: str | None) -> None:
        if self._progress is None or self._task is None:
            return
        left = f"{format_bytes(self._bytes)} captured"
        done = self._clients_trained + self._clients_failed
        if 0 < done < self._clients_total:
            spent = time.perf_counter() - self._started
            rest = spent / done * (self._clients_total - done)
            left = f"{format_seconds(rest)} left, {left}"
        if description is None:
            self._progress.update(self._task, completed=done, left=left)
        else:
            self._progress.update(self._task, description=description, completed=done, left=left)


@dataclass(frozen=True)
class Summary:
    """What is said of a plan before it is run, without the plan.

    Parameters
    ----------
    facts : mapping of str to str
        The data, the partition, the model, the bytes to come and the workers.
    sizes : sequence of int
        Samples of each client.
    counts : sequence of sequence of int
        Those of each client by class, or by groups of classes; empty where it is not known.
    classes : int
        How many there are.
    """

    facts: Mapping[str, str]
    sizes: Sequence[int]
    counts: Sequence[Sequence[int]]
    classes: int

    def print(self, console: Console) -> None:
        """Print it."""
        table = _Facts()
        for name, text in self.facts.items():
            table.add_row(name, text)
        console.print(table)
        if self.counts:
            console.print(_table_of(self.sizes, self.counts, self.classes))


def summary_of(plan: RunPlan, workers: int, path: Path) -> Summary:
    """Sum up a plan, for a number of workers and a run directory."""
    config, spec = plan.config, plan.dataset.spec
    classes = classes_of(spec)
    parameters = sum(math.prod(shape) for shape in plan.parameters.values())
    if config.participants is None:
        drawn = f"{config.clients_per_round} of {config.clients} clients"
    else:
        drawn = f"listed clients of {config.clients}"
    facts = {
        "data": f"{spec.name}: {spec.train_size:,} + {spec.test_size:,} samples, {classes} classes",
        "partition": f"{config.partition}, {min(plan.sizes)} to {max(plan.sizes)} samples a client",
        "model": f"{config.described_model}, {parameters:,} parameters",
        "rounds": f"{config.rounds} of {drawn}, seed {config.seed}, {config.strategy.name}",
        "capture": _capture_line(plan),
    }
    if config.rounds > 1:
        largest = max(plan.round_bytes(r) for r in range(1, config.rounds + 1))
        facts["a round"] = f"writes {format_bytes(largest)} at most"
    more = " more" if plan.done >= 0 else ""
    facts["to write"] = f"{format_bytes(plan.bytes_after(plan.done))}{more} into {path}"
    facts["workers"] = f"{workers} with {config.client_cpus} CPU each"
    counts: list[list[int]] = []
    if not config.own_data:
        counts = _grouped(plan.partition, labels_of(plan.dataset), classes).tolist()
    return Summary(facts, plan.sizes, counts, classes)


def print_summary(console: Console, plan: RunPlan, workers: int, path: Path) -> None:
    """Print the data, the partition, the model, the bytes to come and the workers."""
    summary_of(plan, workers, path).print(console)


def _capture_line(plan: RunPlan) -> str:
    config = plan.config
    if not config.policy.keeps_files:
        return "none"
    parts = [config.capture]
    if config.capture_layers != ("*",):
        parts[0] += f" of {', '.join(config.capture_layers)}"
    parts += config.policy.form
    parts.append(f"{format_bytes(plan.step_bytes)} a step")
    parts.append(f"{format_bytes(plan.captured_bytes())} in all")
    return ", ".join(parts)


def partition_table(
    partition: Sequence[NDArray[np.int64]], labels: NDArray[np.int64], classes: int
) -> Table:
    """Draw the samples of each class at each client as a table of shades.

    Many classes share a column, and of many clients the first are shown.
    """
    counts = _grouped(partition, labels, classes).tolist()
    return _table_of([len(indices) for indices in partition], counts, classes)


def _grouped(
    partition: Sequence[NDArray[np.int64]], labels: NDArray[np.int64], classes: int
) -> NDArray[np.int64]:
    counts = class_counts(partition, labels, classes)
    columns = np.array_split(np.arange(classes), min(classes, _MOST_COLUMNS))
    grouped: NDArray[np.int64] = np.stack([counts[:, c].sum(axis=1) for c in columns], axis=1)
    return grouped


def _table_of(sizes: Sequence[int], counts: Sequence[Sequence[int]], classes: int) -> Table:
    most = max(1, max(map(max, counts)))
    width = len(str(classes - 1)) if classes <= _MOST_COLUMNS else 1
    names = " ".join(str(c).rjust(width) for c in range(classes)) + "  classes"
    table = Table(box=None, pad_edge=False)
    table.add_column("client", justify="right")
    table.add_column("samples", justify="right")
    table.add_column(names if classes <= _MOST_COLUMNS else f"classes 0 to {classes - 1}")
    for client, row in enumerate(counts[:_MOST_ROWS]):
        shades = [_SHADES[-(-n * (len(_SHADES) - 1) // most)].rjust(width) for n in row]
        table.add_row(str(client), str(sizes[client]), " ".join(shades))
    if len(sizes) > _MOST_ROWS:
        table.add_row("...", "", f"and {len(sizes) - _MOST_ROWS} more clients")
    return table


def round_line(row: Mapping[str, Any], rounds: int) -> str:
    """Give the line of one round."""
    head = f"round {row['round']:>{len(str(rounds))}}/{rounds}"
    parts = [head]
    if row["global_accuracy"] is None:
        parts.append("not evaluated")
    else:
        parts.append(f"loss {_number(row['global_loss'])}")
        parts.append(f"accuracy {row['global_accuracy']:.4f}")
    if row["round"]:
        parts.append("clients " + _listed(row["participants"]))
    if row["failed"]:
        parts.append("failed " + _listed(row["failed"]))
    parts.append(format_seconds(row["seconds"]["total"]))
    return "  ".join(parts)


def print_run(console: Console, run: Run) -> None:
    """Print what a person wants to know of a run directory."""
    config = run.config
    table = _Facts()
    table.add_row("run", str(run.path))
    status = run.status + (f": {run.entry('error')}" if "error" in run.manifest else "")
    if run.status == "running" and not is_being_written(run.path):
        status = f"killed: `fedsim resume {run.path}` continues"
    table.add_row("status", status)
    table.add_row("created", run.entry("created"))
    data = run.entry("dataset")
    samples = f"{data['train_size']:,} + {data['test_size']:,} samples"
    table.add_row("data", f"{data['name']}: {samples}, {data['classes']} classes")
    sizes = run.entry("partition")["sizes"]
    table.add_row(
        "partition",
        f"{config.partition}, {len(sizes)} clients, {min(sizes)} to {max(sizes)} samples",
    )
    parameters = sum(math.prod(p["shape"]) for p in run.parameters)
    table.add_row(
        "model", f"{run.entry('model')['arch']}, {config.norm} norm, {parameters:,} parameters"
    )
    table.add_row("strategy", f"{config.strategy.name}, seed {config.seed}")
    captured = sum(row.get("bytes_captured", 0) for row in run.client_rows)
    steps = sum(row.get("num_steps_captured", 0) for row in run.client_rows)
    kept = f"{config.capture}: {steps} steps, {format_bytes(captured)}"
    if run.removed:
        kept += f"; {len(run.removed):,} files of them were removed to make room"
    table.add_row("captured", kept)
    versions = run.entry("versions")
    table.add_row("versions", ", ".join(f"{name} {number}" for name, number in versions.items()))
    console.print(table)
    console.print()
    rounds = Table(box=None, pad_edge=False)
    for name in ("round", "loss", "accuracy", "clients", "failed", "seconds", "state sha256"):
        rounds.add_column(name, justify="left" if name in ("clients", "state sha256") else "right")
    for row in run.round_rows:
        accuracy = row["global_accuracy"]
        rounds.add_row(
            str(row["round"]),
            "" if accuracy is None else _number(row["global_loss"]),
            "" if accuracy is None else f"{accuracy:.4f}",
            _listed(row["participants"]),
            _listed(row["failed"]),
            f"{row['seconds']['total']:.1f}",
            row["state_sha256"][:16],
        )
    console.print(rounds)


def print_runs(console: Console, runs: Sequence[FoundRun]) -> None:
    """Print a line for each run, and what all of them take."""
    table = Table(box=None, pad_edge=False)
    headings = ("run", "state", "rounds", "strategy", "created (UTC)", "size", "gradients")
    for name in headings:
        right = name in ("rounds", "size", "gradients")
        # Wherever a line is cut, it is not in a name that somebody copies.
        table.add_column(name, justify="right" if right else "left", no_wrap=True, overflow="fold")
    for run in runs:
        cells = (
            *(str(run.path), run.state, f"{run.rounds}/{run.rounds_asked}", run.strategy),
            *(run.created[:16].replace("T", " "), format_bytes(run.size)),
            format_bytes(run.gradients) if run.gradients else "-",
        )
        table.add_row(*(Text(printable(cell)) for cell in cells))
    if runs:
        console.print(table)
    size, gradients = sum(run.size for run in runs), sum(run.gradients for run in runs)
    count = "1 run" if len(runs) == 1 else f"{len(runs):,} runs"
    console.print(f"{count}, {format_bytes(size)}, of which {format_bytes(gradients)} gradients")


def print_findings(console: Console, findings: Findings, seconds: float) -> None:
    """Print what was proven, what could not be and why, and what is wrong."""
    table = Table(box=None, pad_edge=False)
    for name, justify in (("check", "left"), ("proven", "right"), ("", "left"), ("what", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for check in findings.checks.values():
        outcomes = [f"{check.proven:,} {check.unit}"] if check.proven else []
        if check.violations:
            outcomes.append(f"{len(check.violations)} wrong")
        # Of what was not recorded there is nothing to prove: that is no failure.
        outcome = ", ".join(outcomes) or ("not proven" if check.unproven else "-")
        detail = "; ".join([check.meaning, *check.notes])
        table.add_row(check.name, outcome, "", Text(printable(detail)))
    console.print(table)
    unproven = [f"{c.name}: {reason}" for c in findings.checks.values() for reason in c.unproven]
    wrong = [f"{c.name}: {what}" for c in findings.checks.values() for what in c.violations]
    for title, lines, style in (("not proven", unproven, ""), ("wrong", wrong, "red")):
        if lines:
            console.print(f"\n{title}")
        for line in lines[:_MOST_LINES]:
            console.print(Text(f"  {printable(line)}", style), soft_wrap=True)
        if len(lines) > _MOST_LINES:
            console.print(f"  and {len(lines) - _MOST_LINES} more")
    rate = findings.bytes_read / max(seconds, 1e-9)
    console.print(
        f"\n{format_bytes(findings.bytes_read)} read in {format_seconds(seconds)}, "
        f"{format_bytes(int(rate))}/s"
    )


class ByteProgress:
    """A bar of bytes on a terminal, nothing elsewhere; told from several threads."""

    def __init__(self, console: Console, description: str) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(description, total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __call__(self, done: int, total: int) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=done, total=total)

    def tell(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(Text(printable(text)), soft_wrap=True)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def _listed(clients: Sequence[int]) -> str:
    shown = " ".join(str(p) for p in clients[:_MOST_CLIENTS])
    rest = len(clients) - _MOST_CLIENTS
    return f"{shown} and {rest} more" if rest > 0 else shown


def _number(value: float | None) -> str:
    # A loss that is not finite is null in a row.
    if value is None or not math.isfinite(value):
        return "not finite"
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4e}"


def format_seconds(seconds: float) -> str:
    """Write a duration: tenths of seconds, or minutes and seconds, or hours and minutes."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
