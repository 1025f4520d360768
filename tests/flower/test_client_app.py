import json

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common import FitIns, GetParametersIns, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.compat.common.recorddict_compat import (
    evaluateins_to_recorddict,
    fitins_to_recorddict,
    getparametersins_to_recorddict,
    recorddict_to_evaluateres,
    recorddict_to_fitres,
    recorddict_to_getparametersres,
)
from flwr.compat.common.typing import EvaluateIns
from flwr.serverapp.strategy import FedAdam, FedAvg, FedProx

from fedsim.core.config import RunConfig
from fedsim.core.errors import ConfigError, InputError
from fedsim.core.plan import RunPlan
from fedsim.flower import messages as wire
from fedsim.flower.client import FedSimClient
from fedsim.flower.client_app import app
from fedsim.flower.node import NodeSettings
from fedsim.flower.run_config import config_from_run_config
from tests.flower.conftest import SMALL
from tests.local_grid import LocalGrid


@pytest.fixture
def plan():
    return RunPlan.prepare(RunConfig.from_mapping(SMALL))


def ask(content, message_type, partition=2, recordings=None, **node_config):
    keys = {key.replace("_", "-"): value for key, value in node_config.items()}
    grid = LocalGrid(app, 6, recordings=recordings, node_config=lambda _: keys)
    node = next(n for n, p in grid.partitions.items() if p == partition)
    (number,) = grid.push_messages([Message(content, node, message_type)])
    (reply,) = grid.pull_messages([number])
    return reply


RUN_ID = "20261123-140000-0a1b2c3d"


def train_content(plan, *, partition=2, **changes):
    config = wire.train_config(
        plan.config.to_json(),
        round_number=1,
        partition=partition,
        partition_sha256=plan.partition_sha256,
        run="run",
        run_id=RUN_ID,
    )
    config |= {key.replace("_", "-"): value for key, value in changes.items()}
    return RecordDict(
        {
            wire.ARRAYS: wire.array_record(plan.initial_state),
            wire.CONFIG: ConfigRecord(config),
        }
    )


def client(partition, run_config):
    return FedSimClient(NodeSettings(partition_id=partition), run_config)


def told(reply):
    return json.loads(reply.content[wire.TELEMETRY]["json"])


def test_both_apis_give_the_same_local_weights(plan):
    modern = ask(train_content(plan), "train")
    config = {"config": plan.config.to_json(), "server-round": 1}
    ins = FitIns(ndarrays_to_parameters(list(plan.initial_state.values())), config)
    former = recorddict_to_fitres(ask(fitins_to_recorddict(ins, True), "train").content, True)
    expected = [a.numpy() for a in modern.content[wire.ARRAYS].values()]
    found = parameters_to_ndarrays(former.parameters)
    assert len(found) == len(plan.initial_state)
    for ours, theirs in zip(expected, found, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    assert former.num_examples == plan.sizes[2]
    assert json.loads(former.metrics["telemetry"])["partition"] == 2


def test_the_former_api_serves_parameters_and_evaluation(plan):
    content = getparametersins_to_recorddict(GetParametersIns({"config": plan.config.to_json()}))
    result = recorddict_to_getparametersres(ask(content, "get_parameters").content, True)
    arrays = parameters_to_ndarrays(result.parameters)
    for found, expected in zip(arrays, plan.initial_state.values(), strict=True):
        np.testing.assert_array_equal(found, expected)
    ins = EvaluateIns(ndarrays_to_parameters(arrays), {"config": plan.config.to_json()})
    outcome = recorddict_to_evaluateres(
        ask(evaluateins_to_recorddict(ins, True), "evaluate").content
    )
    assert outcome.num_examples == plan.sizes[2]
    assert 2.0 < outcome.loss < 2.6


def test_a_reply_carries_weights_scalars_and_telemetry_but_no_gradients(plan, tmp_path):
    reply = ask(train_content(plan), "train", recordings=tmp_path)
    assert list(reply.content[wire.ARRAYS]) == list(plan.initial_state)
    assert dict(reply.content[wire.METRICS]).keys() == {"num-examples", "loss"}
    telemetry = json.loads(reply.content[wire.TELEMETRY]["json"])
    assert telemetry["num_steps"] == telemetry["num_steps_captured"] == plan.steps_of(2)
    assert telemetry["num_samples"] == sum(telemetry["class_distribution"]) == plan.sizes[2]
    assert telemetry["local_loss"] == pytest.approx(
        np.average(telemetry["loss_history"], weights=telemetry["batch_sizes"])
    )
    assert telemetry["gradient_norm"] == pytest.approx(
        np.linalg.norm(list(telemetry["per_layer_norms"].values()))
    )
    assert telemetry["seconds"].keys() == {"load", "train", "capture", "write", "total"}
    assert telemetry["bytes_captured"] == plan.step_bytes * plan.steps_of(2)
    assert telemetry["place"] == "node"
    folder = tmp_path / RUN_ID / "rounds/0001/clients/0002"
    written = sorted(path.name for path in folder.iterdir())
    assert written == ["gradients-00000.safetensors", "steps.jsonl"]


def test_a_node_without_recordings_writes_nothing(plan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    telemetry = told(ask(train_content(plan), "train"))
    assert telemetry["num_steps_captured"] == 0
    assert (telemetry["place"], telemetry["files"]) == ("none", {})
    assert telemetry["not_captured"] == (
        "capture is not allowed by this node (its configuration says capture = false)"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_second_attempt_leaves_the_same_files_as_the_first(plan, tmp_path):
    ask(train_content(plan), "train", recordings=tmp_path)
    folder = tmp_path / RUN_ID / "rounds/0001/clients/0002"
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "gradients-00007.safetensors").write_bytes(b"left by a killed worker")
    (folder / "steps.jsonl.123.partial").write_bytes(b"left by a killed worker")
    ask(train_content(plan), "train", recordings=tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


def test_a_message_for_another_partition_is_refused(plan):
    reply = ask(train_content(plan, partition=3), "train", partition=2)
    assert reply.error.reason == "a message for client 3 reached client 2"


def test_a_query_says_the_partition():
    content = RecordDict({wire.CONFIG: ConfigRecord()})
    assert ask(content, "query", partition=4).content[wire.METRICS][wire.PARTITION] == 4


def test_the_client_is_a_numpy_client(plan):
    asked = client(2, plan.config.to_json())
    weights, samples, metrics = asked.fit(list(plan.initial_state.values()), {})
    assert (len(weights), samples) == (len(plan.initial_state), plan.sizes[2])
    loss, samples, outcome = asked.evaluate(weights, {})
    assert samples == plan.sizes[2]
    assert loss < asked.evaluate(list(plan.initial_state.values()), {})[0]
    assert 0 <= outcome["accuracy"] <= 1
    assert metrics["loss"] == json.loads(metrics["telemetry"])["local_loss"]


def test_training_leaves_the_global_generators_alone(plan):
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    ask(train_content(plan), "train")
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


@pytest.mark.parametrize("strategy", [FedAvg, FedProx, FedAdam])
def test_flowers_own_strategies_drive_the_same_client(plan, strategy):
    named = {"proximal_mu": 0.1} if strategy is FedProx else {}
    train_config = ConfigRecord({"config": plan.config.to_json()})
    result = strategy(fraction_evaluate=1.0, **named).start(
        LocalGrid(app, 6),
        wire.array_record(plan.initial_state),
        num_rounds=1,
        train_config=train_config,
        evaluate_config=ConfigRecord({"config": plan.config.to_json()}),
    )
    # One round of any of them from the same weights on the same batches: the clients' mean loss.
    own = [client(p, plan.config.to_json()) for p in range(6)]
    asked = {"proximal-mu": 0.1} if strategy is FedProx else {}
    outcomes = [one.fit(list(plan.initial_state.values()), asked) for one in own]
    mean = np.average([o[2]["loss"] for o in outcomes], weights=[o[1] for o in outcomes])
    assert result.train_metrics_clientapp[1]["loss"] == pytest.approx(mean, rel=1e-6)
    assert 0 <= result.evaluate_metrics_clientapp[1]["accuracy"] <= 1


def test_run_config_fills_what_it_leaves_empty_from_the_file(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("rounds = 7\nclients = 12\n[client.3]\nbatch-size = 8\n")
    empty = {name.replace("_", "-"): "" for name in RunConfig.model_fields if name != "client"}
    config = config_from_run_config({**empty, "config": str(file), "rounds": 2, "alpha": 1.5})
    assert (config.rounds, config.clients, config.alpha) == (2, 12, 1.5)
    assert config.client[3].batch_size == 8
    assert config_from_run_config({**empty, "config": ""}) == RunConfig()


def test_run_config_of_a_resumed_run_changes_what_was_recorded():
    recorded = {"rounds": 7, "clients": 12}
    given = {"resume": "/runs/a", "rounds": 9, "clients": "", "config": ""}
    config = config_from_run_config(given, recorded)
    assert (config.rounds, config.clients, config.seed) == (9, 12, 42)


def test_run_config_reads_lists_from_strings():
    assert config_from_run_config({"batch-size": "[16, 32]"}).batch_size == (16, 32)
    assert config_from_run_config({"output": "/2024"}).output == "/2024"


def test_run_config_refuses_like_the_command_line(tmp_path):
    with pytest.raises(ConfigError, match="clients = 0"):
        config_from_run_config({"clients": 0})
    with pytest.raises(ConfigError, match="round = 3"):
        config_from_run_config({"round": 3})
    for key in ("config", "output", "data-root", "resume"):
        with pytest.raises(ConfigError, match="an absolute path"):
            config_from_run_config({key: "here/run.toml"})
    with pytest.raises(InputError, match="cannot be read"):
        config_from_run_config({"config": str(tmp_path / "none.toml")})
