"""Where a process may record a run: below a folder of its own choice, never where it is told."""

from __future__ import annotations

import datetime
import functools
import os
import re
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

from fedsim.core.errors import InputError, shorten
from fedsim.core.inputs import parse_json, read_text_bytes

RUN_ID = r"[0-9]{8}-[0-9]{6}-[0-9a-f]{8}"
"""What the id of a run looks like: when it was made (UTC), and 32 bits of chance."""


def new_run_id() -> str:
    """Make an id by which hosts that share no disk know a run."""
    now = datetime.datetime.now(datetime.UTC)
    return f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"


def dated_name() -> str:
    """Make a default name: the local time, and 32 bits of chance.

    Runs that are started in the same second, on any host, have different ones.
    """
    return f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"


@dataclass(frozen=True)
class Place:
    """Where a client leaves its files of a run.

    Parameters
    ----------
    root : Path
        The run directory, or a folder of the same layout on the client's own disk.
    is_run : bool
        Whether it is the run directory itself.
    """

    root: Path
    is_run: bool


def place_of_run(recordings: Path, name: str, run_id: str) -> Place:
    """Find the place of a run below the folder that a host records into.

    It is the run directory where that is in it, and a folder named by the id of the run
    otherwise.

    Parameters
    ----------
    recordings : Path
        The host's folder.
    name : str
        What the run directory is called on the server's disk.
    run_id : str
        ``id`` of its ``run.json``.

    Raises
    ------
    InputError
        When one of the two names leads out of the folder.
    """
    if not re.fullmatch(RUN_ID, run_id):
        raise InputError(
            f"run-id = {shorten(run_id)} cannot be used; expected the id of a run, "
            "like 20261123-140000-0a1b2c3d"
        )
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise InputError(
            f"run = {shorten(name)} cannot be used; expected the plain name of a folder"
        )
    recordings = recordings.resolve()
    if _is_run(recordings / name, run_id):
        return Place(recordings / name, is_run=True)
    folder = recordings / run_id
    if _is_link(folder):
        raise InputError(f"{folder} is a symbolic link, which may lead out of {recordings}")
    return Place(folder, is_run=False)


@functools.lru_cache(maxsize=8)
def _is_run(folder: Path, run_id: str) -> bool:
    try:
        found: object = parse_json(read_text_bytes(folder / "run.json"))["id"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return found == run_id and not _is_link(folder)


def _is_link(path: Path) -> bool:
    try:
        return stat.S_ISLNK(os.lstat(path).st_mode)
    except OSError:
        return False
