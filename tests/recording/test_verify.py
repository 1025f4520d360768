from __future__ import annotations

import json
import random
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from numpy.typing import NDArray

from fedsim.cli import run as command
from fedsim.core.aggregation import state_sha256
from fedsim.core.algorithm import strategy_table
from fedsim.core.config import RunConfig
from fedsim.core.errors import InputError
from fedsim.core.plan import RunPlan
from fedsim.flower.client_app import app
from fedsim.flower.server_app import execute
from fedsim.recording import proofs, row_proofs, strategy_proofs
from fedsim.recording.checksums import checksum_line, read_checksums
from fedsim.recording.files import Checksum, read_lines, write_tensors
from fedsim.recording.findings import BUFFERS, LOSSES, SCORES, SOURCES, Findings
from fedsim.recording.layout import RunLayout
from fedsim.recording.reader import load_run
from fedsim.recording.verify import verify
from tests.local_grid import LocalGrid
from tests.observers import Memory
from tests.recording.conftest import Recorded
from tests.recording.rows import AllWhole

SHARD = "rounds/0001/clients/0002/gradients-00000.safetensors"
Arrays = dict[str, NDArray[Any]]


def record(plan: RunPlan, path: Path, *, to: bool = True, **changes: Any) -> Path:
    """Make a run of one round of the plan with some settings changed, `to` its directory or not."""
    values = {k: v for k, v in plan.config.to_mapping().items() if v is not None}
    config = RunConfig.from_mapping({**values, "rounds": 1, **changes})
    changed = replace(plan, config=config)
    execute(
        LocalGrid(app, config.clients, recordings=path.parent if to else None),
        changed,
        path,
        observer=Memory(),
        workers=2,
        stop=threading.Event(),
    )
    return path


def reseal(root: Path) -> None:
    """Make every checksum that of what is there now, as a forger would."""
    lines = []
    listed = list(read_checksums(root / "checksums.jsonl"))
    for line in listed:
        files = {}
        for name, checksum in line.files.items():
            # What grows keeps its beginning; the last line speaks for all of it.
            whole = not name.endswith(("rounds.jsonl", "clients.jsonl")) or line is listed[-2]
            path = root / name
            size = None if whole or name.startswith("rounds/") else checksum.size
            files[name] = Checksum.of_file(path, size) if path.exists() else checksum
        lines.append(checksum_line(files))
    (root / "checksums.jsonl").write_bytes(b"".join(lines))


def rewrite_tensors(path: Path, change: Callable[[Arrays], None]) -> None:
    order = list(safetensors.safe_open(path, framework="np").offset_keys())
    arrays = safetensors.numpy.load_file(path)
    change(arrays)
    write_tensors(path, {name: arrays[name] for name in order})


def rewrite_lines(path: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    rows = list(read_lines(path))
    change(rows)
    lines = [json.dumps(row, separators=(",", ":")) for row in rows]
    path.write_text("\n".join(lines) + "\n")


def rewrite_client(root: Path, number: int, partition: int, name: str) -> None:
    """Let the client's row tell the present checksum of one of its files."""

    def change(rows: list[dict[str, Any]]) -> None:
        (row,) = [r for r in rows if (r["round"], r["partition"]) == (number, partition)]
        path = root / f"rounds/{number:04d}/clients/{partition:04d}/{name}"
        row["files"][name] = Checksum.of_file(path).to_json()

    rewrite_lines(root / "clients.jsonl", change)


def violations_of(findings: Findings) -> dict[str, list[str]]:
    return {name: c.violations for name, c in findings.checks.items() if c.violations}


def test_of_a_whole_run_everything_is_proven(recorded: Recorded) -> None:
    findings = verify(recorded.path, recompute=None)
    assert violations_of(findings) == {}
    rows = read_lines(recorded.path / "clients.jsonl")
    steps = sum(row["num_steps"] for row in rows)
    assert {n: check.unproven for n, check in findings.checks.items() if check.unproven} == {
        "rows": [
            *(row_proofs.MEASURED, row_proofs.TOLD, row_proofs.NO_TRACE, row_proofs.NO_DIFFERENCE),
        ],
    }
    unlisted = ("checksums.jsonl", "lock")
    files = [p for p in recorded.path.rglob("*") if p.is_file() and p.name not in unlisted]
    assert {name: check.proven for name, check in findings.checks.items()} == {
        "files": len(files),
        "partition": 4,
        "participants": 2,
        "initial state": 1,
        "steps": steps,
        "gradients": steps,
        "replay": steps,
        "aggregate": 2,
        "state": 3,
        "kept": 0,
        "evaluation": 3,
        "recomputed": steps,
        # run.json, three of rounds and six of clients.
        "rows": 10,
    }
    for name in ("replay", "evaluation", "recomputed"):
        assert findings.checks[name].notes == ["bit for bit"]
    assert findings.bytes_read == sum(p.stat().st_size for p in files)


def test_without_computing_anything_again_what_is_open_is_named(recorded: Recorded) -> None:
    findings = verify(recorded.path, evaluate=0)
    assert violations_of(findings) == {}
    everyone = "all clients of rounds 1, 2"
    steps = sum(row["num_steps"] for row in read_lines(recorded.path / "clients.jsonl"))
    assert {n: check.unproven for n, check in findings.checks.items() if check.unproven} == {
        "replay": [f"{BUFFERS} ({everyone})"],
        "recomputed": [f"{SOURCES} ({steps} steps; {everyone})"],
        "rows": [
            *(row_proofs.MEASURED, row_proofs.TOLD, row_proofs.NO_TRACE, row_proofs.NO_DIFFERENCE),
            f"{LOSSES} ({steps} steps; {everyone})",
            f"{SCORES} (rounds 0 to 2)",
        ],
    }


def test_what_an_interrupted_run_finished_is_proven(recorded: Recorded) -> None:
    findings = verify(recorded.killed)
    assert violations_of(findings) == {}
    assert findings.checks["state"].proven == 2


def test_a_row_that_was_being_written_when_the_run_was_killed_is_no_damage(copied: Path) -> None:
    text = (copied / "run.json").read_text().replace('"finished"', '"running"')
    (copied / "run.json").write_text(text)
    rows = (copied / "rounds.jsonl").read_bytes().splitlines(keepends=True)
    # As a kill leaves it: the line of checksums is there, that of the round is not.
    sealed = list(read_checksums(copied / "checksums.jsonl"))[:-1]
    sealed[1].files["run.json"] = Checksum.of_file(copied / "run.json")
    lines = [checksum_line(line.files) for line in sealed]
    (copied / "checksums.jsonl").write_bytes(b"".join(lines))
    for torn in (b"".join(rows[:-1]), b"".join(rows)[:-1], b"".join(rows[:-1]) + rows[-1][:9]):
        (copied / "rounds.jsonl").write_bytes(torn)
        findings = verify(copied)
        assert violations_of(findings) == {}
        assert findings.checks["state"].proven == 2
    (copied / "rounds.jsonl").write_bytes(b"".join(rows))
    assert verify(copied).checks["state"].proven == 3


def test_a_finished_run_without_its_last_round_is_damaged(copied: Path) -> None:
    rows = (copied / "rounds.jsonl").read_bytes().splitlines(keepends=True)
    (copied / "rounds.jsonl").write_bytes(b"".join(rows[:-1]))
    assert verify(copied).checks["files"].violations == ["rounds.jsonl is not what was written"]


@pytest.mark.matrix
def test_a_hundred_flipped_bits_are_all_reported_by_file(copied: Path) -> None:
    files = [p for p in sorted(copied.rglob("*")) if p.is_file() and p.stat().st_size]
    draw = random.Random(7)
    for number in range(100):
        path = files[number % len(files)]
        whole = path.read_bytes()
        bit = draw.randrange(8 * len(whole))
        broken = bytearray(whole)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        violations = verify(copied, evaluate=0).violations
        assert any(path.name in violation for violation in violations), (path, bit, violations)
        path.write_bytes(whole)
    assert verify(copied).violations == []


@pytest.mark.parametrize(
    "name",
    [
        "run.json",
        "rounds.jsonl",
        "clients.jsonl",
        "checksums.jsonl",
        "partition.safetensors",
        "rounds/0000/global.safetensors",
        "rounds/0001/aggregate.safetensors",
        "rounds/0001/clients/0002/delta.safetensors",
        "rounds/0001/clients/0002/steps.jsonl",
        SHARD,
    ],
)
def test_a_file_that_is_gone_cut_or_no_file_is_reported(copied: Path, name: str) -> None:
    path = copied / name
    whole = path.read_bytes()

    def reported() -> bool:
        return any(path.name in violation for violation in verify(copied).violations)

    path.write_bytes(whole[: len(whole) // 2])
    assert reported()
    path.write_bytes(b"")
    assert reported()
    path.unlink()
    assert reported()
    path.mkdir()
    assert reported()
    path.rmdir()
    path.write_bytes(whole)
    assert not verify(copied).violations


def test_a_shard_that_nobody_listed_is_reported_and_not_read(copied: Path) -> None:
    added = SHARD.replace("00000", "00001")
    captured = load_run(copied).round(1).client(2).captured_steps
    shutil.copy(copied / SHARD, copied / added)
    assert verify(copied).violations == [f"{added} is not listed in clients.jsonl"]
    (copied / added).write_bytes(b"no tensors")
    assert load_run(copied).round(1).client(2).captured_steps == captured


@pytest.mark.parametrize("recorded_by_clients", [True, False])
def test_files_added_to_a_client_that_has_none_of_them_are_reported(
    plan: RunPlan, recorded: Recorded, tmp_path: Path, recorded_by_clients: bool
) -> None:
    path = record(plan, tmp_path / "run", capture="none", to=recorded_by_clients)
    client = load_run(path).round(1).client(2)
    client.folder.mkdir(exist_ok=True)
    names = ["gradients-00000.safetensors", "sketch.safetensors"]
    names += [] if recorded_by_clients else ["steps.jsonl"]
    for name in names:
        shutil.copy(recorded.path / SHARD, client.folder / name)
    folder = client.folder.relative_to(path)
    told = [f"{folder}/{name} is not listed in clients.jsonl" for name in names]
    assert verify(path).checks["files"].violations == told
    assert client.captured_steps == []


def test_a_path_out_of_the_run_is_reported_and_not_read(copied: Path) -> None:
    secret = copied.parent / "secret"
    secret.write_text("x")
    line = checksum_line({"../secret": Checksum.of_file(secret)})
    with (copied / "checksums.jsonl").open("ab") as file:
        file.write(line)
    assert verify(copied).violations == ["../secret leads out of the run directory"]


# Forgeries: the checksums are made anew, so that only what the files mean is left to tell.


def test_a_resealed_run_is_still_whole(copied: Path) -> None:
    reseal(copied)
    assert violations_of(verify(copied)) == {}


def test_one_changed_bit_of_one_gradient_is_found_by_replay(copied: Path) -> None:
    def change(arrays: Arrays) -> None:
        flat = arrays["000001/8.weight"].reshape(-1).view(np.int32)
        flat[flat.argmax()] ^= 1 << 10

    rewrite_tensors(copied / SHARD, change)
    rewrite_client(copied, 1, 2, "gradients-00000.safetensors")
    reseal(copied)
    (violation,) = verify(copied).violations
    assert "clients/0002/delta.safetensors: 8.weight is not where the gradients lead" in violation


def test_a_scaled_gradient_is_found_by_step_and_tensor(copied: Path) -> None:
    def change(arrays: Arrays) -> None:
        arrays["000003/8.weight"] *= 1.01

    rewrite_tensors(copied / SHARD, change)
    rewrite_client(copied, 1, 2, "gradients-00000.safetensors")
    reseal(copied)
    found = violations_of(verify(copied))
    assert list(found) == ["gradients", "replay"]
    assert "gradients-00000.safetensors: step 3, 8.weight has norm" in found["gradients"][0]


def test_a_changed_delta_is_found_by_replay_and_aggregate(copied: Path) -> None:
    def change(arrays: Arrays) -> None:
        arrays["13.bias"][4] *= 2

    rewrite_tensors(copied / "rounds/0001/clients/0002/delta.safetensors", change)
    reseal(copied)
    found = violations_of(verify(copied))
    assert list(found) == ["replay", "aggregate"]
    assert "13.bias" in found["replay"][0]
    assert "aggregate.safetensors: 13.bias is not" in found["aggregate"][0]


def test_a_changed_buffer_of_a_delta_is_found_by_the_aggregate(copied: Path) -> None:
    def change(arrays: Arrays) -> None:
        arrays["1.running_var"][0] += 1

    rewrite_tensors(copied / "rounds/0002/clients/0003/delta.safetensors", change)
    reseal(copied)
    assert list(violations_of(verify(copied))) == ["aggregate"]


def test_a_changed_aggregate_is_found_twice(copied: Path) -> None:
    def change(arrays: Arrays) -> None:
        arrays["13.bias"][4] += 1

    rewrite_tensors(copied / "rounds/0001/aggregate.safetensors", change)
    reseal(copied)
    assert list(violations_of(verify(copied))) == ["aggregate", "state"]


def test_a_changed_state_is_found_with_its_row_and_without(copied: Path) -> None:
    path = copied / "rounds/0002/global.safetensors"

    def change(arrays: Arrays) -> None:
        arrays["13.bias"][4] = np.nextafter(arrays["13.bias"][4], np.float32(9))

    rewrite_tensors(path, change)
    reseal(copied)
    assert list(violations_of(verify(copied))) == ["state"]

    def follow(rows: list[dict[str, Any]]) -> None:
        rows[2]["state_sha256"] = state_sha256(safetensors.numpy.load_file(path))

    rewrite_lines(copied / "rounds.jsonl", follow)
    reseal(copied)
    (violation,) = verify(copied).violations
    assert "13.bias is not the state before plus the aggregate" in violation


@pytest.fixture(scope="module")
def adam(plan: RunPlan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One round of FedAdam. Never write into it: copy it."""
    path = tmp_path_factory.mktemp("adam") / "run"
    return record(plan, path, strategy="fedadam", capture="none")


def follow_the_state(root: Path, number: int) -> None:
    """Give a changed state's row its hash, and every file its checksum."""
    state = safetensors.numpy.load_file(RunLayout(root).state(number))

    def follow(rows: list[dict[str, Any]]) -> None:
        rows[number]["state_sha256"] = state_sha256(state)

    rewrite_lines(root / "rounds.jsonl", follow)
    reseal(root)


@pytest.mark.parametrize(
    ("file", "array", "check", "said"),
    [
        ("global", "13.bias", "state", "13.bias is not the state before plus the step of fedadam"),
        ("global", "1.running_var", "state", "1.running_var is not the state before plus the ag"),
        ("strategy", "m/13.bias", "kept", "m/13.bias does not follow from the one before and the"),
        ("strategy", "v/0.weight", "kept", "v/0.weight does not follow from the one before and th"),
        ("aggregate", "13.bias", "aggregate", "13.bias is not the weighted mean of the deltas"),
    ],
)
def test_a_forged_server_step_is_found(
    adam: Path, tmp_path: Path, file: str, array: str, check: str, said: str
) -> None:
    root = Path(shutil.copytree(adam, tmp_path / "run"))

    def change(arrays: Arrays) -> None:
        # One step of float32 is enough where a state may hide it on some processors.
        flat = arrays[array].reshape(-1)
        flat[0] = flat[0] * np.float32(1.001) if file == "global" else np.nextafter(flat[0], 9)

    rewrite_tensors(root / f"rounds/0001/{file}.safetensors", change)
    follow_the_state(root, 1)
    (violation,) = violations_of(verify(root, evaluate=0))[check]
    assert said in violation


def test_a_strategy_file_that_lacks_an_array_or_is_not_there_is_found(
    adam: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(adam, tmp_path / "run"))
    path = root / "rounds/0001/strategy.safetensors"
    arrays = safetensors.numpy.load_file(path)
    write_tensors(path, {name: array for name, array in arrays.items() if name != "v/13.bias"})
    reseal(root)
    found = violations_of(verify(root))
    assert list(found) == ["state", "kept"]
    assert "v/13.bias is missing" in found["kept"][0]
    path.unlink()
    findings = verify(root)
    assert findings.violations == ["rounds/0001/strategy.safetensors is not there"]
    assert findings.checks["state"].reasons == ["rounds/0001/strategy.safetensors is damaged"]
    assert findings.checks["kept"].reasons == ["rounds/0001/strategy.safetensors is damaged"]


def test_of_a_strategy_whose_step_is_unknown_buffers_and_hash_are_proven(
    adam: Path, tmp_path: Path
) -> None:
    def findings_of(root: Path) -> Findings:
        run, findings = load_run(root), Findings()
        run.__dict__["config"] = run.config.model_copy(
            update={"strategy": strategy_table("fedmedian")}
        )
        strategy_proofs.prove_strategy(run, 1, findings, AllWhole())
        return findings

    findings = findings_of(adam)
    assert findings.checks["state"].proven == 1
    assert findings.checks["state"].reasons == [
        "parameters: how fedmedian moves them is not followed from the deltas"
    ]
    root = Path(shutil.copytree(adam, tmp_path / "run"))

    def change(arrays: Arrays) -> None:
        arrays["1.running_mean"][0] += 1

    rewrite_tensors(root / "rounds/0001/global.safetensors", change)
    (violation,) = findings_of(root).violations
    assert "1.running_mean is not the state before plus the aggregate" in violation


def test_a_changed_initial_state_is_found(copied: Path) -> None:
    path = copied / "rounds/0000/global.safetensors"

    def change(arrays: Arrays) -> None:
        arrays["0.weight"] *= 1.5

    def follow(rows: list[dict[str, Any]]) -> None:
        rows[0]["state_sha256"] = state_sha256(safetensors.numpy.load_file(path))

    rewrite_tensors(path, change)
    rewrite_lines(copied / "rounds.jsonl", follow)
    reseal(copied)
    found = violations_of(verify(copied))
    assert "0.weight does not follow from the seed" in found["initial state"][0]


def test_other_participants_than_the_drawn_are_found(copied: Path) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        rows[1]["participants"] = rows[1]["participants"][::-1]

    rewrite_lines(copied / "rounds.jsonl", change)
    reseal(copied)
    assert list(violations_of(verify(copied))) == ["participants"]


def test_a_sample_that_changed_hands_is_found(copied: Path) -> None:
    def change(arrays: Arrays) -> None:
        arrays["0"][0], arrays["1"][0] = arrays["1"][0], arrays["0"][0]

    rewrite_tensors(copied / "partition.safetensors", change)
    reseal(copied)
    found = violations_of(verify(copied))
    assert "partition.safetensors has another hash than run.json" in found["partition"]
    assert "is not the one drawn" in found["steps"][0]


def test_a_sample_that_two_clients_have_is_found(copied: Path) -> None:
    def change(arrays: Arrays) -> None:
        arrays["0"][0] = arrays["1"][0]

    rewrite_tensors(copied / "partition.safetensors", change)
    reseal(copied)
    assert (
        "partition.safetensors does not deal each of 1438 samples once"
        in verify(copied).checks["partition"].violations
    )


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("indices", list(range(64)), "the batch of step 1 is not the one drawn"),
        ("loss", 0.5, "has other losses than clients.jsonl"),
        ("learning_rate", 0.5, "step 1 is not as the configuration says"),
    ],
)
def test_a_changed_row_of_a_step_is_found(
    copied: Path, key: str, value: Any, sentence: str
) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        rows[1][key] = value

    rewrite_lines(copied / "rounds/0001/clients/0002/steps.jsonl", change)
    rewrite_client(copied, 1, 2, "steps.jsonl")
    reseal(copied)
    (violation,) = verify(copied).checks["steps"].violations
    assert sentence in violation


def test_class_counts_that_are_not_those_of_the_data_are_found(copied: Path) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        counts = rows[0]["class_distribution"]
        counts[0], counts[1] = counts[1] + 1, counts[0] - 1

    rewrite_lines(copied / "clients.jsonl", change)
    reseal(copied)
    (violation,) = verify(copied).violations
    assert "class_distribution of client 2 in round 1" in violation


def test_a_gradient_forged_with_its_norms_is_found_by_computing_it_again(
    plan: RunPlan, tmp_path: Path
) -> None:
    root = record(plan, tmp_path / "run", capture="first:1")

    def change(arrays: Arrays) -> None:
        arrays["000000/8.weight"] = arrays["000000/8.weight"][::-1].copy()

    rewrite_tensors(root / SHARD, change)
    rewrite_client(root, 1, 2, "gradients-00000.safetensors")
    reseal(root)
    assert verify(root).violations == []
    (violation,) = verify(root, recompute=None).violations
    assert violation.endswith("clients/0002: the gradient of 8.weight in step 0 differs")


# What cannot be proven is said.


def test_an_initial_state_that_other_instructions_drew_is_no_violation(copied: Path) -> None:
    def found(capability: str) -> Findings:
        run, findings = load_run(copied), Findings()
        run.manifest["device"]["cpu_capability"] = capability
        proofs.prove_initial_state(run, findings)
        return findings

    here = torch.backends.cpu.get_cpu_capability()
    assert found("VSX").checks["initial state"].proven == 1

    def change(arrays: Arrays) -> None:
        arrays["0.weight"][0] = np.nextafter(arrays["0.weight"][0], np.float32(9))

    rewrite_tensors(copied / "rounds/0000/global.safetensors", change)
    assert found("VSX").violations == []
    assert found("VSX").checks["initial state"].reasons == [
        "0.weight differs from what is drawn here: the run used VSX instructions, and this "
        f"machine has {here}"
    ]
    (violation,) = found(here).violations
    assert violation.endswith("global.safetensors: 0.weight does not follow from the seed")


def test_a_round_is_judged_by_what_its_part_of_the_run_was_made_with(copied: Path) -> None:
    manifest = json.loads((copied / "run.json").read_bytes())
    versions, device = manifest["versions"], manifest["device"]
    other = {**device, "cpu_capability": "VSX"}
    manifest["resumed"] = [{"after": 1, "versions": versions, "device": other}]
    (copied / "run.json").write_text(json.dumps(manifest))
    assert [load_run(copied).made_by(r) for r in (0, 1, 2)] == [
        (versions, device),
        (versions, device),
        (versions, other),
    ]

    def change(arrays: Arrays) -> None:
        arrays["13.bias"][4] = np.nextafter(arrays["13.bias"][4], np.float32(9))

    for client in ("0001/clients/0002", "0002/clients/0003"):
        rewrite_tensors(copied / f"rounds/{client}/delta.safetensors", change)
    reseal(copied)
    (violation,) = violations_of(verify(copied))["replay"]
    assert "rounds/0001/clients/0002/delta.safetensors: 13.bias is not where the" in violation


def test_with_some_steps_the_norms_are_proven_and_the_replay_is_not(
    plan: RunPlan, tmp_path: Path
) -> None:
    findings = verify(record(plan, tmp_path / "run", capture="every:2"))
    assert findings.violations == []
    assert findings.checks["replay"].proven == 0
    assert findings.checks["replay"].unproven == [
        "capture = 'every:2' keeps some of the steps (all clients of round 1)"
    ]
    assert findings.checks["gradients"].proven == 10


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_layers_that_were_not_captured_and_buffers_are_named(
    plan: RunPlan, tmp_path: Path, norm: str
) -> None:
    values = {k: v for k, v in plan.config.to_mapping().items() if v is not None}
    changed = RunPlan.prepare(RunConfig.from_mapping({**values, "norm": norm}))
    root = record(changed, tmp_path / "run", **{"capture-layers": ["13.*"]})

    def change(arrays: Arrays) -> None:
        arrays["0.weight"] += 1

    rewrite_tensors(root / "rounds/0001/clients/0002/delta.safetensors", change)
    reseal(root)
    findings = verify(root)
    assert list(violations_of(findings)) == ["aggregate"]
    count = len(load_run(root).shapes)
    layers = f"2 of {count} parameters were captured: the deltas of the others are not followed"
    # Groups are normalised without any.
    buffers = {BUFFERS} if norm == "batch" else set()
    assert set(findings.checks["replay"].reasons) == {layers} | buffers


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded_gradients_lead_near_the_delta(plan: RunPlan, tmp_path: Path, dtype: str) -> None:
    findings = verify(record(plan, tmp_path / "run", **{"capture-dtype": dtype}), recompute=None)
    assert findings.violations == []
    (note,) = findings.checks["replay"].notes
    assert note.endswith(f"gradients are stored as {dtype}")
    steps = sum(row["num_steps"] for row in read_lines(tmp_path / "run" / "clients.jsonl"))
    assert findings.checks["recomputed"].proven == steps
    assert findings.checks["recomputed"].notes == ["bit for bit"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_steps_as_small_as_the_rounding_of_a_parameter_lead_near_the_delta(
    plan: RunPlan, tmp_path: Path, dtype: str, optimizer: str
) -> None:
    changes = {"capture-dtype": dtype, "optimizer": optimizer, "learning-rate": 1e-7}
    findings = verify(record(plan, tmp_path / "run", **changes))
    assert violations_of(findings) == {}
    assert findings.checks["replay"].reasons == [BUFFERS]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_delta_beside_that_of_rounded_gradients_is_found(
    plan: RunPlan, tmp_path: Path, dtype: str, optimizer: str
) -> None:
    def change(arrays: Arrays) -> None:
        arrays["8.weight"] *= np.float32(1.02)

    root = record(plan, tmp_path / "run", **{"capture-dtype": dtype, "optimizer": optimizer})
    rewrite_tensors(root / "rounds/0001/clients/0002/delta.safetensors", change)
    reseal(root)
    (violation,) = violations_of(verify(root))["replay"]
    named, _, off = violation.partition("8.weight is not where the gradients lead, off by ")
    assert named
    # 0.02 / 1.02, and the 2**-9 by which bfloat16 rounds, twice: momentum adds steps up.
    assert float(off) == pytest.approx(0.0196, abs=0.004)


def test_gradients_that_float16_cannot_hold_prove_nothing(plan: RunPlan, tmp_path: Path) -> None:
    changes = {"capture-dtype": "float16", "learning-rate": 1e6, "momentum": 0.0}
    root = record(plan, tmp_path / "run", **changes, **{"allow-divergence": True})
    norms = [row["gradient_norm"] for path in root.rglob("steps.jsonl") for row in read_lines(path)]
    assert any(norm and norm > 65504 for norm in norms)
    findings = verify(root, recompute=1)
    assert violations_of(findings) == {}
    unproven = set(findings.checks["replay"].reasons) - {BUFFERS}
    assert unproven == {"gradients are not finite, or too large for float16"}


@pytest.mark.parametrize("capture", ["none", "sketch:64"])
def test_without_gradients_the_rest_is_proven(plan: RunPlan, tmp_path: Path, capture: str) -> None:
    root = record(plan, tmp_path / "run", capture=capture)
    findings = verify(root)
    assert findings.violations == []
    assert findings.checks["replay"].reasons == [f"capture = {capture!r} keeps no gradients"]
    assert findings.checks["state"].proven == 2
    # Training again takes no gradients, and leads to deltas and sketches.
    findings = verify(root, recompute=None)
    assert findings.violations == []
    steps = sum(row["num_steps"] for row in read_lines(root / "clients.jsonl"))
    assert findings.checks["recomputed"].proven == steps
    assert findings.checks["recomputed"].unproven == []
    assert findings.checks["rows"].reasons == [
        *(row_proofs.MEASURED, row_proofs.TOLD, row_proofs.NO_TRACE, row_proofs.NO_DIFFERENCE)
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adam", "learning-rate": 0.001},
        {"nesterov": True},
        {"momentum": 0.0, "weight-decay": 0.0},
        {"capture-layers": ["8.*", "13.*"]},
        {"capture-encoding": "dense"},
        {"gradient-statistics": False},
        {"autocast": "bfloat16"},
        # Slow on a CPU: few samples, and some steps all the same.
        pytest.param(
            {"autocast": "float16", "local-steps": 3, "batch-size": 8}, marks=pytest.mark.matrix
        ),
        {"local-steps": 3},
    ],
)
def test_every_way_of_local_training_is_replayed_to_the_bit(
    plan: RunPlan, tmp_path: Path, changes: dict[str, Any]
) -> None:
    findings = verify(record(plan, tmp_path / "run", **changes))
    assert findings.violations == []
    assert findings.checks["replay"].notes == ["bit for bit"]
    rows = read_lines(tmp_path / "run" / "clients.jsonl")
    assert findings.checks["replay"].proven == sum(row["num_steps"] for row in rows)


def test_a_failed_client_is_no_violation(plan: RunPlan, tmp_path: Path) -> None:
    values = {k: v for k, v in plan.config.to_mapping().items() if v is not None}
    config = RunConfig.from_mapping({**values, "rounds": 1, "max-failures": 1})

    def fail(partition: int, message: Any) -> None:
        if message.metadata.message_type == "train" and partition == 2:
            raise ValueError("no")

    execute(
        LocalGrid(app, 4, before=fail, recordings=tmp_path),
        replace(plan, config=config),
        tmp_path / "run",
        observer=Memory(),
        workers=2,
        stop=threading.Event(),
    )
    findings = verify(tmp_path / "run")
    assert findings.violations == []
    assert findings.checks["aggregate"].proven == 1


def test_without_the_data_its_checks_are_named(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(recorded.path, tmp_path / "run"))
    manifest = json.loads((root / "run.json").read_bytes())
    manifest["dataset"]["sha256"] = "0" * 64
    (root / "run.json").write_text(json.dumps(manifest))
    reseal(root)
    findings = verify(root, recompute=1)
    # Digits are the same for everybody.
    told = f"run.json: the data has sha256 {'0' * 16}..., which is not the official digits"
    assert findings.violations == [told]
    reason = "the data at hand has another hash than that of the run"
    assert findings.checks["partition"].reasons == [
        f"class counts: {reason}",
        "who holds which sample: the labels are not at hand",
    ]
    assert row_proofs.NOT_OF_THE_DATA + reason in findings.checks["rows"].reasons
    assert reason in findings.checks["recomputed"].reasons


# Parts of a run, and the command.


def test_one_round_and_one_client_can_be_asked_for(recorded: Recorded) -> None:
    findings = verify(recorded.path, rounds=[2], clients=[3])
    rows = read_lines(recorded.path / "clients.jsonl")
    (row,) = [r for r in rows if (r["round"], r["partition"]) == (2, 3)]
    assert findings.violations == []
    assert findings.checks["replay"].proven == row["num_steps"]
    assert findings.checks["aggregate"].proven == 1
    assert findings.checks["initial state"].proven == 0


def test_progress_ends_at_the_whole(recorded: Recorded) -> None:
    told: list[tuple[int, int]] = []
    verify(recorded.path, jobs=1, progress=lambda done, total: told.append((done, total)))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    done, total = told[-1]
    assert 0.99 < done / total <= 1


def test_what_is_not_in_the_run_is_refused(recorded: Recorded, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--round = 7 is not in the run; there are 0, 1, 2"):
        verify(recorded.path, rounds=[1, 7])
    with pytest.raises(InputError, match=r"--client = 9 is not in the run"):
        verify(recorded.path, clients=[9])
    with pytest.raises(InputError, match="is not a folder"):
        verify(tmp_path / "absent")


def test_the_command_prints_a_table_and_ends_with_what_was_found(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["verify", str(copied), "--recompute", "2"]) == 0
    out, err = capsys.readouterr()
    assert "replay" in out
    assert "bit for bit" in out
    assert err == ""
    path = copied / SHARD
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert command(["verify", str(copied)]) == 1
    out, err = capsys.readouterr()
    assert f"files: {SHARD} is not what was written" in out
    assert f"gradients: {SHARD} is damaged" in out
    assert err.count("\n") == 1
    assert f"is not what was recorded: {SHARD} is not what was written" in err
    assert command(["verify", str(copied.parent / "absent")]) == 2
    assert command(["verify", str(copied), "--round", "9"]) == 2
    assert command(["verify", str(copied), "--jobs", "0"]) == 2


@pytest.mark.matrix
def test_float16_steps_that_may_be_skipped_are_not_replayed_from_some_layers(
    plan: RunPlan, tmp_path: Path
) -> None:
    few = {"local-steps": 2, "batch-size": 8}
    changes = {"autocast": "float16", "capture-layers": ["13.*"], **few}
    root = record(plan, tmp_path / "run", **changes)
    findings = verify(root)
    assert findings.violations == []
    assert findings.checks["replay"].proven == 0
    (reason,) = findings.checks["replay"].reasons
    assert reason.startswith("autocast = 'float16' takes all layers")
    with pytest.raises(InputError, match="not all were captured"):
        load_run(root).round(1).client(2).parameters_at(1)
