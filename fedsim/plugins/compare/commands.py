"""``fedsim compare``."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from pathlib import Path

import click

from fedsim.command import (
    FAILURE,
    SUCCESS,
    Command,
    check_trackers,
    config_file,
    keys_of,
    say,
    tell,
    tracked,
    verbose,
)
from fedsim.core.errors import InputError, RunInterruptedError
from fedsim.interrupts import stop_on_signals


@click.command(
    "compare",
    cls=Command,
    keys=True,
    but=["output"],
    waits=True,
    short_help="run a grid of configurations and tabulate the results",
)
@config_file
@click.option("--strategies", metavar="A,B", help="the same as --vary strategy=A,B")
@click.option("--seeds", metavar="A,B", help="the same as --vary seed=A,B")
@click.option(
    "--vary",
    multiple=True,
    metavar="KEY=A,B",
    help="values of any key, like alpha=0.1,0.5,10 (repeatable)",
)
@click.option("--target", metavar="ACCURACY", help="count the rounds to this accuracy, like 0.5")
@click.option(
    "--output", metavar="FOLDER", help="of the comparison (default: a dated one under runs/)"
)
@verbose
@tracked
def compare(
    config: Path | None,
    strategies: str | None,
    seeds: str | None,
    vary: Sequence[str],
    target: str | None,
    output: str | None,
    verbose: bool,
    tracker: Sequence[str],
    **keys: str | None,
) -> int:
    """Run every combination of the values given, one after another, and print a table.

    Each run has a folder of its own. The same command goes on where one was stopped, and repeats no
    finished run. It takes every key of `fedsim run` for all of them.
    """
    from fedsim.core.config import RunConfig, read_config_file
    from fedsim.plugins.compare.cells import make_cells, parse_axis

    axes = []
    for text, key in ((strategies, "strategy"), (seeds, "seed")):
        if text is not None:
            axes.append(parse_axis(key, text))
    for given in vary:
        key, equals, text = given.partition("=")
        if not equals:
            raise InputError(f"--vary {given} cannot be used; expected KEY=A,B like alpha=0.1,1")
        axes.append(parse_axis(key, text))
    flags = keys_of({**keys, "output": output})
    for axis in axes:
        if axis.key in flags:
            raise InputError(f"{axis.key} is both varied and set by a flag; expected only one")
    wanted = _target_of(target)
    check_trackers(tracker)
    known = {*flags, *(axis.key for axis in axes)}
    values = {**(read_config_file(config, known) if config else {}), **flags}
    named = values.pop("output", None)
    cells = make_cells(values, axes)

    from fedsim.flower.scratch import sweep
    from fedsim.flower.simulation import fit_pool
    from fedsim.plugins.compare import compare as grid
    from fedsim.plugins.compare.tables import GridProgress, group_rows, print_comparison
    from fedsim.terminal import make_console

    # Checked as the same key of a run is.
    checked = RunConfig.from_mapping({"output": named} if named is not None else {}).output
    folder = Path(checked) if checked else grid.default_output()
    grid.check_grid(folder, cells)
    tell(f"preparing  {len(cells)} cells")
    sweep()
    works = grid.find_work(folder, cells, fit_pool)
    more = [f"--tracker={name}" for name in tracker]
    more += ["--verbose"] if verbose else []
    stop, stop_after_round = threading.Event(), threading.Event()
    launch = grid.ProcessLauncher(folder, more, stop_after_round)
    console = make_console(lasting=True)
    kept = (
        f"the finished rounds are kept in {folder}, and the same command"
        f"{'' if named else f' with --output {folder}'} continues"
    )
    stop_on_signals(stop, stop_after_round, lambda: kept)
    with contextlib.closing(GridProgress(console)) as progress:
        try:
            with grid.begun(folder, works):
                figures = grid.compare(
                    works, folder, target=wanted, stop=stop, launch=launch, observer=progress
                )
        except RunInterruptedError:
            how = "stopped after a round" if stop_after_round.is_set() else "interrupted"
            raise RunInterruptedError(f"{how}; {kept}") from None
    console.print()
    print_comparison(console, group_rows(cells, figures, target=wanted), target=wanted)
    console.print(f"written: {folder}/table.csv, table.json, cells.csv", markup=False)
    failed = [name for name, f in figures.items() if f.status == "failed"]
    if not failed:
        return SUCCESS
    others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
    say(f"{failed[0]} failed: {figures[failed[0]].error}{others}; the same command tries it again")
    return FAILURE


def _target_of(text: str | None) -> float | None:
    if text is None:
        return None
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= 1:
            return float(text)
    raise InputError(f"--target = {text!r} cannot be used; expected an accuracy above 0, up to 1")


COMMANDS = [compare]
