"""What is refused before an engine starts; with real namespaces where this machine has them."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from fedsim.core.errors import InputError
from fedsim.flower import preflight
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]


def unshared(*kinds: str) -> list[str]:
    """Give what a command is prefixed with to run in namespaces of its own."""
    prefix = ["unshare", *kinds]
    try:
        done = subprocess.run([*prefix, "true"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("this machine has no unshare")
    if done.returncode:
        pytest.skip(f"this machine lets no test make a namespace: {done.stderr}")
    return prefix


def test_without_loopback_nothing_is_started(tmp_path: Path) -> None:
    program = "from fedsim.flower.preflight import check_machine; check_machine(1)"
    done = subprocess.run(
        [*unshared("--net"), sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=PATIENCE,
    )
    said = "InputError: the address 127.0.0.1 cannot be reached on this machine (Network is unreach"
    assert said in done.stderr


def test_a_read_only_disk_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    program = f"""
from pathlib import Path
from fedsim.core.errors import InputError
from fedsim.flower.preflight import *
for call, path in ((check_can_be_made, "new/run"), (check_can_be_written, "run")):
    try:
        call(Path({str(tmp_path)!r}) / path)
    except InputError as error:
        print(error)
"""
    mount = f"mount --bind {tmp_path} {tmp_path} && mount -o remount,bind,ro {tmp_path} && exec"
    done = subprocess.run(
        [*unshared("--mount"), "sh", "-c", f'{mount} "$@"', "sh", sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if "mount:" in done.stderr:
        pytest.skip(f"this machine lets no test mount: {done.stderr}")
    assert done.stdout.splitlines() == [
        f"output = '{tmp_path}/new/run' cannot be made: Read-only file system",
        f"{tmp_path}/run cannot be continued: nothing can be written there (Read-only file system)",
    ]


def test_a_folder_that_can_be_made_is_not_made(tmp_path: Path) -> None:
    preflight.check_can_be_made(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/run' cannot be made: Not a directory"):
        preflight.check_can_be_made(tmp_path / "file" / "run")


def test_too_few_files_are_refused_and_a_soft_limit_is_raised() -> None:
    program = """
import resource
from fedsim.core.errors import InputError
from fedsim.flower.preflight import _check_handles
resource.setrlimit(resource.RLIMIT_NOFILE, (30, 5000))
_check_handles(4)
print(resource.getrlimit(resource.RLIMIT_NOFILE))
resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30))
try:
    _check_handles(4)
except InputError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.splitlines() == [
        "(4096, 5000)",
        "this process may open 30 files and 4 workers need 64; `ulimit -n 64` allows them",
    ]


def test_a_temporary_folder_without_room_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_ROOM", 10**18)
    with pytest.raises(InputError, match=r"free and Ray needs 1000000\.0 TB; TMPDIR names"):
        preflight.check_machine(1)


def test_what_can_be_used_is_not_refused() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    preflight.check_machine(1)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] == before[1]
