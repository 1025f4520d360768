"""How many CPU cores and how much memory this process may use, which is not what the machine has.

A batch system or a container gives a part of a machine: by an affinity mask, a cpuset (the kernel
takes it into the mask), a quota of processor time or a limit of memory. Counts of the machine, as
`os.cpu_count` gives them, start workers for cores that others use.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_SELF = Path("/proc/self")


def usable_cpus(process: Path = _SELF) -> int:
    """Count the CPU cores that this process may keep busy, at least 1.

    Parameters
    ----------
    process : Path
        The kernel's folder about this process.

    Returns
    -------
    int
        Cores of the affinity mask, or of the smallest quota above this process where that is
        less: 1.5 cores count as 2, 1.4 as 1. A worker takes its memory also where it gets little
        of a core.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        cores = os.cpu_count() or 1
    quotas = [quota for group in _groups(process) if (quota := group.cpus()) is not None]
    return max(1, min([cores, *(int(quota + 0.5) for quota in quotas)]))


def usable_memory(process: Path = _SELF) -> int:
    """Count the bytes of memory that this process and those that it starts may use together.

    Parameters
    ----------
    process : Path
        The kernel's folder about this process.

    Returns
    -------
    int
        The memory of the machine, or the smallest limit above this process.
    """
    limits = [limit for group in _groups(process) if (limit := group.memory()) is not None]
    return min([int(psutil.virtual_memory().total), *limits])


@dataclass(frozen=True)
class _Group:
    """A control group that this process is in, directly or by one above it.

    A file that is not there, or says ``max`` or -1, limits nothing.
    """

    folder: Path
    is_second_version: bool

    def cpus(self) -> float | None:
        if self.is_second_version:
            quota, period = (*self._numbers("cpu.max"), None, None)[:2]
        else:
            quota = next(iter(self._numbers("cpu.cfs_quota_us")), None)
            period = next(iter(self._numbers("cpu.cfs_period_us")), None)
        return quota / period if quota and period and quota > 0 else None

    def memory(self) -> int | None:
        name = "memory.max" if self.is_second_version else "memory.limit_in_bytes"
        return next(iter(self._numbers(name)), None)

    def _numbers(self, name: str) -> list[int | None]:
        try:
            words = (self.folder / name).read_text(encoding="ascii").split()
        except (OSError, ValueError):
            return []
        return [int(word) if re.fullmatch(r"-?[0-9]+", word) else None for word in words]


def _groups(process: Path) -> Iterator[_Group]:
    """Find the control groups of a process from its own up to the topmost one that it can see."""
    with contextlib.suppress(OSError):
        text = (process / "cgroup").read_text(encoding="utf-8", errors="surrogateescape")
        paths = {names: path for _, names, path in (x.split(":", 2) for x in text.splitlines())}
        for mount, root, controllers in _mounts(process):
            for names, path in paths.items():
                # The second version has one hierarchy for all controllers and names none.
                if names == "" if controllers is None else controllers & {*names.split(",")}:
                    for folder in _upwards(mount, root, path):
                        yield _Group(folder, is_second_version=controllers is None)


def _mounts(process: Path) -> Iterator[tuple[Path, str, set[str] | None]]:
    """Give where cgroup hierarchies are mounted, what of each, and whose; None for all."""
    text = (process / "mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    for line in text.splitlines():
        about, _, system = line.partition(" - ")
        _, _, _, root, mount, *_ = about.split()
        kind, _, options = system.split(maxsplit=2)
        if kind == "cgroup2":
            yield Path(_plain(mount)), _plain(root), None
        elif kind == "cgroup" and (own := {*options.split(",")} & {"cpu", "memory"}):
            yield Path(_plain(mount)), _plain(root), own


def _plain(text: str) -> str:
    """Undo how the kernel writes spaces in its list of mounts."""
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), text)


def _upwards(mount: Path, root: str, path: str) -> Iterator[Path]:
    # A container may see its own group as the top of what is mounted, under a path of the host.
    inside = "" if root == "/" else root
    below = path.removeprefix(inside).strip("/") if path.startswith(inside) else ""
    folder = mount / below
    if ".." in folder.parts or not folder.is_dir():
        folder = mount
    while True:
        yield folder
        if folder == mount:
            return
        folder = folder.parent
