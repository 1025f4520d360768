"""Rounds of many clients, whose deltas and lines of steps share files."""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.core.config import RunConfig
from fedsim.core.errors import FedsimError, InputError, RunFailedError
from fedsim.core.plan import RunPlan
from fedsim.flower.client_app import app
from fedsim.flower.server_app import execute
from fedsim.recording import layout, shared
from fedsim.recording.files import Checksum, json_line, read_lines, write_tensors
from fedsim.recording.findings import Findings
from fedsim.recording.layout import RunLayout, format_of
from fedsim.recording.reader import Run, load_run
from fedsim.recording.recovery import find_recovery
from fedsim.recording.row_proofs import OF_FAILED, OF_NODES
from fedsim.recording.shared import SharedFiles
from fedsim.recording.tensor_files import TensorFile
from fedsim.recording.verify import verify
from fedsim.recording.writer import RunWriter
from tests.local_grid import LocalGrid
from tests.observers import Memory
from tests.recording.conftest import own_folder, record
from tests.recording.rows import client_row
from tests.recording.test_reader import example_reader

VALUES = {
    "dataset": "synthetic:240:4",
    "model": "cnn",
    "clients": 6,
    "participants": [[0, 1, 2, 3, 4], [5, 1, 3, 2], [4, 2]],
    "rounds": 3,
    "batch-size": 16,
    "capture": "first:1",
    "max-failures": 1,
    "device": "cpu",
}
FAILING = (2, 3)


def go(plan: RunPlan, path: Path, *, dying: tuple[int, int] | None = None) -> None:
    """Run or resume; client 3 fails in round 2, and the server dies when it hears from one."""

    def before(partition: int, message: Any) -> None:
        if message.metadata.message_type == "train":
            number = int(message.content.config_records["config"]["server-round"])
            if (number, partition) == FAILING:
                raise ValueError("enough")

    class Mortal(Memory):
        def client_finished(self, row: Any) -> None:
            super().client_finished(row)
            if (row["round"], row["partition"]) == dying:
                shutil.copytree(path, path.with_name("killed"))

    execute(
        LocalGrid(app, plan.config.clients, before=before, recordings=path.parent),
        plan,
        path,
        observer=Mortal(),
        workers=2,
        stop=threading.Event(),
        recovery=find_recovery(path) if path.exists() else None,
    )


@dataclass
class Pair:
    """The same run, with the clients of rounds 1 and 2 sharing files and without."""

    plan: RunPlan
    alone: Path
    together: Path
    killed: Path


def let_four_be_many(patch: pytest.MonkeyPatch) -> None:
    """Let four clients share files, three of whose deltas fill one."""
    patch.setattr(layout, "SHARED_FROM", 4)
    patch.setattr(shared, "SHARED_BYTES", 150_000)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    let_four_be_many(monkeypatch)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    plan = RunPlan.prepare(RunConfig.from_mapping(VALUES))
    folder = tmp_path_factory.mktemp("pair")
    go(plan, folder / "alone")
    with pytest.MonkeyPatch.context() as patch:
        let_four_be_many(patch)
        go(plan, folder / "together", dying=(2, 1))
    return Pair(plan, folder / "alone", folder / "together", folder / "killed")


def names(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())


def tensors(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*.safetensors")}


def known(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k not in ("seconds", "peak_memory", "shard", "files")}


# --- what is written


def test_many_clients_share_files_and_few_have_their_own(pair: Pair) -> None:
    first = "gradients-00000.safetensors"
    of_round = ["aggregate.safetensors", "global.safetensors"]
    assert names(pair.together / "rounds" / "0001") == [
        "aggregate.safetensors",
        *(f"clients/{p:04d}/{first}" for p in range(5)),
        "deltas-00000.safetensors",
        "deltas-00001.safetensors",
        "global.safetensors",
        "steps-00000.jsonl",
        "steps-00001.jsonl",
    ]
    own = ("delta.safetensors", first, "steps.jsonl")
    assert names(pair.together / "rounds" / "0003") == [
        of_round[0],
        *(f"clients/{p:04d}/{name}" for p in (2, 4) for name in own),
        of_round[1],
    ]
    assert names(pair.alone / "rounds" / "0003") == names(pair.together / "rounds" / "0003")
    assert load_run(pair.alone).manifest["format"] == 1
    assert load_run(pair.together).manifest["format"] == 2


def test_the_round_of_64_clients_is_the_first_to_share() -> None:
    assert [format_of(n) for n in (1, 63, 64, 10**6)] == [1, 1, 2, 2]


def test_what_is_read_is_the_same_however_it_was_written(pair: Pair) -> None:
    alone, together = load_run(pair.alone), load_run(pair.together)
    assert [r["state_sha256"] for r in together.round_rows] == [
        r["state_sha256"] for r in alone.round_rows
    ]
    assert [known(row) for row in together.client_rows] == [known(r) for r in alone.client_rows]
    shards = {
        n: [c.telemetry.get("shard") for c in together.round(n).clients.values()] for n in (1, 2, 3)
    }
    assert shards == {1: [0, 0, 0, 1, 1], 2: [0, 0, 0], 3: [None, None]}
    for number in (1, 2, 3):
        for partition, theirs in alone.round(number).clients.items():
            ours = together.round(number).client(partition)
            assert ours.steps == theirs.steps
            assert len(ours.steps) == ours.telemetry["num_steps"]
            assert list(ours.delta) == list(theirs.delta)
            for name, tensor in theirs.delta.items():
                assert ours.delta[name].numpy().tobytes() == tensor.numpy().tobytes()
            assert ours.captured_steps == [0]
            for name, tensor in theirs.gradient(0).items():
                assert ours.gradient(0)[name].numpy().tobytes() == tensor.numpy().tobytes()


def test_the_reader_of_the_format_page_reads_shared_files(pair: Pair) -> None:
    run = load_run(pair.together)
    _, _, rounds = example_reader()(pair.together)
    for number in (1, 2, 3):
        assert list(rounds[number]["clients"]) == list(run.round(number).clients)
        for partition, found in rounds[number]["clients"].items():
            ours = run.round(number).client(partition)
            assert found["steps"] == ours.steps
            assert set(found["delta"]) == set(ours.delta)
            for name, tensor in ours.delta.items():
                assert found["delta"][name].tobytes() == tensor.numpy().tobytes()


def test_a_file_is_closed_by_bytes_of_deltas_of_steps_or_by_arrays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "SHARED_BYTES", 100)
    monkeypatch.setattr(shared, "MOST_KEYS", 7)
    files = SharedFiles(RunLayout(tmp_path), 1)
    folder = tmp_path / "rounds" / "0001"

    def add(partition: int, size: int, steps: bytes, arrays: int = 1) -> list[str]:
        delta = {str(n): np.full(size, partition, np.uint8) for n in range(arrays)}
        return [path.name for path in files.add(partition, delta, steps)]

    line = json_line({"step": 0})
    assert add(3, 99, line) == []
    assert names(tmp_path) == []
    assert add(12, 1, b"") == ["deltas-00000.safetensors", "steps-00000.jsonl"]
    assert add(5, 1, line * 4) == ["deltas-00001.safetensors", "steps-00001.jsonl"]
    assert add(6, 1, b"", arrays=4) == ["deltas-00002.safetensors"]
    assert add(7, 1, b"") == []
    assert [path.name for path in files.close()] == ["deltas-00003.safetensors"]
    assert files.close() == {}
    assert files.shard == 4
    assert list(TensorFile(folder / "deltas-00000.safetensors")) == ["3/0", "12/0"]
    assert (folder / "steps-00000.jsonl").read_bytes() == b'{"partition":3,"step":0}\n'
    assert names(folder) == [
        *(f"deltas-{n:05d}.safetensors" for n in range(4)),
        "steps-00000.jsonl",
        "steps-00001.jsonl",
    ]


def test_steps_that_are_not_what_the_client_wrote_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "SHARED_FROM", 1)
    writer = RunWriter.create(tmp_path / "run", {"format": 2}, [np.arange(3)])
    writer.begin_round(1, 1)
    steps = writer.layout.steps(1, 0)
    steps.parent.mkdir(parents=True)
    steps.write_bytes(b'{"step":0}\n')
    told = {"steps.jsonl": Checksum.of(b'{"step":1}\n').to_json()}
    with pytest.raises(RunFailedError, match=r"steps\.jsonl was changed by another program$"):
        writer.add_client({**client_row(1, 0), "files": told}, {"w": np.zeros(2, np.float32)})


def unproven(findings: Findings) -> dict[str, set[str]]:
    # One of two runs has clients that say where their files are, the other one that failed.
    return {n: set(c.reasons) - {OF_NODES, OF_FAILED} for n, c in findings.checks.items()}


def test_what_many_clients_kept_is_collected(pair: Pair, few: None, tmp_path: Path) -> None:
    remote = pytest.importorskip("fedsim.plugins.remote.collect")
    record(pair.plan, tmp_path / "run", own_folder(tmp_path / "nodes"))
    run = load_run(tmp_path / "run")
    assert run.manifest["format"] == 2
    shards = [name for name in names(tmp_path / "run" / "rounds" / "0001") if "/" not in name]
    assert shards == [
        "aggregate.safetensors",
        "deltas-00000.safetensors",
        "deltas-00001.safetensors",
        "global.safetensors",
    ]
    before = verify(tmp_path / "run")
    assert (before.violations, before.checks["replay"].proven) == ([], 0)
    sources = [str(p) for p in sorted((tmp_path / "nodes").iterdir())]
    collected = remote.collect(run, sources)
    # Gradients and lines of steps of the 5, 4 and 2 clients of the rounds.
    assert (collected.files, collected.missing, collected.wrong) == (22, [], [])
    after = verify(tmp_path / "run")
    assert after.violations == []
    assert unproven(after) == unproven(verify(pair.together))
    assert after.checks["steps"].proven == sum(
        row["num_steps"] for row in load_run(tmp_path / "run").client_rows
    )


# --- proofs, exports, figures


def test_verify_proves_as_much_of_shared_files(pair: Pair, few: None) -> None:
    alone, together = verify(pair.alone), verify(pair.together)
    assert alone.violations == together.violations == []
    for name, check in alone.checks.items():
        if name != "files":
            assert (name, together.checks[name].proven) == (name, check.proven)
    listed = set().union(*(row["files"] for row in read_lines(pair.together / "checksums.jsonl")))
    assert listed == {*names(pair.together)} - {"checksums.jsonl", "lock"}


@pytest.mark.parametrize("name", ["deltas-00001.safetensors", "steps-00000.jsonl"])
def test_damage_of_a_shared_file_is_found(name: str, pair: Pair, tmp_path: Path) -> None:
    path = Path(shutil.copytree(pair.together, tmp_path / "run"))
    file = path / "rounds" / "0001" / name
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    violations = verify(path).violations
    assert f"rounds/0001/{name} is not what was written" in violations


def test_a_client_that_a_shared_file_does_not_hold_is_told(pair: Pair, tmp_path: Path) -> None:
    path = Path(shutil.copytree(pair.together, tmp_path / "run"))
    file = path / "rounds" / "0001" / "deltas-00001.safetensors"
    arrays = {key: tensor.numpy().copy() for key, tensor in TensorFile(file).items()}
    run = load_run(path)
    first, second = [c.partition for c in run.round(1).clients.values()][3:]
    write_tensors(file, {k: a for k, a in arrays.items() if not k.startswith(f"{second}/")})
    _ = run.round(1).client(first).delta
    with pytest.raises(InputError, match=rf"00001\.safetensors holds nothing of client {second}$"):
        _ = run.round(1).client(second).delta
    write_tensors(file, arrays | {"07/13.bias": np.zeros(2, np.float32)})
    with pytest.raises(InputError, match=r"'07/13\.bias' is not an array of a client's delta$"):
        _ = load_run(path).round(1).client(first).delta
    (path / "rounds" / "0001" / "steps-00000.jsonl").write_bytes(b'{"step":0}\n')
    with pytest.raises(InputError, match=r"steps-00000\.jsonl: line 1 has no epoch$"):
        _ = next(iter(Run(path).round(1).clients.values())).steps


def test_reports_and_exports_take_shared_files(pair: Pair, tmp_path: Path) -> None:
    export = pytest.importorskip("fedsim.plugins.export.export")
    report = pytest.importorskip("fedsim.plugins.report.report")
    for path in (pair.alone, pair.together):
        export.export_notebook(load_run(path), 1, output=tmp_path / path.name)
        report.write_report([path], tmp_path / f"{path.name}.html")
    exported = [
        torch.load(tmp_path / f"{name}_01_tensors.pt", weights_only=True)["model_updates"]
        for name in ("alone", "together")
    ]
    assert exported[0].keys() == exported[1].keys() == set(range(5))
    for partition, delta in exported[0].items():
        for name, tensor in delta.items():
            assert torch.equal(exported[1][partition][name], tensor)


# --- kills and resumes


def test_a_round_that_was_killed_is_made_again(pair: Pair, tmp_path: Path, few: None) -> None:
    path = Path(shutil.copytree(pair.killed, tmp_path / "run"))
    assert [row["round"] for row in load_run(path).round_rows] == [0, 1]
    go(pair.plan, path)
    assert tensors(path) == tensors(pair.together)
    assert verify(path).violations == []


def test_a_run_that_began_without_sharing_goes_on_without(
    pair: Pair, tmp_path: Path, few: None
) -> None:
    path = Path(shutil.copytree(pair.alone, tmp_path / "run"))
    (path / "rounds" / "0002" / "global.safetensors").unlink()
    (path / "rounds" / "0003" / "global.safetensors").unlink()
    go(pair.plan, path)
    assert tensors(path) == tensors(pair.alone)
    assert verify(path).violations == []


def test_a_round_of_one_too_many_failures_leaves_no_shared_file(
    pair: Pair, tmp_path: Path, few: None
) -> None:
    plan = RunPlan.prepare(RunConfig.from_mapping({**VALUES, "max-failures": 0}))
    with pytest.raises(FedsimError, match="client 3 failed in round 2"):
        go(plan, tmp_path / "run")
    assert names(tmp_path / "run" / "rounds" / "0001") == names(pair.together / "rounds" / "0001")
    assert not (tmp_path / "run" / "rounds" / "0002").exists()
    assert json.loads((tmp_path / "run" / "run.json").read_bytes())["status"] == "failed"
