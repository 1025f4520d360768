import math

import numpy as np
import pytest
import torch
from torch import nn

from fedsim.core.errors import RunFailedError
from fedsim.core.evaluation import first_overflow
from fedsim.core.rng import draw_participants
from fedsim.recording.files import read_lines
from fedsim.recording.reader import load_run
from fedsim.recording.recovery import find_recovery
from fedsim.recording.verify import verify
from fedsim.tasks.vision.datasets import DatasetSpec
from tests.vision import vision

FIRST = draw_participants(42, 1, 6, 3)
HUGE = {"learning_rate": 1e30, "momentum": 0.0, "optimizer": "sgd", "batch_size": 64}


def test_a_client_that_diverges_stops_the_run_with_its_layer_and_step(run_locally, tmp_path):
    with pytest.raises(RunFailedError) as failed:
        run_locally(**HUGE)
    text = str(failed.value)
    assert text.startswith("client ")
    assert "returned 0.weight with values that are not finite; its loss was not finite from" in text
    run = load_run(tmp_path / "run")
    assert (run.status, run.manifest["error"]) == ("failed", text)
    assert [row["round"] for row in run.round_rows] == [0]
    assert verify(run.path).violations == []
    assert find_recovery(run.path).round == 0


def test_survivors_of_a_diverging_client_go_on(run_locally):
    partition = FIRST[1]
    run = run_locally(
        client={str(partition): {"learning-rate": 1e30, "batch-size": 4}},
        max_failures=1,
        rounds=1,
        capture="none",
    )
    assert run.round(1).row["failed"] == [partition]
    assert math.isfinite(run.round(1).row["global_loss"])
    (row,) = [r for r in run.client_rows if r["status"] == "failed"]
    assert row["error"].startswith("returned 0.weight with values that are not finite")


def test_with_leave_a_diverging_run_is_recorded_to_its_end_and_proven(run_locally):
    run = run_locally(allow_divergence=True, **HUGE)
    assert (run.status, len(run.round_rows)) == ("finished", 3)
    assert run.round_rows[1]["global_loss"] is None
    assert bool(run.round(2).state["0.weight"].isnan().any())
    findings = verify(run.path)
    assert findings.violations == []
    assert findings.checks["replay"].proven == findings.checks["steps"].proven
    assert findings.checks["state"].proven == 3


def test_a_global_loss_that_is_not_finite_names_the_layer_that_overflows(run_locally, tmp_path):
    """Every client returns finite weights, so large that the next forward pass overflows."""
    with pytest.raises(RunFailedError) as failed:
        run_locally(learning_rate=1e18, momentum=0.0, local_steps=1, weight_decay=0.0, norm="group")
    assert str(failed.value).startswith("round 1 diverged: the global loss is not finite: ")
    assert "--allow-divergence" in str(failed.value)
    assert [row["round"] for row in read_lines(tmp_path / "run" / "rounds.jsonl")] == [0]


SPEC = DatasetSpec(
    name="any", classes=2, mean=(0.5,) * 3, std=(0.5,) * 3, train_size=4, test_size=4, flip=False
)


def test_the_first_layer_that_overflows_is_found_whatever_the_image():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 2), nn.ReLU(), nn.Linear(2, 2))
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    images[3] = 255
    columns = {"images": images, "labels": torch.zeros(4, dtype=torch.int64)}
    with torch.no_grad():
        model[1].weight.fill_(1e34)
        model[1].bias.fill_(0.0)
        model[3].weight.fill_(100.0)
    found = first_overflow(vision(SPEC), model, columns, torch.device("cpu"), batch_size=2)
    assert found == "3"
    with torch.no_grad():
        model[1].weight.fill_(np.float32(3e38))
    assert first_overflow(vision(SPEC), model, columns, torch.device("cpu"), batch_size=2) == "1"
    with torch.no_grad():
        model[1].weight.fill_(1.0)
    assert first_overflow(vision(SPEC), model, columns, torch.device("cpu")) is None
    assert all(not layer._forward_hooks for layer in model)
