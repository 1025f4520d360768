"""Every strategy of the registry over the whole round loop: recorded, verified, resumed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsim.core.config import RunConfig
from fedsim.core.errors import DivergedError, FedsimError, RunFailedError
from fedsim.core.plan import RunPlan
from fedsim.recording import strategy_proofs
from fedsim.recording.files import write_tensors
from fedsim.recording.findings import BUFFERS, Findings
from fedsim.recording.reader import load_run
from fedsim.recording.tensor_files import TensorFile
from fedsim.recording.verify import verify
from strategies.registry import STRATEGIES
from tests import fuzz
from tests.flower.test_resume import contents, fail_in, go, hashes
from tests.recording.rows import AllWhole
from tests.strategies.replies import KEEPS

ROUNDS = 4
FAILURE = "enough"


def plan_of(strategy: str, **changes: object) -> RunPlan:
    return RunPlan.prepare(
        RunConfig.from_mapping(
            {
                "dataset": "synthetic:60:3",
                "model": "cnn",
                "clients": 4,
                "clients-per-round": 3,
                "rounds": ROUNDS,
                "min-samples": 4,
                "batch-size": 8,
                "capture": "first:1",
                "device": "cpu",
                "strategy": strategy,
                **{key.replace("_", "-"): value for key, value in changes.items()},
            }
        )
    )


def config_of(table: dict[str, object], **changes: object) -> RunConfig:
    values = plan_of("fedavg", **changes).config.to_mapping()
    return RunConfig.from_mapping({**values, "strategy": table})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give an uninterrupted run of a strategy, made once. Never write into it."""
    made: dict[str, Path] = {}

    def give(strategy: str) -> Path:
        if strategy not in made:
            made[strategy] = tmp_path_factory.mktemp(strategy) / "run"
            go(plan_of(strategy), made[strategy])
        return made[strategy]

    return give


@pytest.mark.matrix
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_stopped_in_every_round_ends_with_the_same_bytes(
    strategy: str, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    plan, path = plan_of(strategy), tmp_path / "run"
    for number in range(1, ROUNDS + 1):
        partition = plan.config.participants_of(number)[-1]
        with pytest.raises(FedsimError, match=FAILURE):
            go(plan, path, before=fail_in(number, partition), resume=number > 1)
        assert verify(path).violations == []
    go(plan, path, resume=True)
    assert hashes(path) == hashes(whole(strategy))
    assert contents(path) == contents(whole(strategy))
    kept = [name for name in contents(path) if name.endswith("strategy.safetensors")]
    stateful = strategy in KEEPS or strategy == "scaffold"
    assert len(kept) == (ROUNDS if stateful else 0)
    assert verify(path).violations == []


@pytest.mark.parametrize("strategy", KEEPS)
def test_the_whole_run_is_proven_and_what_is_kept_is_of_the_parameters(
    strategy: str, whole: Callable[[str], Path]
) -> None:
    run = load_run(whole(strategy))
    keeps = KEEPS[strategy]
    for number in range(1, ROUNDS + 1):
        kept = run.round(number).strategy_state
        assert list(kept) == [f"{what}/{name}" for what in keeps for name in run.shapes]
        for key, tensor in kept.items():
            assert tuple(tensor.shape) == run.shapes[key.partition("/")[2]]
            assert tensor.numpy().dtype == np.float32
    findings = verify(run.path)
    assert findings.violations == []
    assert findings.checks["state"].proven == ROUNDS + 1
    assert findings.checks["aggregate"].proven == ROUNDS
    assert findings.checks["state"].reasons == findings.checks["kept"].reasons == []
    assert findings.checks["kept"].proven == ROUNDS


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_written_bytes_are_those_of_the_plan(
    strategy: str, whole: Callable[[str], Path]
) -> None:
    plan, root = plan_of(strategy), whole(strategy)
    rounds = sorted((root / "rounds").iterdir())
    per_round = [
        sum(
            tensor.numpy().nbytes
            for file in folder.rglob("*.safetensors")
            for name, tensor in TensorFile(file).items()
            if not name.startswith("support/")
        )
        for folder in rounds
    ]
    assert per_round[0] == plan.state_bytes
    assert per_round[1:] == [plan.round_bytes(r) for r in range(1, ROUNDS + 1)]
    assert sum(per_round) == plan.run_bytes


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_order_of_replies_changes_nothing(
    strategy: str, whole: Callable[[str], Path], run_locally
) -> None:
    config = {k.replace("-", "_"): v for k, v in plan_of(strategy).config.to_mapping().items()}
    config = {k: v for k, v in config.items() if v is not None}
    run = run_locally(workers=3, newest_first=True, **config)
    assert contents(run.path) == contents(whole(strategy))


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("strategy", "model"),
    [*((name, "cnn") for name in KEEPS), ("fedadam", "resnet18")],
)
def test_no_variance_is_negative_and_no_loss_is_nan(
    strategy: str, model: str, tmp_path: Path
) -> None:
    plan = plan_of(
        strategy,
        model=model,
        capture="none",
        rounds=4 if model == "cnn" else 1,
        local_steps=20,
        learning_rate=1e-9,
    )
    # Faint activations that stay so, under a larger running variance: the step of an optimiser
    # on it would overshoot zero.
    initial = dict(plan.initial_state)
    for name, array in plan.initial_state.items():
        if array.ndim == 4:
            initial[name] = array * np.float32(0.01)
        elif name.endswith("running_var"):
            initial[name] = np.full_like(array, 0.01)
    go(replace(plan, initial_state=initial), tmp_path / "run")
    run = load_run(tmp_path / "run")
    for row in run.round_rows:
        assert row["global_loss"] is not None
        for name, tensor in run.round(row["round"]).state.items():
            assert bool(tensor.isfinite().all()), name
            assert not name.endswith("running_var") or float(tensor.min()) >= 0, name


@pytest.mark.parametrize(
    "table",
    [
        {"name": "fedavg", "dp": "server-side-adaptive"},
        {"name": "fedadam", "dp": "client-side-adaptive"},
        {"name": "fedavgm", "server-momentum": 0.0},
        {"name": "fedavgm", "server-momentum": 0.0, "server-learning-rate": 0.5},
        {"name": "tests.strategies.own:Counting"},
        {"name": "tests.strategies.own:Drawing"},
    ],
    ids=str,
)
def test_a_run_stopped_in_its_first_round_ends_with_the_same_bytes(
    table: dict[str, object], tmp_path: Path
) -> None:
    if "dp" in table:
        table = {**table, "noise-multiplier": 0.1, "clipping-norm": 0.5}
    plan = replace(plan_of("fedavg"), config=config_of(table))
    go(plan, tmp_path / "whole")
    path = tmp_path / "run"
    for number in (1, 3):
        partition = plan.config.participants_of(number)[-1]
        with pytest.raises(FedsimError, match=FAILURE):
            go(plan, path, before=fail_in(number, partition), resume=number > 1)
        # Another process has other global generators; drawing moves those of this one.
        random.random()
        np.random.random()
    go(plan, path, resume=True)
    assert hashes(path) == hashes(tmp_path / "whole")
    assert contents(path) == contents(tmp_path / "whole")
    assert verify(path).violations == []


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("Sampling", "the strategy made no message for client [0-3] of round 1; it must make"),
        ("Refusing", "the strategy made no model of what 3 of 3 clients returned in round 1"),
    ],
)
def test_a_strategy_that_does_not_do_its_part_is_told(kind: str, told: str, tmp_path: Path) -> None:
    plan = replace(plan_of("fedavg"), config=config_of({"name": f"tests.strategies.own:{kind}"}))
    with pytest.raises(RunFailedError, match=told) as failed:
        go(plan, tmp_path / "run")
    assert not isinstance(failed.value, DivergedError)
    assert "diverged" not in load_run(tmp_path / "run").manifest


@pytest.mark.parametrize("strategy", ["scaffold", "fednova"])
def test_a_step_that_overflows_is_no_work(strategy: str, tmp_path: Path) -> None:
    changes = {"autocast": "float16", "learning_rate": 2.0, "momentum": 0.0, "weight_decay": 0.0}
    changes |= {"local_steps": 5, "rounds": 1, "capture": "all", "allow_divergence": True}
    go(plan_of(strategy, **changes), tmp_path / "run")
    run = load_run(tmp_path / "run")
    rows = [client.telemetry for client in run.round(1).clients.values()]
    assert any(0 < row["num_updates"] < row["num_steps"] == 5 for row in rows)
    assert verify(tmp_path / "run").violations == []
    if strategy == "fednova":
        return
    for client in run.round(1).clients.values():
        gradients = [client.gradient(step) for step in range(5)]
        made = [g for g in gradients if all(bool(t.isfinite().all()) for t in g.values())]
        assert len(made) == client.telemetry["num_updates"]
        for name, control in client.control.items():
            # Karimireddy et al. 2020, option II: the mean of the gradients of the updates.
            mean = torch.stack([g[name] for g in made]).mean(0)
            torch.testing.assert_close(control, mean, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("damage", ["a bit", "gone", "cut"])
def test_a_round_with_a_damaged_strategy_file_is_made_again(
    whole: Callable[[str], Path], tmp_path: Path, damage: str
) -> None:
    plan, path = plan_of("fedadam"), tmp_path / "run"
    with pytest.raises(FedsimError, match=FAILURE):
        go(plan, path, before=fail_in(3, plan.config.participants_of(3)[0]))
    file = path / "rounds/0002/strategy.safetensors"
    content = bytearray(file.read_bytes())
    match damage:
        case "a bit":
            content[-1] ^= 1
            file.write_bytes(content)
        case "gone":
            file.unlink()
        case "cut":
            file.write_bytes(content[:-1])
    (violation,) = verify(path).violations
    assert violation.startswith("rounds/0002/strategy.safetensors ")
    go(plan, path, resume=True)
    assert contents(path) == contents(whole("fedadam"))
    assert verify(path).violations == []


def test_only_the_state_of_the_last_round_is_needed_to_go_on(
    whole: Callable[[str], Path], tmp_path: Path
) -> None:
    plan, path = plan_of("fedyogi"), tmp_path / "run"
    with pytest.raises(FedsimError, match=FAILURE):
        go(plan, path, before=fail_in(3, plan.config.participants_of(3)[0]))
    (path / "rounds/0001/strategy.safetensors").unlink()
    go(plan, path, resume=True)
    assert hashes(path) == hashes(whole("fedyogi"))


def test_fedprox_trains_with_its_term_and_is_replayed_with_it(tmp_path: Path) -> None:
    plain, prox = tmp_path / "plain", tmp_path / "prox"
    changes = {"capture": "all", "rounds": 2, "local_steps": 4}
    go(plan_of("fedavg", **changes), plain)
    table = {"name": "fedprox", "proximal-mu": 0.5}
    go(replace(plan_of("fedavg", **changes), config=config_of(table, **changes)), prox)
    findings = verify(prox, recompute=1)
    assert findings.violations == []
    assert findings.checks["replay"].proven == 2 * 3 * 4
    assert findings.checks["replay"].notes == ["bit for bit"]
    # The first step is taken at the global model, where the term has no gradient.
    for partition, client in load_run(prox).round(1).clients.items():
        other = load_run(plain).round(1).clients[partition]
        assert client.telemetry["proximal_mu"] == client.proximal_mu == 0.5
        assert "proximal_mu" not in other.telemetry
        assert client.steps[0]["proximal"] == 0
        assert client.steps[0]["objective_norm"] == pytest.approx(client.steps[0]["gradient_norm"])
        assert "proximal" not in other.steps[0]
        parameters, start = client.parameters_at(2), load_run(prox).round(0).state
        data, whole = client.gradient(2), client.gradient(2, objective=True)
        both = client.gradient(2, objective=True, weight_decay=True)
        for name, gradient in data.items():
            expected = gradient + 0.5 * (parameters[name] - start[name])
            torch.testing.assert_close(whole[name], expected, rtol=0, atol=0)
            decayed = expected + 5e-4 * parameters[name]
            torch.testing.assert_close(both[name], decayed, rtol=1e-6, atol=1e-8)
        norm = torch.cat([g.flatten() for g in whole.values()]).norm()
        assert client.steps[2]["objective_norm"] == pytest.approx(float(norm), rel=1e-5)
        assert not torch.equal(client.delta["0.weight"], other.delta["0.weight"])


def test_a_proximal_term_that_was_not_asked_for_is_a_violation(tmp_path: Path) -> None:
    path = tmp_path / "run"
    go(plan_of("fedprox", capture="all", rounds=1), path)
    rows = path / "clients.jsonl"
    rows.write_text(rows.read_text().replace('"proximal_mu":0.01', '"proximal_mu":0.02'))
    fuzz.reseal(path)
    checks = verify(path).checks
    steps = [v for v in checks["steps"].violations if "proximal_mu" in v]
    assert len(steps) == len([v for v in checks["rows"].violations if "proximal_mu" in v]) == 3
    assert "trained with proximal_mu = 0.02, not 0.01" in steps[0]


@pytest.mark.parametrize("kind", ["client-side-fixed", "client-side-adaptive"])
def test_clients_clip_the_update_of_the_parameters_alone(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    table = {"name": "fedavg", "dp": kind, "noise-multiplier": 0.1, "clipping-norm": 0.01}
    changes = {"capture": "all", "rounds": 2}
    go(replace(plan_of("fedavg", **changes), config=config_of(table, **changes)), path)
    run = load_run(path)
    for client in run.round(1).clients.values():
        moved = [client.delta[name].double().flatten() for name in run.shapes]
        assert float(torch.cat(moved).norm()) == pytest.approx(0.01, rel=1e-3)
        assert float(client.delta["1.running_var"].abs().max()) > 0.01
    findings = verify(path)
    assert findings.violations == []
    assert findings.checks["replay"].reasons == [
        f"with strategy.dp = {kind!r} clients clip their deltas"
    ]


def test_fednovas_state_is_proven_and_a_changed_one_found(tmp_path: Path) -> None:
    path = tmp_path / "run"
    # Three clients of unequal samples, and so of unequal steps.
    go(plan_of("fednova", batch_size=4, rounds=2), path)
    findings = verify(path)
    assert findings.violations == []
    assert findings.checks["state"].proven == 3
    assert findings.checks["state"].reasons == []
    run = load_run(path)
    steps = {client.telemetry["num_steps"] for client in run.round(1).clients.values()}
    assert len(steps) > 1
    moved = run.round(1).state["0.weight"] - run.round(0).state["0.weight"]
    assert not torch.allclose(moved, run.round(1).aggregate["0.weight"], atol=1e-5)
    run.__dict__["config"] = run.config.model_copy(update={"momentum": 0.8})
    changed = Findings()
    strategy_proofs.prove_strategy(run, 1, changed, AllWhole())
    assert "is not the state before plus the step of fednova" in changed.violations[0]


def test_scaffold_is_replayed_with_its_corrections_and_proven(tmp_path: Path) -> None:
    path = tmp_path / "run"
    go(plan_of("scaffold", capture="all", local_steps=4), path)
    findings = verify(path, recompute=1)
    assert findings.violations == []
    assert findings.checks["replay"].notes == ["bit for bit"]
    assert findings.checks["replay"].reasons == [BUFFERS]
    assert findings.checks["state"].proven == ROUNDS + 1
    assert findings.checks["state"].reasons == []
    run = load_run(path)
    for client in run.round(ROUNDS).clients.values():
        data, whole = client.gradient(1), client.gradient(1, objective=True)
        assert client.correction is not None
        for name, gradient in data.items():
            assert torch.equal(whole[name], gradient + client.correction[name])
        assert max(float(c.abs().max()) for c in client.correction.values()) > 0
        norm = torch.cat([g.flatten() for g in whole.values()]).norm()
        assert client.steps[1]["objective_norm"] == pytest.approx(float(norm), rel=1e-5)
    # c is the mean of the clients' c_i.
    latest = {p: c for r in range(1, ROUNDS + 1) for p, c in run.round(r).clients.items()}
    kept = run.round(ROUNDS).strategy_state
    for name in run.shapes:
        mean = sum(c.control[name].double() for c in latest.values()) / run.config.clients
        torch.testing.assert_close(kept[f"control/{name}"].double(), mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("what", ["clients/P/control", "strategy"])
def test_a_changed_control_variate_is_found(what: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    plan = plan_of("scaffold", rounds=2)
    go(plan, path)
    name = what.replace("P", f"{plan.config.participants_of(1)[0]:04d}")
    file = path / "rounds/0001" / f"{name}.safetensors"
    arrays = {n: t.numpy().copy() for n, t in TensorFile(file).items()}
    next(iter(arrays.values())).flat[0] += 1
    write_tensors(file, arrays)
    fuzz.reseal(path)
    told = verify(path).violations
    assert any("does not follow from the" in violation for violation in told)
