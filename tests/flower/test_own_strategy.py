"""Strategies of the user's, recorded by the whole round loop and proven by their own checks."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from fedsim import cli
from fedsim.core.errors import ConfigError, InputError
from fedsim.recording.files import write_tensors
from fedsim.recording.reader import load_run
from fedsim.recording.verify import verify
from tests import fuzz

ROOT = Path(__file__).parents[2]
EXAMPLE = f"{ROOT}/examples/extend/strategy.py:HeavyBall"
STEERING = "tests.strategies.own:Steering"


def forge(path, key, by=1.001):
    arrays = safetensors.numpy.load_file(path)
    arrays[key] = np.asarray(arrays[key] * np.float32(by), np.float32)
    write_tensors(path, arrays)


@pytest.fixture
def run(run_locally):
    return run_locally(strategy={"name": EXAMPLE, "decay": 0.5}, rounds=3, capture="first:1")


def test_the_example_is_proven_by_its_own_check_where_it_is_named(run):
    assert len(Path(EXAMPLE.rpartition(":")[0]).read_text().splitlines()) <= 50
    assert list(run.round(1).strategy_state) == [f"velocity/{name}" for name in run.shapes]
    for name in run.shapes:
        before = run.round(1).strategy_state[f"velocity/{name}"]
        expected = 0.5 * before + run.round(2).aggregate[name]
        assert torch.equal(run.round(2).strategy_state[f"velocity/{name}"], expected)
        assert not torch.equal(expected, run.round(2).aggregate[name])
    findings = verify(run.path, evaluate=0, strategy=EXAMPLE)
    assert findings.violations == []
    assert (findings.checks["state"].proven, findings.checks["kept"].proven) == (4, 3)
    assert findings.checks["state"].reasons == findings.checks["kept"].reasons == []
    unnamed = verify(run.path, evaluate=0)
    assert unnamed.violations == []
    assert unnamed.checks["kept"].proven == 0
    assert unnamed.checks["kept"].reasons == [
        f"arrays that {EXAMPLE} keeps: they follow from its own code"
    ]
    assert len(unnamed.checks["state"].reasons) == 1


def test_a_forged_array_and_a_forged_parameter_are_found_where_the_class_is_named(run):
    forge(run.layout.strategy(2), "velocity/0.weight")
    fuzz.reseal(run.path)
    assert verify(run.path, evaluate=0).violations == []
    checks = verify(run.path, evaluate=0, strategy=EXAMPLE).checks
    kept, state = checks["kept"].violations, checks["state"].violations
    assert "0002/strategy.safetensors: velocity/0.weight does not follow" in kept[0]
    # The next velocity does not follow from the forged one, nor the state from what is kept.
    assert "0003/strategy.safetensors: velocity/0.weight does not follow" in kept[1]
    assert "0002/global.safetensors: 0.weight is not the state before plus the step" in state[0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tests.strategies.own:Counting", "HeavyBall', which made "),
        (EXAMPLE.replace("HeavyBall", "Nobody"), "HeavyBall', which made "),
        ("no_such_module:HeavyBall", "a class that can be imported: ModuleNotFoundError"),
    ],
)
def test_another_class_than_that_of_the_run_is_refused(run, name, said):
    with pytest.raises(ConfigError) as refused:
        verify(run.path, strategy=name)
    assert said in str(refused.value)


def test_what_is_kept_of_clients_and_sent_to_them_is_followed_where_the_class_is_named(run_locally):
    # All six clients, so that each is corrected by its own round before.
    run = run_locally(strategy=STEERING, clients_per_round=6)
    (client, *_) = run.round(2).clients.values()
    assert client.correction is None
    with pytest.raises(InputError, match="adds to gradients follows from its own code"):
        client.parameters_at(1)
    unnamed = verify(run.path, evaluate=0, recompute=None)
    assert unnamed.violations == []
    reason = f"what {STEERING} adds to gradients follows from its own code, which was not named"
    assert reason in unnamed.checks["replay"].reasons
    assert reason in unnamed.checks["recomputed"].reasons
    named = load_run(run.path, STEERING).round(2).client(client.partition)
    expected = run.round(1).client(client.partition).delta["0.weight"] * 0.1
    assert torch.equal(named.correction["0.weight"], expected)
    findings = verify(run.path, evaluate=0, recompute=1, strategy=STEERING)
    assert findings.violations == []
    assert findings.checks["replay"].notes == ["bit for bit"]
    assert findings.checks["kept"].proven == 2
    # What a check makes no claim of is named.
    assert findings.checks["kept"].reasons == [f"rounds: the check of {STEERING} does not say how "
                                               "it follows"]  # fmt: skip
    forge(run.layout.control(1, client.partition), "0.weight")
    fuzz.reseal(run.path)
    checks = verify(run.path, evaluate=0, strategy=STEERING).checks
    assert "control.safetensors: 0.weight does not follow" in checks["kept"].violations[0]
    assert checks["replay"].violations != []


def test_the_command_takes_the_class(run, capsys):
    assert cli.run(["verify", str(run.path), "--evaluate", "0", "--strategy", EXAMPLE]) == 0
    (kept,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("kept"))
    assert "3 rounds" in kept
