from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torchvision.transforms import functional

from fedsim.core.aggregation import state_sha256
from fedsim.core.evaluation import evaluate
from fedsim.core.task import rows_of
from fedsim.core.training import state_arrays
from fedsim.tasks.vision.models import build_model
from tests.vision import vision


def build():
    return build_model("cnn", classes=10, norm="batch", seed=42)


def evaluated(model, data, count=359, **options):
    return evaluate(
        vision(data.spec),
        model,
        rows_of(data.test(), slice(count)),
        device=torch.device("cpu"),
        **options,
    )


ROUNDINGS = 64 * 2**-24
"""Relative error of a mean of float32 losses, whose scores are sums of some hundred products."""


def test_it_equals_a_loop_over_single_images(digits):
    spec = replace(digits.spec, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    data = replace(digits, spec=spec)
    model = build().eval()
    loss, correct = 0.0, 0
    for image, label in zip(digits.test_images[:60], digits.test_labels[:60], strict=True):
        inputs = functional.normalize(image.float() / 255, spec.mean, spec.std)[None]
        with torch.no_grad():
            scores = model(inputs)[0].double()
        loss -= math.log(scores.softmax(dim=0)[label].item())
        correct += int(scores.argmax() == label)
    found = evaluated(build(), data, 60)
    assert found.loss == pytest.approx(loss / 60, rel=ROUNDINGS)
    assert found.accuracy == correct / 60
    assert 0 < correct < 60
    assert found.num_samples == 60


@pytest.mark.parametrize("batch_size", [1, 7, 359, 1000])
def test_batch_size_changes_no_accuracy(digits, batch_size):
    expected = evaluated(build(), digits)
    found = evaluated(build(), digits, batch_size=batch_size)
    assert found.accuracy == expected.accuracy
    assert found.loss == pytest.approx(expected.loss, rel=ROUNDINGS)
    assert found.num_samples == 359


def test_a_model_of_nan_gives_a_nan_loss_and_no_error(digits):
    model = build()
    with torch.no_grad():
        model[13].weight[3, 5] = math.nan
    found = evaluated(model, digits)
    assert math.isnan(found.loss)
    assert 0 <= found.accuracy <= 1


def test_a_diverged_model_gives_an_infinite_loss(digits):
    model = build()
    with torch.no_grad():
        model[13].bias[0] = math.inf
    assert not math.isfinite(evaluated(model, digits).loss)


def test_the_model_is_left_in_evaluation_mode_with_its_state_and_no_gradients(digits):
    model = build()
    before = state_sha256(state_arrays(model))
    evaluated(model, digits)
    assert not any(module.training for module in model.modules())
    assert state_sha256(state_arrays(model)) == before
    assert all(p.grad is None for p in model.parameters())


def test_sums_of_losses_are_kept_in_float64(digits):
    class Steep(nn.Module):
        def __init__(self):
            super().__init__()
            self.batches = 0

        def forward(self, inputs):
            # A loss of 2**24 in the first batch and of 1 in each of the others.
            self.batches += 1
            gap = 2.0**24 if self.batches == 1 else math.log(math.e - 1)
            scores = torch.full((len(inputs), 10), -1e30)
            scores[:, 0], scores[:, 1] = 0, gap
            return scores

    data = replace(digits, test_labels=torch.zeros(359, dtype=torch.int64))
    found = evaluated(Steep(), data, 11, batch_size=1)
    assert found.loss * 11 == pytest.approx(2**24 + 10, abs=1e-3)


def test_no_graph_is_built(digits):
    seen = []
    model = build()
    model.register_forward_hook(lambda _, inputs, output: seen.append(output.requires_grad))
    evaluated(model, digits, batch_size=100)
    assert seen == [False] * 4
