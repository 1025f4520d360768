"""What a process may use, by real masks and groups where this machine lets a test make some."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fedsim.core.allowance import usable_cpus, usable_memory

MACHINE = psutil.virtual_memory().total
TELL = "from fedsim.core.allowance import *; print(usable_cpus(), usable_memory())"


def told(*prefix: str) -> tuple[int, int]:
    """Ask a process of its own, started by `prefix`."""
    done = subprocess.run(
        [*prefix, sys.executable, "-c", TELL], capture_output=True, text=True, check=True
    )
    cpus, memory = done.stdout.split()
    return int(cpus), int(memory)


def process_at(folder: Path, groups: str, mounts: str, files: dict[str, str]) -> Path:
    """Make what the kernel would say of a process in these groups."""
    for name, text in files.items():
        path = folder / "sys" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    process = folder / "process"
    process.mkdir()
    (process / "cgroup").write_text(groups)
    lines = []
    for number, mount in enumerate(mounts.splitlines()):
        root, place, kind, options = mount.split()
        at = f"{folder}/sys/{place}".replace(" ", "\\040")
        lines.append(f"{number} 1 0:3 {root} {at} rw,nosuid shared:9 - {kind} none {options}\n")
    (process / "mountinfo").write_text("5 1 8:1 / / rw - ext4 /dev/a rw\n" + "".join(lines))
    return process


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_one_core_of_the_mask_is_one_core() -> None:
    one = min(os.sched_getaffinity(0))
    program = f"import os; os.sched_setaffinity(0, [{one}]); {TELL}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split()[0] == "1", done.stderr


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [
        ("max 100000", 8),
        ("100000 100000", 1),
        ("140000 100000", 1),
        ("150000 100000", 2),
        ("20000 100000", 1),
        ("900000 100000", 8),
        ("300000 50000", 6),
        ("", 8),
    ],
)
def test_a_quota_bounds_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cpus: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    process = process_at(
        tmp_path,
        "0::/job/step\n",
        "/ . cgroup2 rw",
        {"job/step/cpu.max": quota, "job/cpu.max": "max 100000"},
    )
    assert usable_cpus(process) == cpus


def test_the_smallest_limit_above_a_process_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    process = process_at(
        tmp_path,
        "0::/job 1/step/task\n",
        "/ . cgroup2 rw",
        {
            "job 1/cpu.max": "200000 100000",
            "job 1/memory.max": "3000000",
            "job 1/step/cpu.max": "max 100000",
            "job 1/step/memory.max": "4000000",
            "job 1/step/task/memory.max": "max",
            "other/memory.max": "5",
        },
    )
    assert (usable_cpus(process), usable_memory(process)) == (2, 3_000_000)


@pytest.mark.parametrize(
    ("path", "root"),
    [
        ("/slurm/job", "/"),
        # A container without a namespace of its own sees its group as the top.
        ("/docker/abc", "/docker/abc"),
        # With one, what is outside of it.
        ("/../../x", "/"),
    ],
)
def test_the_first_version_has_a_hierarchy_for_each_controller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, root: str
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    inside = "slurm/job/" if path == "/slurm/job" else ""
    process = process_at(
        tmp_path,
        f"4:memory:{path}\n2:cpu,cpuacct:{path}\n1:name=systemd:{path}\n0::/\n",
        f"{root} cpu cgroup rw,cpu,cpuacct\n{root} memory cgroup rw,memory\n/ unified cgroup2 rw",
        {
            f"cpu/{inside}cpu.cfs_quota_us": "300000\n",
            f"cpu/{inside}cpu.cfs_period_us": "100000\n",
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
            f"memory/{inside}memory.limit_in_bytes": "2000000\n",
        },
    )
    assert (usable_cpus(process), usable_memory(process)) == (3, 2_000_000)


def test_without_limits_it_is_the_machine(tmp_path: Path) -> None:
    quota = {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}
    for folder in ("none", "minus"):
        (tmp_path / folder).mkdir()
    free = process_at(tmp_path / "minus", "2:cpu:/\n", "/ cpu cgroup rw,cpu", quota)
    for process in (free, tmp_path / "none"):
        assert usable_memory(process) == MACHINE
        assert usable_cpus(process) == len(os.sched_getaffinity(0))


@pytest.fixture
def group() -> Iterator[dict[str, Path]]:
    """Make real groups with a quota of one core and a limit of memory."""
    name = f"fedsim-test-{os.getpid()}"
    first, second = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/cgroup.controllers")
    made: dict[str, Path] = {}
    try:
        if second.exists():
            made = {"all": first / name}
            made["all"].mkdir()
            (made["all"] / "cpu.max").write_text("100000 100000")
            (made["all"] / "memory.max").write_text(str(2**31))
        else:
            for key in ("cpu", "memory"):
                (first / key / name).mkdir()
                made[key] = first / key / name
            (made["cpu"] / "cpu.cfs_quota_us").write_text("100000")
            (made["memory"] / "memory.limit_in_bytes").write_text(str(2**31))
        yield made
    except OSError as error:
        pytest.skip(f"this machine lets no test make a cgroup: {error}")
    finally:
        for folder in made.values():
            if folder.is_dir():
                folder.rmdir()


def test_a_real_group_bounds_both(group: dict[str, Path]) -> None:
    enter = "".join(f"echo $$ > {folder}/cgroup.procs && " for folder in group.values())
    assert told("sh", "-c", f'{enter} exec "$@"', "sh") == (1, 2**31)
