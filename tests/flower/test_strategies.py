"""Every strategy of the registry over the whole round loop: recorded, verified, resumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedsim.core.config import RunConfig
from fedsim.core.errors import FedsimError
from fedsim.core.plan import RunPlan
from fedsim.core.server_optimizer import KEEPS
from fedsim.core.strategies import STRATEGIES
from fedsim.recording.reader import TensorFile, load_run
from fedsim.recording.verify import verify
from tests.flower.test_resume import contents, fail_in, go, hashes

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
    assert len(kept) == (ROUNDS if strategy in KEEPS else 0)
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
    assert findings.checks["state"].unproven == [
        "strategy.safetensors: it follows from the deltas up to rounding only"
    ]


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
