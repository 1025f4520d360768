import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common import EvaluateIns, FitIns, ndarrays_to_parameters
from flwr.compat.common.recorddict_compat import evaluateins_to_recorddict, fitins_to_recorddict

from fedsim.core.config import RunConfig
from fedsim.core.errors import ConfigError
from fedsim.core.plan import RunPlan
from fedsim.flower import messages as wire
from fedsim.flower.node import NodeSettings
from tests.flower.conftest import SMALL
from tests.flower.test_client_app import RUN_ID, ask, told, train_content
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]
REFUSED = "capture is not allowed by this node (its configuration says capture = false)"


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def plan():
    return RunPlan.prepare(RunConfig.from_mapping(SMALL))


@pytest.fixture(autouse=True)
def _bare(monkeypatch):
    for name in ("FEDSIM_RECORDINGS", "FEDSIM_CAPTURE"):
        monkeypatch.delenv(name, raising=False)


def test_a_node_of_the_simulation_needs_its_partition_alone():
    node = NodeSettings.of({"partition-id": 3, "num-partitions": 4})
    assert node == NodeSettings(partition_id=3, num_partitions=4)
    assert (node.recordings, node.capture, node.data, node.data_root) == (None, False, None, None)


def test_every_key_of_a_node_is_taken():
    keys = {"data-root": "/a", "recordings": "/b", "capture": True}
    node = NodeSettings.of({"partition-id": 0, **keys})
    assert (node.data_root, node.recordings, node.capture) == ("/a", "/b", True)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({}, "partition-id = None cannot be used; expected the partition that this node holds"),
        ({"partition-id": -1}, "partition-id = -1 cannot be used; expected a value of at least"),
        ({"partition-id": "0"}, "partition-id = '0' cannot be used; expected a whole number"),
        ({"partition-id": True}, "partition-id = True cannot be used; expected a whole number"),
        (
            {"partition-id": 4, "num-partitions": 4},
            "partition-id = 4 cannot be used; expected 0 to 3",
        ),
        ({"capture": "yes"}, "capture = 'yes' cannot be used; expected true or false"),
        (
            {"capture": True},
            "capture = True cannot be used; expected false, or true together with recordings",
        ),
        (
            {"recordings": "here"},
            "recordings = 'here' cannot be used; expected an absolute path",
        ),
        ({"data": "../there"}, "data = '../there' cannot be used; expected an absolute path"),
        (
            {"recording": "/x"},
            "recording = '/x' cannot be used; expected a known key, perhaps recordings",
        ),
    ],
)
def test_what_a_node_cannot_be_is_one_sentence(keys, sentence):
    with pytest.raises(ConfigError) as caught:
        NodeSettings.of({"partition-id": 0, **keys} if keys else {})
    assert str(caught.value).startswith(f"node-config {sentence}")


def test_the_environment_stands_in_for_what_the_configuration_leaves_open(monkeypatch):
    monkeypatch.setenv("FEDSIM_RECORDINGS", "/env")
    monkeypatch.setenv("FEDSIM_CAPTURE", "true")
    node = NodeSettings.of({"partition-id": 0})
    assert (node.recordings, node.capture) == ("/env", True)
    node = NodeSettings.of({"partition-id": 0, "recordings": "/own", "capture": False})
    assert (node.recordings, node.capture) == ("/own", False)
    monkeypatch.setenv("FEDSIM_CAPTURE", "1")
    with pytest.raises(ConfigError, match=r"FEDSIM_CAPTURE = '1' .* expected true or false"):
        NodeSettings.of({"partition-id": 0})


def test_a_wrong_configuration_answers_a_query_with_one_line():
    reply = ask(RecordDict({wire.CONFIG: ConfigRecord()}), "query", capture="yes")
    assert reply.error.reason == (
        "node-config capture = 'yes' cannot be used; expected true or false"
    )


def test_a_node_that_forbids_capture_trains_and_says_so(plan, tmp_path, caplog):
    asked = train_content(plan)
    reply = ask(asked, "train", recordings=tmp_path, capture=False)
    row = told(reply)
    assert (row["not_captured"], row["num_steps_captured"], row["place"]) == (REFUSED, 0, "node")
    assert list(row["files"]) == ["steps.jsonl"]
    assert [r.getMessage() for r in caplog.records if "fedsim" in r.getMessage()] == [
        f"fedsim: {REFUSED}"
    ]
    same = ask(asked, "train", recordings=tmp_path / "other")
    assert told(same)["num_steps_captured"] == plan.steps_of(2)
    for name, array in reply.content[wire.ARRAYS].items():
        assert array.data == same.content[wire.ARRAYS][name].data


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("run", "..", "the plain name of a folder"),
        ("run", "../other", "the plain name of a folder"),
        ("run", "/etc", "the plain name of a folder"),
        ("run-id", "../../etc", "the id of a run, like 20261123-140000-0a1b2c3d"),
        ("run-id", "", "the id of a run, like 20261123-140000-0a1b2c3d"),
    ],
)
def test_a_server_cannot_choose_a_path(plan, tmp_path, caplog, key, value, allowed):
    reply = ask(train_content(plan, **{key: value}), "train", recordings=tmp_path / "node")
    sentence = f"{key} = {value!r} cannot be used; expected {allowed}"
    assert reply.error.reason == sentence
    assert f"fedsim: {sentence}" in [r.getMessage() for r in caplog.records]
    assert list(tmp_path.iterdir()) == []


def test_a_link_out_of_the_recordings_is_refused(plan, tmp_path):
    node, outside = tmp_path / "node", tmp_path / "outside"
    node.mkdir()
    outside.mkdir()
    (node / RUN_ID).symlink_to(outside)
    reply = ask(train_content(plan), "train", recordings=node)
    assert reply.error.reason == (
        f"{node / RUN_ID} is a symbolic link, which may lead out of {node}"
    )
    (node / RUN_ID).unlink()
    (node / RUN_ID).mkdir()
    (node / RUN_ID / "rounds").symlink_to(outside)
    reply = ask(train_content(plan), "train", recordings=node)
    assert "rounds is a symbolic link" in reply.error.reason
    assert list(outside.iterdir()) == []


def test_a_run_directory_of_another_run_is_not_recorded_into(plan, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"id": "20250101-000000-00000000"}))
    assert told(ask(train_content(plan), "train", recordings=tmp_path))["place"] == "node"
    assert names_in(tmp_path / "run") == ["run.json"]


def test_the_run_directory_itself_is_recorded_into_where_a_node_has_it(plan, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"id": RUN_ID}))
    assert "place" not in told(ask(train_content(plan), "train", recordings=tmp_path))
    assert names_in(tmp_path) == ["run"]
    written = tmp_path / "run" / "rounds/0001/clients/0002"
    assert names_in(written) == ["gradients-00000.safetensors", "steps.jsonl"]


def test_more_bytes_than_the_model_has_are_refused_undecoded(plan, tmp_path):
    content = train_content(plan)
    arrays = dict(content[wire.ARRAYS])
    name = next(iter(arrays))
    most = sum(8 * a.size + 256 for a in plan.initial_state.values())
    # No array at all: what is decoded would raise otherwise.
    arrays[name] = Array("float32", (1,), "numpy.ndarray", b"\x00" * (most + 1))
    content[wire.ARRAYS] = ArrayRecord(arrays)
    found = sum(len(array.data) for array in arrays.values())
    reply = ask(content, "train", recordings=tmp_path)
    assert reply.error.reason == (
        f"the message has {found:,} bytes of 'arrays'; expected what the model of the run "
        f"has, at most {most:,} bytes"
    )
    reply = ask(train_content(plan, config=" " * 2**21 + "{}"), "train")
    assert reply.error.reason == (
        "the message has a configuration of 2,097,154 bytes; expected at most 2,097,152"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("kind", "ins"), [("train", FitIns), ("evaluate", EvaluateIns)])
def test_so_they_are_in_messages_of_the_former_api(plan, kind, ins):
    asked = ins(ndarrays_to_parameters([]), {"config": plan.config.to_json()})
    encode = fitins_to_recorddict if kind == "train" else evaluateins_to_recorddict
    content = encode(asked, True)
    (name,) = content.array_records
    most = sum(8 * a.size + 256 for a in plan.initial_state.values())
    array = Array("float32", (1,), "numpy.ndarray", b"\x00" * (most + 1))
    content[name] = ArrayRecord({"0": array})
    # Of another model, as nobody's strategy sends it.
    larger = RunConfig.from_mapping({**SMALL, "model": "resnet18"})
    content["more"] = ConfigRecord({"config": larger.to_json()})
    assert ask(content, kind).error.reason == (
        f"the message has {most + 1:,} bytes of {name!r}; expected what the model of the run "
        f"has, at most {most:,} bytes"
    )


def test_a_node_that_deals_otherwise_refuses_to_train(plan):
    reply = ask(train_content(plan, partition_sha256="0" * 64), "train")
    assert reply.error.reason.startswith(
        "this node deals the samples of synthetic:240:10 otherwise than"
    )


def test_a_partition_that_the_run_does_not_have_is_refused(plan):
    reply = ask(train_content(plan, partition=9), "train", partition_id=9, num_partitions=12)
    assert reply.error.reason == "this node holds partition 9; the run has 0 to 5"


def test_a_server_cannot_say_where_data_is(plan, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FEDSIM_DATA_ROOT", str(tmp_path / "of the process"))
    values = {**SMALL, "dataset": "cifar10", "data-root": str(tmp_path / "of the server")}
    config = RunConfig.from_mapping(values).to_json()
    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", lambda self: None)
    for own, used in ({}, "of the process"), ({"data_root": str(tmp_path / "own")}, "own"):
        reply = ask(train_content(plan, config=config), "train", **own)
        assert f"was not found in {tmp_path / used}/cifar-10-batches-py" in reply.error.reason
    assert not (tmp_path / "of the server").exists()


LEAN = """
import sys
from flwr.app import ConfigRecord, RecordDict
from fedsim.flower.client_app import app
from tests.local_grid import LocalGrid
from flwr.app import Message

def ask(content, kind):
    grid = LocalGrid(app, 6)
    (number,) = grid.push_messages([Message(content, next(iter(grid.partitions)), kind)])
    (reply,) = grid.pull_messages([number])
    assert not reply.has_error(), reply.error

ask(RecordDict({"config": ConfigRecord()}), "query")
print(sorted({"torch", "pandas", "ray"} & set(sys.modules)))

from fedsim.core.config import RunConfig
from fedsim.core.plan import RunPlan
from fedsim.flower import messages as wire

plan = RunPlan.prepare(RunConfig.from_json(sys.argv[1]))
config = {"config": sys.argv[1], "server-round": 1, "partition": 0}
ask(RecordDict({
    "arrays": wire.array_record(plan.initial_state), "config": ConfigRecord(config)
}), "train")
print(sorted({"torchvision", "torch._dynamo", "sklearn", "pandas", "ray"} & set(sys.modules)))
"""


def test_a_message_imports_what_it_needs_and_nothing_else():
    values = {**SMALL, "model": "resnet18", "local-steps": 1, "capture": "none"}
    done = subprocess.run(
        [sys.executable, "-c", LEAN, RunConfig.from_mapping(values).to_json()],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.stdout.splitlines()[:1] + done.stdout.splitlines()[-1:] == ["[]", "[]"], done.stderr
