import json

import numpy as np
import pytest
from flwr.app import Array

from fedsim.core.config import RunConfig
from fedsim.flower import messages as wire
from fedsim.flower.client_app import app
from fedsim.flower.messages import traceback_of, writable
from fedsim.flower.replies import UnusableReplyError, accept, loss_of
from fedsim.recording.files import json_line
from fedsim.recording.rows import read_rows
from tests.local_grid import LocalGrid
from tests.strategies.replies import SIZES, failure, global_state, local_state, reply


@pytest.fixture(autouse=True)
def _identity():
    """Flower stamps messages with the identity of their process, which a grid sets."""
    LocalGrid(app, 1)


def problem(message, folder, **values):
    keys = {key.replace("_", "-"): value for key, value in values.items()}
    asked = {"clients-per-round": 5, "batch-size": 200, "learning-rate": 0.1, "local-epochs": 1}
    try:
        accept(
            message,
            global_state(),
            partition=1,
            num_samples=SIZES[1],
            most=(9, 2**40),
            config=RunConfig.from_mapping({**asked, **keys}),
            folder=folder,
        )
    except UnusableReplyError as error:
        return str(error)
    return None


HASH = "0123456789abcdef0123456789abcdef"
OTHERS = {
    "status": "ok",
    "num_samples": 400,
    "local_epochs": 1,
    "local_steps": None,
    "batch_size": 200,
    "learning_rate": 0.1,
    "local_loss": 0.5,
    "gradient_norm": float("nan"),
    "per_layer_norms": {},
    "num_steps_captured": 0,
    "bytes_captured": 0,
    "class_distribution": [400],
    "seconds": {},
    "peak_memory": {},
}


def reply_of(state=None, num_examples=None, **telemetry):
    message = reply(1, state=state, num_examples=num_examples)
    row = {"partition": 1, "files": {}, "loss_history": [1.0, 0.5], **OTHERS, **telemetry}
    row |= {"num_steps": len(row["loss_history"]), "batch_sizes": [200] * len(row["loss_history"])}
    message.content.config_records["telemetry"]["json"] = json.dumps(row)
    return message


def test_a_good_reply_has_no_problem(tmp_path):
    assert problem(reply_of(), tmp_path) is None


def changed(name, change):
    state = local_state(1)
    state[name] = change(state[name])
    return state


def spoil(value):
    def change(array):
        array = array.copy()
        array.reshape(-1)[-1] = value
        return array

    return change


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_names_its_layer_and_the_step(tmp_path, value):
    state = changed("bn.running_var", spoil(value))
    assert problem(reply_of(state), tmp_path) == (
        "returned bn.running_var with values that are not finite"
    )
    told = problem(reply_of(state, loss_history=[2.0, float("inf")]), tmp_path)
    assert told == (
        "returned bn.running_var with values that are not finite; its loss was not finite from "
        "local step 1 on"
    )
    assert problem(reply_of(state), tmp_path, allow_divergence=True) is None


@pytest.mark.parametrize(
    ("state", "told"),
    [
        (
            changed("conv.weight", lambda a: a[1:]),
            "conv.weight has shape (7, 3, 3, 3) and dtype float32; the global state has "
            "(8, 3, 3, 3) and float32",
        ),
        (
            changed("fc.bias", lambda a: a.astype(np.float64)),
            "fc.bias has shape (4,) and dtype float64; the global state has (4,) and float32",
        ),
        (
            {n: a for n, a in local_state(1).items() if n != "fc.bias"},
            "the local state and the global one differ in fc.bias",
        ),
        (
            dict(reversed(local_state(1).items())),
            "the local state and the global one differ in their order",
        ),
    ],
)
def test_a_state_of_another_kind_is_no_state(tmp_path, state, told):
    assert problem(reply_of(state), tmp_path) == f"returned what cannot be folded: {told}"
    assert problem(reply_of(state), tmp_path, allow_divergence=True) is not None


@pytest.mark.parametrize("weight", [399, 0, -400, 401, 400.5])
def test_the_weight_is_that_of_the_partition(tmp_path, weight):
    told = problem(reply_of(num_examples=weight), tmp_path)
    assert told == f"returned num-examples = {weight}; its partition has 400"


def test_a_reply_speaks_for_the_client_that_was_asked(tmp_path):
    assert problem(reply_of(partition=3), tmp_path) == "returned the telemetry of client 3"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"partition":1}', '{"partition":1,"files":3}']
)
def test_telemetry_that_cannot_be_read_is_a_problem(tmp_path, text):
    message = reply_of()
    message.content.config_records["telemetry"]["json"] = text
    assert problem(message, tmp_path).startswith("returned what cannot be folded: ")


def test_telemetry_of_any_depth_is_a_problem(tmp_path):
    message = reply_of()
    message.content.config_records["telemetry"]["json"] = "[" * 100_000
    told = problem(message, tmp_path)
    assert told.startswith("returned what cannot be folded: RecursionError: ")
    assert "\n" not in told


@pytest.mark.parametrize(
    "header", ["(((((", "{" * 9000, "{'descr': 'O', 'fortran_order': False, 'shape': (8,)}", "\0"]
)
def test_an_array_that_cannot_be_decoded_is_a_problem(tmp_path, header):
    array = Array("float32", (8,), "numpy.ndarray", npy_of(header))
    message = reply_of()
    message.content.array_records["arrays"]["bn.running_var"] = array
    told = problem(message, tmp_path)
    assert told.startswith("returned what cannot be folded: ")
    assert "\n" not in told


def npy_of(header):
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", 0.0),
        ("batch_size", 201),
        ("local_epochs", 2),
        ("local_steps", 2),
        ("num_samples", 401),
        ("loss_history", []),
    ],
)
def test_a_client_that_trained_otherwise_than_asked_is_a_problem(tmp_path, key, value):
    told = problem(reply_of(**{key: value}), tmp_path)
    asked = {"key": "num_steps", "value": 0} if value == [] else {"key": key, "value": value}
    expected = "returned what cannot be folded: its telemetry has {key} = {value}, not "
    assert told.startswith(expected.format(**asked))


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_history": [1.0, None]},
        {"local_loss": None},
        {"gradient_norm": None},
        {"per_layer_norms": {"w": None}},
    ],
)
def test_null_is_no_figure(tmp_path, changes):
    assert problem(reply_of(**changes), tmp_path) == (
        "returned what cannot be folded: its telemetry has null for a loss or a norm"
    )


@pytest.mark.parametrize(
    ("metrics", "told"),
    [
        ({"more": 1.0}, "'more' missing or unexpected"),
        ({"loss": None}, "'loss' missing or unexpected"),
        ({"norm_bit": 1}, "'norm_bit' missing or unexpected"),
        ({"loss": [1.0, 2.0]}, "loss = [1.0, 2.0]"),
        ({"loss": -1e-9}, "loss = -1e-09"),
    ],
)
def test_metrics_that_no_honest_client_sends_are_a_problem(tmp_path, metrics, told):
    message = reply_of()
    found = message.content.metric_records["metrics"]
    for key, value in metrics.items():
        if value is None:
            del found[key]
        else:
            found[key] = value
    assert problem(message, tmp_path) == (
        f"returned what cannot be folded: its metrics have {told}"
    )


def test_clients_that_clip_say_whether_they_did(tmp_path):
    private = {
        "strategy": {
            "name": "fedavg",
            "dp": "client-side-fixed",
            "noise-multiplier": 1.0,
            "clipping-norm": 1.0,
        }
    }
    message = reply_of()
    assert problem(message, tmp_path, **private) == (
        "returned what cannot be folded: its metrics have 'norm_bit' missing or unexpected"
    )
    metrics = message.content.metric_records["metrics"]
    metrics["norm_bit"] = 1
    assert problem(message, tmp_path, **private) is None
    metrics["norm_bit"] = -(10**9)
    assert problem(message, tmp_path, **private) == (
        "returned what cannot be folded: its metrics have norm_bit = -1000000000"
    )


@pytest.mark.parametrize("name", ["arrays", "metrics"])
def test_two_records_of_a_kind_are_a_problem(tmp_path, name):
    message = reply_of()
    message.content["more"] = message.content[name]
    assert problem(message, tmp_path).startswith("returned what cannot be folded: ")


@pytest.mark.parametrize("record", [wire.ARRAYS, wire.METRICS, wire.TELEMETRY])
def test_a_reply_without_a_record_is_a_problem(tmp_path, record):
    message = reply_of()
    del message.content[record]
    assert problem(message, tmp_path).startswith("returned what cannot be folded: ")


def test_files_that_are_not_as_the_client_wrote_them_are_a_problem(tmp_path):
    message = reply_of(files={"steps.jsonl": {"bytes": 10, "xxh3_128": HASH}})
    path = tmp_path / "steps.jsonl"
    assert problem(message, tmp_path) == f"wrote 10 bytes to {path}, which is gone"
    path.write_bytes(b"123456789")
    assert problem(message, tmp_path) == f"wrote 10 bytes to {path}, which has 9 bytes"
    path.write_bytes(b"1234567890")
    assert problem(message, tmp_path) is None


def test_files_on_a_clients_own_disk_are_not_looked_for_here(tmp_path):
    files = {"steps.jsonl": {"bytes": 10, "xxh3_128": HASH}}
    assert problem(reply_of(files=files, place="node"), tmp_path) is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"round": 7}, "its telemetry names a round"),
        ({"status": "failed"}, "its telemetry: status = 'failed' cannot be used"),
        ({"num_steps_captured": -1}, "its telemetry: num_steps_captured = -1 cannot be used"),
        ({"place": "/etc"}, "its telemetry: place = '/etc' cannot be used"),
        ({"place": "none", "files": "steps.jsonl"}, "lists files and says that there are none"),
        ({"files": "delta.safetensors"}, "lists 'delta.safetensors', which no client writes"),
        ({"files": "../steps.jsonl"}, "files.../steps.jsonl.[key] = '../steps.jsonl' cannot be"),
    ],
)
def test_telemetry_that_no_honest_client_sends_is_a_problem(tmp_path, changes, told):
    if "files" in changes:
        changes = {**changes, "files": {changes["files"]: {"bytes": 1, "xxh3_128": HASH}}}
    found = problem(reply_of(**{"place": "node", **changes}), tmp_path)
    assert found.startswith("returned what cannot be folded: ")
    assert told in found


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"not_captured": "x" * 9_000_000}, "telemetry of 9,000,"),
        ({"not_captured": "x" * 1001}, "not_captured = 'xxxx"),
        ({"not_captured": "\ud800"}, "hex escape"),
        ({"x": [[]] * 1_100_000}, "more than 1,048,576 objects and lists"),
        ({"x": 1}, "'x' holds what no client tells"),
        ({"x": None}, "'x' holds what no client tells"),
        (
            {"files": {"steps.jsonl": {"bytes": 1, "xxh3_128": HASH, "x": 1}}, "place": "node"},
            "'files' holds what no client tells",
        ),
        ({"class_distribution": [10**4000] * 10}, "its telemetry: class_distribution.0 = "),
        ({"class_distribution": [-1]}, "its telemetry: class_distribution.0 = -1"),
        ({"learning_rate": 10**4000}, "its telemetry: learning_rate = "),
        ({"seconds": {"load": 2**1030}}, "its telemetry: seconds.load = "),
        ({"local_epochs": 2**63}, "its telemetry: local_epochs = "),
    ],
)
def test_what_could_not_be_read_back_is_not_written(tmp_path, changes, told):
    found = problem(reply_of(**changes), tmp_path)
    assert found.startswith("returned what cannot be folded: ")
    assert told in found
    assert len(found) < 500


def test_it_is_the_line_whose_length_counts(tmp_path):
    message = reply_of(not_captured="#")
    text = message.content.config_records["telemetry"]["json"]
    message.content.config_records["telemetry"]["json"] = text.replace("#", "é" * 1_600_000)
    assert "its telemetry makes a line of 9,600," in problem(message, tmp_path)


@pytest.mark.parametrize(("autocast", "told"), [("float16", {}), ("none", {"num_updates": 1})])
def test_updates_are_told_where_steps_may_overflow_and_nowhere_else(tmp_path, autocast, told):
    found = problem(reply_of(**told), tmp_path, autocast=autocast)
    assert found.endswith("its telemetry has num_updates missing or unexpected")


def test_many_steps_are_no_flood(tmp_path):
    losses = list(np.random.default_rng(0).uniform(size=300_000))
    many = reply_of(loss_history=losses, local_steps=300_000)
    assert problem(many, tmp_path, local_steps=300_000) is None


@pytest.mark.parametrize("words", ["x" * 40_000_000, "\ud800", "é" * 9_000_000 + "\nlast"])
def test_a_clients_last_words_can_be_read_back_whatever_they_are(tmp_path, words):
    failed = {"round": 1, "partition": 1, "status": "failed", "error": writable(words)}
    path = tmp_path / "clients.jsonl"
    path.write_bytes(json_line(failed))
    assert path.stat().st_size < 2**20
    (row,) = read_rows(path, None)
    assert row["error"][-3:] == words[-3:].replace("\ud800", "?")


def test_an_error_is_told_as_it_is(tmp_path):
    assert problem(failure(), tmp_path) == "it broke"


def test_the_first_step_whose_loss_is_not_finite_is_told():
    assert loss_of({"loss_history": [1.0, 2.0]}) == ""
    assert loss_of({}) == ""
    assert loss_of({"loss_history": [float("nan")]}) == (
        "; its loss was not finite from local step 0 on"
    )


def test_of_a_chain_of_tracebacks_the_clients_own_is_told():
    ray = (
        "<class 'flwr.ClientAppException'>:<'\x1b[36mray::ClientAppActor.run()\x1b[39m (pid=7)\n"
        '           ^^^^\n  File "client.py", line 3, in fit\n    1 / 0\nZeroDivisionError: zero\n'
        "\nThe above exception was the direct cause of the following exception:\n\n"
        "ray::ClientAppActor.run()\nflwr.ClientAppException: zero'>"
    )
    told = '  File "client.py", line 3, in fit\n    1 / 0\nZeroDivisionError: zero'
    assert traceback_of(failure(ray)) == told
    gone = "<class 'flwr.Gone'>:<'the node is gone'>"
    assert traceback_of(failure(gone)) == "the node is gone"
    assert traceback_of(failure("")) == "no reason given"


def test_more_files_than_a_client_can_have_written_are_a_problem(tmp_path):
    files = {"steps.jsonl": {"bytes": 2**41, "xxh3_128": HASH}}
    found = problem(reply_of(files=files, place="node"), tmp_path)
    assert found == (
        "returned what cannot be folded: its telemetry lists 1 files of 2.2 TB; "
        "expected at most 9 of 1.1 TB"
    )
