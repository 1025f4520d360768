import random

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fedsim.flower import messages as wire
from strategies import DeltaFedAvg
from tests.local_grid import LocalGrid
from tests.strategies.replies import (
    SIZES,
    Exporter,
    bits,
    failure,
    global_state,
    local_state,
    reply,
    started,
)


def test_the_state_equals_flowers_fedavg_to_1e_6():
    ours, metrics = started(DeltaFedAvg()).aggregate_train(3, [reply(p) for p in range(5)])
    theirs, their_metrics = FedAvg().aggregate_train(3, [reply(p) for p in range(5)])
    for name in ("conv.weight", "bn.running_var", "fc.bias"):
        np.testing.assert_allclose(ours[name].numpy(), theirs[name].numpy(), atol=1e-6, rtol=0)
    assert metrics["loss"] == pytest.approx(their_metrics["loss"], abs=1e-12)
    assert metrics["loss"] == pytest.approx(
        sum((1 + p) * n for p, n in SIZES.items()) / sum(SIZES.values()), abs=1e-12
    )


def test_integer_buffers_take_the_rounded_weighted_mean_and_keep_dtype_and_shape():
    arrays, _ = started(DeltaFedAvg()).aggregate_train(3, [reply(p) for p in range(5)])
    tracked = arrays["bn.num_batches_tracked"].numpy()
    mean = sum((1 + p) * n for p, n in SIZES.items()) / sum(SIZES.values())
    assert (tracked.dtype, tracked.shape, int(tracked)) == (np.int64, (), 10 + round(mean))


def test_a_list_of_replies_in_any_order_gives_the_same_bits():
    expected = bits(started(DeltaFedAvg()).aggregate_train(3, [reply(p) for p in range(5)])[0])
    shuffler = random.Random(1)
    for _ in range(10):
        order = shuffler.sample(range(5), 5)
        replies = [reply(p, node=shuffler.randrange(10**9)) for p in order]
        assert bits(started(DeltaFedAvg()).aggregate_train(3, replies)[0]) == expected


def test_the_fixed_order_of_a_list_is_largest_first_then_by_partition():
    exporter = Exporter()
    strategy = started(DeltaFedAvg(exporter=exporter))
    strategy.aggregate_train(3, [reply(p) for p in range(5)])
    assert [row["partition"] for row, _ in exporter.clients] == [1, 3, 4, 0, 2]


def test_a_generator_is_folded_as_it_comes_and_one_at_a_time():
    exporter = Exporter()
    strategy = started(DeltaFedAvg(exporter=exporter))
    folded = []

    def replies():
        for partition in (2, 0, 4):
            yield reply(partition)
            folded.append([row["partition"] for row, _ in exporter.clients])

    strategy.aggregate_train(3, replies())
    assert folded == [[2], [2, 0], [2, 0, 4]]


def test_every_round_is_exported_with_one_sign_and_adds_up_to_the_bit():
    exporter = Exporter()
    strategy = started(DeltaFedAvg(exporter=exporter))
    arrays, _ = strategy.aggregate_train(3, [reply(p) for p in range(5)])
    start = global_state()
    for row, delta in exporter.clients:
        assert row["round"] == 3
        local = local_state(row["partition"])
        for name in start:
            np.testing.assert_array_equal(delta[name], local[name] - start[name])
    for name, array in start.items():
        total = sum(
            SIZES[row["partition"]] * delta[name].astype(np.float64)
            for row, delta in exporter.clients
        )
        mean = total / sum(SIZES.values())
        mean = np.rint(mean) if array.dtype == np.int64 else mean
        np.testing.assert_array_equal(exporter.aggregates[3][name], mean.astype(array.dtype))
        np.testing.assert_array_equal(
            exporter.states[3][name], array + exporter.aggregates[3][name]
        )
        np.testing.assert_array_equal(arrays[name].numpy(), exporter.states[3][name])


def test_failed_replies_are_left_out_and_the_weights_renormalised():
    survivors = [reply(1), reply(4)]
    expected = bits(started(DeltaFedAvg()).aggregate_train(3, survivors)[0])
    mixed = [failure(), reply(4), reply(1), failure()]
    assert bits(started(DeltaFedAvg()).aggregate_train(3, mixed)[0]) == expected
    assert started(DeltaFedAvg()).aggregate_train(3, [failure()]) == (None, None)
    assert started(DeltaFedAvg()).aggregate_train(3, []) == (None, None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: {**s, "fc.bias": s["fc.bias"][:3]}, "client 4 returned fc.bias has shape (3,)"),
        (
            lambda s: {**s, "fc.bias": s["fc.bias"].astype(np.float64)},
            "client 4 returned fc.bias has shape (4,) and dtype float64",
        ),
        (lambda s: {n: a for n, a in s.items() if n != "fc.bias"}, "differ in fc.bias"),
    ],
)
def test_arrays_unlike_the_global_ones_are_refused_by_name(change, said):
    broken = reply(4, state=change(local_state(4)))
    with pytest.raises(ValueError) as refused:
        started(DeltaFedAvg()).aggregate_train(3, [reply(1), broken])
    assert said in str(refused.value)


def test_a_weight_that_is_no_whole_number_is_refused():
    odd = reply(4, num_examples=0.5)
    with pytest.raises(ValueError, match=r"num-examples is 0\.5"):
        started(DeltaFedAvg()).aggregate_train(3, [odd])


def test_it_runs_under_flowers_own_start_like_fedavg():
    def run(strategy):
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

        return strategy.start(
            LocalGrid(app, clients=4), wire.array_record(global_state()), num_rounds=3
        )

    settings = {"fraction_evaluate": 0.0}
    ours = run(DeltaFedAvg(**settings)).arrays
    theirs = run(FedAvg(**settings)).arrays
    for name in ("conv.weight", "fc.bias"):
        np.testing.assert_allclose(ours[name].numpy(), theirs[name].numpy(), atol=1e-5, rtol=0)
        # Deltas 1 to 4 with weights 10 to 40 have the mean 3.
        np.testing.assert_allclose(ours[name].numpy(), global_state()[name] + 9, atol=1e-5)
    assert int(ours["bn.num_batches_tracked"].numpy()) == 19
