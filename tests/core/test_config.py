from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.captures.gradients import Gradients
from fedsim.core.config import RunConfig, flag_text, flags_to_resume, parse_text, read_config_file
from fedsim.core.errors import ConfigError, InputError
from fedsim.core.rng import draw_participants
from fedsim.core.training import OptimizerSettings, TrainingSettings
from fedsim.core.units import parse_bytes

ROOT = Path(__file__).parents[2]
KEYS = [name.replace("_", "-") for name in RunConfig.model_fields]
TWO = "2 or more: norm = 'batch' cannot normalise one sample in resnet18's last stage"
SEVERAL = "a whole number from 1 to 1,000,000,000, or a list of them"
RATES = "a finite number above 0, or a list of them"
FORMS = "none, all, first:K, last:K, every:K or sketch:K with K from 1, a sketch to 1,048,576"
BYTES = "a number of bytes above 0 with a unit, like '20 GB' or '1.5 GiB'"
TABLES = "tables [client.<partition>] with whole numbers for partitions"

# field of the message, what is given for it, what the message says is allowed
BAD_VALUES = [
    ("dataset", "mnist", "digits, cifar10, cifar100, synthetic or synthetic:SAMPLES[:CLASSES]"),
    ("dataset", "synthetic:5", "synthetic:SAMPLES[:CLASSES] with at least 2 classes"),
    ("dataset", "synthetic:\uff16\uff10:3", "synthetic:SAMPLES[:CLASSES] with at least 2 classes"),
    ("dataset", "synthetic:" + "9" * 19, "synthetic:SAMPLES[:CLASSES] with at least 2 classes"),
    ("dataset", 3, "one of 'digits', 'cifar10', 'cifar100', 'synthetic[:SAMPLES[:CLASSES]]'"),
    ("data-root", 3, "a text"),
    ("data-root", "a\0b", "a path in UTF-8 without a zero byte"),
    ("clients", 0, "a value of at least 1"),
    ("clients", 10**9 + 1, "a value of at most 1000000000"),
    ("clients", "ten", "a whole number"),
    ("clients", 2.0, "a whole number"),
    ("clients", True, "a whole number"),
    ("clients-per-round", 0, "a value of at least 1"),
    ("clients-per-round", 11, "1 to the number of clients, 10"),
    ("clients-per-round", "all", "a whole number"),
    ("rounds", 0, "a value of at least 1"),
    ("rounds", 1.5, "a whole number"),
    (
        "partition",
        "label",
        "dirichlet, iid, shards, shards:K with a whole K of 1 or more, or nodes",
    ),
    (
        "partition",
        "shards:0",
        "dirichlet, iid, shards, shards:K with a whole K of 1 or more, or nodes",
    ),
    ("partition", "shards:144", "at most 143 shards a client with 1438 samples"),
    ("partition", 1, "a text"),
    (
        "partition",
        "shards:\u0663",
        "dirichlet, iid, shards, shards:K with a whole K of 1 or more, or nodes",
    ),
    ("alpha", 0.0, "a value above 0.0"),
    ("alpha", -1, "a value above 0.0"),
    ("alpha", "x", "a number"),
    ("alpha", float("inf"), "a finite number"),
    ("alpha", float("nan"), "a value above 0.0"),
    ("min-samples", 0, "a value of at least 1"),
    ("min-samples", 1, TWO),
    ("min-samples", 144, "at most 143: digits has 1438 training samples for 10 clients"),
    ("min-samples", "x", "a whole number"),
    ("seed", -1, "a value of at least 0"),
    ("seed", 2**32, "a value of at most 4294967295"),
    ("seed", 1.0, "a whole number"),
    ("seed", None, "a whole number"),
    ("participants", 3, "a list of client numbers for each round"),
    ("model", "vgg", "one of 'resnet18', 'resnet18-cifar', 'cnn'"),
    ("model", 18, "one of 'resnet18', 'resnet18-cifar', 'cnn'"),
    ("norm", True, "one of 'batch', 'group'"),
    ("norm", "layer", "one of 'batch', 'group'"),
    ("optimizer", "rmsprop", "one of 'sgd', 'adam'"),
    ("learning-rate", 0, RATES),
    ("learning-rate", -0.1, RATES),
    ("learning-rate", "fast", RATES),
    ("learning-rate", float("nan"), RATES),
    ("learning-rate", float("inf"), RATES),
    ("momentum", 1.0, "a value below 1.0"),
    ("momentum", -0.1, "a value of at least 0.0"),
    ("momentum", "x", "a number"),
    ("momentum", float("nan"), "a value below 1.0"),
    ("nesterov", "yes", "true or false"),
    ("nesterov", 1, "true or false"),
    ("weight-decay", -1.0, "a value of at least 0.0"),
    ("weight-decay", float("inf"), "a finite number"),
    ("weight-decay", "x", "a number"),
    ("batch-size", 0, SEVERAL),
    ("batch-size", 1, TWO),
    ("batch-size", 1.5, SEVERAL),
    ("batch-size", "x", SEVERAL),
    ("local-epochs", 0, SEVERAL),
    ("local-epochs", "x", SEVERAL),
    ("local-steps", 0, SEVERAL),
    ("local-steps", 10**30, SEVERAL),
    ("local-steps", "x", SEVERAL),
    ("client", 3, TABLES),
    ("capture", "some", FORMS),
    ("capture", "first", FORMS),
    ("capture", "first:", FORMS),
    ("capture", "every:0", FORMS),
    ("capture", "sketch:0", FORMS),
    ("capture", "sketch:1048577", FORMS),
    ("capture", "all:3", FORMS),
    ("capture", 5, "a text"),
    ("capture-layers", 3, "a list"),
    ("capture-dtype", "float64", "one of 'float32', 'bfloat16', 'float16'"),
    ("capture-dtype", 16, "one of 'float32', 'bfloat16', 'float16'"),
    ("capture-encoding", "sparse", "one of 'support', 'dense'"),
    ("capture-budget", "a lot", BYTES),
    ("capture-budget", "0 GB", BYTES),
    ("capture-budget", "20 PB", BYTES),
    ("capture-budget", "-1 GB", BYTES),
    ("capture-budget", "", BYTES),
    ("capture-budget", True, "a number of bytes above 0 with a unit"),
    ("capture-budget", 1.5, "a number of bytes above 0 with a unit"),
    ("gradient-statistics", "yes", "true or false"),
    ("gradient-statistics", 1, "true or false"),
    ("strategy", "fedsgd", "one of 'delta-fedavg', 'fedavg', 'fedavgm', 'fedadagrad', 'fedadam', "),
    ("strategy", 3, "or a class as 'package.module:Class'"),
    ("strategy", "module:", "or a class as 'package.module:Class'"),
    ("strategy", ["fedavg"], "one of 'delta-fedavg', "),
    ("strategy", {"eta": 0.1}, "a name, or a table with one, like name = 'delta-fedavg'"),
    ("workers", 0, "a value of at least 1"),
    ("workers", 1025, "a value of at most 1024"),
    ("workers", "x", "a whole number"),
    ("client-cpus", 0, "a value of at least 1"),
    ("client-cpus", 1.5, "a whole number"),
    ("client-gpus", -0.5, "a value of at least 0.0"),
    ("client-gpus", 1.5, "a share up to 1 or a whole number of GPUs"),
    ("client-gpus", float("inf"), "a finite number"),
    ("client-gpus", "x", "a number"),
    ("autocast", "float32", "one of 'none', 'bfloat16', 'float16'"),
    ("autocast", "\udcff", "one of 'none', 'bfloat16', 'float16'"),
    ("autocast", True, "one of 'none', 'bfloat16', 'float16'"),
    ("compile", "max", "true or false"),
    ("compile", 1, "true or false"),
    ("device", "tpu", "one of 'auto', 'cpu', 'cuda', 'mps'"),
    ("evaluate-every", 0, "a value of at least 1"),
    ("evaluate-every", "x", "a whole number"),
    ("max-failures", -1, "a value of at least 0"),
    ("max-failures", "x", "a whole number"),
    ("task", "audio", "one of 'vision', or your own as module:NAME"),
    ("learning-rate-schedule", "cosin", "one of 'constant', or your own as module:NAME"),
    ("client-evaluation", "metric", "one of 'metrics', 'none', or your own as module:NAME"),
    ("behavior", 3, "tables [behavior.NAME] with clients = [..] and the settings that it takes"),
    ("client-timeout", 0, "a value above 0"),
    ("client-timeout", math.inf, "a finite number"),
    ("client-timeout", "x", "a number"),
    ("node-timeout", 0, "a value above 0"),
    ("allow-divergence", 1, "true or false"),
    ("deterministic", "yes", "true or false"),
    ("output", 3, "a text"),
    ("mirror", 3, "a text"),
    ("ray-address", 3, "a text"),
    ("output", "\udcff", "a path in UTF-8 without a zero byte"),
    ("output", "a\0b", "a path in UTF-8 without a zero byte"),
]

# everything given, field of the message, value in the message, what it says is allowed
BAD_COMBINATIONS = [
    ({"nesterov": True, "momentum": 0.0}, "nesterov", True, "only with optimizer = 'sgd'"),
    ({"nesterov": True, "optimizer": "adam"}, "nesterov", True, "only with optimizer = 'sgd'"),
    ({"clients": 3, "seed": 1}, "clients-per-round", 4, "1 to the number of clients, 3"),
    ({"clients": 144}, "min-samples", 10, "at most 9: digits has 1438 training samples"),
    ({"clients": 720}, "clients", 720, "at most 719: digits has 1438 training samples"),
    ({"clients": 1439, "model": "cnn"}, "clients", 1439, "at most 1438: digits has 1438 training"),
    ({"learning-rate": [0.1, -1.0]}, "learning-rate", -1.0, RATES),
    ({"learning-rate": [float("inf")]}, "learning-rate", float("inf"), RATES),
    ({"learning-rate": [0.1, "x"]}, "learning-rate", "x", RATES),
    ({"batch-size": [16, 1]}, "batch-size", 1, TWO),
    ({"batch-size": [16, 0]}, "batch-size", 0, SEVERAL),
    ({"batch-size": [0]}, "batch-size", 0, SEVERAL),
    ({"batch-size": [16, "x"]}, "batch-size", "x", SEVERAL),
    ({"local-epochs": [1, 0]}, "local-epochs", 0, SEVERAL),
    ({"local-steps": [1, 0]}, "local-steps", 0, SEVERAL),
    ({"local-steps": [0]}, "local-steps", 0, SEVERAL),
    ({"capture-layers": ["fc.*", 3]}, "capture-layers", 3, "a text"),
    (
        {"participants": [[0, 1], [2, 2]], "rounds": 2},
        "participants of round 2",
        [2, 2],
        "different clients, one or more",
    ),
    (
        {"participants": [[0], []], "rounds": 2},
        "participants of round 2",
        [],
        "different clients, one or more",
    ),
    ({"participants": [[10]], "rounds": 1}, "participants of round 1", [10], "clients 0 to 9"),
    ({"participants": [[-1]], "rounds": 1}, "participants of round 1", [-1], "clients 0 to 9"),
    ({"participants": [["a"]], "rounds": 1}, "participants", "a", "a list of client numbers"),
    ({"participants": [1], "rounds": 1}, "participants", 1, "a list of client numbers"),
    ({"client": {"3": {"batch-size": 0}}}, "client.3.batch-size", 0, "a value of at least 1"),
    ({"client": {"3": {"batch-size": 1}}}, "client.3.batch-size", 1, TWO),
    ({"client": {"3": {"batch-size": [8]}}}, "client.3.batch-size", [8], "a whole number"),
    ({"client": {"3": {"local-epochs": 0}}}, "client.3.local-epochs", 0, "a value of at least 1"),
    ({"client": {"3": {"local-steps": "x"}}}, "client.3.local-steps", "x", "a whole number"),
    ({"client": {"3": {"learning-rate": 0}}}, "client.3.learning-rate", 0, "a value above 0.0"),
    ({"client": {"3": {"batchsize": 8}}}, "client.3.batchsize", 8, "perhaps batch-size"),
    ({"client": {"3": {"seed": 8}}}, "client.3.seed", 8, "one of batch-size, local-epochs"),
    ({"client": {"3": 5}}, "client.3", 5, "a table"),
    ({"client": {"10": {}}}, "client.10", {}, "a table for one of the clients 0 to 9"),
    ({"client": {"-1": {}}}, "client", "-1", TABLES),
    ({"client": {"3": {}, "03": {}}}, "client", "03", TABLES),
    ({"client": {"10": {"batch-size": 8}}}, "client.10", {"batch-size": 8}, "clients 0 to 9"),
    (
        {"strategy": {"name": "krum", "num-malicious-nodes": 1}},
        *("strategy.num-malicious-nodes", 1, "at most 0 where a round has 4 participants; krum "),
    ),
    (
        {"strategy": {"name": "multikrum", "num-malicious-nodes": 3}, "clients-per-round": 8},
        *("strategy.num-malicious-nodes", 3, "at most 2 where a round has 8 participants; multi"),
    ),
    (
        {"strategy": {"name": "bulyan", "num-malicious-nodes": 2}, "clients-per-round": 10},
        *("strategy.num-malicious-nodes", 2, "at most 1 where a round has 10 participants; bul"),
    ),
    (
        {"strategy": {"name": "multikrum", "num-nodes-to-select": 5}},
        *("strategy.num-nodes-to-select", 5, "at most 4, the participants of a round"),
    ),
    (
        {"strategy": "krum", "clients-per-round": 2},
        *("clients-per-round", 2, "3 or more with strategy = 'krum'"),
    ),
    (
        {"strategy": "bulyan", "participants": [[0, 1, 2], [3, 4]], "rounds": 2},
        *("participants of round 2", [3, 4], "3 or more with strategy = 'bulyan'"),
    ),
    ({"clients_per_round": 3}, "clients_per_round", 3, "perhaps clients-per-round"),
    ({"a1": 3}, "a1", 3, "one of dataset"),
    ({"": 3}, "''", 3, "one of dataset"),
    ({"a\nb": 3}, r"'a\nb'", 3, "one of dataset"),
    ({"x" * 99: 3}, "'" + "x" * 76 + "...", 3, "one of dataset"),
    ({"participants": [[0, 1]]}, "participants", [[0, 1]], "each of the 5 rounds"),
    ({"learning-rat": 0.1}, "learning-rat", 0.1, "a known key, perhaps learning-rate"),
    ({"client-per-round": 3}, "client-per-round", 3, "perhaps clients-per-round"),
    ({"zzz": 1}, "zzz", 1, "one of dataset, data-root, clients,"),
]


def refused(values):
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_mapping(values)
    return caught.value


def config(**values):
    return RunConfig.from_mapping({n.replace("_", "-"): v for n, v in values.items()})


@pytest.mark.parametrize(("field", "value", "allowed"), BAD_VALUES)
def test_a_bad_value_is_refused_by_field_value_and_what_is_allowed(field, value, allowed):
    error = refused({field: value})
    start, _, end = str(error).partition("; expected ")
    assert start == f"{field} = {value!r} cannot be used"
    assert allowed in end
    assert "\n" not in str(error)
    assert (error.field, error.allowed) == (field, end)


@pytest.mark.parametrize(("values", "field", "value", "allowed"), BAD_COMBINATIONS)
def test_a_bad_combination_is_refused_by_field_value_and_what_is_allowed(
    values, field, value, allowed
):
    error = refused(values)
    start, _, end = str(error).partition("; expected ")
    assert start == f"{field} = {value!r} cannot be used"
    assert allowed in end
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("batch-size", [], "a list of one or more"),
        ("learning-rate", [], "a list of one or more"),
        ("local-epochs", [], "a list of one or more"),
        ("local-steps", [], "a list of one or more"),
        ("capture-layers", [], "a list of one or more"),
        ("participants", [], "a list of clients for each of the 5 rounds"),
        ("participants", [[0, 1]] * 4, "a list of clients for each of the 5 rounds"),
    ],
)
def test_a_list_that_is_too_short_is_refused(field, value, allowed):
    error = refused({field: value})
    assert error.field == field
    assert error.allowed == allowed
    assert "\n" not in str(error)


def test_krum_takes_as_many_malicious_nodes_as_its_papers_allow():
    for name, malicious, participants in (("krum", 3, 9), ("multikrum", 3, 9), ("bulyan", 1, 7)):
        table = {"name": name, "num-malicious-nodes": malicious}
        made = config(strategy=table, clients_per_round=participants)
        assert made.strategy.num_malicious_nodes == malicious
        error = refused({"strategy": table, "clients-per-round": participants - 1})
        assert error.field == "strategy.num-malicious-nodes"


def test_every_key_is_among_the_bad_values():
    assert {field for field, _, _ in BAD_VALUES} == set(KEYS)


def test_a_long_value_is_shortened_in_the_message():
    error = refused({"dataset": "x" * 500})
    assert str(error).startswith(f"dataset = '{'x' * 76}... cannot be used")
    assert error.value == "x" * 500


def test_cnn_and_group_norm_may_have_batches_and_clients_of_one():
    for choice in ({"model": "cnn"}, {"norm": "group"}, {"model": "resnet18-cifar"}):
        made = config(**choice, batch_size=1, min_samples=1)
        assert (made.batch_size, made.min_samples) == (1, 1)


@pytest.mark.parametrize(
    ("field", "given", "kept"),
    [
        ("learning-rate", 1, 1.0),
        ("learning-rate", [0.1, 1], (0.1, 1.0)),
        ("batch-size", [16, 32], (16, 32)),
        ("batch-size", [16], (16,)),
        ("local-epochs", [1, 2, 3], (1, 2, 3)),
        ("local-steps", None, None),
        ("local-steps", [5, 7], (5, 7)),
        ("capture-layers", "fc.*", ("fc.*",)),
        ("capture-layers", ["fc.*", "conv1.*"], ("fc.*", "conv1.*")),
        ("client-gpus", 0, 0.0),
        ("client-gpus", 0.5, 0.5),
        ("client-gpus", 2, 2.0),
        ("workers", 64, 64),
        ("min-samples", 143, 143),
        ("clients-per-round", 10, 10),
        ("seed", 2**32 - 1, 2**32 - 1),
        ("momentum", 0, 0.0),
        ("weight-decay", 0, 0.0),
        ("max-failures", 0, 0),
        ("client-timeout", 1, 1.0),
        ("allow-divergence", True, True),
        ("deterministic", True, True),
        ("dataset", "synthetic:1000:7", "synthetic:1000:7"),
        ("partition", "shards:143", "shards:143"),
        ("capture", "last:3", "last:3"),
        ("capture", "sketch:4096", "sketch:4096"),
        ("capture", "sketch:1048576", "sketch:1048576"),
        ("capture-dtype", "bfloat16", "bfloat16"),
        ("capture-dtype", "float16", "float16"),
        ("capture-encoding", "dense", "dense"),
        ("capture-budget", "20 GB", "20 GB"),
        ("capture-budget", "1.5 GiB", "1.5 GiB"),
        ("capture-budget", 20, "20"),
        ("capture-budget", None, None),
        ("gradient-statistics", False, False),
        ("autocast", "bfloat16", "bfloat16"),
        ("autocast", "float16", "float16"),
        ("compile", True, True),
    ],
)
def test_these_values_are_taken(field, given, kept):
    made = RunConfig.from_mapping({field: given})
    assert made.to_mapping()[field] == (list(kept) if isinstance(kept, tuple) else kept)
    assert getattr(made, field.replace("-", "_")) == kept


def test_a_configuration_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        config().seed = 3


def test_defaults_are_those_of_the_quickstart_file():
    values = read_config_file(ROOT / "configs" / "quickstart.toml")
    assert RunConfig.from_mapping(values) == RunConfig() == RunConfig.from_mapping({})
    defaults = RunConfig().to_mapping()
    assert values.pop("strategy") == defaults["strategy"]["name"]
    assert values == {key: defaults[key] for key in values}
    assert set(KEYS) - {"strategy"} - set(values) == {
        *("data-root", "participants", "nesterov", "local-steps", "client", "capture-layers"),
        *("capture-dtype", "capture-encoding", "capture-budget", "gradient-statistics"),
        *("workers", "client-cpus", "client-gpus", "autocast", "compile", "device"),
        *("deterministic", "evaluate-every", "max-failures", "client-timeout"),
        *("node-timeout", "allow-divergence", "output", "ray-address", "mirror"),
        *("task", "learning-rate-schedule", "client-evaluation", "behavior"),
    }


def test_the_cifar100_file_is_twenty_clients_of_resnet18():
    made = RunConfig.from_mapping(read_config_file(ROOT / "configs" / "cifar100.toml"))
    assert made == config(dataset="cifar100", clients=20, clients_per_round=5, rounds=10)


def test_the_notebook_file_lists_the_notebooks_participants():
    made = RunConfig.from_mapping(read_config_file(ROOT / "configs" / "notebook.toml"))
    listed = (
        (9, 7, 2, 0, 6),
        (17, 10, 4, 9, 6),
        (2, 11, 13, 3, 10),
        (4, 14, 17, 9, 15),
        (9, 19, 4, 8, 7),
        (19, 6, 14, 16, 15),
        (18, 5, 2, 7, 14),
        (18, 5, 2, 7, 14),
        (14, 19, 9, 8, 15),
        (13, 9, 18, 16, 7),
    )
    assert made.participants == listed
    assert made.participants_of(1) == [9, 7, 2, 0, 6]
    assert made.participants_of(10) == [13, 9, 18, 16, 7]
    assert made == config(
        dataset="cifar100",
        clients=20,
        clients_per_round=5,
        rounds=10,
        participants=[list(clients) for clients in listed],
    )


def test_fewer_rounds_than_lists_of_participants_are_fine_and_more_are_not():
    lists = [[0, 1], [2, 3], [4, 5]]
    assert config(participants=lists, rounds=2).participants_of(2) == [2, 3]
    assert config(participants=lists, rounds=3).participants_of(3) == [4, 5]
    assert refused({"participants": lists, "rounds": 4}).field == "participants"


def test_listed_participants_make_clients_per_round_idle():
    made = config(participants=[[0], [1, 2]], rounds=2, clients=3, clients_per_round=9)
    assert [made.participants_of(n) for n in (1, 2)] == [[0], [1, 2]]


def test_drawn_participants_follow_from_seed_and_round():
    made = config(clients=20, clients_per_round=5, seed=7)
    assert made.participants_of(3) == draw_participants(7, 3, 20, 5)


def test_flowers_run_config_has_every_key_but_the_tables_and_all_are_empty():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    flat = project["tool"]["flwr"]["app"]["config"]
    assert set(flat) == (set(KEYS) - {"behavior", "client"}) | {"config", "resume"}
    assert set(flat.values()) == {""}


def write(folder, text, name="run.toml"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_toml_file_is_read_with_its_tables(tmp_path):
    path = write(tmp_path, "clients = 5\nbatch-size = [8, 16]\n[client.3]\nlocal-epochs = 2\n")
    values = read_config_file(path)
    assert values == {"clients": 5, "batch-size": [8, 16], "client": {"3": {"local-epochs": 2}}}
    assert RunConfig.from_mapping(values).training_of(3).local_epochs == 2


def test_a_clients_table_beside_the_number_of_clients_hints_at_client_tables(tmp_path):
    path = write(tmp_path, "clients = 5\n\n[clients.3]\nbatch-size = 8\n")
    with pytest.raises(InputError) as caught:
        read_config_file(path)
    text = str(caught.value)
    assert text.startswith(f"config = {str(path)!r} cannot be parsed: ")
    assert text.endswith("; settings of single clients go into tables named [client.<partition>]")
    assert "\n" not in text


def test_a_clients_table_alone_hints_at_client_tables(tmp_path):
    error = refused(read_config_file(write(tmp_path, "[clients.3]\nbatch-size = 8\n")))
    assert str(error) == (
        "clients = {'3': {'batch-size': 8}} cannot be used; expected a number of clients; "
        "settings of single clients go into [client.<partition>]"
    )


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("broken.toml", b"clients = \n", "cannot be parsed: Invalid value"),
        ("broken.json", b"{", "cannot be parsed: "),
        ("list.json", b"[1]", "is not a configuration"),
        ("number.json", b"3", "is not a configuration"),
        ("other.json", b'{"format": 1}', "is not a configuration"),
        ("list-inside.json", b'{"config": [1]}', "is not a configuration"),
        ("latin.toml", b"output = '\xe9'", "cannot be read: it is not UTF-8 text"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(tmp_path, name, content, reason):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_config_file(path)
    assert str(caught.value).startswith(f"config = {str(path)!r} {reason}")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_one_sentence(tmp_path):
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(InputError, match="cannot be read: ") as caught:
            read_config_file(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


FULL = {
    "clients": 4,
    "clients-per-round": 2,
    "rounds": 2,
    "participants": [[0, 1], [3]],
    "model": "resnet18-cifar",
    "learning-rate": [0.1, 0.02],
    "batch-size": [16, 32],
    "local-steps": 3,
    "capture": "every:2",
    "capture-layers": ["13.*"],
    "capture-dtype": "bfloat16",
    "capture-encoding": "dense",
    "capture-budget": 2_000_000,
    "gradient-statistics": False,
    "autocast": "float16",
    "compile": True,
    "deterministic": True,
    "client-timeout": 2.5,
    "node-timeout": 90.0,
    "task": "mine:Task",
    "learning-rate-schedule": "mine.py:rate",
    "client-evaluation": "mine.py:tell",
    "behavior": {"mine:Evil": {"clients": [3, 0], "by-how-much": 2.0, "names": ["a"]}},
    "client": {"3": {"batch-size": 8, "learning-rate": 0.5}, "0": {"local-epochs": 2}},
    "workers": 2,
    "client-gpus": 0.25,
    "data-root": "some/folder",
    "output": "some/run",
    "ray-address": "10.0.0.1:6379",
    "mirror": "s3://bucket/run",
}


def test_json_gives_the_same_configuration_back():
    for made in (RunConfig(), RunConfig.from_mapping(FULL)):
        text = made.to_json()
        assert "\n" not in text
        assert RunConfig.from_json(text) == made
        assert RunConfig.from_json(text).to_json() == text
    assert set(json.loads(text)) == set(KEYS)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "seed": st.integers(0, 2**32 - 1),
            "alpha": st.floats(1e-9, 1e9),
            "learning-rate": st.lists(st.floats(1e-12, 10), min_size=1, max_size=3),
            "batch-size": st.lists(st.integers(2, 512), min_size=1, max_size=3),
            "weight-decay": st.floats(0, 1),
            "output": st.text(),
            "client": st.dictionaries(
                st.integers(0, 9).map(str),
                st.fixed_dictionaries({}, optional={"local-steps": st.integers(1, 9)}),
            ),
        },
    )
)
def test_json_keeps_every_number_to_the_last_bit(values):
    made = RunConfig.from_mapping(values)
    assert RunConfig.from_json(made.to_json()) == made


def test_the_configuration_of_a_run_is_taken_without_its_places(tmp_path):
    made = RunConfig.from_mapping(FULL)
    stored = {"format": 1, "status": "finished", "config": made.to_mapping(), "seed": 42}
    file = write(tmp_path, json.dumps(stored), "run.json")
    code = ("task", "learning-rate-schedule", "client-evaluation", "behavior")
    for said in ((), code[:2], code[1:]):
        with pytest.raises(InputError, match="is code, which is never taken from a run"):
            read_config_file(file, said)
    values = read_config_file(file, code)
    assert {"output", "mirror", "ray-address"}.isdisjoint(values)
    here = {"output": None, "mirror": None, "ray_address": "local"}
    elsewhere = made.model_copy(update=here)
    assert RunConfig.from_mapping(values) == elsewhere


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("rounds", "3", 3),
        ("seed", "0x10", 16),
        ("learning-rate", "1e-2", 0.01),
        ("learning-rate", "[0.1, 0.2]", [0.1, 0.2]),
        ("batch-size", "[16, 32]", [16, 32]),
        ("nesterov", "true", True),
        ("participants", "[[1, 2], [3]]", [[1, 2], [3]]),
        ("model", "resnet18-cifar", "resnet18-cifar"),
        ("capture-layers", "fc.*", "fc.*"),
        ("capture-layers", '["fc.*"]', ["fc.*"]),
        ("client", "{3 = {batch-size = 8}}", {"3": {"batch-size": 8}}),
        ("clients", "ten", "ten"),
        ("learning-rate", ".5", 0.5),
        ("rounds", "3\nseed = 4", "3\nseed = 4"),
        ("dataset", "123", "123"),
        ("data-root", "true", "true"),
        ("output", "[1]", "[1]"),
        ("capture", "first:3", "first:3"),
        ("capture-dtype", "float16", "float16"),
        ("capture-budget", "1.5 GiB", "1.5 GiB"),
        ("capture-budget", "2000000", 2_000_000),
        ("gradient-statistics", "false", False),
        ("autocast", "none", "none"),
        ("compile", "true", True),
        ("partition", "shards:2", "shards:2"),
        ("output", "", ""),
        ("mirror", "2024", "2024"),
        ("mirror", "none", None),
        ("data-root", "none", None),
        ("client-timeout", "none", None),
        ("participants", "none", None),
        ("capture", "none", "none"),
        ("rounds", "none", "none"),
    ],
)
def test_text_is_read_as_toml_but_for_text_fields(field, text, value):
    found = parse_text(field, text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("strategy", {"name": "own:Own", 'a"b': [1, 0.5, True, {"c": "\n'\"\\ü€"}]}),
        ("strategy", "fedadam"),
        ("batch-size", [16, 32]),
        ("learning-rate", 1e-300),
        ("client-timeout", None),
        ("allow-divergence", False),
        ("data-root", "/a b"),
    ],
)
def test_a_value_is_read_back_from_the_text_of_a_flag(key, value):
    assert parse_text(key, flag_text(value)) == value


def test_to_resume_a_run_what_it_alone_does_not_decide_is_said_again():
    assert flags_to_resume(RunConfig()) == ""
    values = {"strategy": {"name": "own:Own", "trust": 0.5}, "mirror": "/a b"}
    flags = flags_to_resume(RunConfig.from_mapping(values))
    assert flags == ' --strategy \'{"name" = "own:Own", "trust" = 0.5}\' --mirror \'/a b\''


def test_text_that_is_no_value_is_refused_by_the_checks():
    assert str(refused({"rounds": parse_text("rounds", "many")})) == (
        "rounds = 'many' cannot be used; expected a whole number"
    )


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("round", "rounds"),
        ("learning_rate", "learning-rate"),
        ("clients_per_round", "clients-per-round"),
        ("batchsize", "batch-size"),
    ],
)
def test_an_unknown_key_of_a_text_suggests_the_nearest(key, nearest):
    with pytest.raises(ConfigError) as caught:
        parse_text(key, "3")
    assert str(caught.value) == (
        f"{key} = '3' cannot be used; expected a known key, perhaps {nearest}"
    )


def test_training_of_a_client_holds_the_runs_settings():
    made = config(
        batch_size=8,
        local_epochs=3,
        local_steps=5,
        learning_rate=0.25,
        momentum=0.5,
        nesterov=True,
        weight_decay=0.125,
    )
    assert made.training_of(9) == TrainingSettings(
        batch_size=8,
        local_epochs=3,
        local_steps=5,
        merge_single=True,
        optimizer=OptimizerSettings(
            name="sgd", learning_rate=0.25, momentum=0.5, nesterov=True, weight_decay=0.125
        ),
    )
    adam = config(optimizer="adam").training_of(0).optimizer
    assert (adam.name, adam.learning_rate, adam.weight_decay) == ("adam", 0.01, 5e-4)


def test_single_samples_merge_under_batch_norm_only():
    assert config().training_of(0).merge_single
    assert not config(norm="group").training_of(0).merge_single


def drawn(clients=100, **values):
    made = config(clients=clients, **values)
    return [made.training_of(client) for client in range(clients)]


def test_lists_are_drawn_once_per_client_and_every_value_occurs():
    lists = {
        "batch_size": [8, 16, 32],
        "local_epochs": [1, 2, 3],
        "local_steps": [4, 5],
        "learning_rate": [0.1, 0.01],
    }
    trainings = drawn(**lists)
    assert trainings == drawn(**lists)
    assert trainings != drawn(**lists, seed=43)
    found = {
        "batch_size": [t.batch_size for t in trainings],
        "local_epochs": [t.local_epochs for t in trainings],
        "local_steps": [t.local_steps for t in trainings],
        "learning_rate": [t.optimizer.learning_rate for t in trainings],
    }
    for name, values in found.items():
        assert set(values) == set(lists[name])
        assert min(values.count(v) for v in lists[name]) > 60 / len(lists[name])
    pairs = {(t.batch_size, t.local_epochs) for t in trainings}
    assert len(pairs) == 9


def test_a_clients_first_four_draws_choose_its_settings():
    lists = {
        "batch_size": [16, 32, 64],
        "local_epochs": [1, 2],
        "local_steps": [3, 4, 5],
        "learning_rate": [0.1, 0.2],
    }
    for client, training in enumerate(drawn(clients=10, **lists)):
        sequence = np.random.SeedSequence([42, 4, 0, client])
        positions = np.random.Generator(np.random.PCG64(sequence)).random(4)
        assert [
            training.batch_size,
            training.local_epochs,
            training.local_steps,
            training.optimizer.learning_rate,
        ] == [v[int(p * len(v))] for v, p in zip(lists.values(), positions, strict=True)]
    sizes = [t.batch_size for t in drawn(clients=10, **lists)]
    assert sizes == [64, 64, 32, 16, 64, 64, 32, 64, 32, 16]


def test_making_one_setting_a_list_leaves_the_draws_of_the_others_alone():
    alone = drawn(learning_rate=[0.1, 0.01])
    beside = drawn(learning_rate=[0.1, 0.01], batch_size=[8, 16], local_epochs=[1, 2, 3])
    assert [t.optimizer.learning_rate for t in alone] == [t.optimizer.learning_rate for t in beside]


def test_a_list_of_one_is_that_value():
    assert drawn(clients=5, batch_size=[16]) == drawn(clients=5, batch_size=16)


def test_a_table_goes_before_draws_and_touches_no_other_client():
    lists = {"batch_size": [8, 16], "learning_rate": [0.1, 0.01], "local_epochs": [1, 2]}
    table = {"batch-size": 5, "learning-rate": 0.7, "local-epochs": 9}
    without = drawn(clients=10, **lists)
    with_table = drawn(clients=10, **lists, client={"3": table})
    three = with_table.pop(3)
    assert (three.batch_size, three.local_epochs, three.optimizer.learning_rate) == (5, 9, 0.7)
    assert with_table == without[:3] + without[4:]


def test_a_table_with_one_setting_keeps_the_clients_other_draws():
    lists = {"batch_size": [8, 16], "learning_rate": [0.1, 0.01]}
    for client in range(10):
        (before,) = drawn(clients=10, **lists)[client : client + 1]
        made = config(**lists, client={str(client): {"local-epochs": 4}}).training_of(client)
        assert (made.batch_size, made.optimizer) == (before.batch_size, before.optimizer)
        assert made.local_epochs == 4


def test_epochs_in_a_table_go_before_the_runs_steps_and_steps_before_all():
    tables = {
        "1": {"local-epochs": 2},
        "2": {"local-steps": 7},
        "3": {"local-epochs": 2, "local-steps": 7},
    }
    made = config(local_steps=5, client=tables)
    found = [(t.local_epochs, t.local_steps) for t in map(made.training_of, range(4))]
    assert found == [(1, 5), (2, None), (1, 7), (2, 7)]


def test_the_policy_joins_capture_its_layers_and_its_form():
    made = config(capture="every:4", capture_layers=["fc.*"])
    assert made.policy == Gradients(steps="every", count=4, layers=("fc.*",))
    other = config(capture="last:2", capture_dtype="float16", capture_encoding="dense")
    assert other.policy == Gradients(steps="last", count=2, dtype="float16", encoding="dense")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1", 1),
        ("20", 20),
        ("20 B", 20),
        ("20 GB", 20_000_000_000),
        ("20GB", 20_000_000_000),
        ("  20  gb ", 20_000_000_000),
        ("1 kB", 1000),
        ("1 KiB", 1024),
        ("3 MB", 3_000_000),
        ("3 mib", 3_145_728),
        ("1.5 GiB", 1_610_612_736),
        ("2 TB", 2_000_000_000_000),
        ("0.5 TiB", 549_755_813_888),
        ("0.001 kB", 1),
        ("999999999999999 TB", 999_999_999_999_999 * 10**12),
        # No binary fraction is 0.1; the bytes are counted in decimals.
        ("0.1 TB", 100_000_000_000),
        ("1.9999 B", 1),
    ],
)
def test_bytes_are_read_with_decimal_and_binary_units(text, count):
    assert parse_bytes(text) == count
    assert config(capture_budget=text).budget == count


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "GB", "x", "0", "0 GB", "0.0", "0.4", "0.0009 kB", "-1", "-1 GB", "+1 GB"),
        *("1e9", "1,5 GB", "1 000 MB", "1 PB", "1 gigabyte", "1 GB/s", ".5 GB", "1. GB"),
        *("inf", "nan", "0x10", "1 GB 1 MB", "1234567890123456 B", "1.2345678 GB"),
    ],
)
def test_what_is_no_number_of_bytes_above_zero_is_refused(text):
    with pytest.raises(ValueError) as caught:
        parse_bytes(text)
    assert str(caught.value) == BYTES
    assert str(refused({"capture-budget": text})) == (
        f"capture-budget = {text!r} cannot be used; expected {BYTES}"
    )


@pytest.mark.parametrize(("number", "count"), [(1, 1), (2_000_000, 2_000_000)])
def test_a_budget_that_is_a_plain_number_is_in_bytes(number, count):
    made = RunConfig.from_mapping({"capture-budget": number})
    assert (made.capture_budget, made.budget) == (str(number), count)
    assert RunConfig.from_json(made.to_json()) == made


@pytest.mark.parametrize("number", [0, -5])
def test_a_budget_that_is_a_plain_number_of_0_or_less_is_refused(number):
    assert refused({"capture-budget": number}).allowed == BYTES


def test_a_run_has_no_budget_unless_it_is_given_one():
    assert (config().capture_budget, config().budget) == (None, None)


def test_compiling_a_model_that_torch_leaves_as_it_is_is_refused() -> None:
    with pytest.raises(ConfigError, match="compile = True cannot be used; expected false with"):
        RunConfig.from_mapping({"model": "cnn", "compile": True})
