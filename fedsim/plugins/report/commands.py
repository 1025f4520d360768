"""``fedsim report``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from fedsim.command import Command, data_root, say_first


@click.command(
    "report", cls=Command, short_help="write one page of figures about one run or several"
)
@click.argument(
    "runs", type=Path, nargs=-1, required=True, metavar="RUN...", help="run directories"
)
@click.option(
    "--output",
    type=Path,
    default="report.html",
    metavar="FILE",
    help="the page; an earlier report is replaced (default: report.html)",
)
@click.option("--png", type=Path, metavar="FOLDER", help="write each figure as an image too")
@click.option("--verify", is_flag=True, help="check all that `fedsim verify` does, not rows alone")
@click.option(
    "--read-budget",
    default="20 GB",
    metavar="BYTES",
    help="most deltas and gradients to read of a run; rounds are left out evenly to keep to it "
    "(default: 20 GB)",
)
@data_root
def report(
    runs: Sequence[Path],
    output: Path,
    png: Path | None,
    verify: bool,
    read_budget: str,
    data_root: str | None,
) -> int:
    """Write one HTML page about one run or several, also while they are under way.

    It shows accuracy, partition, drift, gradients, time, configuration and verification, and needs
    no network.
    """
    from fedsim.core.errors import ConfigError
    from fedsim.core.units import parse_bytes
    from fedsim.plugins.report.report import write_report
    from fedsim.terminal import ByteProgress, make_console

    try:
        budget = parse_bytes(read_budget)
    except ValueError as error:
        raise ConfigError("--read-budget", read_budget, str(error)) from None
    console = make_console()
    with ByteProgress(console, "reading") as progress:
        written, violations = write_report(
            runs,
            output,
            images=png,
            in_full=verify,
            budget=budget,
            data_root=data_root,
            progress=progress,
        )
    page, *images = written
    console.print(f"written: {page}", markup=False, soft_wrap=True)
    if images:
        console.print(f"written: {len(images)} images in {png}", markup=False, soft_wrap=True)
    return say_first(violations)


COMMANDS = [report]
