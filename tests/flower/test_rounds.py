import contextlib
import re
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsim.core.aggregation import state_sha256
from fedsim.core.config import RunConfig
from fedsim.core.errors import InputError, RunFailedError, RunInterruptedError
from fedsim.core.evaluation import evaluate
from fedsim.core.partition import fold_order
from fedsim.core.plan import RunPlan
from fedsim.core.rng import Purpose, draw_participants, generator
from fedsim.core.training import load_batches, load_state, make_optimizer
from fedsim.flower.client_app import app
from fedsim.flower.server_app import check_output, execute
from fedsim.recording.reader import load_run
from fedsim.recording.verify import verify
from fedsim.recording.writer import is_being_written
from fedsim.tasks.vision.models import build_model
from tests.flower.conftest import SMALL
from tests.installed import needs
from tests.local_grid import LocalGrid
from tests.observers import Memory


def hashes(run):
    return [row["state_sha256"] for row in run.round_rows]


def arrays(tensors):
    return {name: tensors[name].numpy() for name in tensors}


def test_order_of_replies_and_number_of_workers_do_not_change_a_bit(run_locally):
    first = run_locally("a", workers=1)
    again = run_locally("b", workers=1)
    many = run_locally("c", workers=4)
    reversed_replies = run_locally("d", workers=4, newest_first=True)
    assert hashes(first) == hashes(again) == hashes(many) == hashes(reversed_replies)
    assert len(set(hashes(first))) == 3


def test_the_window_bounds_the_replies_that_wait(run_locally):
    run_locally(workers=1, clients_per_round=6, rounds=1, newest_first=True)
    assert run_locally.most_waiting == 2


def test_every_row_says_what_happened(run_locally):
    run = run_locally()
    assert [row["round"] for row in run.round_rows] == [0, 1, 2]
    assert run.round_rows[0]["participants"] == []
    for number in (1, 2):
        drawn = draw_participants(42, number, 6, 3)
        assert run.round(number).participants == drawn
        order = fold_order(drawn, run.manifest["partition"]["sizes"])
        assert list(run.round(number).clients) == order
    assert run.status == "finished"
    for row in run.round_rows:
        assert row["failed"] == []
        assert row["state_sha256"] == state_sha256(arrays(run.round(row["round"]).state))


def test_the_row_of_a_round_speaks_of_the_model_of_that_round(run_locally):
    run = run_locally()
    plan = RunPlan.prepare(run.config)
    for number in range(3):
        model = build_model("cnn", classes=10, norm="batch", seed=0)
        load_state(model, arrays(run.round(number).state))
        outcome = evaluate(plan.task, model, plan.dataset.test(), device=torch.device("cpu"))
        row = run.round_rows[number]
        assert row["global_accuracy"] == outcome.accuracy
        # The threads of the two may differ, and with them the order of sums.
        assert row["global_loss"] == pytest.approx(outcome.loss, rel=64 * 2**-24)


def test_states_aggregates_and_deltas_add_up_to_the_bit(run_locally):
    run = run_locally()
    sizes = run.manifest["partition"]["sizes"]
    for number in (1, 2):
        before, now = arrays(run.round(number - 1).state), arrays(run.round(number).state)
        aggregate = arrays(run.round(number).aggregate)
        clients = run.round(number).clients.values()
        for name in now:
            total = sum(
                np.float64(sizes[c.partition]) * c.delta[name].numpy().astype(np.float64)
                for c in clients
            )
            mean = total / sum(sizes[c.partition] for c in clients)
            if now[name].dtype == np.int64:
                mean = np.rint(mean)
            np.testing.assert_array_equal(aggregate[name], mean.astype(now[name].dtype))
            np.testing.assert_array_equal(now[name], before[name] + aggregate[name])


@pytest.mark.parametrize(
    "optimizer",
    [
        {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 5e-4},
        {"optimizer": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.0},
        {"optimizer": "adam", "learning_rate": 1e-3},
    ],
)
def test_replaying_the_recorded_gradients_lands_on_the_recorded_delta(run_locally, optimizer):
    run = run_locally(local_epochs=2, **optimizer)
    for number in (1, 2):
        start = run.round(number - 1).state
        for client in run.round(number).clients.values():
            assert client.captured_steps == list(range(client.telemetry["num_steps"]))
            names = [p["name"] for p in run.manifest["model"]["parameters"]]
            parameters = {n: torch.nn.Parameter(start[n].clone()) for n in names}
            settings = run.config.training_of(client.partition).optimizer
            optimiser = make_optimizer(list(parameters.values()), settings)
            for step in client.captured_steps:
                gradient = client.gradient(step)
                assert list(gradient) == names
                for name, parameter in parameters.items():
                    parameter.grad = gradient[name].clone()
                optimiser.step()
            for name, parameter in parameters.items():
                assert torch.equal(parameter.detach() - start[name], client.delta[name])


def test_recorded_indices_and_augmentation_draws_give_the_recorded_gradient(run_locally):
    run = run_locally(rounds=1)
    plan = RunPlan.prepare(run.config)
    client = next(iter(run.round(1).clients.values()))
    batches = load_batches(
        plan.task,
        plan.dataset.train(),
        run.partition[client.partition],
        run.config.training_of(client.partition),
        order=generator(42, Purpose.BATCHES, 1, client.partition),
        augmentation=generator(42, Purpose.AUGMENTATION, 1, client.partition),
        device=torch.device("cpu"),
    )
    model = build_model("cnn", classes=10, norm="batch", seed=0)
    load_state(model, arrays(run.round(0).state))
    model.train()
    batch = next(batches)
    assert client.steps[0]["indices"] == batch.indices.tolist()
    loss = plan.task.loss(model, batch.tensors)
    loss.backward()
    assert client.steps[0]["loss"] == loss.item()
    for name, parameter in model.named_parameters():
        assert torch.equal(client.gradient(0)[name], parameter.grad)


def test_what_is_captured_does_not_change_the_model(run_locally):
    everything = hashes(run_locally("a", capture="all", local_epochs=2))
    for name, capture in (("b", "none"), ("c", "first:1"), ("d", "every:3")):
        assert hashes(run_locally(name, capture=capture, local_epochs=2)) == everything


def test_weights_are_distinct_samples_however_many_epochs_a_client_runs(run_locally):
    tables = {"0": {"local-epochs": 3}, "1": {"local-epochs": 1}}
    run = run_locally(clients=2, clients_per_round=2, rounds=1, client=tables)
    telemetry = {row["partition"]: row for row in run.client_rows}
    sizes = run.manifest["partition"]["sizes"]
    for partition, epochs in ((0, 3), (1, 1)):
        row = telemetry[partition]
        assert row["num_samples"] == sizes[partition]
        assert sum(row["batch_sizes"]) == epochs * sizes[partition]
        assert row["local_epochs"] == epochs


def test_settings_of_single_clients_reach_only_them(run_locally):
    tables = {"2": {"batch-size": 8, "local-steps": 3, "learning-rate": 0.5}}
    run = run_locally(rounds=1, clients_per_round=6, client=tables)
    rows = {row["partition"]: row for row in run.client_rows}
    assert (rows[2]["batch_sizes"], rows[2]["learning_rate"]) == ([8, 8, 8], 0.5)
    assert {rows[p]["learning_rate"] for p in (0, 1, 3, 4, 5)} == {0.01}
    assert {rows[p]["batch_size"] for p in (0, 1, 3, 4, 5)} == {16}


def test_a_last_batch_of_one_sample_joins_the_one_before_and_is_recorded(run_locally):
    sizes = RunPlan.prepare(RunConfig.from_mapping(SMALL)).sizes
    partition = max(range(6), key=lambda p: sizes[p])
    batch_size = sizes[partition] - 1
    run = run_locally(
        rounds=1, participants=[[partition]], client={str(partition): {"batch-size": batch_size}}
    )
    client = run.round(1).client(partition)
    assert client.telemetry["batch_sizes"] == [batch_size + 1]
    assert [len(step["indices"]) for step in client.steps] == [batch_size + 1]


def test_listed_participants_are_the_ones(run_locally):
    run = run_locally(participants=[[5], [2, 0]])
    assert [row["participants"] for row in run.round_rows] == [[], [5], [2, 0]]


def test_evaluate_every_skips_rounds_but_never_the_last(run_locally):
    run = run_locally(rounds=5, evaluate_every=3, capture="none")
    measured = [row["round"] for row in run.round_rows if row["global_accuracy"] is not None]
    assert measured == [0, 3, 5]


def test_a_run_leaves_the_global_generators_alone(run_locally):
    import random

    states = random.getstate(), torch.random.get_rng_state(), np.random.get_state()[1].copy()
    run_locally(rounds=1)
    assert random.getstate() == states[0]
    assert torch.equal(torch.random.get_rng_state(), states[1])
    assert (np.random.get_state()[1] == states[2]).all()


def fails_once(rounds, partition):
    def before(asked, message):
        config = message.content.config_records.get("config", {})
        if asked == partition and config.get("server-round") in rounds:
            raise ZeroDivisionError("the sensor is gone")

    return before


def test_a_failed_client_stops_the_run_and_is_named(run_locally, tmp_path):
    partition = draw_participants(42, 2, 6, 3)[1]
    observer = Memory()
    with pytest.raises(RunFailedError) as failed:
        run_locally(before=fails_once({2}, partition), observer=observer)
    text = str(failed.value)
    assert f"client {partition} failed in round 2" in text
    assert "ZeroDivisionError: the sensor is gone" in text
    assert observer.of("client failed")[0][3].startswith("  File ")
    run = load_run(tmp_path / "run")
    assert (run.status, len(run.round_rows)) == ("failed", 2)
    assert "the sensor is gone" in run.manifest["error"]


def test_max_failures_lets_the_survivors_go_on(run_locally):
    partition = draw_participants(42, 1, 6, 3)[0]
    run = run_locally(before=fails_once({1}, partition), max_failures=1)
    survivors = [p for p in draw_participants(42, 1, 6, 3) if p != partition]
    assert run.status == "finished"
    assert run.round(1).row["failed"] == [partition]
    assert sorted(run.round(1).clients) == sorted(survivors)
    row = next(r for r in run.client_rows if r["round"] == 1 and r["partition"] == partition)
    assert row["status"] == "failed"
    assert "the sensor is gone" in row["error"]


@pytest.mark.parametrize("max_failures", [0, 3])
def test_what_a_client_says_of_its_failure_leaves_the_run_readable(
    run_locally, tmp_path, max_failures
):
    def before(partition, message):
        if message.metadata.message_type == "train" and partition == first:
            raise ValueError("\ud800" + "x" * 40_000_000)

    first = draw_participants(42, 1, 6, 3)[0]
    with contextlib.suppress(RunFailedError):
        run_locally(before=before, max_failures=max_failures)
    run = load_run(tmp_path / "run")
    assert run.status == ("finished" if max_failures else "failed")
    assert verify(tmp_path / "run").violations == []
    assert sum((tmp_path / "run" / name).stat().st_size for name in LISTS) < 200_000


LISTS = ("run.json", "rounds.jsonl", "clients.jsonl", "checksums.jsonl")


@needs("remote")
def test_a_run_whose_copy_cannot_be_begun_says_so_and_is_given_free(run_locally, tmp_path):
    told = "nothing://there is no place for a run: Protocol not known: nothing"
    # Whatever the exception holds on to is still there.
    with pytest.raises(InputError, match=told) as caught:
        run_locally(mirror="nothing://there")
    assert not is_being_written(tmp_path / "run")
    run = load_run(tmp_path / "run")
    assert (run.status, run.manifest["error"]) == ("failed", str(caught.value))


def test_a_round_without_any_survivor_fails(run_locally):
    def before(partition, message):
        if message.metadata.message_type == "train":
            raise ZeroDivisionError("the sensor is gone")

    with pytest.raises(RunFailedError) as failed:
        run_locally(before=before, max_failures=6)
    assert re.fullmatch(
        r"no client of round 1 returned a model; the last that failed was client [0-5]: "
        r"ZeroDivisionError: the sensor is gone",
        str(failed.value),
    )


def test_a_node_that_cannot_say_what_it_holds_tells_why(run_locally):
    def before(partition, message):
        if message.metadata.message_type == "query":
            raise ZeroDivisionError("the sensor is gone")

    with pytest.raises(RunFailedError) as failed:
        run_locally(before=before)
    assert str(failed.value) == (
        "a node could not say which partition it holds: ZeroDivisionError: the sensor is gone"
    )


def test_a_stop_ends_the_run_and_keeps_the_finished_rounds(tmp_path):
    plan = RunPlan.prepare(RunConfig.from_mapping({**SMALL, "rounds": 3}))
    stop = threading.Event()

    class StopAfterFirstRound(Memory):
        def round_finished(self, row):
            if row["round"] == 1:
                stop.set()

    with pytest.raises(RunInterruptedError):
        execute(
            LocalGrid(app, 6, newest_first=True, recordings=tmp_path),
            plan,
            tmp_path / "run",
            observer=StopAfterFirstRound(),
            workers=4,
            stop=stop,
        )
    run = load_run(tmp_path / "run")
    assert (run.status, [row["round"] for row in run.round_rows]) == ("failed", [0, 1])


def test_node_ids_are_nowhere_in_the_record(run_locally):
    run = run_locally(rounds=1)
    ids = [str(node).encode() for node in LocalGrid(app, 6).partitions]
    # A float has at most 17 digits, so none can be found in one by chance.
    assert {len(node) for node in ids} == {19}
    texts = [path.read_bytes() for path in run.path.rglob("*.json*")]
    assert not any(node in text for node in ids for text in texts)


def test_an_existing_output_is_refused_and_left_alone(tmp_path):
    plan = RunPlan.prepare(RunConfig.from_mapping(SMALL))
    (tmp_path / "taken").mkdir()
    with pytest.raises(InputError, match="exists already"):
        check_output(tmp_path / "taken", plan)
    with pytest.raises(InputError, match="exists already"):
        check_output(Path(__file__), plan)
    assert list((tmp_path / "taken").iterdir()) == []


def test_a_disk_that_cannot_hold_the_run_is_refused(tmp_path):
    # 4 MB a state, of which each round writes several.
    plan = RunPlan.prepare(RunConfig.from_mapping({**SMALL, "rounds": 100_000, "seed": 7}))
    big = replace(plan, initial_state={"w": np.empty((10**6,), np.float32)})
    with pytest.raises(InputError, match=r"needs [\d.]+ TB and its disk has .* free; ") as refused:
        check_output(tmp_path / "new", big)
    assert "its states and deltas alone do not fit" in str(refused.value)
    assert not (tmp_path / "new").exists()
