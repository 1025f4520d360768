import json

import numpy as np
import pytest
from flwr.app import ConfigRecord

from fedsim.core.aggregation import local_work
from fedsim.core.algorithm import Setup
from fedsim.flower import messages as wire
from strategies import DeltaFedAvg
from strategies.flower_strategy import FlowerStrategy
from strategies.recorded import CorrectingStrategy, StatefulStrategy
from strategies.scaffold import Scaffold, ScaffoldSettings
from tests.strategies.replies import Exporter, global_state, local_state, reply, started

TRAINABLE = ["conv.weight", "fc.bias", "fc.scale"]
CLIENTS = 8
STEPS = {0: 3, 1: 5, 2: 1, 3: 4, 4: 2}
RATE = 0.1


def scaffold(keeper, rate=1.0, **setup):
    shapes = {name: global_state()[name].shape for name in TRAINABLE}
    settings = ScaffoldSettings(name="scaffold", server_learning_rate=rate)
    algorithm = Scaffold(settings, Setup(shapes=shapes, clients=CLIENTS, **setup))
    return FlowerStrategy(algorithm, keeper)


def replies(state, number, partitions):
    made = []
    for partition in partitions:
        message = reply(partition, state=local_state(partition, start=state, round_number=number))
        row = {"partition": partition, "num_steps": STEPS[partition], "learning_rate": RATE}
        message.content["telemetry"] = ConfigRecord({"json": json.dumps(row)})
        made.append(message)
    return made


def one_round(strategy, state, number, partitions):
    started(strategy, state=state, round_number=number)
    made = replies(state, number, partitions)
    return wire.state_of(strategy.aggregate_train(number, made)[0])


ROUNDS = {1: [1, 3, 0], 2: [3, 4], 3: [1, 0, 2, 4]}


def test_control_variates_are_those_of_the_paper_and_sum_as_they_must():
    """Karimireddy et al. 2020, alg. 1, option II, in float64."""
    keeper = Exporter()
    strategy, state = scaffold(keeper), global_state()
    control = {n: np.zeros_like(state[n], dtype=float) for n in TRAINABLE}
    own = {p: dict(control) for p in range(CLIENTS)}
    for number, partitions in ROUNDS.items():
        started(strategy, state=state, round_number=number)
        for partition in partitions:
            correction = strategy.correction(partition)
            for name in TRAINABLE:
                expected = control[name] - own[partition][name]
                np.testing.assert_allclose(correction[name], expected, rtol=1e-5, atol=1e-5)
                assert correction[name].dtype == np.float32
        after = one_round(strategy, state, number, partitions)
        local = {p: local_state(p, start=state, round_number=number) for p in partitions}
        changes = dict.fromkeys(TRAINABLE, 0.0)
        for partition in partitions:
            for name in TRAINABLE:
                moved = state[name].astype(float) - local[partition][name]
                renewed = own[partition][name] - control[name] + moved / (STEPS[partition] * RATE)
                changes[name] = changes[name] + renewed - own[partition][name]
                own[partition] = {**own[partition], name: renewed}
        for name in TRAINABLE:
            mean = np.mean([local[p][name].astype(float) - state[name] for p in partitions], axis=0)
            np.testing.assert_allclose(after[name], state[name] + mean, rtol=1e-5, atol=1e-6)
            control[name] = control[name] + changes[name] / CLIENTS
        kept = strategy.state_arrays()
        assert list(kept) == [f"control/{n}" for n in TRAINABLE]
        for name in TRAINABLE:
            found = kept[f"control/{name}"]
            np.testing.assert_allclose(found, control[name], rtol=1e-4, atol=1e-5)
            # The server's is the mean of all clients', taking part or not.
            of_all = sum(keeper.control(p).get(name, 0.0) for p in range(CLIENTS)) / CLIENTS
            np.testing.assert_allclose(found, of_all, rtol=1e-4, atol=1e-5)
        state = after


def test_with_momentum_the_work_is_what_momentum_makes_of_the_steps():
    keeper, state = Exporter(), global_state()
    one_round(scaffold(keeper, momentum=0.9, nesterov=True), state, 1, [1])
    work = local_work(5, learning_rate=RATE, momentum=0.9, nesterov=True)
    local = local_state(1, start=state, round_number=1)
    for name in TRAINABLE:
        expected = -(local[name] - state[name]) / np.float32(work)
        np.testing.assert_array_equal(keeper.control(1)[name], expected)


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_parameters_move_by_the_plain_mean_and_buffers_by_the_weighted_one(rate):
    keeper, state = Exporter(), global_state()
    found = one_round(scaffold(keeper, rate), state, 1, [1, 2])
    plain = one_round(DeltaFedAvg(), state, 1, [1, 2])
    for name, array in found.items():
        local = [local_state(p, start=state, round_number=1)[name] for p in (1, 2)]
        mean = (local[0].astype(float) + local[1]) / 2 - state[name]
        if name in TRAINABLE:
            np.testing.assert_allclose(array, state[name] + rate * mean, rtol=1e-5, atol=1e-6)
            assert not np.allclose(array, plain[name], atol=1e-4)
        else:
            assert array.tobytes() == plain[name].tobytes()


def test_a_fresh_strategy_goes_on_from_what_is_kept():
    whole, state = scaffold(Exporter()), global_state()
    states = [state]
    for number, partitions in ROUNDS.items():
        states.append(one_round(whole, states[-1], number, partitions))
    keeper = Exporter()
    first, second = scaffold(keeper), scaffold(keeper)
    assert isinstance(first, StatefulStrategy)
    assert isinstance(first, CorrectingStrategy)
    between = one_round(first, state, 1, ROUNDS[1])
    second.load_state_arrays(first.state_arrays())
    for number in (2, 3):
        between = one_round(second, between, number, ROUNDS[number])
    for name, array in states[-1].items():
        assert array.tobytes() == between[name].tobytes()
    fresh = scaffold(Exporter()).state_arrays()
    assert all(not array.any() for array in fresh.values())
    assert any(array.any() for array in whole.state_arrays().values())
