"""What a user adds in one file, with no edit of fedsim, runs and is proven."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim.core import registry
from fedsim.core.config import RunConfig
from fedsim.core.errors import ConfigError, InputError, RunFailedError
from fedsim.core.plan import RunPlan
from fedsim.core.task import initial_model, task_of
from fedsim.core.training import load_state
from fedsim.flower.client_app import app
from fedsim.flower.server_app import check_output, check_resume, execute
from fedsim.recording.findings import EVALUATED
from fedsim.recording.reader import Run, load_run
from fedsim.recording.verify import verify
from tests.local_grid import LocalGrid
from tests.observers import Memory
from tests.recording.test_forgeries import in_lines, repair

pytestmark = pytest.mark.usefixtures("nothing_trusted")
SMALL = {"clients": 5, "clients-per-round": 4, "batch-size": 64, "device": "cpu"}
DATA = {"dataset": "synthetic:480:10", "batch-size": 16}


@pytest.fixture
def nothing_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_trusted", set())


def record(output: Path, **values: Any) -> Run:
    plan = RunPlan.prepare(RunConfig.from_mapping({**SMALL, **values}))
    grid = LocalGrid(app, plan.config.clients, recordings=output.parent)
    check_output(output, plan)
    stop = threading.Event()
    execute(grid, plan, output, observer=Memory(), workers=2, stop=stop)
    return load_run(output)


def example(name: str, output: Path, **values: Any) -> Run:
    module = importlib.import_module(f"examples.extend.{name}")
    run = record(output, **{**module.CONFIG, **values})
    checks = verify(output, recompute=None).checks
    assert {name: check.violations for name, check in checks.items() if check.violations} == {}
    steps = sum(row["num_steps"] for row in run.client_rows)
    for check in ("steps", "gradients", "replay", "recomputed"):
        assert checks[check].proven == steps, check
    assert checks["replay"].notes == checks["recomputed"].notes == ["bit for bit"]
    return run


def test_a_task(tmp_path: Path) -> None:
    run = example("task", tmp_path / "run")
    accuracy = [row["global_accuracy"] for row in run.round_rows]
    assert accuracy[3] > accuracy[0] + 0.25
    data = run.entry("dataset")
    assert data["columns"] == {
        "grey": {"dtype": "float32", "shape": [64]},
        "digit": {"dtype": "int64", "shape": [], "values": 10},
    }
    assert (data["name"], data["label"], data["train_size"]) == ("digits-64", "digit", 1497)
    registry._trusted.clear()
    with pytest.raises(InputError, match="is code, which is loaded only where the user names it"):
        verify(tmp_path / "run")
    assert set(load_run(tmp_path / "run").round(1).state) == set(run.shapes)


def test_a_schedule(tmp_path: Path) -> None:
    run = example("schedule", tmp_path / "run", **DATA)
    for number, base in ((1, 0.01), (2, 0.01), (3, 0.005)):
        for client in run.round(number).clients.values():
            rates = [step["learning_rate"] for step in client.steps]
            assert rates[:3] == [base * (1 / 3), base * (2 / 3), base][: len(rates)]
            assert set(rates[3:]) <= {base}


def test_an_evaluation_on_clients(tmp_path: Path) -> None:
    run = example("evaluation", tmp_path / "run")
    task, model = task_of(run.config), initial_model(run.config)
    images, labels = (task.data().train()[name] for name in ("images", "labels"))
    for number in (1, 3):
        load_state(model, {n: t.numpy() for n, t in run.round(number - 1).state.items()})
        model.eval()
        for client in run.round(number).clients.values():
            rows = torch.from_numpy(run.partition[client.partition])
            batch = task.batch({"images": images[rows], "labels": labels[rows]}, None)
            with torch.no_grad():
                right = model(batch["inputs"]).argmax(1) == labels[rows]
            assert client.telemetry["evaluation"] == {
                f"digit {digit}": float(right[labels[rows] == digit].double().mean())
                for digit in sorted(set(labels[rows].tolist()))
            }
    assert EVALUATED in verify(tmp_path / "run", recompute=0).checks["rows"].reasons
    assert EVALUATED not in verify(tmp_path / "run", recompute=None).checks["rows"].reasons


@pytest.mark.parametrize(
    ("forged", "told"),
    [
        (lambda row: row["evaluation"].update(loss=row["evaluation"]["loss"] + 1e-9),
         "evaluation of client {} in round 1 is not what it measures when evaluated again"),
        (lambda row: row.pop("evaluation"), "client {} in round 1 has another evaluation than "
         "follows from the run"),
    ],
)  # fmt: skip
def test_a_forged_evaluation_on_a_client_is_found(
    forged: Callable[[dict[str, Any]], object], told: str, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    run = record(root, model="cnn", rounds=1, **DATA, **{"client-evaluation": "metrics"})
    first = run.client_rows[0]
    assert list(first["evaluation"]) == ["loss", "accuracy"]
    assert verify(root, recompute=None).violations == []
    in_lines("clients.jsonl", lambda rows: forged(rows[0]))(root)
    repair(root)
    (violation,) = verify(root, recompute=None).violations
    assert violation == "clients.jsonl: " + told.format(first["partition"])


def test_an_evaluation_that_gives_no_numbers_fails_its_client(tmp_path: Path) -> None:
    (file := tmp_path / "mine.py").write_text("def tell(*_):\n    return {'loss': 'low'}\n")
    with pytest.raises(RunFailedError, match=r"gave \{'loss': 'low'\}; expected at most"):
        record(
            tmp_path / "run",
            model="cnn",
            rounds=1,
            **DATA,
            **{"client-evaluation": f"{file}:tell"},
        )


COSINE = """
import math


def cosine(about):
    rate = about.learning_rate / 2
    return lambda number, step: rate * (1 + math.cos(math.pi * (number - 1) / about.rounds))
"""


def test_a_schedule_of_a_run_that_is_extended_twice_is_proven_as_it_was(tmp_path: Path) -> None:
    (file := tmp_path / "mine.py").write_text(COSINE)
    root = tmp_path / "run"
    values = {"model": "cnn", "learning-rate-schedule": f"{file}:cosine"}
    record(root, rounds=2, **values)
    run = go_on(go_on(root, 3).path, 4)
    assert [run.rounds_of(number) for number in range(1, 5)] == [2, 2, 3, 4]
    rates = [next(iter(run.round(n).clients.values())).steps[0]["learning_rate"] for n in (2, 3, 4)]
    assert rates == pytest.approx([0.005, 0.0025, 0.005 * (1 + math.cos(math.pi * 3 / 4))])
    assert verify(root).violations == []


def meddle(about: Any, task: Any, model: Any, examples: Any) -> dict[str, float]:
    """Change all that can be reached."""
    for module in model.modules():
        module.register_forward_hook(lambda *seen: seen[2] * 2)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = module.eps = 0.9
    for parameter in model.parameters():
        parameter.requires_grad_(False).zero_()
    torch.set_num_threads(3)
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(False)
    return {"one": 1.0}


def test_no_evaluation_changes_the_training(tmp_path: Path) -> None:
    rows = [
        record(tmp_path / f"{n}", model="cnn", rounds=2, **{"client-evaluation": name}).round_rows
        for n, name in enumerate(("none", "metrics", f"{__file__}:meddle"))
    ]
    alone, *others = [[row["state_sha256"] for row in of_run] for of_run in rows]
    assert others == [alone, alone]


def test_a_behavior_without_one_of_its_methods_is_refused(tmp_path: Path) -> None:
    (file := tmp_path / "mine.py").write_text("class Flip:\n    examples = dict\n")
    with pytest.raises(ConfigError, match="update and explain; it has no update"):
        record(tmp_path / "run", model="cnn", behavior={f"{file}:Flip": {"clients": [0]}})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "gives",
    ["{1: 1.0}", "{'a': '1.0'}", "{'a' * 201: 1.0}", "{'\\ud800': 1.0}", "{'a': 10**400}", "[1.0]",
     "{str(n): 0.0 for n in range(1001)}"],
)  # fmt: skip
def test_what_is_not_numbers_by_name_is_refused_in_a_sentence(tmp_path: Path, gives: str) -> None:
    (file := tmp_path / "mine.py").write_text(f"def tell(*_):\n    return {gives}\n")
    with pytest.raises(RunFailedError, match="expected at most 1,000 numbers by name, of at most"):
        record(tmp_path / "run", model="cnn", rounds=1, **{"client-evaluation": f"{file}:tell"})


def test_a_malicious_client_is_one_where_the_user_names_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = example("behavior", tmp_path / "run", rounds=1, **DATA)
    said = "mirrors its labels and sends 3.0 times its update"
    assert {row.get("behavior") for row in run.client_rows if row["partition"] < 2} == {said}
    assert all("behavior" not in row for row in run.client_rows if row["partition"] > 1)
    registry._trusted.clear()
    checks = verify(tmp_path / "run", recompute=None).checks
    assert not any(check.violations for check in checks.values())
    attackers = [row for row in run.client_rows if row["partition"] < 2]
    others = sum(row["num_steps"] for row in run.client_rows if row["partition"] > 1)
    assert attackers != []
    assert checks["recomputed"].proven == checks["replay"].proven == others
    name = next(iter(run.config.behavior))
    with pytest.raises(InputError, match=f"{registry.TRUSTED}={name} in the environment says"):
        _ = run.round(1).client(attackers[0]["partition"]).behavior
    monkeypatch.setenv(registry.TRUSTED, name)
    assert verify(tmp_path / "run", recompute=None).checks["recomputed"].proven > others


SCHEDULE = "def half(context):\n    return lambda round_number, step: context.learning_rate * {}\n"
DECAY = """
import numpy as np

from fedsim.core.algorithm import Algorithm, Outcome


class Slow(Algorithm):
    def fold(self, this_round):
        mean = this_round.mean()
        moved = {n: np.add(a, mean[n] / 2) for n, a in this_round.before.items()}
        return Outcome(moved, {})
"""


def forget_code() -> None:
    """Be as a new process, which has loaded nothing of the user's."""
    registry._trusted.clear()
    registry._sources.clear()
    for name in [name for name in sys.modules if name.startswith("fedsim_user_")]:
        del sys.modules[name]


def go_on(run: Path, rounds: int, *, allow_changed_code: bool = False) -> Run:
    recorded = load_run(run)
    values = {**recorded.config.to_mapping(), "rounds": rounds}
    config = RunConfig.from_mapping({k: v for k, v in values.items() if v is not None})
    plan = RunPlan.prepare(config)
    recovery = check_resume(recorded, plan, allow_changed_code=allow_changed_code)
    grid, stop = LocalGrid(app, config.clients, recordings=run.parent), threading.Event()
    execute(grid, plan, run, observer=Memory(), workers=2, stop=stop, recovery=recovery)
    return load_run(run)


def test_changed_code_is_refused_at_resume_and_told_by_verify(tmp_path: Path) -> None:
    (file := tmp_path / "mine.py").write_text(SCHEDULE.format(0.5))
    name, root = f"{file}:half", tmp_path / "run"
    values = {**DATA, "model": "cnn", "rounds": 1, "learning-rate-schedule": name}
    run = record(root, **values)
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    assert run.manifest["code"] == {name: before}
    assert not any("code:" in reason for reason in verify(root).checks["rows"].reasons)

    file.write_text(SCHEDULE.format(0.25))
    after = hashlib.sha256(file.read_bytes()).hexdigest()
    forget_code()
    unnamed = f"code: the source of {name} was not named here, or cannot be read (rounds 0, 1)"
    assert unnamed in verify(root).checks["rows"].unproven
    registry.trust([name])
    found = verify(root)
    assert (
        f"code: {name} has changed: its source has sha256 {after[:16]}..., and {before[:16]}... "
        "made these rounds; checks that run it fail where it computes differently (rounds 0, 1)"
    ) in found.checks["rows"].unproven
    assert found.checks["rows"].violations == []
    assert found.checks["steps"].violations != []
    manifest = (root / "run.json").read_bytes()
    with pytest.raises(InputError) as refused:
        go_on(root, 2)
    assert str(refused.value) == (
        f"{name} has changed since {root} was recorded: its source has sha256 {after[:16]}..., "
        f"not {before[:16]}...; bring that source back, or `--allow-changed-code` of `fedsim "
        "resume` goes on with the changed one"
    )
    assert (root / "run.json").read_bytes() == manifest

    run = go_on(root, 2, allow_changed_code=True)
    assert run.manifest["code"] == {name: before}
    assert run.manifest["resumed"][0]["code"] == {name: after}
    assert [run.code_of(number)[name] for number in range(3)] == [before, before, after]
    (told,) = (r for r in verify(root).checks["rows"].unproven if r.startswith("code:"))
    assert told.endswith("(rounds 0, 1)")
    # What goes on from here is the changed one, and no change any more.
    assert go_on(root, 3).manifest["resumed"][1]["code"] == {name: after}


def test_the_source_of_a_strategy_is_told_where_it_is_named(tmp_path: Path) -> None:
    (file := tmp_path / "mine.py").write_text(DECAY)
    name, root = f"{file}:Slow", tmp_path / "run"
    run = record(root, model="cnn", rounds=1, strategy=name)
    assert run.manifest["code"] == {name: hashlib.sha256(file.read_bytes()).hexdigest()}
    assert not any("code:" in r for r in verify(root, strategy=name).checks["rows"].reasons)
    assert f"code: the source of {name} was not named here, or cannot be read" in (
        verify(root).checks["rows"].reasons
    )
    file.write_text(DECAY + "\n# The same arithmetic.\n")
    forget_code()
    found = verify(root, strategy=name)
    assert found.violations == []
    assert any(r.startswith(f"code: {name} has changed:") for r in found.checks["rows"].reasons)


def test_only_runs_with_code_tell_of_it(tmp_path: Path) -> None:
    root = tmp_path / "run"
    manifest = record(root, model="cnn", rounds=1).manifest
    assert "code" not in manifest
    (root / "run.json").write_text(json.dumps(manifest | {"code": {"nowhere:rate": "0" * 64}}))
    repair(root)
    assert verify(root).violations == [
        "run.json: code has nowhere:rate, which its configuration does not"
    ]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"task": "audio"}, "task = 'audio' cannot be used; expected one of 'vision', or your own "
         "as module:NAME"),
        ({"learning-rate-schedule": "cosin"}, "learning-rate-schedule = 'cosin' cannot be used; "
         "expected one of 'constant', or your own as module:NAME"),
        ({"behavior": {"evil": {"clients": [0]}}}, "behavior.evil = 'evil' cannot be used; "
         "expected one of 'honest', or your own as module:NAME"),
        ({"behavior": {"honest": {"clients": [5]}}}, "behavior.honest.clients = 5 cannot be used; "
         "expected clients 0 to 4"),
        ({"behavior": {"honest": {"clients": [1, 1]}}}, "behavior.honest.clients = 1 cannot be "
         "used; expected one behavior a client; it has honest"),
        ({"behavior": {"honest": {}}}, "expected tables [behavior.NAME] with clients = [..]"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        RunConfig.from_mapping({**SMALL, "model": "cnn", **values})
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"task": "builtins:print"}, "task = 'builtins:print' cannot be used; "
         "expected a callable that returns a task with spec"),
        ({"learning-rate-schedule": "nowhere:rate"}, "learning-rate-schedule = 'nowhere:rate' "
         "cannot be used; expected a callable that can be imported: ModuleNotFoundError"),
        ({"behavior": {"honest": {"clients": [0], "power": 3}}}, "behavior.honest = {'power': 3} "
         "cannot be used; expected settings that it takes"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_refused_before_anything_is_written(
    values: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as refused:
        record(tmp_path / "run", model="cnn", **values)
    assert told in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_the_defaults_change_no_bit(tmp_path: Path) -> None:
    plain = record(tmp_path / "a", model="cnn", rounds=1, **DATA)
    asked = record(
        tmp_path / "b", model="cnn", rounds=1, **DATA, behavior={"honest": {"clients": [0, 1, 2]}}
    )
    assert plain.round_rows[1]["state_sha256"] == asked.round_rows[1]["state_sha256"]
    state = plain.round(1).state
    assert all(torch.equal(t, asked.round(1).state[n]) for n, t in state.items())
