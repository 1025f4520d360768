"""A run whose clients record on their own disks, before and after it is collected."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from fedsim.cli import run as fedsim
from fedsim.core.config import RunConfig
from fedsim.core.errors import InputError, RunFailedError
from fedsim.core.plan import RunPlan
from fedsim.flower.client_app import app
from fedsim.flower.server_app import execute
from fedsim.recording.checksums import read_checksums
from fedsim.recording.collect import collect
from fedsim.recording.findings import BUFFERS, Findings
from fedsim.recording.reader import load_run
from fedsim.recording.recovery import find_recovery
from fedsim.recording.row_proofs import NO_SHARDS
from fedsim.recording.verify import verify
from fedsim.recording.writer import RunWriter
from tests.local_grid import LocalGrid
from tests.observers import Memory
from tests.recording.conftest import Recorded


@pytest.fixture(scope="module")
def plan_of_all(plan: RunPlan) -> RunPlan:
    """Rounds of clients 2, 1, 3 and of 0, 1: each node takes part."""
    values = {k: v for k, v in plan.config.to_mapping().items() if v is not None}
    values |= {"participants": [[2, 1, 3], [0, 1]], "strategy": "delta-fedavg"}
    return replace(plan, config=RunConfig.from_mapping(values))


def own_folder(nodes: Path) -> Callable[[int], dict[str, Any]]:
    return lambda partition: {"recordings": str(nodes / str(partition)), "capture": True}


def record(
    plan: RunPlan, path: Path, node_config: Callable[[int], dict[str, Any]], *, resume: bool = False
) -> None:
    execute(
        LocalGrid(app, plan.config.clients, node_config=node_config),
        plan,
        path,
        observer=Memory(),
        workers=2,
        stop=threading.Event(),
        recovery=find_recovery(path) if resume else None,
    )


@pytest.fixture(scope="module")
def away(plan_of_all: RunPlan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``run`` and ``nodes``, four clients' own disks. Copy it to change it."""
    folder = tmp_path_factory.mktemp("away")
    record(plan_of_all, folder / "run", own_folder(folder / "nodes"))
    return folder


@pytest.fixture
def here(away: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(away, tmp_path / "here"))


def sources(folder: Path, *partitions: int) -> list[str]:
    return [str(folder / "nodes" / str(p)) for p in partitions]


def proven(findings: Findings) -> dict[str, int]:
    return {name: check.proven for name, check in findings.checks.items()}


def files_of(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def elsewhere(root: Path) -> set[str]:
    return {n for line in read_checksums(root / "checksums.jsonl") for n in line.elsewhere}


EXPECTED = {
    f"rounds/{number:04d}/clients/{partition:04d}/{name}"
    for number, partition in [(1, 1), (1, 2), (1, 3), (2, 0), (2, 1)]
    for name in ("gradients-00000.safetensors", "steps.jsonl")
}


def test_the_run_lists_what_is_on_the_clients_disks(away: Path) -> None:
    assert elsewhere(away / "run") == EXPECTED
    assert not EXPECTED & files_of(away / "run").keys()
    run = load_run(away / "run")
    for client in run.round(1).clients.values():
        assert client.telemetry["place"] == "node"
        (folder,) = (away / "nodes" / str(client.partition)).iterdir()
        assert folder.name == run.manifest["id"]
        told = {name: file["bytes"] for name, file in client.telemetry["files"].items()}
        there = folder / f"rounds/0001/clients/{client.partition:04d}"
        assert told == {p.name: p.stat().st_size for p in there.iterdir()}
    with pytest.raises(InputError, match=r"gradients of client 1 in round 1 are on the client's"):
        run.round(1).client(1).gradient(0)


def test_what_clients_record_is_well_within_what_they_may_list(
    away: Path, plan_of_all: RunPlan
) -> None:
    for number in (1, 2):
        for client in load_run(away / "run").round(number).clients.values():
            files = client.telemetry["files"]
            found, most = (
                sum(f["bytes"] for f in files.values()),
                (plan_of_all.most_bytes_of(client.partition)),
            )
            assert found < most < 3 * found + 2**20
            assert len(files) <= plan_of_all.most_files_of(client.partition)


LISTS = [
    ({"steps.jsonl": 2**62}, "lists 1 files of 4611686.0 TB; expected at most 8 of 2."),
    ({f"gradients-{n:05d}.safetensors": 1 for n in range(9)}, "lists 9 files of 9 B; expected"),
]


@pytest.mark.parametrize(("listed", "told"), LISTS)
def test_a_client_lists_no_more_than_it_can_have_written(
    plan_of_all: RunPlan, tmp_path: Path, listed: dict[str, int], told: str
) -> None:
    class Lying(LocalGrid):
        def _answer(self, message: Message) -> Message:
            reply = super()._answer(message)
            telemetry = reply.content.config_records.get("telemetry")
            if telemetry is not None and self.partitions[message.metadata.dst_node_id] == 3:
                row = json.loads(str(telemetry["json"]))
                row["files"] = {n: {"bytes": s, "xxh3_128": "0" * 32} for n, s in listed.items()}
                telemetry["json"] = json.dumps(row)
            return reply

    with pytest.raises(RunFailedError, match=re.escape(told)):
        execute(
            Lying(app, 4, node_config=own_folder(tmp_path / "nodes")),
            plan_of_all,
            tmp_path / "run",
            observer=Memory(),
            workers=2,
            stop=threading.Event(),
        )


def test_what_the_sources_have_not_needs_no_room(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_run(here / "run")
    (folder,) = (here / "nodes" / "1").iterdir()
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    usage = shutil.disk_usage(here)._replace(free=size)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"run needs .* more and its disk has .* free"):
        collect(run, sources(here, 1, 2))
    told: list[tuple[int, int]] = []
    collected = collect(run, sources(here, 1), lambda *now: told.append(now))
    assert (collected.files, collected.size, told[-1]) == (4, size, (size, size))


def test_the_model_is_that_of_a_run_recorded_in_one_place(
    away: Path, plan_of_all: RunPlan, tmp_path: Path
) -> None:
    record(plan_of_all, tmp_path / "run", lambda _: {})
    rows = [load_run(p / "run").round_rows for p in (away, tmp_path)]
    hashes = [[row["state_sha256"] for row in found] for found in rows]
    assert hashes[0] == hashes[1]
    findings = verify(tmp_path / "run")
    assert findings.violations == []
    assert findings.checks["steps"].reasons == ["clients keep no record on their nodes"]


def test_what_is_not_here_is_no_violation_and_is_said(away: Path) -> None:
    run = away / "run"
    size = sum(f.size for line in read_checksums(run / "checksums.jsonl") for n, f in
               line.files.items() if n in EXPECTED)  # fmt: skip
    findings = verify(run)
    assert findings.violations == []
    reason = (
        f"10 files ({size / 1e6:.1f} MB) are on the disks of clients; `fedsim collect` brings them"
    )
    told = {name for name, check in findings.checks.items() if reason in check.reasons}
    assert told == {"files", "steps", "gradients", "replay"}
    assert NO_SHARDS in findings.checks["rows"].reasons
    counts = proven(findings)
    assert (counts["steps"], counts["replay"], counts["aggregate"], counts["state"]) == (0, 0, 2, 3)
    assert fedsim(["verify", str(run)]) == 0


def test_what_nobody_listed_is_reported_while_files_are_at_the_nodes(here: Path) -> None:
    added = "rounds/0001/clients/0002/gradients-00001.safetensors"
    (here / "run" / added).parent.mkdir(exist_ok=True)
    (here / "run" / added).write_bytes(b"anything")
    assert verify(here / "run").violations == [f"{added} is not listed in clients.jsonl"]


def test_a_collected_run_is_proven_whole(here: Path, plan_of_all: RunPlan, tmp_path: Path) -> None:
    run, before = here / "run", files_of(here / "run")
    told: list[tuple[int, int]] = []
    collected = collect(load_run(run), sources(here, 0, 1, 2, 3), lambda *now: told.append(now))
    assert (collected.files, collected.missing, collected.wrong) == (10, [], [])
    assert told == sorted(told)
    assert told[-1] == (collected.size, collected.size)
    after = files_of(run)
    assert after.keys() - before.keys() == EXPECTED
    assert {name: after[name] for name in before} == before
    findings = verify(run)
    steps = sum(
        plan_of_all.steps_of(p)
        for r in (1, 2)
        for p in plan_of_all.config.participants_of(r)
    )  # fmt: skip
    assert findings.violations == []
    assert findings.checks["replay"].reasons == [BUFFERS]
    assert not any("disks of clients" in r for c in findings.checks.values() for r in c.reasons)
    assert (proven(findings)["steps"], proven(findings)["replay"]) == (steps, steps)
    assert findings.checks["replay"].notes == ["bit for bit"]
    # All that one host would have written, but for what no two runs share.
    record(plan_of_all, tmp_path / "run", lambda _: {"recordings": str(tmp_path), "capture": True})
    others = files_of(tmp_path / "run")
    assert others.keys() == after.keys()
    assert {n for n in after if others[n] != after[n]} == {
        "run.json", "rounds.jsonl", "clients.jsonl", "checksums.jsonl"
    }  # fmt: skip


def test_nothing_is_written_through_a_link_and_verify_names_it(here: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    clients = here / "run" / "rounds" / "0001" / "clients"
    shutil.rmtree(clients)
    clients.symlink_to(outside)
    # Only what belongs to the other round.
    assert collect(load_run(here / "run"), sources(here, 0, 1, 2, 3)).files == 4
    assert list(outside.iterdir()) == []
    assert f"{clients} is a symbolic link" in " ".join(verify(here / "run").violations)


def test_what_a_killed_collection_was_writing_is_removed(here: Path) -> None:
    run, killed = here / "run", subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    folder = run / "rounds/0001/clients/0003"
    folder.mkdir(parents=True, exist_ok=True)
    for name in (
        f"steps.jsonl.{killed.pid}.partial",
        f"steps.jsonl.{os.getppid()}.partial",
        "mine.partial",
    ):
        (folder / name).write_bytes(b"half")
    # None of the client's own files is in this source.
    assert collect(load_run(run), sources(here, 1)).files == 4
    assert sorted(p.name for p in folder.glob("*.partial")) == [
        "mine.partial",
        f"steps.jsonl.{os.getppid()}.partial",
    ]


def test_owners_are_collected_from_one_by_one(here: Path) -> None:
    run = here / "run"
    first = collect(load_run(run), sources(here, 1))
    assert (first.files, len(first.missing)) == (4, 6)
    findings = verify(run)
    assert findings.violations == []
    assert findings.checks["files"].reasons[0].startswith("6 files (")
    # The folder of the run itself, and a URL.
    (folder,) = (here / "nodes" / "2").iterdir()
    second = collect(load_run(run), [str(folder), f"file://{here}/nodes/0"])
    assert (second.files, len(second.missing)) == (4, 2)
    assert collect(load_run(run), sources(here, 1, 3)).files == 2
    assert collect(load_run(run), sources(here, 1, 3)).files == 0
    assert verify(run).checks["replay"].reasons == [BUFFERS]


def test_a_file_that_the_client_did_not_write_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = here / "run"
    wrong = next((here / "nodes" / "3").rglob("gradients-00000.safetensors"))
    good = wrong.read_bytes()
    for content in (good[:-1] + bytes([good[-1] ^ 1]), good + b"\0", good[:-1], b""):
        wrong.write_bytes(content)
        assert fedsim(["collect", str(run), *sources(here, 0, 1, 2, 3)]) == 1
        assert capsys.readouterr().err == f"fedsim: {wrong} is not what the client wrote\n"
        name = "rounds/0001/clients/0003/gradients-00000.safetensors"
        assert files_of(run).keys() & EXPECTED == EXPECTED - {name}
        assert list(run.rglob("*.partial")) == []
    # Of two sources the right one is taken.
    whole = here / "whole" / "rounds/0001/clients/0003"
    whole.mkdir(parents=True)
    (whole / wrong.name).write_bytes(good)
    assert fedsim(["collect", str(run), *sources(here, 3), str(here / "whole")]) == 0
    assert verify(run).checks["replay"].reasons == [BUFFERS]


def test_what_is_broken_after_it_was_collected_is_a_violation(here: Path) -> None:
    run = here / "run"
    collect(load_run(run), sources(here, 0, 1, 2, 3))
    path = run / "rounds/0001/clients/0003/steps.jsonl"
    path.write_bytes(path.read_bytes().replace(b"0", b"1", 1))
    assert verify(run).violations == [
        "rounds/0001/clients/0003/steps.jsonl is not what was written"
    ]


def test_sources_that_are_none_are_one_sentence(here: Path, tmp_path: Path) -> None:
    run = load_run(here / "run")
    (tmp_path / "empty").mkdir()
    for source, told in (
        (str(tmp_path / "none"), "it is not a folder"),
        ("nothing://there", "Protocol not known: nothing"),
        (str(tmp_path / "empty"), f"with the folder {run.manifest['id']}, or that folder"),
    ):
        with pytest.raises(InputError, match=told):
            collect(run, [source])


def test_a_run_under_way_is_not_collected_into(here: Path) -> None:
    writer = RunWriter.__new__(RunWriter)
    lock = (here / "run" / "lock").open("ab")
    writer.layout, writer._lock_file = load_run(here / "run").layout, lock
    writer._lock()
    with pytest.raises(InputError, match="is being written; expected a run that has ended"):
        collect(load_run(here / "run"), sources(here, 1))
    writer.close()


def test_a_resumed_run_goes_on_without_what_its_clients_keep(
    here: Path, plan_of_all: RunPlan, away: Path
) -> None:
    run = here / "run"
    os.truncate(run / "rounds.jsonl", (run / "rounds.jsonl").read_bytes().rindex(b"\n", 0, -1) + 1)
    recovery = find_recovery(run)
    assert (recovery.round, recovery.damage) == (1, [])
    record(plan_of_all, run, own_folder(here / "nodes"), resume=True)
    assert elsewhere(run) == EXPECTED
    hashes = [[r["state_sha256"] for r in load_run(p / "run").round_rows] for p in (here, away)]
    assert hashes[0] == hashes[1]
    assert collect(load_run(run), sources(here, 0, 1, 2, 3)).files == 10
    assert verify(run).violations == []


def test_a_run_of_one_host_has_nothing_elsewhere(recorded: Recorded) -> None:
    assert elsewhere(recorded.path) == set()
    assert collect(load_run(recorded.path), ["/nowhere"]).files == 0


@pytest.mark.parametrize("own", [False, True])
def test_a_node_that_forbids_capture_is_named_by_verify(
    plan_of_all: RunPlan, tmp_path: Path, own: bool
) -> None:
    root = tmp_path / "nodes" if own else tmp_path

    def node(partition: int) -> dict[str, Any]:
        return {"recordings": str(root), "capture": partition != 1}

    record(plan_of_all, tmp_path / "run", node)
    if own:
        collect(load_run(tmp_path / "run"), [str(root)])
    findings = verify(tmp_path / "run")
    assert findings.violations == []
    reasons = {BUFFERS, "nodes do not allow capture"}
    assert set(findings.checks["replay"].reasons) == reasons
    counted = [(1, 2), (1, 3), (2, 0)]
    assert findings.checks["replay"].proven == sum(plan_of_all.steps_of(p) for _, p in counted)
    client = load_run(tmp_path / "run").round(1).client(1)
    assert client.captured_steps == []
    assert len(client.steps) == plan_of_all.steps_of(1)


def test_what_a_node_sent_is_not_followed_out_of_it(here: Path) -> None:
    (folder,) = (here / "nodes" / "2").iterdir()
    links = sorted(folder.rglob("steps.jsonl")), sorted(folder.rglob("gradients-*"))
    for number, path in enumerate([*links[0], *links[1]]):
        path.rename(here / f"secret{number}")
        path.symlink_to(here / f"secret{number}")
    collected = collect(load_run(here / "run"), sources(here, 2))
    assert collected.files == 0
    assert [what.rpartition(": ")[2] for what in collected.wrong] == ["it is a symbolic link"] * 2
    # Nor is what lies where a file is made.
    shutil.rmtree(folder)
    shutil.copytree(here / "nodes" / "1", here / "nodes" / "2", dirs_exist_ok=True)
    target = here / "run/rounds/0001/clients/0001"
    target.mkdir(exist_ok=True)
    (here / "untouched").write_text("mine")
    (target / f"steps.jsonl.{os.getpid()}.partial").symlink_to(here / "untouched")
    assert collect(load_run(here / "run"), sources(here, 2)).wrong == []
    assert (here / "untouched").read_text() == "mine"
    assert (target / "steps.jsonl").is_file()
