"""``fedsim push``, ``fetch`` and ``collect``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from fedsim.command import Command, run_argument, say_first

url_argument = click.argument("url", metavar="URL", help="like s3://bucket/run")


@click.command(
    "collect",
    cls=Command,
    short_help="bring what clients recorded on their own disks into a run directory",
)
@run_argument
@click.argument(
    "sources",
    nargs=-1,
    required=True,
    metavar="SOURCE...",
    help="what a node calls its recordings, or the folder of the run in it: a path, or a URL that "
    "fsspec knows",
)
def collect(run: Path, sources: Sequence[str]) -> int:
    """Bring what clients recorded on their own disks into a run directory.

    Each file is checked against the hash that the client told when it wrote it. The same command
    goes on where it was stopped. Exit code 1 where a file is not what the client wrote.
    """
    from fedsim.core.units import format_bytes
    from fedsim.plugins.remote.collect import collect
    from fedsim.recording.reader import load_run
    from fedsim.terminal import ByteProgress, make_console

    console = make_console()
    with ByteProgress(console, f"collecting into {run}") as progress:
        found = collect(load_run(run), sources, progress)
    lines = [f"collected: {found.files:,} files, {format_bytes(found.size)}"]
    if found.missing:
        lines.append(f"not in any source: {len(found.missing):,} files, {found.missing[0]}")
    for line in [*lines, *found.wrong]:
        console.print(line, markup=False, soft_wrap=True)
    return say_first(found.wrong)


@click.command("push", cls=Command, short_help="copy a run to a URL, or bring a copy up to date")
@run_argument
@url_argument
def push(run: Path, url: str) -> None:
    """Copy a run to a URL or path, in an order that leaves a run there wherever it is cut off.

    The same command goes on. A run with `mirror` does this by itself.
    """
    from fedsim.core.units import format_bytes
    from fedsim.plugins.remote.folder import Folder
    from fedsim.plugins.remote.mirror import push
    from fedsim.recording.reader import load_run
    from fedsim.recording.recovery import check_places
    from fedsim.terminal import ByteProgress, make_console

    load_run(run)
    check_places(run)
    console = make_console()
    with ByteProgress(console, f"copying {run}") as progress:
        size = push(run, Folder(url), progress=progress)
    text = f"copied: {format_bytes(size)} to {url}, which is up to date"
    console.print(text, markup=False, soft_wrap=True)


@click.command("fetch", cls=Command, short_help="copy a run from a URL and check every byte")
@url_argument
@click.argument("folder", type=Path, metavar="RUN", help="the run directory to make")
def fetch(url: str, folder: Path) -> None:
    """Copy a run from a URL or path into a folder that does not exist.

    Every file is checked against its checksum. The same command goes on where one was cut off.
    """
    from fedsim.plugins.remote.mirror import fetch
    from fedsim.terminal import ByteProgress, make_console

    console = make_console()
    with ByteProgress(console, f"fetching {url}") as progress:
        rounds = fetch(url, folder, progress)
    # The untrained model is not counted, as everywhere.
    text = f"fetched: {max(rounds - 1, 0)} rounds into {folder}"
    console.print(text, markup=False, soft_wrap=True)


COMMANDS = [collect, push, fetch]
