import json

import numpy as np
import pytest
from flwr.app import ConfigRecord

from fedsim.core.aggregation import local_work
from fedsim.core.algorithm import Setup
from fedsim.flower import messages as wire
from strategies import DeltaFedAvg
from strategies.fednova import FedNova, FedNovaSettings, NormalisedMean
from strategies.flower_strategy import FlowerStrategy
from tests.strategies.replies import (
    SIZES,
    Exporter,
    bits,
    global_state,
    local_state,
    reply,
    started,
)

TRAINABLE = ["conv.weight", "fc.bias", "fc.scale"]


def fednova(exporter=None, **settings):
    shapes = {name: global_state()[name].shape for name in TRAINABLE}
    algorithm = FedNova(FedNovaSettings(name="fednova"), Setup(shapes=shapes, **settings))
    return FlowerStrategy(algorithm, exporter)


def replies(steps, rates=None):
    """Replies in the fixed order, with the telemetry of so many steps at such rates."""
    made = []
    for partition in (1, 3, 4, 0, 2):
        message = reply(partition)
        row = {"partition": partition, "num_steps": steps[partition]}
        row["learning_rate"] = (rates or [0.1] * 5)[partition]
        message.content["telemetry"] = ConfigRecord({"json": json.dumps(row)})
        made.append(message)
    return made


def test_the_normalised_mean_is_that_of_the_paper():
    # Two clients of 10 and 30 samples that made 5 and 1 steps at rate 1.
    mean = NormalisedMean()
    mean.add({"w": np.float32([5, -10])}, 10, 5.0)
    mean.add({"w": np.float32([2, 4])}, 30, 1.0)
    work = 0.25 * 5 + 0.75 * 1
    expected = [work * (0.25 * 5 / 5 + 0.75 * 2 / 1), work * (0.25 * -10 / 5 + 0.75 * 4 / 1)]
    np.testing.assert_array_equal(mean.mean()["w"], np.float32(expected))


def state_after(strategy, messages):
    return wire.state_of(started(strategy).aggregate_train(3, messages)[0])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_with_equal_work_it_is_delta_fedavg_to_1e_6(momentum):
    expected = state_after(DeltaFedAvg(), replies([7] * 5))
    found = state_after(fednova(momentum=momentum), replies([7] * 5))
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_with_other_work_it_differs_as_its_equation_says(nesterov):
    steps, rates, momentum = [1, 2, 3, 4, 5], [0.1, 0.2, 0.1, 0.3, 0.1], 0.5
    strategy = fednova(momentum=momentum, nesterov=nesterov)
    found = state_after(strategy, replies(steps, rates))
    work = [
        local_work(t, learning_rate=r, momentum=momentum, nesterov=nesterov)
        for t, r in zip(steps, rates, strict=True)
    ]
    start, total = global_state(), sum(SIZES.values())
    tau = sum(SIZES[p] / total * work[p] for p in SIZES)
    plain = state_after(DeltaFedAvg(), replies(steps, rates))
    for name in TRAINABLE:
        moved = sum(
            SIZES[p] / total * (local_state(p)[name].astype(float) - start[name]) / work[p]
            for p in SIZES
        )
        np.testing.assert_allclose(found[name], start[name] + tau * moved, rtol=1e-5, atol=1e-6)
        assert not np.allclose(found[name], plain[name], atol=1e-4)
    # Buffers have no work to be divided by.
    for name in set(start) - set(TRAINABLE):
        assert found[name].tobytes() == plain[name].tobytes()


def test_the_aggregate_on_record_is_the_mean_delta_and_the_state_is_the_normalised_one():
    ours, plain = Exporter(), Exporter()
    arrays = started(fednova(ours)).aggregate_train(3, replies([1, 2, 3, 4, 5]))
    started(DeltaFedAvg(plain)).aggregate_train(3, replies([1, 2, 3, 4, 5]))
    assert {n: a.tobytes() for n, a in ours.aggregates[3].items()} == {
        n: a.tobytes() for n, a in plain.aggregates[3].items()
    }
    assert {n: a.tobytes() for n, a in ours.states[3].items()} == bits(arrays[0])
