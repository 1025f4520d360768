"""Forgers who repair every checksum: what they change is found, or was never claimed."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from fedsim.captures.statistics import GradientStatistics
from fedsim.core.aggregation import DeltaMean, apply_delta, state_sha256
from fedsim.core.config import RunConfig
from fedsim.core.partition import fold_order, partition_sha256
from fedsim.core.plan import RunPlan
from fedsim.core.support import count_nonzero
from fedsim.recording import rows
from fedsim.recording.checksums import checksum_line
from fedsim.recording.files import Checksum, write_tensors
from fedsim.recording.findings import Findings
from fedsim.recording.layout import RunLayout
from fedsim.recording.proofs import arrays_of
from fedsim.recording.reader import load_run
from fedsim.recording.row_proofs import OF_FAILED
from fedsim.recording.verify import verify
from tests.recording.test_verify import (
    Arrays,
    record,
    reseal,
    rewrite_lines,
    rewrite_tensors,
    violations_of,
)

CLIENT = "rounds/0001/clients/0002"
DELTA, STEPS = f"{CLIENT}/delta.safetensors", f"{CLIENT}/steps.jsonl"
SHARD = f"{CLIENT}/gradients-00000.safetensors"
Change = Callable[[Path], None]
FEW = {"local-steps": 3, "batch-size": 16, "client": {}}


@pytest.fixture(scope="module")
def honest(plan: RunPlan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One round of three clients and three steps each, all captured. Never write into it."""
    return record(plan, tmp_path_factory.mktemp("honest") / "run", **FEW)


def repair(root: Path, *, hashes: bool = True) -> None:
    """Make every checksum and hash that of what is there now."""

    def of_files(found: list[dict[str, Any]]) -> None:
        for row in found:
            folder = RunLayout(root).client(row["round"], row["partition"])
            for name in row.get("files", {}):
                # A row that speaks of another client has nothing to follow.
                if (folder / name).exists():
                    row["files"][name] = Checksum.of_file(folder / name).to_json()

    def of_states(found: list[dict[str, Any]]) -> None:
        for row in found:
            if (path := RunLayout(root).state(row["round"])).exists():
                row["state_sha256"] = state_sha256(safetensors.numpy.load_file(path))

    rewrite_lines(root / "clients.jsonl", of_files)
    if hashes:
        rewrite_lines(root / "rounds.jsonl", of_states)
    reseal(root)


def follow_deltas(root: Path) -> None:
    """Let aggregate and state of round 1 follow from its deltas."""
    run = load_run(root)
    mean, this = DeltaMean(), run.round(1)
    sizes = [len(indices) for indices in run.partition.values()]
    for partition in fold_order(list(this.clients), sizes):
        mean.add(arrays_of(this.clients[partition].delta), sizes[partition])
    write_tensors(run.layout.aggregate(1), mean.mean())
    before = arrays_of(run.round(0).state)
    write_tensors(run.layout.state(1), apply_delta(before, mean.mean()))


def in_row(file: str, position: int, *keys: Any, to: Callable[[Any], Any]) -> Change:
    """Change a number of a line of a file."""

    def change(root: Path) -> None:
        def one(found: list[dict[str, Any]]) -> None:
            place: Any = found[position]
            for key in keys[:-1]:
                place = place[key]
            place[keys[-1]] = to(place[keys[-1]])

        rewrite_lines(root / file, one)

    return change


def in_manifest(*keys: Any, to: Callable[[Any], Any]) -> Change:
    def change(root: Path) -> None:
        manifest = json.loads((root / "run.json").read_bytes())
        place = manifest
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = to(place[keys[-1]])
        (root / "run.json").write_text(json.dumps(manifest))

    return change


def in_tensors(file: str, name: str, to: Callable[[Any], Any]) -> Change:
    """Change the first entry of an array of a file."""

    def change(root: Path) -> None:
        def one(arrays: Arrays) -> None:
            flat = arrays[name].reshape(-1)
            flat[0] = to(flat[0])

        rewrite_tensors(root / file, one)

    return change


def of_client(*keys: Any, to: Callable[[Any], Any]) -> Change:
    """Change a number of the line of client 2."""

    def change(root: Path) -> None:
        found = [json.loads(line) for line in (root / "clients.jsonl").read_text().splitlines()]
        position = next(i for i, row in enumerate(found) if row["partition"] == 2)
        in_row("clients.jsonl", position, *keys, to=to)(root)

    return change


def both(*changes: Change) -> Change:
    def change(root: Path) -> None:
        for one in changes:
            one(root)

    return change


def a_loss(root: Path) -> None:
    """Set a step's loss everywhere that it stands."""
    in_row("rounds/0001/clients/0002/steps.jsonl", 1, "loss", to=lambda _: 0.001)(root)
    of_client("loss_history", 1, to=lambda _: 0.001)(root)

    def mean(found: list[dict[str, Any]]) -> None:
        for row in found:
            weights = row["batch_sizes"]
            row["local_loss"] = float(np.average(row["loss_history"], weights=weights))

    rewrite_lines(root / "clients.jsonl", mean)


def a_buffer(root: Path) -> None:
    in_tensors(DELTA, "1.running_mean", lambda v: v + 5)(root)
    follow_deltas(root)


def a_gradient(by: float) -> Change:
    """Change a gradient, and let figures, delta, aggregate and state follow from it."""

    def change(root: Path) -> None:
        in_tensors(SHARD, "000001/8.weight", lambda v: v + by)(root)
        run = load_run(root)
        client = run.round(1).client(2)
        statistics = GradientStatistics()
        told = []
        for step in range(3):
            shard = client.shard(step, "8.weight")
            packed = {n: shard.packed(step, n) for n in run.shapes}
            taps = {n: shard.taps(n) for n in run.shapes}
            nonzero = sum(map(count_nonzero, packed.values()))
            told.append(vars(statistics.add(packed, taps, run.shapes, nonzero=nonzero)))
        moved = client.parameters_at(3)
        start = run.round(0).state
        delta = {n: (moved[n] - start[n] if n in moved else t).numpy().copy()
                 for n, t in client.delta.items()}  # fmt: skip
        write_tensors(root / DELTA, delta)

        def figures(found: list[dict[str, Any]]) -> None:
            for row, figure in zip(found, told, strict=True):
                row |= {"gradient_norm": figure["norm"]} | {
                    k: v for k, v in figure.items() if k != "norm"
                }

        rewrite_lines(root / STEPS, figures)
        follow_deltas(root)

    return change


def swap_samples(root: Path) -> None:
    """Let two clients change a sample, in the partition, its hash and all batches."""

    def change(arrays: Arrays) -> None:
        arrays["0"][0], arrays["1"][0] = arrays["1"][0], arrays["0"][0]
        for name in ("0", "1"):
            arrays[name].sort()

    rewrite_tensors(root / "partition.safetensors", change)
    found = load_run(root).partition
    in_manifest("partition", "sha256", to=lambda _: partition_sha256(found))(root)


def times(by: float) -> Callable[[Any], Any]:
    return lambda value: value * by


def first_norms(root: Path) -> None:
    """Set all norms of a client's row, and let the whole run look as one without the choice."""
    of_client("per_layer_norms", to=lambda norms: dict.fromkeys(norms, 7.0))(root)
    of_client("gradient_norm", to=lambda _: 7 * math.sqrt(11))(root)
    in_manifest("config", to=lambda c: {k: c[k] for k in c if k != "gradient-statistics"})(root)


def plus(by: Any) -> Callable[[Any], Any]:
    return lambda value: value + by


def a_client(number: int) -> Change:
    """Tell of a client in a round that had none."""

    def change(root: Path) -> None:
        row = {"round": number, "partition": 0, "status": "failed", "error": "it is said so"}
        rewrite_lines(root / "clients.jsonl", lambda found: found.append(row))

    return change


def another_figure(key: str) -> Change:
    return in_lines(STEPS, lambda found: found[1].update({key: 5.0}))


def in_lines(file: str, to: Callable[[list[dict[str, Any]]], None]) -> Change:
    return lambda root: rewrite_lines(root / file, to)


WRONG = [
    # run.json
    (in_manifest("seed", to=plus(1)), "rows", "run.json: seed is not"),
    (in_manifest("model", "arch", to=lambda _: "resnet18"), "rows", "model.arch"),
    (in_manifest("dataset", "mean", 1, to=plus(0.01)), "rows", "dataset.mean"),
    (in_manifest("dataset", "test_size", to=plus(1)), "rows", "dataset.test_size"),
    (in_manifest("config", "rounds", to=plus(1)), "rows", "finished, with 1 of 2 rounds"),
    (in_manifest("config", "momentum", to=times(0.5)), "replay", "not where the gradients lead"),
    (in_manifest("config", "alpha", to=times(2)), "rows", "is not what the seed deals"),
    (in_manifest("partition", "sizes", 0, to=plus(1)), "partition", "other sizes than run.json"),
    # partition.safetensors
    (swap_samples, "rows", "is not what the seed deals"),
    (in_tensors("partition.safetensors", "0", plus(1)), "partition", "does not deal each of"),
    # rounds.jsonl
    (in_row("rounds.jsonl", 1, "global_accuracy", to=plus(1e-4)), "rows", "is not a fraction of"),
    (in_row("rounds.jsonl", 1, "participants", to=lambda v: v[::-1]), "participants", "round 1"),
    (in_row("rounds.jsonl", 1, "global_loss", to=times(-1)), "rows", "is negative"),
    (in_row("rounds.jsonl", 1, "global_accuracy", to=lambda _: None), "rows", "was not evaluated"),
    (in_row("rounds.jsonl", 0, "participants", to=lambda _: [1]), "rows", "round 0 has participan"),
    (in_row("rounds.jsonl", 0, "failed", to=lambda _: [1]), "rows", "round 0 has participants"),
    # clients.jsonl
    (a_client(0), "rows", "clients.jsonl: round 0 has clients"),
    (a_client(7), "rows", "there are clients of round 7, which is not in rounds.jsonl"),
    (of_client("num_samples", to=plus(1)), "rows", "another num_samples"),
    (of_client("local_loss", to=times(0.5)), "rows", "another local_loss"),
    (of_client("gradient_norm", to=times(1.001)), "rows", "another gradient_norm"),
    (of_client("per_layer_norms", "8.weight", to=times(1.001)), "rows", "another norm of 8.weight"),
    (of_client("bytes_captured", to=plus(4)), "rows", "other bytes_captured"),
    (of_client("num_steps_captured", to=plus(-1)), "rows", "another num_steps_captured"),
    (of_client("learning_rate", to=times(2)), "rows", "another learning_rate"),
    (of_client("batch_sizes", 1, to=plus(1)), "rows", "another batch_sizes"),
    (first_norms, "rows", "another norm of 0.weight than"),
    # steps.jsonl
    (in_row(STEPS, 1, "gradient_norm", to=times(1.001)), "gradients", "another gradient_norm"),
    (in_row(STEPS, 1, "cosine_to_previous", to=plus(0.01)), "gradients", "cosine_to_previous"),
    (in_row(STEPS, 2, "cosine_to_mean", to=plus(0.01)), "gradients", "cosine_to_mean"),
    (in_row(STEPS, 0, "zero_fraction", to=plus(0.001)), "gradients", "zero_fraction"),
    (in_row(STEPS, 1, "per_layer_norms", "8.weight", to=times(1.01)), "gradients", "has norm"),
    (in_row(STEPS, 1, "indices", to=lambda v: v[::-1]), "steps", "is not the one drawn"),
    (another_figure("proximal"), "rows", "step 1 has proximal, and the objective is the loss"),
    (another_figure("objective_norm"), "rows", "step 1 has objective_norm, and the objective"),
    # tensors
    (in_tensors("rounds/0000/global.safetensors", "8.weight", plus(1)), "initial state", "8.weig"),
    (in_tensors("rounds/0001/global.safetensors", "8.weight", plus(1)), "state", "8.weight is not"),
    (in_tensors("rounds/0001/global.safetensors", "1.running_var", plus(1)), "state", "running_va"),
    (in_tensors("rounds/0001/aggregate.safetensors", "8.weight", plus(1)), "aggregate", "8.weight"),
    (both(in_tensors(DELTA, "8.weight", plus(1e-3)), follow_deltas), "replay", "8.weight is not"),
    (both(in_tensors(DELTA, "13.bias", times(1.01)), follow_deltas), "replay", "13.bias is not"),
    (in_tensors(SHARD, "000001/8.weight", plus(1e-3)), "replay", "8.weight is not where"),
    (in_tensors(SHARD, "000002/0.weight", times(1.5)), "replay", "0.weight is not where"),
]  # fmt: skip

NAMED = [
    (
        in_row("rounds.jsonl", 1, "global_accuracy", to=lambda _: 328 / 359),
        "rows",
        "global_loss, global_accuracy: .*rounds 0, 1",
        "global_accuracy of round 1 is 0.9136490250696379; evaluated again it is 0.1",
    ),
    (
        a_loss,
        "rows",
        r"loss, loss_history, local_loss: .*9 steps; all clients of round 1",
        "clients/0002: steps.jsonl: loss of step 1 differs",
    ),
    (
        a_buffer,
        "replay",
        r"buffers: .*all clients of round 1",
        "clients/0002: the delta of 1.running_mean is not where training again leads",
    ),
    (
        a_gradient(5e-3),
        "recomputed",
        r"gradients, sketches: .*9 steps; all clients of round 1",
        "clients/0002: the gradient of 8.weight in step 1 differs",
    ),
    (
        a_gradient(1.0),
        "recomputed",
        r"gradients, sketches: .*9 steps; all clients of round 1",
        "clients/0002: the gradient of 8.weight in step 1 differs",
    ),
    (
        in_row("rounds.jsonl", 1, "seconds", "clients", to=times(2)),
        "rows",
        "seconds, .*measured",
        "",
    ),
    (of_client("peak_memory", "process", to=times(2)), "rows", "peak_memory, .*measured", ""),
    # Where more threads round differently, computing again finds it; elsewhere nothing does.
    (in_manifest("device", "worker_threads", to=plus(1)), "rows", "device, .*measured", None),
    (in_manifest("config", "workers", to=lambda _: 77), "rows", "config.workers, ", ""),
]


@pytest.mark.parametrize(("change", "check", "said"), WRONG)
def test_what_does_not_follow_is_found(
    honest: Path, tmp_path: Path, change: Change, check: str, said: str
) -> None:
    root = Path(shutil.copytree(honest, tmp_path / "run"))
    change(root)
    repair(root)
    found = violations_of(verify(root, jobs=1))
    assert any(said in violation for violation in found.get(check, [])), found


@pytest.mark.parametrize(("change", "check", "said", "again"), NAMED)
def test_what_nothing_follows_from_is_named_and_found_by_computing_again(
    honest: Path, tmp_path: Path, change: Change, check: str, said: str, again: str | None
) -> None:
    root = Path(shutil.copytree(honest, tmp_path / "run"))
    change(root)
    repair(root)
    assert any(file.read_bytes() != (honest / file.relative_to(root)).read_bytes()
               for file in root.rglob("*") if file.is_file())  # fmt: skip
    findings = verify(root, jobs=1, evaluate=0)
    # The forger left no trace; so the reader is told of the gap.
    assert violations_of(findings) == {}
    assert any(re.search(said, line) for line in findings.checks[check].unproven)
    if again is None:
        return
    violations = verify(root, jobs=1, recompute=None).violations
    assert any(again in violation for violation in violations) if again else not violations


CONTROL = f"{CLIENT}/control.safetensors"
KEPT = "rounds/0001/strategy.safetensors"
ADAPTIVE = {
    "name": "fedavg",
    "dp": "server-side-adaptive",
    "noise-multiplier": 0.0,
    "clipping-norm": 0.05,
}
OWN = {"name": "tests.strategies.own:Counting"}
OTHERS = [
    # strategy, what else is set, change, whether it is wrong or named, check, said
    ("fedprox", {}, in_row(STEPS, 1, "proximal", to=times(1.01)), "wrong", "rows", "proximal of s"),
    ("fedprox", {}, in_row(STEPS, 2, "objective_norm", to=times(1.01)), "wrong", "rows", "objecti"),
    ("fedprox", {}, of_client("proximal_mu", to=times(2)), "wrong", "rows", "another proximal_mu"),
    (
        *("fedavg", {}, in_tensors("rounds/0001/global.safetensors", "13.bias", plus(1e-6))),
        *("wrong", "state", "13.bias is not the state before plus the step of fedavg"),
    ),
    ("scaffold", {}, in_tensors(CONTROL, "13.bias", times(1.001)), "wrong", "kept", "13.bias does"),
    ("scaffold", {}, in_tensors(KEPT, "control/13.bias", plus(1)), "wrong", "kept", "control/13"),
    ("fedavgm", {}, in_tensors(KEPT, "momentum/0.weight", times(1.001)), "wrong", "kept", "0.weig"),
    ("fedyogi", {}, in_tensors(KEPT, "v/8.weight", times(1.001)), "wrong", "kept", "v/8.weight"),
    ("fedadagrad", {}, in_tensors(KEPT, "m/8.weight", times(1.001)), "wrong", "kept", "m/8.weight"),
    (ADAPTIVE, {}, in_tensors(KEPT, "clipping-norm", times(1.001)), "wrong", "kept", "clipping-n"),
    (ADAPTIVE, {}, in_tensors("rounds/0001/global.safetensors", "8.weight", plus(1)), "named",
     "state", r"parameters: how fedavg with dp = .* is not followed .*round 1"),
    (OWN, {}, in_tensors(KEPT, "total", plus(1)), "named", "kept", r"own:Counting keeps: .*nd 1"),
    (OWN, {}, in_tensors("rounds/0001/global.safetensors", "8.weight", plus(1)), "named", "state",
     r"parameters: how tests.strategies.own:Counting moves them is not followed .*round 1"),
    ("delta-fedavg", {"capture": "sketch:64"},
     in_tensors(f"{CLIENT}/sketch.safetensors", "sketch", plus(1)), "named", "recomputed",
     "gradients, sketches: .*all clients of round 1"),
    ("delta-fedavg", {"capture": "sketch:64"}, of_client("bytes_captured", to=plus(4)), "wrong",
     "rows", "another bytes_captured"),
    ("delta-fedavg", {"capture": "none"}, in_row(STEPS, 1, "gradient_norm", to=times(2)), "named",
     "rows", "^gradient_norm, .*9 steps; all clients of round 1"),
    ("delta-fedavg", {"capture": "none"}, in_manifest("config", "momentum", to=times(0.5)), "named",
     "rows", "config.optimizer, momentum, .*all clients of round 1"),
    ("delta-fedavg", {"autocast": "float16"}, of_client("num_updates", to=plus(-1)), "wrong",
     "replay", "made other updates"),
    ("delta-fedavg", {"autocast": "bfloat16", "capture-dtype": "bfloat16"},
     in_row(STEPS, 1, "gradient_norm", to=times(1.02)), "wrong", "gradients", "gradient_norm"),
    ("delta-fedavg", {"autocast": "bfloat16", "capture-dtype": "float16"},
     in_row(STEPS, 1, "cosine_to_previous", to=plus(0.1)), "wrong", "gradients", "cosine_to_prev"),
]  # fmt: skip


@pytest.fixture(scope="module")
def others(plan: RunPlan, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Give a run with another strategy or other settings, made once and honest."""
    made: dict[str, Path] = {}

    def give(strategy: Any, changes: dict[str, Any]) -> Path:
        key = repr((strategy, changes))
        if key not in made:
            few = {**FEW, "strategy": strategy, **changes}
            path = tmp_path_factory.mktemp("other") / "run"
            made[key] = record(plan, path, **few)
            assert violations_of(verify(path, jobs=1)) == {}
        return made[key]

    return give


@pytest.mark.parametrize("side", ["server-side", "client-side"])
def test_a_clipping_norm_with_noise_is_followed_over_rounds(
    others: Callable[..., Path], tmp_path: Path, side: str
) -> None:
    table = {**ADAPTIVE, "name": "fedadam", "dp": f"{side}-adaptive", "noise-multiplier": 0.1}
    honest = others(table, {"rounds": 2, "capture": "none"})
    findings = verify(honest, jobs=1)
    (reason,) = findings.checks["kept"].unproven
    assert re.match(rf"with dp = '{side}-adaptive', what fedadam keeps .*rounds 1, 2", reason)
    assert findings.checks["kept"].proven == 2
    root = Path(shutil.copytree(honest, tmp_path / "run"))
    in_tensors("rounds/0002/strategy.safetensors", "clipping-norm", times(1 + 1e-9))(root)
    repair(root)
    assert list(violations_of(verify(root, jobs=1))) == ["kept"]


@pytest.mark.parametrize(("strategy", "changes", "change", "outcome", "check", "said"), OTHERS)
def test_other_strategies_and_captures_are_held_too(
    others: Callable[..., Path],
    tmp_path: Path,
    strategy: Any,
    changes: dict[str, Any],
    change: Change,
    outcome: str,
    check: str,
    said: str,
) -> None:
    root = Path(shutil.copytree(others(strategy, changes), tmp_path / "run"))
    change(root)
    repair(root)
    findings = verify(root, jobs=1, evaluate=0)
    if outcome == "wrong":
        assert any(said in v for v in findings.checks[check].violations), violations_of(findings)
    else:
        assert violations_of(findings) == {}
        assert any(re.search(said, line) for line in findings.checks[check].unproven)


def test_the_cause_of_a_failure_is_named_with_its_client(honest: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(honest, tmp_path / "run"))
    run = load_run(root)
    shutil.rmtree(run.round(1).client(2).folder)

    def fail(found: list[dict[str, Any]]) -> None:
        for row in found:
            if row["partition"] == 2:
                row.clear()
                row |= {"round": 1, "partition": 2, "status": "failed", "error": "it is said so"}

    rewrite_lines(root / "clients.jsonl", fail)
    in_row("rounds.jsonl", 1, "failed", to=lambda _: [2])(root)
    lines = (root / "checksums.jsonl").read_text().splitlines()
    kept = [json.loads(line)["files"] for line in lines]
    (root / "checksums.jsonl").write_bytes(
        b"".join(
            checksum_line(
                {
                    name: Checksum(size=file["bytes"], xxh3_128=file["xxh3_128"])
                    for name, file in files.items()
                    if CLIENT not in name
                }
            )
            for files in kept
        )
    )
    follow_deltas(root)
    repair(root)
    findings = verify(root, jobs=1, evaluate=0)
    # A server that drops a client, and says that it failed, leaves no trace but its word.
    assert violations_of(findings) == {}
    assert f"{OF_FAILED} (client 2 of round 1)" in findings.checks["rows"].unproven


@pytest.mark.parametrize("file", ["run.json", "rounds.jsonl", "clients.jsonl", STEPS])
def test_a_key_that_no_version_writes_is_named(honest: Path, tmp_path: Path, file: str) -> None:
    root = Path(shutil.copytree(honest, tmp_path / "run"))
    if file == "run.json":
        manifest = json.loads((root / file).read_bytes())
        (root / file).write_text(json.dumps({**manifest, "f1-score": 0.99}))
    else:
        rewrite_lines(root / file, lambda found: found[1].update({"f1-score": 0.99}))
    repair(root)
    findings = verify(root, jobs=1, evaluate=0)
    name = Path(file).name
    assert (
        f"{name}: 'f1-score', which this version does not know" in findings.checks["rows"].reasons
    )


def leaves(value: Any, *path: Any) -> Iterator[tuple[Any, ...]]:
    """Give the place of one number of each key."""
    if isinstance(value, dict) and value:
        numbered = not any(isinstance(k, str) and k.isidentifier() for k in value)
        for key in list(value)[:1] if numbered and path else value:
            yield from leaves(value[key], *path, key)
    elif isinstance(value, list) and value and isinstance(value[0], dict | list):
        yield from leaves(value[-1], *path, len(value) - 1)
    elif isinstance(value, list) and value:
        yield (*path, len(value) - 1)
    else:
        yield path


def another(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 1.5 + 0.1
    if isinstance(value, str):
        return ("1" if value[:1] == "0" else "0") + value[1:] if len(value) > 30 else value + "x"
    return {"x": 1} if isinstance(value, dict) else [1] if isinstance(value, list) else 1


def is_held(findings: Findings, key: str) -> bool:
    """Say whether a number was found wrong, or is named by its key."""
    lines = [line for check in findings.checks.values() for line in check.unproven]
    lines = [line.partition(" (")[0] for line in lines]
    return bool(findings.violations) or any(
        re.search(rf"(^|[ .]){re.escape(key)}([ ,:]|$)", line) for line in lines
    )


@pytest.mark.parametrize("file", ["run.json", "rounds.jsonl", "clients.jsonl", STEPS])
def test_every_number_of_every_row_is_proven_or_named(
    honest: Path, tmp_path: Path, file: str
) -> None:
    root = Path(shutil.copytree(honest, tmp_path / "run"))
    whole = {name: (root / name).read_bytes() for name in (file, "clients.jsonl", "rounds.jsonl",
             "run.json", "checksums.jsonl")}  # fmt: skip
    if file == "run.json":
        first, change = json.loads(whole[file]), in_manifest
    else:
        first = json.loads(whole[file].splitlines()[1])
        change = lambda *keys, to: in_row(file, 1, *keys, to=to)  # noqa: E731
    places = [place for place in leaves(first) if place[:1] != ("files",)]
    free = []
    for place in places:
        change(*place, to=another)(root)
        repair(root, hashes="state_sha256" not in place)
        key = next(part for part in reversed(place) if isinstance(part, str))
        key = place[0] if place[0] in ("versions", "device", "peak_memory", "seconds") else key
        if not is_held(verify(root, jobs=1, evaluate=0), key):
            free.append(place)
        for name, content in whole.items():
            (root / name).write_bytes(content)
    assert free == []
    model = {"run.json": rows.Manifest, "rounds.jsonl": rows.RoundRow,
             "clients.jsonl": rows.TrainedClientRow, STEPS: rows.StepRow}[file]  # fmt: skip
    absent = set(model.model_fields) - {place[0] for place in places} - {"files"}
    assert absent <= ELSEWHERE, absent - ELSEWHERE
    if file == "run.json":
        keys = {place[1] for place in places if place[0] == "config"}
        assert keys == set(RunConfig.model_validate({}).to_mapping())


ELSEWHERE = {
    # Of runs that failed or were continued: always named.
    *("error", "diverged", "resumed"),
    # Of runs with code of the user's own or evaluation on clients, in `tests/test_extend.py`.
    "code",
    "evaluation",
    # Not honest, with float16 or a proximal term, on other hosts, in shared files, elsewhere.
    "behavior",
    *("num_updates", "proximal_mu", "place", "not_captured", "shard", "arithmetic"),
    *("proximal", "objective_norm"),
}  # fmt: skip
