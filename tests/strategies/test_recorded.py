import gc
import math
import random

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAdam, FedAvg

from fedsim.core.errors import RunFailedError
from fedsim.core.rng import Purpose, global_seed
from fedsim.flower import messages as wire
from strategies import DeltaFedAvg
from strategies.recorded import Recorded, StatefulStrategy
from tests.local_grid import LocalGrid
from tests.strategies.replies import (
    KEEPS,
    SIZES,
    Exporter,
    bits,
    built,
    failure,
    global_state,
    local_state,
    reply,
    started,
)

TRAINABLE = ["conv.weight", "fc.bias", "fc.scale"]
BUFFERS = ["bn.running_var", "bn.num_batches_tracked"]
FIXED_ORDER = [1, 3, 4, 0, 2]
PLAIN = {
    "fedavgm": lambda: flower.FedAvgM(server_momentum=0.9),
    "fedadagrad": flower.FedAdagrad,
    "fedadam": flower.FedAdam,
    "fedyogi": flower.FedYogi,
    "fedavg": flower.FedAvg,
    "fedprox": lambda: flower.FedProx(proximal_mu=0.01),
    "fedmedian": flower.FedMedian,
    "fedtrimmedavg": flower.FedTrimmedAvg,
    "krum": flower.Krum,
    "multikrum": lambda: flower.MultiKrum(num_nodes_to_select=2),
    "bulyan": flower.Bulyan,
    "qfedavg": lambda: flower.QFedAvg(client_learning_rate=0.01, train_loss_key="loss"),
}


class Turned:
    """Andrew et al. 2021: the norm shrinks where most updates are below it."""

    def _geometric_update(self, clipped_fraction):
        self.clipping_norm *= math.exp(-0.2 * (1 - clipped_fraction - 0.5))


class TurnedServerSide(Turned, flower.DifferentialPrivacyServerSideAdaptiveClipping):
    pass


class TurnedClientSide(Turned, flower.DifferentialPrivacyClientSideAdaptiveClipping):
    pass


PRIVATE = {
    "server-side-fixed": flower.DifferentialPrivacyServerSideFixedClipping,
    "client-side-fixed": flower.DifferentialPrivacyClientSideFixedClipping,
    "server-side-adaptive": TurnedServerSide,
    "client-side-adaptive": TurnedClientSide,
}


@pytest.fixture(scope="module", autouse=True)
def _little_garbage():
    # Some of Flower's strategies collect garbage for every reply, among all that pytest holds.
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def replies(state, round_number, order=FIXED_ORDER):
    return [reply(p, state=local_state(p, start=state, round_number=round_number)) for p in order]


def one_round(strategy, state, round_number, order=FIXED_ORDER):
    """Run a round on the replies to a state, and give the new arrays."""
    started(strategy, state=state, round_number=round_number)
    return strategy.aggregate_train(round_number, replies(state, round_number, order))


def bare_replies(state, round_number):
    """Leave out of the replies what a strategy without fedsim has no rule for."""
    sent = replies(state, round_number)
    for message in sent:
        arrays = message.content["arrays"]
        message.content["arrays"] = ArrayRecord({n: arrays[n] for n in TRAINABLE})
    return sent


def some_rounds(strategy, rounds, state=None):
    state = state or global_state()
    for number in rounds:
        state = wire.state_of(one_round(strategy, state, number)[0])
    return state


def bits_of(state):
    return {n: (a.dtype.name, a.shape, a.tobytes()) for n, a in state.items()}


@pytest.mark.parametrize("name", PLAIN)
def test_parameters_move_as_under_flower_alone_to_the_bit(name):
    ours, theirs = built(name, Exporter(), TRAINABLE), PLAIN[name]()
    state = global_state()
    for number in range(1, 6):
        started(theirs, state={n: state[n] for n in TRAINABLE}, round_number=number)
        expected, expected_metrics = theirs.aggregate_train(number, bare_replies(state, number))
        found, metrics = one_round(ours, state, number)
        for parameter in TRAINABLE:
            # FedAdam's own are float64; a state of the model is float32.
            array = expected[parameter].numpy().astype(np.float32)
            assert found[parameter].numpy().tobytes() == array.tobytes()
            assert not np.array_equal(array, state[parameter])
        assert dict(metrics) == dict(expected_metrics)
        state = wire.state_of(found)


@pytest.mark.parametrize("name", PLAIN)
def test_names_order_shapes_and_dtypes_stay_those_of_the_model(name):
    start, state = global_state(), some_rounds(built(name, Exporter(), TRAINABLE), [1, 2])
    about = [(n, a.dtype, a.shape) for n, a in start.items()]
    assert [(n, a.dtype, a.shape) for n, a in state.items()] == about


@pytest.mark.parametrize("name", PLAIN)
def test_buffers_are_averaged_as_in_delta_fedavg(name):
    found, _ = one_round(built(name, Exporter(), TRAINABLE), global_state(), 3)
    expected, _ = one_round(DeltaFedAvg(), global_state(), 3)
    for buffer in BUFFERS:
        assert bits(found)[buffer] == bits(expected)[buffer]
    tracked = found["bn.num_batches_tracked"].numpy()
    mean = sum((1 + p) * n for p, n in SIZES.items()) / sum(SIZES.values())
    assert (tracked.dtype, tracked.shape, int(tracked)) == (np.int64, (), 10 + round(mean))


@pytest.mark.parametrize("name", ["fedadagrad", "fedadam"])
def test_a_variance_that_shrinks_stays_positive_where_flower_alone_makes_it_negative(name):
    state = global_state()
    state["bn.running_var"] = np.full(8, 0.03, np.float32)
    ours, theirs = built(name, Exporter(), TRAINABLE), PLAIN[name]()
    lowest = {}
    for strategy in (ours, theirs):
        started(strategy, state=state)
        shrunk = []
        for partition in FIXED_ORDER:
            local = local_state(partition, start=state)
            local["bn.running_var"] = np.full(8, 0.005, np.float32)
            shrunk.append(reply(partition, state=local))
        arrays, _ = strategy.aggregate_train(3, shrunk)
        lowest[strategy] = float(arrays["bn.running_var"].numpy().min())
    assert lowest[ours] == pytest.approx(0.005, abs=1e-8)
    assert lowest[theirs] < 0


@pytest.mark.parametrize("name", PLAIN)
def test_a_list_of_replies_in_any_order_gives_the_same_bits(name):
    def go(order):
        strategy = built(name, Exporter(), TRAINABLE)
        state = global_state()
        for number in (1, 2):
            state = wire.state_of(one_round(strategy, state, number, order)[0])
        return bits_of(state), bits_of(strategy.state_arrays())

    expected = go(FIXED_ORDER)
    shuffler = random.Random(1)
    for _ in range(5):
        assert go(shuffler.sample(range(5), 5)) == expected


def test_messages_carry_the_whole_state_and_what_the_strategy_says():
    strategy = Recorded(FedAdam(), TRAINABLE)
    messages = strategy.configure_train(
        4, wire.array_record(global_state()), ConfigRecord({"key": 1}), LocalGrid(ClientApp(), 5)
    )
    assert len({message.metadata.dst_node_id for message in messages}) == 5
    for message in messages:
        assert bits(message.content["arrays"]) == bits(wire.array_record(global_state()))
        assert list(message.content["arrays"]) == list(global_state())
        assert dict(message.content["config"]) == {"key": 1, "server-round": 4}


def test_what_a_strategy_changes_in_the_parameters_it_sends_is_sent():
    class Halving(FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            assert list(arrays) == TRAINABLE
            halves = {n: Array(np.asarray(a.numpy() / 2)) for n, a in arrays.items()}
            return super().configure_train(server_round, ArrayRecord(halves), config, grid)

    messages = Recorded(Halving(), TRAINABLE).configure_train(
        1, wire.array_record(global_state()), ConfigRecord(), LocalGrid(ClientApp(), 5)
    )
    for message in messages:
        for name, array in wire.state_of(message.content["arrays"]).items():
            half = 2 if name in TRAINABLE else 1
            np.testing.assert_array_equal(array, global_state()[name] / half)


@pytest.mark.parametrize("name", PLAIN)
def test_every_round_is_exported_and_the_aggregate_is_the_mean_delta(name):
    ours, plain = Exporter(), Exporter()
    strategy = built(name, ours, TRAINABLE)
    arrays, _ = one_round(strategy, global_state(), 3)
    one_round(DeltaFedAvg(exporter=plain), global_state(), 3)
    assert [row["partition"] for row, _ in ours.clients] == FIXED_ORDER
    for (row, delta), (their_row, their_delta) in zip(ours.clients, plain.clients, strict=True):
        assert row == their_row
        assert row["round"] == 3
        assert bits_of(delta) == bits_of(their_delta)
    assert bits_of(ours.aggregates[3]) == bits_of(plain.aggregates[3])
    assert bits_of(ours.states[3]) == bits_of(wire.state_of(arrays))
    if isinstance(strategy, StatefulStrategy):
        assert bits_of(ours.kept.get(3, {})) == bits_of(strategy.state_arrays())
    keeps = KEEPS.get(name, ())
    assert list(ours.kept.get(3, {})) == [f"{what}/{p}" for what in keeps for p in TRAINABLE]
    for key, array in ours.kept.get(3, {}).items():
        of_parameter = global_state()[key.partition("/")[2]]
        assert (array.dtype, array.shape) == (of_parameter.dtype, of_parameter.shape)


def copied(arrays):
    """Write and read, as far as bytes go."""
    return {n: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape) for n, a in arrays.items()}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("stop", [0, 1, 3])
def test_a_fresh_strategy_goes_on_from_what_another_kept(name, stop):
    whole = built(name, Exporter(), TRAINABLE)
    expected = some_rounds(whole, range(1, 6))
    first, second = (built(name, Exporter(), TRAINABLE) for _ in range(2))
    between = some_rounds(first, range(1, stop + 1))
    assert isinstance(second, StatefulStrategy)
    second.load_state_arrays(copied(first.state_arrays()))
    assert bits_of(some_rounds(second, range(stop + 1, 6), between)) == bits_of(expected)
    assert bits_of(second.state_arrays()) == bits_of(whole.state_arrays())
    if stop and name in KEEPS:
        forgetful = built(name, Exporter(), TRAINABLE)
        assert bits_of(some_rounds(forgetful, range(stop + 1, 6), between)) != bits_of(expected)


def private(kind, exporter=None, name="fedadam"):
    settings = {"dp": kind, "noise_multiplier": 0.2, "clipping_norm": 0.5}
    return built(name, exporter, TRAINABLE, **settings)


def with_norm_bits(messages):
    for number, message in enumerate(messages):
        message.content["metrics"]["norm_bit"] = number % 2
    return messages


def private_round(strategy, state, number, order=FIXED_ORDER):
    started(strategy, state=state, round_number=number)
    return strategy.aggregate_train(number, with_norm_bits(replies(state, number, order)))


@pytest.mark.parametrize("kind", PRIVATE)
def test_privacy_is_flowers_own_with_seeded_noise(kind):
    ours = private(kind)
    norm = "clipping_norm" if kind.endswith("fixed") else "initial_clipping_norm"
    settings = {"noise_multiplier": 0.2, "num_sampled_clients": 5, norm: 0.5}
    theirs = PRIVATE[kind](FedAdam(), **settings)
    state, anything = global_state(), np.random.get_state()[1].tobytes()
    for number in (1, 2, 3):
        found = wire.state_of(private_round(ours, state, number)[0])
        assert np.random.get_state()[1].tobytes() == anything
        bare = {n: state[n] for n in TRAINABLE}
        started(theirs, state=bare, round_number=number)
        sent = with_norm_bits(bare_replies(state, number))
        with global_seed(42, Purpose.NOISE, number):
            expected = wire.state_of(theirs.aggregate_train(number, sent)[0])
        plain = wire.state_of(one_round(built("fedadam", None, TRAINABLE), state, number)[0])
        for name in TRAINABLE:
            assert found[name].tobytes() == expected[name].astype(np.float32).tobytes()
            assert not np.array_equal(found[name], plain[name])
        assert found["bn.running_var"].tobytes() == plain["bn.running_var"].tobytes()
        state = found


@pytest.mark.parametrize("name", ["fedadam", "fedavgm"])
@pytest.mark.parametrize("kind", PRIVATE)
def test_a_private_strategy_goes_on_from_what_another_kept(kind, name):
    def go(strategy, numbers, state):
        for number in numbers:
            state = wire.state_of(private_round(strategy, state, number)[0])
        return state

    expected = go(private(kind, name=name), range(1, 5), global_state())
    first, second = private(kind, name=name), private(kind, name=name)
    between = go(first, (1, 2), global_state())
    second.load_state_arrays(copied(first.state_arrays()))
    assert bits_of(go(second, (3, 4), between)) == bits_of(expected)
    if kind.endswith("adaptive"):
        assert list(first.state_arrays())[-1] == "clipping-norm"
        assert second.strategy.clipping_norm != 0.5


@pytest.mark.parametrize("kind", ["server-side-adaptive", "client-side-adaptive"])
def test_an_adaptive_norm_goes_where_half_of_the_updates_are_above_it(kind):
    state = {name: np.zeros(4, np.float32) for name in TRAINABLE}
    norms = [0.5, 1.0, 2.0, 4.0, 8.0]

    def last_norm(start):
        settings = {"dp": kind, "noise_multiplier": 0.0, "clipping_norm": start}
        strategy = built("fedavg", None, TRAINABLE, **settings)
        for number in range(1, 121):
            clipping_norm = strategy.strategy.clipping_norm
            sent = []
            for partition, norm in enumerate(norms):
                moved = state | {"fc.bias": np.array([norm, 0, 0, 0], np.float32)}
                sent.append(reply(partition, state=moved))
                sent[-1].content["metrics"]["norm_bit"] = int(norm > clipping_norm)
            started(strategy, state=state, round_number=number)
            strategy.aggregate_train(number, sent)
        return strategy.strategy.clipping_norm

    # The one in the middle of the five, give or take a step of a tenth of 0.2.
    for start in (0.01, 100.0):
        assert last_norm(start) == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("kind", ["server-side-fixed", "server-side-adaptive"])
def test_an_update_of_zero_is_told_where_the_server_cannot_clip_it(kind):
    strategy, state = private(kind), global_state()
    started(strategy, state=state, round_number=4)
    told = "round 4: a client's update is zero, which the server's differential privacy cannot"
    with pytest.raises(RunFailedError, match=told):
        strategy.aggregate_train(4, [reply(0, state=state), reply(1, state=state)])


def test_what_a_private_strategy_records_is_what_the_clients_sent():
    ours, plain = Exporter(), Exporter()
    one_round(private("server-side-fixed", ours, "delta-fedavg"), global_state(), 3)
    one_round(DeltaFedAvg(exporter=plain), global_state(), 3)
    assert [bits_of(delta) for _, delta in ours.clients] == [bits_of(d) for _, d in plain.clients]
    assert bits_of(ours.aggregates[3]) == bits_of(plain.aggregates[3])
    assert bits_of(ours.states[3]) != bits_of(plain.states[3])


def test_a_strategy_without_state_leaves_none():
    exporter = Exporter()
    strategy = Recorded(FedAvg(), TRAINABLE, exporter)
    one_round(strategy, global_state(), 1)
    assert strategy.state_arrays() == {}
    assert exporter.kept == {}
    assert list(exporter.states) == [1]


def test_failed_replies_are_left_out():
    survivors = [p for p in FIXED_ORDER if p in (1, 4)]
    expected, _ = one_round(Recorded(FedAdam(), TRAINABLE), global_state(), 3, survivors)
    strategy = started(Recorded(FedAdam(), TRAINABLE))
    mixed = [failure(), *replies(None, 3, [4, 1]), failure()]
    assert bits(strategy.aggregate_train(3, mixed)[0]) == bits(expected)
    exporter = Exporter()
    strategy = started(Recorded(FedAdam(), TRAINABLE, exporter))
    assert strategy.aggregate_train(3, [failure()]) == (None, None)
    assert strategy.aggregate_train(3, []) == (None, None)
    assert (exporter.clients, exporter.states, exporter.kept) == ([], {}, {})


def test_arrays_unlike_the_global_ones_are_refused_by_name():
    local = local_state(4)
    broken = reply(4, state={**local, "fc.bias": local["fc.bias"][:3]})
    with pytest.raises(ValueError) as refused:
        started(Recorded(FedAdam(), TRAINABLE)).aggregate_train(3, [reply(1), broken])
    assert "client 4 returned fc.bias has shape (3,)" in str(refused.value)


def test_replies_that_the_caller_holds_are_left_as_they_are():
    held = [reply(p) for p in FIXED_ORDER]
    before = [bits(message.content["arrays"]) for message in held]
    started(Recorded(FedAdam(), TRAINABLE)).aggregate_train(3, held)
    assert [bits(message.content["arrays"]) for message in held] == before


def test_it_runs_under_flowers_own_start():
    app = ClientApp()

    @app.train()
    def train(message, context):
        arrays = message.content["arrays"]
        partition = context.node_config["partition-id"]
        moved = {
            n: Array(np.asarray(a.numpy() + np.array(partition + 1, a.dtype)))
            for n, a in arrays.items()
        }
        metrics = MetricRecord({"num-examples": 10 * (partition + 1), "loss": 1.0})
        content = RecordDict({"arrays": ArrayRecord(moved), "metrics": metrics})
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        metrics = MetricRecord({"num-examples": 1, "accuracy": 0.5})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    result = Recorded(flower.FedAvgM(server_momentum=0.5), TRAINABLE).start(
        LocalGrid(app, clients=4), wire.array_record(global_state()), num_rounds=2
    )
    state = wire.state_of(result.arrays)
    # Deltas 1 to 4 with weights 10 to 40 have the mean 3; momentum adds half of the first.
    np.testing.assert_allclose(state["fc.bias"], global_state()["fc.bias"] + 7.5, atol=1e-5)
    np.testing.assert_allclose(
        state["bn.running_var"], global_state()["bn.running_var"] + 6, atol=1e-5
    )
    assert int(state["bn.num_batches_tracked"]) == 16
    assert result.evaluate_metrics_clientapp[2]["accuracy"] == 0.5
