"""Real processes, really killed."""

import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from fedsim.core.errors import InputError
from fedsim.flower import scratch
from fedsim.flower.scratch import VARIABLE, Scratch, place_of, stack_when_late, sweep
from tests.patience import PATIENCE

OWNER = """
import os, subprocess, sys
from fedsim.flower.scratch import Scratch
with Scratch() as scratch:
    (scratch.path / "a file").write_text("x")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE,
                             start_new_session=True)
    print(scratch.path, child.pid, scratch._janitor.pid, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def start():
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    path, child, janitor = owner.stdout.readline().split()
    return owner, Path(path), psutil.Process(int(child)), psutil.Process(int(janitor))


def is_gone(process):
    return process not in psutil.wait_procs([process], timeout=PATIENCE)[1]


def test_what_was_started_within_is_gone_at_the_end(folder):
    owner, path, child, janitor = start()
    assert (path / "a file").exists()
    owner.communicate("")
    assert owner.returncode == 0
    assert is_gone(child)
    assert is_gone(janitor)
    assert list(folder.iterdir()) == []


def test_the_janitor_tidies_up_after_an_owner_that_was_killed(folder):
    owner, _, child, janitor = start()
    owner.kill()
    owner.communicate()
    assert is_gone(child)
    assert is_gone(janitor)
    assert list(folder.iterdir()) == []


def test_the_next_run_tidies_up_where_the_janitor_was_killed_too(folder):
    owner, path, child, janitor = start()
    janitor.kill()
    owner.kill()
    owner.communicate()
    assert path.exists()
    assert child.is_running()
    with Scratch() as own:
        assert not path.exists()
        assert is_gone(child)
        assert list(folder.iterdir()) == [own.path]
    assert list(folder.iterdir()) == []


def test_a_folder_that_another_run_removes_before_it_is_locked_is_not_used(folder, monkeypatch):
    lock, removed = fcntl.flock, []

    def late(file, how):
        if how == fcntl.LOCK_EX and not removed:
            removed.append(file.name)
            sweep()
        lock(file, how)

    monkeypatch.setattr(scratch.fcntl, "flock", late)
    with Scratch() as own:
        assert list(folder.iterdir()) == [own.path]
        sweep()
        assert (own.path / "owner").exists()
    assert removed != [str(own.path / "owner")]
    assert list(folder.iterdir()) == []


def test_a_process_whose_parent_has_not_asked_for_its_end_is_not_waited_for():
    child = subprocess.Popen([sys.executable, "-c", ""])
    assert scratch._is_running(psutil.Process())
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert psutil.pid_exists(child.pid)
    assert not scratch._is_running(psutil.Process(child.pid))
    child.wait()


def test_what_is_alive_or_not_ours_is_left_alone(folder, tmp_path_factory):
    other = folder / "fedsim-other"
    other.mkdir()
    far = tmp_path_factory.mktemp("far")
    (far / "owner").touch()
    (folder / "fedsim-link").symlink_to(far)
    alive = folder / "fedsim-alive"
    alive.mkdir()
    with (alive / "owner").open("wb") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        sweep()
    names = ["fedsim-alive", "fedsim-link", "fedsim-other"]
    assert sorted(p.name for p in folder.iterdir()) == names
    assert (far / "owner").exists()
    sweep()
    assert sorted(p.name for p in folder.iterdir()) == names[1:]


def test_the_place_of_a_late_client_is_known(folder, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(folder))
    assert place_of(3) == ""
    with stack_when_late(3, 0.5):
        stack = os.open(folder / "stack-3.txt", os.O_RDONLY)
        # Other threads are written first: we stay here until our own place is there, too.
        while __file__.encode() not in os.pread(stack, 2**20, 0):
            pass
    os.close(stack)
    assert place_of(3).startswith(f'File "{__file__}", line ')
    assert place_of(3).endswith("in test_the_place_of_a_late_client_is_known")
    assert place_of(4) == ""


def test_who_has_no_limit_leaves_no_stack(folder, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(folder))
    with stack_when_late(3, None):
        assert list(folder.iterdir()) == []
    monkeypatch.delenv(VARIABLE)
    with stack_when_late(3, 0.05):
        assert list(folder.iterdir()) == []
    assert scratch.place_of(3) == ""


@pytest.mark.parametrize("name", ["a" * 60, "Zoë"])
def test_a_folder_with_a_long_or_foreign_path_has_a_short_name(folder, monkeypatch, name):
    (folder / name).mkdir()
    bases = folder / "bases"
    bases.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder / name))
    monkeypatch.setattr(scratch, "_BASES", [folder / "none", Path(os.path.relpath(bases))])
    with Scratch() as own:
        assert own.short.samefile(own.path)
        assert own.short.parent == Path(os.path.relpath(bases))
        # Of one that was killed with its janitor.
        (bases / "fedsim-dead").symlink_to(folder / "nowhere")
        sweep()
        assert [p.name for p in bases.iterdir()] == [own.short.name]
    assert list(bases.iterdir()) == []
    assert list((folder / name).iterdir()) == []


def test_a_short_path_needs_no_other(folder, monkeypatch):
    short = Path(tempfile.mkdtemp(prefix="fs-", dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    with Scratch() as own:
        assert own.short == own.path
    short.rmdir()


def test_where_no_short_name_can_be_had_it_is_refused_and_nothing_left(folder, monkeypatch):
    monkeypatch.setattr(scratch, "_BASES", [folder / "none"])
    monkeypatch.setattr(scratch, "_SHORT", 10)
    with pytest.raises(InputError, match="is too long for a socket or not ASCII"), Scratch():
        pass
    assert list(folder.iterdir()) == []
