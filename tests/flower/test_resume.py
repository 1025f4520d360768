from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedsim import cli
from fedsim.core.config import RunConfig
from fedsim.core.errors import FedsimError, InputError
from fedsim.core.plan import RunPlan
from fedsim.flower.client_app import app
from fedsim.flower.machine import device_of
from fedsim.flower.server_app import check_resume, execute, manifest_of, versions
from fedsim.recording.checksums import checksum_line
from fedsim.recording.files import Checksum, read_lines
from fedsim.recording.reader import load_run
from fedsim.recording.recovery import Recovery, find_recovery
from fedsim.recording.verify import verify
from fedsim.recording.writer import RunWriter, is_being_written
from tests import fuzz
from tests.local_grid import LocalGrid
from tests.observers import Memory
from tests.patience import PATIENCE

ROUNDS = 4
VALUES = {
    "dataset": "synthetic:96:4",
    "model": "cnn",
    "clients": 4,
    "clients-per-round": 3,
    "rounds": ROUNDS,
    "batch-size": 8,
    "capture": "all",
    "device": "cpu",
}


@pytest.fixture(scope="module")
def plan() -> RunPlan:
    return RunPlan.prepare(RunConfig.from_mapping(VALUES))


def go(plan: RunPlan, path: Path, *, before: Any = None, resume: bool = False) -> Memory:
    observer = Memory()
    execute(
        LocalGrid(app, plan.config.clients, before=before, recordings=path.parent),
        plan,
        path,
        observer=observer,
        workers=2,
        stop=threading.Event(),
        recovery=find_recovery(path) if resume else None,
    )
    return observer


def fail_in(number: int, partition: int) -> Any:
    def before(here: int, message: Any) -> None:
        if message.metadata.message_type != "train" or here != partition:
            return
        if int(message.content.config_records["config"]["server-round"]) == number:
            raise ValueError("enough")

    return before


def contents(path: Path) -> dict[str, bytes]:
    """All recorded tensors, which must not depend on how often the run was stopped."""
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def whole(plan: RunPlan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "run"
    go(plan, path)
    return path


def hashes(path: Path) -> list[str]:
    return [row["state_sha256"] for row in read_lines(path / "rounds.jsonl")]


@pytest.mark.parametrize(("number", "position"), [(1, 0), (2, 2), (4, 1)])
def test_a_run_that_failed_anywhere_resumes_to_the_same_bytes(
    plan: RunPlan, whole: Path, tmp_path: Path, number: int, position: int
) -> None:
    partition = plan.config.participants_of(number)[position]
    with pytest.raises(FedsimError, match="enough"):
        go(plan, tmp_path / "run", before=fail_in(number, partition))
    assert verify(tmp_path / "run").violations == []
    observer = go(plan, tmp_path / "run", resume=True)
    assert [event[1] for event in observer.of("round finished")] == list(range(number, ROUNDS + 1))
    assert hashes(tmp_path / "run") == hashes(whole)
    assert contents(tmp_path / "run") == contents(whole)
    findings = verify(tmp_path / "run")
    assert findings.violations == []
    assert findings.checks["replay"].proven == verify(whole).checks["replay"].proven


def test_a_run_stopped_in_every_round_ends_the_same(
    plan: RunPlan, whole: Path, tmp_path: Path
) -> None:
    for number in range(1, ROUNDS + 1):
        partition = plan.config.participants_of(number)[-1]
        with pytest.raises(FedsimError, match="enough"):
            go(plan, tmp_path / "run", before=fail_in(number, partition), resume=number > 1)
    go(plan, tmp_path / "run", resume=True)
    assert contents(tmp_path / "run") == contents(whole)
    assert verify(tmp_path / "run").violations == []


def test_a_finished_run_can_be_extended(plan: RunPlan, whole: Path, tmp_path: Path) -> None:
    short = replace(plan, config=plan.config.model_copy(update={"rounds": 2}))
    go(short, tmp_path / "run")
    go(plan, tmp_path / "run", resume=True)
    assert contents(tmp_path / "run") == contents(whole)
    assert verify(tmp_path / "run").violations == []


@pytest.mark.parametrize("cut", [1, 20, -1])
def test_a_torn_row_is_dropped(plan: RunPlan, whole: Path, tmp_path: Path, cut: int) -> None:
    """As a kill in the middle of writing the last row leaves it."""
    with pytest.raises(FedsimError, match="enough"):
        go(plan, tmp_path / "run", before=fail_in(4, plan.config.participants_of(4)[0]))
    rows = tmp_path / "run" / "rounds.jsonl"
    lines = rows.read_bytes().splitlines(keepends=True)
    rows.write_bytes(b"".join(lines[:-1]) + lines[-1][:cut])
    observer = go(plan, tmp_path / "run", resume=True)
    assert observer.of("round finished")[0][1] == 3
    assert contents(tmp_path / "run") == contents(whole)
    assert verify(tmp_path / "run").violations == []


@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
@pytest.mark.parametrize(
    "name",
    [
        "global.safetensors",
        "clients/P/gradients-00000.safetensors",
        "clients/P/steps.jsonl",
    ],
)
def test_a_damaged_last_round_is_made_again(
    plan: RunPlan, whole: Path, tmp_path: Path, name: str, damage: str
) -> None:
    with pytest.raises(FedsimError, match="enough"):
        go(plan, tmp_path / "run", before=fail_in(3, plan.config.participants_of(3)[0]))
    name = f"rounds/0002/{name}".replace("/P/", f"/{plan.config.participants_of(2)[0]:04d}/")
    damage_file(tmp_path / "run" / name, damage)
    recovery = find_recovery(tmp_path / "run")
    told = "cannot be read: No such file or directory" if damage == "delete" else "is not what"
    assert recovery.round == 1
    assert recovery.damage[0].startswith(f"{name} {told}")
    observer = go(plan, tmp_path / "run", resume=True)
    assert [event[1] for event in observer.of("round finished")] == [2, 3, 4]
    assert contents(tmp_path / "run") == contents(whole)
    assert verify(tmp_path / "run").violations == []
    resumed = json.loads((tmp_path / "run/run.json").read_bytes())["resumed"]
    assert resumed == [{"after": 1, "versions": versions(), "device": device_of(plan)}]


def damage_file(path: Path, damage: str) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flip" else content[:-3])


@pytest.mark.parametrize("name", ["rounds.jsonl", "clients.jsonl"])
def test_rows_that_were_changed_make_their_round_be_made_again(
    plan: RunPlan, whole: Path, tmp_path: Path, name: str
) -> None:
    with pytest.raises(FedsimError, match="enough"):
        go(plan, tmp_path / "run", before=fail_in(3, plan.config.participants_of(3)[0]))
    path = tmp_path / "run" / name
    lines = path.read_bytes().splitlines(keepends=True)
    # The last row of round 2; what comes after it in clients.jsonl are those of round 3.
    row = max(i for i, line in enumerate(lines) if b'"round":2,' in line)
    lines[row] = lines[row].replace(b'"round":2,', b'"round":2 ,')
    path.write_bytes(b"".join(lines))
    assert find_recovery(tmp_path / "run").damage == [f"{name} is not what was written"]
    go(plan, tmp_path / "run", resume=True)
    assert contents(tmp_path / "run") == contents(whole)
    assert verify(tmp_path / "run").violations == []


def test_damage_before_the_last_round_is_left_to_verify(
    plan: RunPlan, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(FedsimError, match="enough"):
        go(plan, tmp_path / "run", before=fail_in(4, plan.config.participants_of(4)[0]))
    path = tmp_path / "run/rounds/0001/aggregate.safetensors"
    path.unlink()
    assert find_recovery(tmp_path / "run").round == 3
    go(plan, tmp_path / "run", resume=True)
    assert hashes(tmp_path / "run") == hashes(whole)
    (violation, *_) = verify(tmp_path / "run").violations
    assert "rounds/0001/aggregate.safetensors" in violation


@pytest.fixture(scope="module")
def scaffold(plan: RunPlan) -> RunPlan:
    # Client 0 sits out rounds 2 and 3, and begins round 4 with what it kept in round 1.
    participants = [[0, 1], [1, 2], [2, 3], [0, 3]]
    changes = {"strategy": "scaffold", "participants": participants, "capture": "none"}
    return replace(plan, config=RunConfig.from_mapping({**VALUES, **changes}))


@pytest.fixture(scope="module")
def of_scaffold(
    scaffold: RunPlan, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, bytes], Path]:
    """All tensors of the run, and a copy of it that failed in round 4."""
    folder = tmp_path_factory.mktemp("scaffold")
    go(scaffold, folder / "whole")
    with pytest.raises(FedsimError, match="enough"):
        go(scaffold, folder / "failed", before=fail_in(4, 3))
    return contents(folder / "whole"), folder / "failed"


@pytest.mark.parametrize(
    ("number", "partition", "damage", "after"),
    [(1, 0, "flip", 0), (1, 0, "delete", 0), (2, 1, "cut", 1), (1, 1, "flip", 3)],
)
def test_what_a_client_begins_its_next_round_with_must_be_whole(
    scaffold: RunPlan,
    of_scaffold: tuple[dict[str, bytes], Path],
    tmp_path: Path,
    number: int,
    partition: int,
    damage: str,
    after: int,
) -> None:
    tensors, failed = of_scaffold
    path = Path(shutil.copytree(failed, tmp_path / "run"))
    name = f"rounds/{number:04d}/clients/{partition:04d}/control.safetensors"
    damaged = path / name
    damage_file(damaged, damage)
    left = damaged.read_bytes() if damaged.exists() else b""
    recovery = find_recovery(path)
    told = "cannot be read: No such file or directory" if damage == "delete" else "is not what"
    assert recovery.round == after
    # Client 1 trained once more in round 2: what it kept before, nothing depends on.
    assert [line.startswith(f"{name} {told}") for line in recovery.damage] == [True] * (after < 3)
    go(scaffold, path, resume=True)
    assert contents(path) == (tensors if after < 3 else {**tensors, name: left})


def test_a_run_that_was_killed_after_its_last_row_is_finished_by_a_resume(
    plan: RunPlan, whole: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(whole, tmp_path / "run"))
    with pytest.raises(InputError, match="the rounds before exist"):
        check_resume(load_run(path), plan)
    manifest = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**manifest, "status": "running"}))
    fuzz.reseal(path)
    assert check_resume(load_run(path), plan).round == ROUNDS
    assert go(plan, path, resume=True).of("round finished") == []
    assert load_run(path).status == "finished"
    assert contents(path) == contents(whole)
    assert verify(path).violations == []


def test_the_cause_is_told_whatever_became_of_the_rows(plan: RunPlan, tmp_path: Path) -> None:
    fail = fail_in(3, plan.config.participants_of(3)[0])

    def spoil_and_fail(here: int, message: Any) -> None:
        if not spoiled and message.metadata.message_type == "train":
            spoiled.append(here)
            with (tmp_path / "run/rounds.jsonl").open("ab") as rows:
                rows.write(b"garbage\n")
        fail(here, message)

    go(replace(plan, config=plan.config.model_copy(update={"rounds": 2})), tmp_path / "run")
    spoiled: list[int] = []
    with pytest.raises(FedsimError, match="enough"):
        go(plan, tmp_path / "run", before=spoil_and_fail, resume=True)
    assert load_run(tmp_path / "run").status == "failed"
    assert "enough" in load_run(tmp_path / "run").manifest["error"]


def test_a_run_does_not_end_with_a_round_that_was_not_evaluated(
    plan: RunPlan, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    seldom = replace(plan, config=plan.config.model_copy(update={"evaluate_every": 4}))
    with pytest.raises(FedsimError, match="enough"):
        go(seldom, path, before=fail_in(4, plan.config.participants_of(4)[0]))
    lower = replace(seldom, config=seldom.config.model_copy(update={"rounds": 3}))
    with pytest.raises(InputError) as refused:
        check_resume(load_run(path), lower)
    assert str(refused.value) == (
        "rounds = 3 cannot be used; expected 4 or more: round 3 was not evaluated "
        "(evaluate-every = 4)"
    )
    assert check_resume(load_run(path), seldom).round == 3


def test_rows_of_any_length_take_little_memory(tmp_path: Path) -> None:
    for name, size in (("rounds.jsonl", 2**29), ("clients.jsonl", 0)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    names = ("rounds.jsonl", "clients.jsonl")
    line = checksum_line({name: Checksum.of_file(tmp_path / name) for name in names})
    (tmp_path / "checksums.jsonl").write_bytes(line)
    tracemalloc.start()
    with pytest.raises(InputError, match=r"rounds.jsonl cannot be read: a line has more than"):
        find_recovery(tmp_path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2**27


def test_the_second_writer_of_a_run_is_refused(plan: RunPlan, tmp_path: Path) -> None:
    path = tmp_path / "run"
    first = RunWriter.create(path, manifest_of(plan), plan.partition)
    with pytest.raises(InputError, match="is being written by another process"):
        RunWriter.reopen(path, plan.config.to_mapping(), plan.partition, Recovery(0, 1, []), {}, {})
    assert is_being_written(path)
    del first
    # The kernel gives the lock back.
    assert not is_being_written(path)


@pytest.mark.parametrize("left", ["run.json", "partition.safetensors", "rounds/0000"])
def test_a_run_killed_before_its_first_round_begins_again(
    plan: RunPlan, whole: Path, tmp_path: Path, left: str
) -> None:
    """`left` is the last thing that was written."""
    path = tmp_path / "run"
    writer = RunWriter.create(path, manifest_of(plan), plan.partition)
    if left == "rounds/0000":
        writer.add_state(0, plan.initial_state)
    del writer
    if left == "run.json":
        for name in ("partition.safetensors", "rounds.jsonl", "clients.jsonl"):
            (path / name).unlink()
        lines = (path / "checksums.jsonl").read_bytes().splitlines(keepends=True)
        (path / "checksums.jsonl").write_bytes(lines[0])
    assert find_recovery(path) == Recovery(-1, 0, [])
    go(plan, path, resume=True)
    assert contents(path) == contents(whole)
    assert verify(path).violations == []


def test_a_run_whose_rounds_are_all_damaged_is_not_begun_again(
    plan: RunPlan, whole: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    shutil.copytree(whole, path)
    (path / "rounds.jsonl").write_bytes(b"")
    with pytest.raises(InputError, match="holds no whole round: rounds"):
        find_recovery(path)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "rounds = 4 cannot be used; expected 5 or more"),
        (["--rounds", "3"], "rounds = 3 cannot be used; expected 5 or more"),
        (["--rounds", "9", "--seed", "1"], "seed = 1 cannot be used; expected 42"),
        (["--rounds", "9", "--model", "resnet18"], "model = 'resnet18' cannot be used; expected "),
        (["--rounds", "9", "--capture-budget", "9 kB"], "capture-budget = '9 kB' cannot be used"),
        (["--rouns", "9"], "perhaps rounds"),
    ],
)
def test_what_would_change_a_run_is_refused(
    whole: Path, capsys: pytest.CaptureFixture[str], flags: list[str], sentence: str
) -> None:
    before = contents(whole)
    assert cli.run(["resume", str(whole), *flags]) == 2
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] in ([], ["preparing"])
    assert sentence in err
    assert err.count("\n") == 1
    assert contents(whole) == before


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["resume", str(tmp_path)]) == 2
    assert "is not a run directory" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_whose_processes_were_all_killed_resumes_to_the_same_state(
    whole: Path, tmp_path: Path
) -> None:
    flags = [f"--{name}={value}" for name, value in VALUES.items()]

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "fedsim", *arguments],
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    process = start("run", *flags, "--output", f"{tmp_path}/run")
    rows = tmp_path / "run" / "rounds.jsonl"
    end = time.monotonic() + PATIENCE
    while not rows.exists() or rows.read_bytes().count(b"\n") < 2:
        assert time.monotonic() < end
        time.sleep(0.01)
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait(PATIENCE)
    assert verify(tmp_path / "run").violations == []
    assert start("resume", f"{tmp_path}/run").wait(PATIENCE) == 0
    assert hashes(tmp_path / "run") == hashes(whole)
    assert contents(tmp_path / "run") == contents(whole)
    assert verify(tmp_path / "run").violations == []
