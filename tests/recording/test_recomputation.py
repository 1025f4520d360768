"""What is computed once more: evaluations and local steps, by a forger's eyes too."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.cli import run as command
from fedsim.core.aggregation import DeltaMean, apply_delta, state_sha256
from fedsim.core.determinism import deterministic_block, torch_threads
from fedsim.core.partition import fold_order
from fedsim.core.plan import RunPlan
from fedsim.core.training import Replay
from fedsim.recording.files import read_lines, write_tensors
from fedsim.recording.layout import SKETCH_KEY, RunLayout
from fedsim.recording.reader import load_run
from fedsim.recording.recomputation import chance_of_catching, draw
from fedsim.recording.verify import verify
from tests.recording.conftest import Recorded
from tests.recording.test_verify import (
    Arrays,
    record,
    reseal,
    rewrite_client,
    rewrite_lines,
    rewrite_tensors,
    violations_of,
)


def of_round(number: int, change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Change the row of a round."""

    def forge(root: Path) -> None:
        def rows(rows: list[dict[str, Any]]) -> None:
            change(rows[number])

        rewrite_lines(root / "rounds.jsonl", rows)

    return forge


def fold_again(root: Path, number: int) -> None:
    """Make the aggregate and the state of the last round follow from its deltas."""
    run, layout = load_run(root), RunLayout(root)
    sizes = [len(indices) for indices in run.partition.values()]
    mean = DeltaMean()
    clients = run.round(number).clients
    for partition in fold_order(list(clients), sizes):
        delta = {n: t.numpy() for n, t in clients[partition].delta.items()}
        mean.add(delta, sizes[partition])
    aggregate = mean.mean()
    before = {n: t.numpy() for n, t in run.round(number - 1).state.items()}
    state = apply_delta(before, aggregate)
    write_tensors(layout.aggregate(number), aggregate)
    write_tensors(layout.state(number), state)

    def change(rows: list[dict[str, Any]]) -> None:
        rows[number]["state_sha256"] = state_sha256(state)

    rewrite_lines(root / "rounds.jsonl", change)


def score_again(root: Path, number: int) -> None:
    """Tell the score that the forged state really has."""
    while violations := verify(root).checks["evaluation"].violations:
        key, value = evaluated(violations)
        of_round(number, lambda row, key=key, value=value: row.update({key: value}))(root)
        reseal(root)


def evaluated(violations: list[str]) -> tuple[str, float]:
    """Read what a state has been evaluated to, where its row says otherwise."""
    (violation,) = violations
    found = re.search(r"(global_\w+) of .* it is ([^,]*)", violation)
    assert found
    return found[1], float(found[2])


def forge_gradient(added: float) -> Callable[[Path], None]:
    """Move a gradient of round 2, and delta, norms, aggregate, state and score with it."""

    def forge(root: Path) -> None:
        number, partition, step = 2, 2, 1
        shard = f"rounds/{number:04d}/clients/{partition:04d}/gradients-00000.safetensors"

        def change(arrays: Arrays) -> None:
            arrays[f"{step:06d}/13.weight"].flat[7] += np.float32(added)

        rewrite_tensors(root / shard, change)
        rewrite_client(root, number, partition, "gradients-00000.safetensors")
        reseal(root)
        run = load_run(root)
        client = run.round(number).client(partition)
        start = run.round(number - 1).state
        optimizer = run.config.training_of(partition).optimizer
        replay = Replay(start, list(run.shapes), optimizer)
        with torch_threads(1):
            for at in range(client.telemetry["num_steps"]):
                replay.step(client.gradient(at))
        moved = {n: (replay.parameters[n] - start[n]).numpy() for n in run.shapes}
        path = RunLayout(root).delta(number, partition)
        rewrite_tensors(path, lambda arrays: arrays.update(moved))
        norm = float(torch.linalg.vector_norm(client.gradient(step)["13.weight"]))

        def row(rows: list[dict[str, Any]]) -> None:
            layers = rows[step]["per_layer_norms"]
            layers["13.weight"] = norm
            rows[step]["gradient_norm"] = math.hypot(*layers.values())

        rewrite_lines(RunLayout(root).steps(number, partition), row)
        rewrite_client(root, number, partition, "steps.jsonl")
        fold_again(root, number)
        reseal(root)
        score_again(root, number)

    return forge


def forge_loss(root: Path) -> None:
    """Tell another loss of one step, everywhere it stands."""
    steps = list(read_lines(root / "rounds/0002/clients/0002/steps.jsonl"))
    steps[1]["loss"] = 0.001
    rewrite_lines(
        root / "rounds/0002/clients/0002/steps.jsonl",
        lambda rows: rows[1].update(loss=0.001),
    )
    rewrite_client(root, 2, 2, "steps.jsonl")

    def change(rows: list[dict[str, Any]]) -> None:
        (row,) = [r for r in rows if (r["round"], r["partition"]) == (2, 2)]
        row["loss_history"][1] = 0.001
        row["local_loss"] = float(np.average(row["loss_history"], weights=row["batch_sizes"]))

    rewrite_lines(root / "clients.jsonl", change)
    reseal(root)


def forge_running_mean(root: Path) -> None:
    """Move a statistic of batch normalisation in delta, aggregate and state."""

    def change(arrays: Arrays) -> None:
        arrays["1.running_mean"] += np.float32(5)

    rewrite_tensors(RunLayout(root).delta(2, 2), change)
    fold_again(root, 2)
    reseal(root)
    score_again(root, 2)


@pytest.mark.parametrize("key", ["global_accuracy", "global_loss"])
def test_a_forged_evaluation_is_found_however_small(copied: Path, key: str) -> None:
    honest = load_run(copied).round_rows[2][key]
    for told in (honest + 0.8, math.nextafter(honest, math.inf)):
        of_round(2, lambda row, told=told: row.update({key: told}))(copied)
        reseal(copied)
        ((check, violations),) = violations_of(verify(copied)).items()
        assert check == "evaluation"
        assert violations[0].startswith(f"rounds.jsonl: {key} of round 2 is {told}; ")
        assert evaluated(violations) == (key, honest)


def test_a_score_that_was_removed_is_found(copied: Path) -> None:
    of_round(2, lambda row: row.update(global_accuracy=None, global_loss=None))(copied)
    reseal(copied)
    ((check, violations),) = violations_of(verify(copied)).items()
    assert check == "evaluation"
    assert violations == ["rounds.jsonl: round 2 tells no loss and no accuracy"]


@pytest.mark.parametrize(
    ("forge", "found"),
    [
        (forge_loss, "loss of step 1"),
        (forge_running_mean, "the delta of 1.running_mean is not where training again leads"),
        (forge_gradient(5e-3), "the gradient of 13.weight in step 1 is another"),
        (forge_gradient(1.0), "the gradient of 13.weight in step 1 is another"),
    ],
)
def test_what_plain_verify_leaves_open_is_found_by_computing_all_steps_again(
    copied: Path, forge: Callable[[Path], None], found: str
) -> None:
    forge(copied)
    plain = verify(copied)
    assert plain.violations == []
    (violation,) = verify(copied, recompute=None).violations
    assert "rounds/0002/clients/0002: " in violation
    assert found in violation
    named = [line for check in plain.checks.values() for line in check.unproven]
    assert any("all clients of rounds 1, 2" in line for line in named)


def test_a_single_step_is_compared_to_the_bit_where_the_arithmetic_is_the_same(
    copied: Path,
) -> None:
    forge_gradient(2e-3)(copied)
    total = sum(row["num_steps"] for row in read_lines(copied / "clients.jsonl"))
    seeds = [s for s in range(200) if draw(total, 1, s) == [position_of(copied, 2, 2, 1)]]
    (violation,) = verify(copied, recompute=1, seed=seeds[0]).violations
    assert "the gradient of step 1 is off by" in violation
    assert violation.endswith("not equal to the bit")
    # Made by other arithmetic, rounding explains what is that small, and the table says so.
    forge_arithmetic(copied)
    findings = verify(copied, recompute=1, seed=seeds[0])
    assert findings.violations == []
    assert "some within 1.0e-03" in findings.checks["recomputed"].notes
    assert "other arithmetic than here made the run" in findings.checks["recomputed"].notes


def position_of(root: Path, number: int, partition: int, step: int) -> int:
    rows = sorted(read_lines(root / "clients.jsonl"), key=lambda r: (r["round"], r["partition"]))
    before = [r for r in rows if (r["round"], r["partition"]) < (number, partition)]
    return sum(int(row["num_steps"]) for row in before) + step


def forge_arithmetic(root: Path) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["arithmetic"] = "0" * 16

    rewrite_lines(root / "clients.jsonl", change)
    manifest = json.loads((root / "run.json").read_bytes())
    manifest["device"]["arithmetic"] = "0" * 16
    (root / "run.json").write_text(json.dumps(manifest))
    reseal(root)


def test_other_arithmetic_is_allowed_rounding_and_no_more(copied: Path) -> None:
    forge_arithmetic(copied)
    findings = verify(copied, recompute=None)
    assert findings.violations == []
    # All steps of a client in a row lead to its buffers there too.
    assert findings.checks["replay"].unproven == []
    assert findings.checks["rows"].unproven == []
    forge_running_mean(copied)
    (violation,) = verify(copied, recompute=None).violations
    assert "the delta of 1.running_mean is off by" in violation
    of_round(2, lambda row: row.update(global_accuracy=row["global_accuracy"] + 0.1))(copied)
    reseal(copied)
    (violation,) = verify(copied).checks["evaluation"].violations
    assert "global_accuracy of round 2" in violation


@pytest.mark.parametrize(
    "changes",
    [
        {"autocast": "float16", "local-steps": 2, "batch-size": 8, "client": {}},
        {"autocast": "bfloat16", "capture": "none"},
        {"capture-dtype": "bfloat16", "optimizer": "adam"},
        {"optimizer": "adam", "capture": "every:2", "capture-layers": ["13.*"]},
        {"strategy": {"name": "scaffold"}, "gradient-statistics": False, "capture": "sketch:16"},
        {"strategy": {"name": "fedprox"}, "capture": "last:1"},
        {"strategy": {"name": "fedavg", "dp": "client-side-fixed", "clipping-norm": 0.5,
                      "noise-multiplier": 0.1}},
    ],
)  # fmt: skip
def test_an_honest_run_is_proven_to_the_bit_by_training_again(
    plan: RunPlan, tmp_path: Path, changes: dict[str, Any]
) -> None:
    root = record(plan, tmp_path / "run", **{"rounds": 2, **changes})
    findings = verify(root, recompute=None)
    assert violations_of(findings) == {}
    steps = sum(row["num_steps"] for row in read_lines(root / "clients.jsonl"))
    assert findings.checks["recomputed"].proven == steps
    assert findings.checks["recomputed"].notes == ["bit for bit"]
    assert findings.checks["evaluation"].proven == 3


def test_a_forged_sketch_is_found(plan: RunPlan, tmp_path: Path) -> None:
    root = record(plan, tmp_path / "run", capture="sketch:16")

    def change(arrays: Arrays) -> None:
        arrays[SKETCH_KEY].flat[3] += np.float32(1e-6)

    rewrite_tensors(root / "rounds/0001/clients/0002/sketch.safetensors", change)
    rewrite_client(root, 1, 2, "sketch.safetensors")
    reseal(root)
    assert verify(root).violations == []
    (violation,) = verify(root, recompute=None).violations
    assert violation.endswith("clients/0002: sketch.safetensors is another")


def test_steps_are_drawn_anew_each_time_and_again_by_their_seed(recorded: Recorded) -> None:
    notes = [verify(recorded.path, recompute=3).checks["recomputed"].notes for _ in range(2)]
    seeds = [int(note[1].rpartition(" ")[2]) for note in notes]
    assert seeds[0] != seeds[1]
    total = sum(row["num_steps"] for row in read_lines(recorded.path / "clients.jsonl"))
    assert notes[0][1] == f"drawn from {total:,} with --recompute-seed {seeds[0]}"
    again = verify(recorded.path, recompute=3, seed=seeds[0]).checks["recomputed"]
    assert (again.proven, again.notes) == (3, notes[0])
    assert draw(1000, 5, 7) == draw(1000, 5, 7) != draw(1000, 5, 8)
    assert draw(4, 9, 0) == [0, 1, 2, 3]


@pytest.mark.parametrize(("total", "drawn", "forged"), [(9, 3, 2), (10, 10, 1), (7, 1, 7)])
def test_the_chance_of_catching_a_forger_is_that_of_drawing_without_replacement(
    total: int, drawn: int, forged: int
) -> None:
    draws = list(combinations(range(total), drawn))
    caught = sum(min(chosen) < forged for chosen in draws)
    assert chance_of_catching(total, drawn, forged) == pytest.approx(caught / len(draws), rel=1e-12)


def test_the_states_to_evaluate_can_be_a_sample(recorded: Recorded) -> None:
    findings = verify(recorded.path, evaluate=1, seed=3)
    check = findings.checks["evaluation"]
    assert check.proven == 1
    assert check.notes == ["drawn from 3 with --recompute-seed 3", "bit for bit"]
    (left,) = draw(3, 1, 3)
    open_rounds = ", ".join(str(n) for n in range(3) if n != left)
    assert any(f"rounds {open_rounds})" in line for line in findings.checks["rows"].unproven)


def test_what_takes_long_is_said_before_with_what_the_run_took(
    recorded: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = list(read_lines(recorded.path / "rounds.jsonl"))
    spent = sum(row["seconds"]["evaluate"] for row in rows)
    assert command(["verify", str(recorded.path), "--recompute", "2", "--recompute-seed", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    total = sum(row["num_steps"] for row in read_lines(recorded.path / "clients.jsonl"))
    assert lines[0] == f"evaluating 3 states again, for which the run took {spent:.1f} s"
    assert lines[1] == f"computing 2 of {total} local steps again, drawn with --recompute-seed 5"


def test_nothing_recomputed_is_no_success_unless_that_is_allowed(
    plan: RunPlan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = record(plan, tmp_path / "run", capture="none")
    forge_arithmetic(root)
    asked = ["verify", str(root), "--recompute", "5"]
    assert command(asked) == 1
    captured = capsys.readouterr()
    assert captured.err == f"fedsim: --recompute = 5: no step of {root} could be recomputed\n"
    reason = "training again needs the arithmetic that made the run"
    assert reason in captured.out
    assert command([*asked, "--recompute-optional"]) == 0


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--recompute", "-1"), ("--recompute", "most"), ("--evaluate", "1.5"),
     ("--recompute-seed", "-1")],
)  # fmt: skip
def test_wrong_counts_are_refused_in_one_sentence(
    recorded: Recorded, capsys: pytest.CaptureFixture[str], flag: str, value: str
) -> None:
    assert command(["verify", str(recorded.path), flag, value]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"fedsim: {flag} = ")
    assert err.count("\n") == 1


def test_computing_again_leaves_torch_as_it_was(recorded: Recorded) -> None:
    torch.use_deterministic_algorithms(False)
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    verify(recorded.path, recompute=2)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic_block(deterministic=True):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_client_on_a_node_that_keeps_no_record_is_trained_again_too(
    plan: RunPlan, tmp_path: Path
) -> None:
    root = record(plan, tmp_path / "run", to=False)
    findings = verify(root, recompute=None)
    assert violations_of(findings) == {}
    steps = sum(row["num_steps"] for row in read_lines(root / "clients.jsonl"))
    assert findings.checks["recomputed"].proven == steps
    assert not list(root.rglob("steps.jsonl"))
