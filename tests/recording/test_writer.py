from __future__ import annotations

import fcntl
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from fedsim.captures.gradients import gradient_key, shard_name, support_key
from fedsim.core.errors import InputError, RunFailedError
from fedsim.recording.checksums import read_checksums
from fedsim.recording.files import Checksum
from fedsim.recording.layout import RunLayout
from fedsim.recording.places import RUN_ID
from fedsim.recording.recovery import Recovery
from fedsim.recording.writer import RunWriter, is_being_written, mark_failed
from tests.recording.conftest import Recorded

VERSIONS = {"torch": "2", "numpy": "2"}
PARTITION = [np.array([1, 4]), np.array([0, 2, 3])]
STATE = {"w": np.array([1, -2], np.float32), "n": np.array(3)}


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def manifest_in(root: Path) -> dict[str, Any]:
    """Give ``run.json`` without the id, which is another for every run."""
    manifest: dict[str, Any] = json.loads((root / "run.json").read_text())
    assert re.fullmatch(RUN_ID, manifest.pop("id"))
    return manifest


def make(root: Path, **manifest: Any) -> RunWriter:
    return RunWriter.create(root, manifest, PARTITION)


@pytest.mark.parametrize(
    ("number", "partition", "client"),
    [
        (0, 0, "rounds/0000/clients/0000"),
        (7, 12, "rounds/0007/clients/0012"),
        (123, 4567, "rounds/0123/clients/4567"),
        (12345, 67890, "rounds/12345/clients/67890"),
    ],
)
def test_rounds_and_clients_have_four_digits_or_more(
    number: int, partition: int, client: str
) -> None:
    layout = RunLayout(Path("RUN"))
    folder = client.partition("/clients")[0]
    assert layout.round(number) == Path("RUN", folder)
    assert layout.state(number) == Path("RUN", folder, "global.safetensors")
    assert layout.aggregate(number) == Path("RUN", folder, "aggregate.safetensors")
    assert layout.strategy(number) == Path("RUN", folder, "strategy.safetensors")
    assert layout.client(number, partition) == Path("RUN", client)
    assert layout.delta(number, partition) == Path("RUN", client, "delta.safetensors")
    assert layout.steps(number, partition) == Path("RUN", client, "steps.jsonl")


def test_shards_have_five_digits_and_steps_six() -> None:
    assert shard_name(0) == "gradients-00000.safetensors"
    assert shard_name(12345) == "gradients-12345.safetensors"
    assert gradient_key(0, "fc.weight") == "000000/fc.weight"
    assert gradient_key(390, "layer4.1.conv2.weight") == "000390/layer4.1.conv2.weight"
    assert support_key("layer4.1.conv2.weight") == "support/layer4.1.conv2.weight"


def test_a_new_run_says_that_it_runs_and_holds_its_partition_and_no_rows(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "run"
    make(root, seed=42, loss=float("inf"))
    assert set(contents(root)) == {
        "run.json",
        "partition.safetensors",
        "clients.jsonl",
        "rounds.jsonl",
        "checksums.jsonl",
        "lock",
    }
    assert manifest_in(root) == {
        "format": 1,
        "status": "running",
        "seed": 42,
        "loss": None,
    }
    partition = safetensors.numpy.load_file(root / "partition.safetensors")
    assert {key: (a.dtype.name, a.tolist()) for key, a in partition.items()} == {
        "0": ("int64", [1, 4]),
        "1": ("int64", [0, 2, 3]),
    }
    assert (root / "clients.jsonl").read_bytes() == b""
    assert (root / "rounds.jsonl").read_bytes() == b""


@pytest.mark.parametrize("what", ["empty folder", "run", "file", "dangling link"])
def test_what_exists_is_refused_by_its_path_and_left_alone(what: str, tmp_path: Path) -> None:
    root = tmp_path / "run"
    match what:
        case "empty folder":
            root.mkdir()
        case "run":
            make(root, seed=1).finish("finished")
        case "file":
            root.write_text("mine")
        case "dangling link":
            root.symlink_to(tmp_path / "nowhere")
    before = contents(tmp_path)
    with pytest.raises(InputError) as caught:
        make(root, seed=2)
    assert str(caught.value) == (
        f"output = '{root}' exists already; expected a new folder, since a run is never overwritten"
    )
    assert contents(tmp_path) == before
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_that_cannot_be_made_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    root = tmp_path / "file" / "run"
    with pytest.raises(InputError) as caught:
        make(root)
    assert str(caught.value) == f"output = '{root}' cannot be made: Not a directory"


def test_the_last_status_and_the_error_are_in_the_manifest(tmp_path: Path) -> None:
    make(tmp_path / "good", seed=3).finish("finished")
    make(tmp_path / "bad", seed=3).finish("failed", "client 4 failed\nin round 2")
    assert manifest_in(tmp_path / "good") == {
        "format": 1,
        "status": "finished",
        "seed": 3,
    }
    assert manifest_in(tmp_path / "bad") == {
        "format": 1,
        "status": "failed",
        "seed": 3,
        "error": "client 4 failed\nin round 2",
    }
    assert not list(tmp_path.rglob("*.partial"))


def test_each_artifact_has_its_place_its_dtypes_and_its_row(tmp_path: Path) -> None:
    root = tmp_path / "run"
    writer = make(root)
    writer.add_state(0, STATE)
    writer.add_round({"round": 0, "participants": []})
    writer.add_client({"round": 1, "partition": 1, "local_loss": float("nan")}, STATE)
    writer.add_failure({"round": 1, "partition": 0, "status": "failed", "error": "why\nso"})
    writer.add_aggregate(1, STATE)
    writer.add_state(1, STATE)
    writer.add_round({"round": 1, "participants": [0, 1], "global_loss": float("inf")})
    files = contents(root)
    tensors = [
        "rounds/0000/global.safetensors",
        "rounds/0001/aggregate.safetensors",
        "rounds/0001/clients/0001/delta.safetensors",
        "rounds/0001/global.safetensors",
    ]
    assert set(files) == {
        "run.json",
        "partition.safetensors",
        "clients.jsonl",
        "rounds.jsonl",
        "checksums.jsonl",
        "lock",
        *tensors,
    }
    for name in tensors:
        found = safetensors.numpy.load(files[name])
        assert {k: (a.dtype.name, a.shape, a.tolist()) for k, a in found.items()} == {
            "w": ("float32", (2,), [1.0, -2.0]),
            "n": ("int64", (), 3),
        }
    assert files["clients.jsonl"] == (
        b'{"round":1,"partition":1,"local_loss":null}\n'
        b'{"round":1,"partition":0,"status":"failed","error":"why\\nso"}\n'
    )
    assert files["rounds.jsonl"] == (
        b'{"round":0,"participants":[]}\n{"round":1,"participants":[0,1],"global_loss":null}\n'
    )


def latest_checksums(root: Path) -> dict[str, Checksum]:
    latest: dict[str, Checksum] = {}
    for line in read_checksums(root / "checksums.jsonl"):
        latest |= line.files
    return latest


def assert_all_listed(root: Path) -> None:
    """Every file but the list itself and the lock is listed with the checksum that it has."""
    found = {name: Checksum.of(content) for name, content in contents(root).items()}
    del found["checksums.jsonl"]
    assert found.pop("lock").size == 0
    assert latest_checksums(root) == found


def write_round(writer: RunWriter, number: int, *partitions: int, **row: Any) -> None:
    for partition in partitions:
        writer.add_client({"round": number, "partition": partition, **row}, STATE)
    writer.add_state(number, STATE)
    writer.add_round({"round": number, "participants": list(partitions)})


def test_checksums_follow_every_file_and_every_row(tmp_path: Path) -> None:
    root = tmp_path / "run"
    writer = make(root)
    assert latest_checksums(root) == {
        name: Checksum.of_file(root / name) for name in ("partition.safetensors", "run.json")
    }
    write_round(writer, 0)
    assert_all_listed(root)
    writer.add_failure({"round": 1, "partition": 0, "status": "failed"})
    writer.add_aggregate(1, STATE)
    write_round(writer, 1, 3, 1)
    assert_all_listed(root)
    writer.finish("failed", "why")
    assert_all_listed(root)


def test_the_files_of_a_client_are_listed_with_the_checksums_that_it_told(tmp_path: Path) -> None:
    root = tmp_path / "run"
    writer = make(root)
    told = {"steps.jsonl": Checksum(5, "a" * 32), "sketch.safetensors": Checksum(9, "b" * 32)}
    folder = "rounds/0001/clients/0007"
    (root / folder).mkdir(parents=True)
    for name, checksum in told.items():
        (root / folder / name).write_bytes(b"x" * checksum.size)
    write_round(writer, 1, 7, files={name: c.to_json() for name, c in told.items()})
    found = latest_checksums(root)
    assert {n: c for n, c in found.items() if n.startswith(folder)} == {
        f"{folder}/steps.jsonl": told["steps.jsonl"],
        f"{folder}/sketch.safetensors": told["sketch.safetensors"],
        f"{folder}/delta.safetensors": Checksum.of_file(root / folder / "delta.safetensors"),
    }


@pytest.mark.parametrize("left", [None, 0, 4, 6])
def test_a_round_with_a_file_that_was_changed_is_not_closed(
    tmp_path: Path, left: int | None
) -> None:
    root = tmp_path / "run"
    writer = make(root)
    path = root / "rounds/0001/clients/0007/steps.jsonl"
    path.parent.mkdir(parents=True)
    if left is not None:
        path.write_bytes(b"x" * left)
    with pytest.raises(RunFailedError, match=rf"it has {left or 0} bytes, not 5$"):
        write_round(writer, 1, 7, files={path.name: Checksum(5, "a" * 32).to_json()})
    assert (root / "rounds.jsonl").read_bytes() == b""


def test_what_a_strategy_keeps_is_read_back_or_refused_by_its_path(tmp_path: Path) -> None:
    writer = make(tmp_path / "run")
    path = tmp_path / "run/rounds/0001/strategy.safetensors"
    kept = {"m/w": np.array([0.5, -2], np.float32), "m/b": np.array(3, np.float32)}
    writer.add_round({"round": 0})
    writer.add_strategy_state(1, kept)
    writer.add_round({"round": 1})
    assert writer.strategy_state(0) == {}
    found = writer.strategy_state(1)
    assert {n: (a.dtype.name, a.tolist()) for n, a in found.items()} == {
        "m/w": ("float32", [0.5, -2]),
        "m/b": ("float32", 3),
    }
    assert list(found) == list(kept)
    listed = list(read_checksums(tmp_path / "run/checksums.jsonl"))[-1]
    assert listed.files["rounds/0001/strategy.safetensors"] == Checksum.of_file(path)
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(InputError) as refused:
        writer.strategy_state(1)
    assert str(refused.value) == f"{path} is not what the strategy kept after round 1"
    path.unlink()
    with pytest.raises(InputError, match="is not what the strategy kept after round 1"):
        writer.strategy_state(1)


def test_a_run_that_is_taken_up_again_goes_on_with_its_rows(tmp_path: Path) -> None:
    root = tmp_path / "run"
    write_round(make(root), 0)
    again = RunWriter(root, json.loads((root / "run.json").read_bytes()))
    write_round(again, 1, 2)
    assert_all_listed(root)
    mark_failed(root, "the engine stopped")
    assert json.loads((root / "run.json").read_text())["error"] == "the engine stopped"
    assert_all_listed(root)


def test_a_run_that_was_killed_while_it_wrote_a_line_is_marked(tmp_path: Path) -> None:
    root = tmp_path / "run"
    write_round(make(root), 0)
    checksums = root / "checksums.jsonl"
    checksums.write_bytes(checksums.read_bytes() + b'{"files":{"rou')
    mark_failed(root, "the engine stopped")
    assert json.loads((root / "run.json").read_text())["status"] == "failed"
    assert_all_listed(root)
    assert not is_being_written(root)


def test_a_run_that_somebody_writes_or_that_is_finished_is_not_marked(tmp_path: Path) -> None:
    root = tmp_path / "run"
    writer = make(root)
    before = contents(root)
    mark_failed(root, "the engine stopped")
    assert contents(root) == before
    writer.finish("finished")
    writer.close()
    before = contents(root)
    mark_failed(root, "the engine stopped")
    assert contents(root) == before


def test_whoever_looks_at_a_run_keeps_no_writer_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "run"
    make(root).close()
    with (root / "lock").open("rb") as looked_at:
        fcntl.flock(looked_at, fcntl.LOCK_SH)
        pauses = []

        def look_away(seconds: float) -> None:
            pauses.append(seconds)
            fcntl.flock(looked_at, fcntl.LOCK_UN)

        clock = SimpleNamespace(monotonic=time.monotonic, sleep=look_away)
        monkeypatch.setattr("fedsim.recording.writer.time", clock)
        writer = RunWriter.reopen(root, {}, PARTITION, Recovery(-1, 0, []), VERSIONS, {})
    assert len(pauses) == 1
    assert is_being_written(root)
    writer.close()


def test_nothing_is_marked_where_no_run_is(tmp_path: Path) -> None:
    mark_failed(tmp_path / "run", "why")
    assert list(tmp_path.iterdir()) == []


def test_a_round_without_a_row_can_be_dropped_with_its_files(tmp_path: Path) -> None:
    root = tmp_path / "run"
    writer = make(root)
    write_round(writer, 0)
    write_round(writer, 1, 2)
    before = contents(root)
    writer.add_client({"round": 2, "partition": 5}, STATE)
    half = root / "rounds" / "0002" / "clients" / "0006" / "gradients-00000.safetensors.7.partial"
    half.parent.mkdir()
    half.write_bytes(b"half")
    (root / "rounds" / "mine").mkdir()
    writer.drop_unfinished_round()
    after = contents(root)
    assert {n: c for n, c in after.items() if n != "clients.jsonl"} == {
        n: c for n, c in before.items() if n != "clients.jsonl"
    }
    assert sorted(p.name for p in (root / "rounds").iterdir()) == ["0000", "0001", "mine"]


def test_a_delta_that_cannot_be_written_has_no_row(tmp_path: Path) -> None:
    root = tmp_path / "run"
    writer = make(root)
    (root / "rounds" / "0001" / "clients" / "0001" / "delta.safetensors").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        writer.add_client({"round": 1, "partition": 1}, STATE)
    assert (root / "clients.jsonl").read_bytes() == b""
    assert not list(root.rglob("*.partial"))


def rows(files: dict[str, bytes], name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in files[name].splitlines()]


def test_a_row_comes_after_everything_that_it_speaks_of(recorded: Recorded) -> None:
    """At no moment of a real run is there a row without its files."""
    told = [moment for moment, _ in recorded.moments]
    assert told == [
        "run started",
        "round 0 finished",
        "round 1 started",
        "client 2 finished in round 1",
        "client 0 finished in round 1",
        "client 1 finished in round 1",
        "round 1 finished",
        "round 2 started",
        "client 2 finished in round 2",
        "client 3 finished in round 2",
        "client 1 finished in round 2",
        "round 2 finished",
        "run finished",
    ]
    for moment, files in recorded.moments:
        status = "finished" if moment == "run finished" else "running"
        assert json.loads(files["run.json"])["status"] == status
        for row in rows(files, "rounds.jsonl"):
            folder = f"rounds/{row['round']:04d}"
            assert f"{folder}/global.safetensors" in files
            assert (f"{folder}/aggregate.safetensors" in files) == (row["round"] > 0)
            trained = {
                r["partition"] for r in rows(files, "clients.jsonl") if r["round"] == row["round"]
            }
            assert trained == set(row["participants"])
        for row in rows(files, "clients.jsonl"):
            folder = f"rounds/{row['round']:04d}/clients/{row['partition']:04d}"
            assert {
                f"{folder}/{name}"
                for name in ("delta.safetensors", "steps.jsonl", "gradients-00000.safetensors")
            } <= set(files)


def test_each_call_of_the_observer_finds_its_rows_written(recorded: Recorded) -> None:
    found = {
        moment: (
            [row["round"] for row in rows(files, "rounds.jsonl")],
            [(row["round"], row["partition"]) for row in rows(files, "clients.jsonl")],
        )
        for moment, files in recorded.moments
    }
    first = [(1, 2), (1, 0), (1, 1)]
    assert found["run started"] == ([], [])
    assert found["round 0 finished"] == ([0], [])
    assert found["client 2 finished in round 1"] == ([0], first[:1])
    assert found["client 1 finished in round 1"] == ([0], first)
    assert found["round 1 finished"] == ([0, 1], first)
    assert found["client 3 finished in round 2"] == ([0, 1], [*first, (2, 2), (2, 3)])
    assert found["run finished"] == ([0, 1, 2], [*first, (2, 2), (2, 3), (2, 1)])


def test_files_of_a_run_are_never_changed_once_they_are_there(recorded: Recorded) -> None:
    earlier: dict[str, bytes] = {}
    for _, files in recorded.moments:
        for name, content in earlier.items():
            if name.endswith(".jsonl"):
                assert files[name].startswith(content)
            elif name != "run.json":
                assert files[name] == content
        earlier = files
    assert not [name for name in earlier if name.endswith(".partial")]


def test_a_control_variate_that_was_changed_is_not_used(tmp_path: Path) -> None:
    writer = make(tmp_path / "run")
    assert writer.control(7) == {}
    writer.add_control(1, 7, {"w": STATE["w"]})
    np.testing.assert_array_equal(writer.control(7)["w"], STATE["w"])
    path = tmp_path / "run/rounds/0001/clients/0007/control.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(RunFailedError, match=f"^{path} was changed by another program$"):
        writer.control(7)
    path.unlink()
    with pytest.raises(RunFailedError, match=f"^{path} was changed by another program$"):
        writer.control(7)
