from __future__ import annotations

import fcntl
import io
import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from fedsim.cli import run as command
from fedsim.core.errors import InputError, RunFailedError
from fedsim.core.units import format_bytes
from fedsim.flower.client_app import app
from fedsim.flower.server_app import execute
from fedsim.recording.checksums import checksum_line, read_checksums
from fedsim.recording.layout import is_removable
from fedsim.recording.reader import load_run
from fedsim.recording.recovery import find_recovery
from fedsim.recording.runs import find_run, find_runs, remove_gradients, remove_run
from fedsim.recording.verify import verify
from tests.local_grid import LocalGrid
from tests.observers import Memory
from tests.recording.conftest import Recorded


def contents(root: Path) -> dict[str, bytes | str]:
    """Give all that is below a folder: files, links with where they lead, empty folders."""
    found: dict[str, bytes | str] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        else:
            found[name] = path.read_bytes() if path.is_file() else "folder"
    return found


def begun(root: Path, created: str, **changes: str) -> Path:
    """Date a run, and change its status."""
    manifest = json.loads((root / "run.json").read_bytes())
    (root / "run.json").write_text(json.dumps({**manifest, "created": created, **changes}))
    return root


@contextmanager
def locked(path: Path) -> Iterator[None]:
    with path.open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture
def folder(recorded: Recorded, tmp_path: Path) -> Path:
    """Four runs, one of them a cell of a comparison, and much that is none."""
    root = tmp_path / "runs"
    for name, created, status in (
        ("b", "2026-01-01T00:00:00+00:00", "finished"),
        ("a", "2026-01-02T00:00:00+00:00", "running"),
        ("grid/seed=1", "2026-01-03T00:00:00+00:00", "failed"),
        ("c", "2026-01-04T00:00:00+00:00", "running"),
    ):
        begun(Path(shutil.copytree(recorded.path, root / name)), created, status=status)
    (root / "grid/compare.json").write_text("{}")
    (root / "grid/lock").touch()
    (root / "linked").symlink_to("b")
    (root / "grid/linked").symlink_to("../b")
    (root / "configs").mkdir()
    shutil.copy(recorded.path / "run.json", root / "configs")
    shutil.copytree(recorded.path, root / "too/deep/run")
    (root / "notes.txt").write_text("mine")
    return root


def test_runs_are_listed_with_what_they_are_and_take(folder: Path, recorded: Recorded) -> None:
    with locked(folder / "c/lock"):
        found = find_runs(folder)
    assert [str(run.path.relative_to(folder)) for run in found] == ["b", "a", "grid/seed=1", "c"]
    assert [run.state for run in found] == ["finished", "killed", "failed", "running"]
    files = {p: p.stat().st_size for p in (folder / "b").rglob("*") if p.is_file()}
    gradients = sum(size for path, size in files.items() if path.name.startswith("gradients-"))
    steps = sum(row["num_steps_captured"] for row in load_run(folder / "b").client_rows)
    assert gradients > steps * 78_184
    assert (found[0].size, found[0].gradients) == (sum(files.values()), gradients)
    assert (found[0].rounds, found[0].rounds_asked) == (2, 2)
    assert (found[0].strategy, found[0].created) == ("delta-fedavg", "2026-01-01T00:00:00+00:00")
    assert find_runs(folder / "configs") == []


def test_a_run_is_no_folder_of_runs(folder: Path) -> None:
    with pytest.raises(InputError, match="b is a run itself; expected a folder of runs"):
        find_runs(folder / "b")


def test_a_run_is_removed_and_nothing_else(folder: Path) -> None:
    before = contents(folder)
    (folder / "b/tensorboard").mkdir()
    (folder / "b/tensorboard/events.out").write_text("event")
    (folder / "b/run.json.17.partial").write_text("{")
    size = find_run(folder / "b").size
    assert remove_run(folder / "b") == size
    assert not (folder / "b").exists()
    assert contents(folder) == {n: c for n, c in before.items() if n.split("/")[0] != "b"}


def a_file(run: Path) -> Path:
    (run / "notes.txt").write_text("mine")
    return run / "notes.txt"


def a_file_of_a_client(run: Path) -> Path:
    path = run / "rounds/0001/clients/0002/attack.png"
    path.write_bytes(b"mine")
    return path


def a_folder(run: Path) -> Path:
    (run / "rounds/0001/exports").mkdir()
    return run / "rounds/0001/exports"


def a_link_to_a_folder(run: Path) -> Path:
    shutil.move(run / "rounds/0001/clients", run.parent / "elsewhere")
    (run / "rounds/0001/clients").symlink_to(run.parent / "elsewhere")
    return run / "rounds/0001/clients"


def a_link_to_a_file(run: Path) -> Path:
    path = run / "rounds/0002/clients/0001/gradients-00000.safetensors"
    path.rename(run.parent / "mine")
    path.symlink_to(run.parent / "mine")
    return path


ODD = [a_file, a_file_of_a_client, a_folder, a_link_to_a_folder, a_link_to_a_file]


@pytest.mark.parametrize("remove", [remove_run, remove_gradients])
@pytest.mark.parametrize("add", ODD)
def test_a_run_with_anything_of_the_users_in_it_is_left_as_it_is(
    add: Callable[[Path], Path], remove: Callable[[Path], int], folder: Path
) -> None:
    odd = add(folder / "b")
    before = contents(folder)
    with pytest.raises(InputError) as caught:
        remove(folder / "b")
    assert str(caught.value) == (
        f"{odd} is not something that a run writes; move it out of {folder / 'b'} first"
    )
    assert contents(folder) == before


@pytest.mark.parametrize("remove", [remove_run, remove_gradients])
def test_what_somebody_writes_is_left_as_it_is(remove: Callable[[Path], int], folder: Path) -> None:
    before = contents(folder)
    with (
        locked(folder / "c/lock"),
        pytest.raises(InputError, match=r"c is being written by another process"),
    ):
        remove(folder / "c")
    with (
        locked(folder / "grid/lock"),
        pytest.raises(InputError, match=r"grid is in use by another comparison"),
    ):
        remove(folder / "grid/seed=1")
    assert contents(folder) == before
    remove(folder / "grid/seed=1")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("linked", "is a symbolic link; expected the run directory itself"),
        ("grid", "is not a run directory: it has no whole run.json"),
        ("configs", "is not a run directory: it has no checksums.jsonl"),
        ("notes.txt", "is not a run directory: it has no whole run.json"),
        ("none", "is not a run directory: it has no whole run.json"),
    ],
)
def test_what_is_no_run_is_refused_before_anything_is_removed(
    name: str, told: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(folder)
    assert command(["runs", "--yes", "--remove", str(folder / "b"), str(folder / name)]) == 2
    assert capsys.readouterr().err == f"fedsim: {folder / name} {told}\n"
    assert contents(folder) == before


def test_a_removal_that_was_stopped_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(path: Path) -> None:
        (path / "0001/global.safetensors").unlink()
        raise PermissionError(13, "Permission denied", str(path / "0002"))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", stopped)
        with pytest.raises(RunFailedError, match=r"b/rounds/0002 cannot be removed: Permission"):
            remove_run(folder / "b")
    assert find_run(folder / "b").state == "finished"
    remove_run(folder / "b")
    assert not (folder / "b").exists()


# --- gradients


def test_a_run_without_its_gradients_is_whole_in_everything_else(
    recorded: Recorded, copied: Path
) -> None:
    before = contents(copied)
    kept = {n: c for n, c in before.items() if not is_removable(n) and n != "checksums.jsonl"}
    assert len(before) - len(kept) > 6
    size = find_run(copied).gradients
    assert remove_gradients(copied) == size
    assert (find_run(copied).gradients, remove_gradients(copied)) == (0, 0)
    after = contents(copied)
    assert {n: c for n, c in after.items() if n != "checksums.jsonl"} == kept

    findings = verify(copied, recompute=2)
    assert findings.violations == []
    assert findings.checks["aggregate"].proven == 2
    assert findings.checks["replay"].proven == findings.checks["gradients"].proven == 0
    told = "of gradients were removed to make room; `fedsim collect` brings them from a copy"
    # Training again takes no gradients.
    assert findings.checks["recomputed"].proven >= 2
    for check in ("files", "replay", "gradients"):
        assert any(told in reason for reason in findings.checks[check].unproven)

    client = load_run(copied).round(1).client(0)
    whole = load_run(recorded.path).round(1).client(0)
    assert client.steps == whole.steps
    assert client.delta["1.weight"].equal(whole.delta["1.weight"])
    for ask in (lambda: client.gradient(0), lambda: client.parameters_at(1), client.replay):
        with pytest.raises(InputError) as caught:
            next(iter(ask()))  # type: ignore[call-overload]
        assert str(caught.value) == (
            "gradients of client 0 in round 1 were removed to make room; `fedsim collect` brings "
            "them from a copy"
        )


def test_a_run_without_its_gradients_is_continued(recorded: Recorded, copied: Path) -> None:
    remove_gradients(copied)
    removed = load_run(copied).removed
    config = recorded.plan.config.model_copy(update={"rounds": 3})
    recovery = find_recovery(copied)
    assert (recovery.round, recovery.damage) == (2, [])
    execute(
        LocalGrid(app, config.clients, recordings=copied.parent),
        replace(recorded.plan, config=config),
        copied,
        observer=Memory(),
        workers=2,
        stop=threading.Event(),
        recovery=recovery,
    )
    run = load_run(copied)
    assert run.removed == removed
    # The new round has its own.
    assert run.round(3).client(run.round(3).participants[0]).captured_steps[0] == 0
    findings = verify(copied)
    assert findings.violations == []
    assert findings.checks["replay"].proven > 0


@pytest.mark.parametrize("name", ["delta.safetensors", "steps.jsonl"])
def test_nothing_but_gradients_may_be_said_to_be_removed(name: str, copied: Path) -> None:
    """A forger who removes what betrays him says that it was removed to make room."""
    gone = f"rounds/0002/clients/{load_run(copied).round(2).participants[0]:04d}/{name}"
    lines = list(read_checksums(copied / "checksums.jsonl"))
    sealed = [
        checksum_line(line.files, removed=[gone] if gone in line.files else ()) for line in lines
    ]
    (copied / "checksums.jsonl").write_bytes(b"".join(sealed))
    (copied / gone).unlink()
    assert f"{gone} is not there" in verify(copied).violations
    assert find_recovery(copied).round == 1


def test_a_removal_of_gradients_that_was_stopped_goes_on(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink, size = Path.unlink, find_run(copied).gradients
    calls = []

    def stopped(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith("gradients-"):
            calls.append(path)
            if len(calls) == 3:
                raise PermissionError(13, "Permission denied", str(path))
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", stopped)
        with pytest.raises(RunFailedError, match="cannot be removed: Permission denied"):
            remove_gradients(copied)
    assert 0 < find_run(copied).gradients < size
    assert verify(copied).violations == []
    remove_gradients(copied)
    assert find_run(copied).gradients == 0
    assert verify(copied).violations == []


# --- the command


def gradients_of(folder: Path) -> dict[str, bool]:
    found = {str(run.path.relative_to(folder)): run.gradients > 0 for run in find_runs(folder)}
    return {name: found[name] for name in sorted(found)}


def test_gradients_of_all_but_the_newest_are_removed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "b/notes.txt").write_text("mine")
    with locked(folder / "c/lock"):
        assert command(["runs", str(folder), "--keep-gradients-of", "2", "--yes"]) == 0
    streams = capsys.readouterr()
    assert streams.err == (
        f"fedsim: {folder / 'b/notes.txt'} is not something that a run writes; move it out of "
        f"{folder / 'b'} first; its gradients stay\n"
    )
    assert f"removed: the gradients of {folder / 'a'}, 3.1 MB\n" in streams.out
    assert gradients_of(folder) == {"a": False, "b": True, "c": True, "grid/seed=1": True}
    (folder / "b/notes.txt").unlink()
    with locked(folder / "c/lock"):
        assert command(["runs", str(folder), "--keep-gradients-of", "0", "--yes"]) == 0
    assert "c is being written by another process" in capsys.readouterr().err
    assert gradients_of(folder) == {"a": False, "b": False, "c": True, "grid/seed=1": False}
    assert command(["runs", str(folder), "--keep-gradients-of", "1", "--yes"]) == 0
    assert capsys.readouterr().out.endswith("nothing was removed\n")
    assert command(["runs", str(folder), "--keep-gradients-of", "-1"]) == 2


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("answer", ["y\n", "n\n", "\n", None])
def test_nothing_is_removed_that_nobody_agreed_to(
    answer: str | None,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = contents(folder)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n") if answer is None else Terminal(answer))
    code = command(["runs", "--remove", str(folder / "b"), str(folder / "grid/seed=1")])
    streams = capsys.readouterr()
    if answer == "y\n":
        assert (code, gradients_of(folder).keys()) == (0, {"a", "c"})
        return
    assert contents(folder) == before
    assert "2 runs, " in streams.out
    if answer is None:
        assert code == 2
        assert streams.err == (
            "fedsim: removing asks first, and there is no terminal to ask at; --yes removes "
            "without asking\n"
        )
    else:
        assert (code, streams.out.endswith("nothing was removed\n")) == (0, True)


def test_the_list_is_for_people(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder.parent)
    assert command(["runs"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "run state rounds strategy created (UTC) size gradients"
    size = format_bytes(find_run(folder / "b").size)
    assert lines[1] == f"runs/b finished 2/2 delta-fedavg 2026-01-01 00:00 {size} 3.1 MB"
    total = format_bytes(sum(run.size for run in find_runs(folder)))
    assert lines[-1] == f"4 runs, {total}, of which 12.3 MB gradients"
    monkeypatch.chdir(folder / "configs")
    assert command(["runs"]) == 0
    assert capsys.readouterr().out == "0 runs, 0 B, of which 0 B gradients\n"
    assert command(["runs", "none"]) == 2
    assert capsys.readouterr().err == "fedsim: none cannot be read: No such file or directory\n"
