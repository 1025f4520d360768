"""What is computed once more: evaluations and local steps, by a forger's eyes too."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.cli import run as command
from fedsim.core.determinism import deterministic_block
from fedsim.core.plan import RunPlan
from fedsim.recording.checksums import checksum_line, read_checksums
from fedsim.recording.files import Checksum, read_lines
from fedsim.recording.findings import LOSSES, SOURCES
from fedsim.recording.reader import load_run
from fedsim.recording.recomputation import _distance, chance_of_catching, draw
from fedsim.recording.verify import verify
from tests.recording.test_forgeries import FEW, a_buffer, a_gradient, honest, repair  # noqa: F401
from tests.recording.test_verify import (
    Arrays,
    record,
    reseal,
    rewrite_client,
    rewrite_lines,
    rewrite_tensors,
    violations_of,
)


@pytest.fixture
def forged(honest: Path, tmp_path: Path) -> Path:  # noqa: F811
    """A copy of the honest run, to be changed."""
    return Path(shutil.copytree(honest, tmp_path / "run"))


def of_round(number: int, change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Change the row of a round."""

    def forge(root: Path) -> None:
        def rows(rows: list[dict[str, Any]]) -> None:
            change(rows[number])

        rewrite_lines(root / "rounds.jsonl", rows)

    return forge


def tell_score(root: Path, number: int) -> None:
    """Tell the score that a forged state really has."""
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


@pytest.mark.parametrize("key", ["global_accuracy", "global_loss"])
def test_a_forged_evaluation_is_found_however_small(forged: Path, key: str) -> None:
    told_first = load_run(forged).round_rows[1][key]
    for told in (told_first + 0.8, math.nextafter(told_first, math.inf)):
        of_round(1, lambda row, told=told: row.update({key: told}))(forged)
        reseal(forged)
        violations = violations_of(verify(forged))["evaluation"]
        assert violations[0].startswith(f"rounds.jsonl: {key} of round 1 is {told}; ")
        assert evaluated(violations) == (key, told_first)


def test_a_finished_run_tells_the_score_of_its_last_round(plan: RunPlan, tmp_path: Path) -> None:
    root = record(plan, tmp_path / "run", **FEW, **{"evaluate-every": 5})
    assert violations_of(verify(root)) == {}
    of_round(1, lambda row: row.update(global_accuracy=None, global_loss=None))(root)
    reseal(root)
    assert violations_of(verify(root)) == {
        "rows": ["rounds.jsonl: round 1 was not evaluated, and evaluate-every = 5"]
    }


def test_a_single_step_is_compared_to_the_bit_where_the_arithmetic_is_the_same(
    forged: Path,
) -> None:
    a_gradient(2e-3)(forged)
    repair(forged)
    tell_score(forged, 1)
    total = sum(row["num_steps"] for row in read_lines(forged / "clients.jsonl"))
    seeds = [s for s in range(200) if draw(total, 1, s) == [position_of(forged, 1, 2, 1)]]
    (violation,) = verify(forged, recompute=1, seed=seeds[0]).violations
    assert "the gradient of step 1 is off by" in violation
    assert violation.endswith("not equal to the bit")
    # Made by other arithmetic, rounding explains what is that small, and the table says so.
    forge_arithmetic(forged)
    findings = verify(forged, recompute=1, seed=seeds[0])
    assert findings.violations == []
    assert "some within 1.0e-03" in findings.checks["recomputed"].notes
    assert (
        "the run was made with other arithmetic than this machine has"
        in findings.checks["recomputed"].notes
    )


@pytest.mark.parametrize("strategy", ["delta-fedavg", "fedavg", "fedprox", "fedadam"])
def test_a_run_that_diverged_is_no_forgery(plan: RunPlan, tmp_path: Path, strategy: str) -> None:
    diverged = {"strategy": strategy, "learning-rate": 1e30, "allow-divergence": True}
    root = record(plan, tmp_path / "run", **FEW, **diverged)
    findings = verify(root, jobs=1, recompute=4, seed=1)
    assert violations_of(findings) == {}
    assert findings.checks["recomputed"].proven == 4
    forge_arithmetic(root)
    assert violations_of(verify(root, jobs=1, evaluate=0, recompute=None)) == {}


def test_a_gradient_is_no_longer_close_when_one_of_the_two_diverged() -> None:
    finite, beyond = {"w": torch.ones(3)}, {"w": torch.tensor([1.0, math.inf, math.nan])}
    for same in (True, False):
        assert math.isinf(_distance(finite, beyond, torch.float32, same=same))
        assert math.isinf(_distance(beyond, finite, torch.float32, same=same))
        assert _distance(beyond, beyond, torch.float32, same=same) == 0
    other = {"w": torch.tensor([2.0, math.inf, math.nan])}
    assert math.isinf(_distance(beyond, other, torch.float32, same=True))


def test_shards_beside_a_removed_one_are_not_said_to_be_of_the_data(forged: Path) -> None:
    folder, extra = "rounds/0001/clients/0002", "gradients-00001.safetensors"
    removed = Checksum(size=100, xxh3_128="0" * 32)

    def change(arrays: Arrays) -> None:
        arrays["000001/8.weight"] += 0.5

    def tell(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if row["partition"] == 2:
                row["files"][extra] = removed.to_json()

    rewrite_tensors(forged / folder / "gradients-00000.safetensors", change)
    rewrite_lines(forged / "clients.jsonl", tell)
    repair(forged)
    lines = b""
    for line in list(read_checksums(forged / "checksums.jsonl")):
        of_client = f"{folder}/delta.safetensors" in line.files
        more = {f"{folder}/{extra}": removed} if of_client else {}
        lines += checksum_line({**line.files, **more}, (), more)
    (forged / "checksums.jsonl").write_bytes(lines)
    findings = verify(forged, jobs=1, evaluate=0, recompute=None)
    (left,) = findings.checks["recomputed"].unproven
    assert left == f"{SOURCES} (3 of 9 steps; client 2 of round 1)"


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


def test_other_arithmetic_is_allowed_rounding_and_no_more(forged: Path) -> None:
    forge_arithmetic(forged)
    findings = verify(forged, recompute=None)
    assert findings.violations == []
    # All steps of a client in a row lead to its buffers there too.
    assert findings.checks["replay"].unproven == []
    assert LOSSES not in findings.checks["rows"].reasons
    a_buffer(forged)
    repair(forged)
    tell_score(forged, 1)
    (violation,) = verify(forged, recompute=None).violations
    assert "the delta of 1.running_mean is off by" in violation
    of_round(1, lambda row: row.update(global_accuracy=row["global_accuracy"] + 0.1))(forged)
    reseal(forged)
    (violation,) = verify(forged).checks["evaluation"].violations
    assert "global_accuracy of round 1" in violation


@pytest.mark.parametrize(
    "changes",
    [
        {"autocast": "float16", "local-steps": 2, "batch-size": 8},
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
    root = record(plan, tmp_path / "run", **{"rounds": 2, **FEW, **changes})
    findings = verify(root, recompute=None)
    assert violations_of(findings) == {}
    steps = sum(row["num_steps"] for row in read_lines(root / "clients.jsonl"))
    assert findings.checks["recomputed"].proven == steps
    assert findings.checks["recomputed"].notes == ["bit for bit"]
    assert findings.checks["evaluation"].proven == 3


def test_a_forged_sketch_is_found(plan: RunPlan, tmp_path: Path) -> None:
    root = record(plan, tmp_path / "run", **{**FEW, "capture": "sketch:16"})

    def change(arrays: Arrays) -> None:
        arrays["sketch"].flat[3] += np.float32(1e-6)

    rewrite_tensors(root / "rounds/0001/clients/0002/sketch.safetensors", change)
    rewrite_client(root, 1, 2, "sketch.safetensors")
    reseal(root)
    assert verify(root).violations == []
    (violation,) = verify(root, recompute=None).violations
    assert violation.endswith("clients/0002: sketch.safetensors differs")


def test_steps_are_drawn_anew_each_time_and_again_by_their_seed(honest: Path) -> None:  # noqa: F811
    notes = [verify(honest, recompute=3).checks["recomputed"].notes for _ in range(2)]
    seeds = [int(note[1].rpartition(" ")[2]) for note in notes]
    assert seeds[0] != seeds[1]
    total = sum(row["num_steps"] for row in read_lines(honest / "clients.jsonl"))
    assert notes[0][1] == f"drawn from {total:,} with --recompute-seed {seeds[0]}"
    again = verify(honest, recompute=3, seed=seeds[0]).checks["recomputed"]
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


def test_the_states_to_evaluate_can_be_a_sample(honest: Path) -> None:  # noqa: F811
    findings = verify(honest, evaluate=1, seed=3)
    check = findings.checks["evaluation"]
    assert check.proven == 1
    assert check.notes == ["drawn from 2 with --recompute-seed 3", "bit for bit"]
    (drawn,) = draw(2, 1, 3)
    assert any(f"(round {1 - drawn})" in line for line in findings.checks["rows"].unproven)


def test_what_takes_long_is_said_before_with_what_the_run_took(
    honest: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = list(read_lines(honest / "rounds.jsonl"))
    spent = sum(row["seconds"]["evaluate"] for row in rows)
    assert command(["verify", str(honest), "--recompute", "2", "--recompute-seed", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    total = sum(row["num_steps"] for row in read_lines(honest / "clients.jsonl"))
    assert lines[0] == f"evaluating 2 states again, for which the run took {spent:.1f} s"
    assert lines[1] == f"computing 2 of {total} local steps again, drawn with --recompute-seed 5"


def test_nothing_recomputed_is_no_success_unless_that_is_allowed(
    plan: RunPlan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = record(plan, tmp_path / "run", **{**FEW, "capture": "none"})
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
    honest: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    flag: str,
    value: str,
) -> None:
    assert command(["verify", str(honest), flag, value]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"fedsim: {flag} = ")
    assert err.count("\n") == 1


def test_computing_again_leaves_torch_as_it_was(honest: Path) -> None:  # noqa: F811
    torch.use_deterministic_algorithms(False)
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    verify(honest, recompute=2)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic_block(deterministic=True):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_client_on_a_node_that_keeps_no_record_is_trained_again_too(
    plan: RunPlan, tmp_path: Path
) -> None:
    root = record(plan, tmp_path / "run", to=False, **FEW)
    findings = verify(root, recompute=None)
    assert violations_of(findings) == {}
    steps = sum(row["num_steps"] for row in read_lines(root / "clients.jsonl"))
    assert findings.checks["recomputed"].proven == steps
    assert not list(root.rglob("steps.jsonl"))
