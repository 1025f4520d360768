"""``fedsim export``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from fedsim.command import Command, Group, Whole, data_root, run_argument

round_option = click.option(
    "--round", "number", type=Whole(), required=True, metavar="R", help="a training round"
)


@click.group(
    "export", cls=Group, short_help="write recorded gradients in the form of another program"
)
def export() -> None:
    """Write recorded gradients in the form of another program."""


@export.command(
    "breaching",
    cls=Command,
    short_help="local steps of a client, for the gradient-inversion tool of that name",
)
@run_argument
@round_option
@click.option("--client", type=Whole(), required=True, metavar="P", help="whose steps")
@click.option("--step", type=Whole(), required=True, metavar="S", help="the first, from 0")
@click.option("--steps", type=Whole(), default=1, metavar="N", help="how many (default: 1)")
@click.option(
    "--allow-not-replayable",
    is_flag=True,
    help="export several steps even where breaching cannot repeat them from the images",
)
@data_root
@click.option(
    "--output", type=Path, required=True, metavar="FOLDER", help="a folder that does not exist"
)
def breaching(
    run: Path,
    number: int,
    client: int,
    step: int,
    steps: int,
    allow_not_replayable: bool,
    data_root: str | None,
    output: Path,
) -> None:
    """Write local steps of one client for the gradient-inversion tool breaching.

    The images that they were computed from are written with them.
    """
    from fedsim.plugins.export.export import export_breaching
    from fedsim.recording.reader import load_run
    from fedsim.terminal import make_console

    reasons = export_breaching(
        load_run(run),
        number,
        client,
        step,
        steps=steps,
        output=output,
        allow_not_replayable=allow_not_replayable,
        data_root=data_root,
    )
    console = make_console()
    console.print(f"written: {output}", markup=False, soft_wrap=True)
    if reasons:
        console.print(f"not replayable: {', '.join(reasons)}", markup=False, soft_wrap=True)


@export.command(
    "notebook", cls=Command, short_help="a round in one file of tensors and one of figures"
)
@run_argument
@round_option
@click.option(
    "--client", type=Whole(), multiple=True, metavar="P", help="this client only (repeatable)"
)
@click.option("--output", type=Path, required=True, metavar="PREFIX", help="how the names begin")
def notebook(run: Path, number: int, client: Sequence[int], output: Path) -> None:
    """Write a round as PREFIX_RR_tensors.pt and PREFIX_RR_meta.json."""
    from fedsim.plugins.export.export import export_notebook
    from fedsim.recording.reader import load_run
    from fedsim.terminal import ByteProgress, make_console

    console = make_console()
    with ByteProgress(console, f"collecting round {number}") as progress:
        paths = export_notebook(
            load_run(run), number, output=output, clients=client, progress=progress
        )
    for path in paths:
        console.print(f"written: {path}", markup=False, soft_wrap=True)


COMMANDS = [export]
