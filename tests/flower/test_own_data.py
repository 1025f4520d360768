"""Nodes with data of their own: what the server learns, trains on, records and proves."""

import re
import threading

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedsim.cli import run as fedsim
from fedsim.core.config import RunConfig
from fedsim.core.errors import ConfigError, InputError, RunFailedError
from fedsim.core.own_data import find_own_data
from fedsim.core.plan import RunPlan
from fedsim.flower import inventory
from fedsim.flower import messages as wire
from fedsim.flower.client_app import app
from fedsim.flower.server_app import check_output, check_resume, execute
from fedsim.flower.simulation import size_pool
from fedsim.recording.reader import load_run
from fedsim.recording.verify import verify
from tests.flower.conftest import SMALL
from tests.installed import needs
from tests.local_grid import LocalGrid
from tests.observers import Memory

SIZES = [40, 25, 33]
NAMES = [f"digit {n}" for n in range(10)]


@pytest.fixture
def nodes(tmp_path):
    """Three nodes with the first digits, and the plan of a run on them."""
    values = {
        **SMALL,
        "dataset": "digits",
        "partition": "nodes",
        "clients": 3,
        "clients-per-round": 2,
    }
    plan = RunPlan.prepare(RunConfig.from_mapping(values))
    start = 0
    for partition, size in enumerate(SIZES):
        rows = slice(start, start + size)
        write(tmp_path / str(partition), plan, rows)
        start += size
    return plan


def write(folder, plan, rows, names=NAMES):
    (folder / "data").mkdir(parents=True, exist_ok=True)
    classes = "[" + ",".join(f'"{name}"' for name in names) + "]"
    arrays = {
        "images": plan.dataset.train_images[rows].numpy(),
        "labels": plan.dataset.train_labels[rows].numpy(),
    }
    save_file(arrays, folder / "data" / "train.safetensors", metadata={"classes": classes})


def go(plan, folder, *, without=None, **more):
    def node(partition):
        own = {"data": str(folder / str(partition) / "data")} if partition != without else {}
        return own | {"recordings": str(folder), "capture": True}

    check_output(folder / "run", plan)
    grid = LocalGrid(app, plan.config.clients, node_config=node)
    execute(
        grid, plan, folder / "run", observer=Memory(), workers=2, stop=threading.Event(), **more
    )


@needs("report", "export")
def test_a_run_over_the_nodes_own_data_is_recorded_and_proven(nodes, tmp_path, capsys):
    go(nodes, tmp_path)
    run = load_run(tmp_path / "run")
    assert run.entry("partition")["sizes"] == SIZES
    own = [find_own_data(tmp_path / str(p) / "data") for p in range(3)]
    assert run.entry("partition")["nodes"] == [
        {"sha256": data.sha256, "classes": NAMES} for data in own
    ]
    for client in run.round(1).clients.values():
        labels = nodes.dataset.train_labels.numpy()
        start = sum(SIZES[: client.partition])
        mine = labels[start : start + SIZES[client.partition]]
        assert client.telemetry["num_samples"] == SIZES[client.partition]
        assert client.telemetry["class_distribution"] == np.bincount(mine, minlength=10).tolist()
        assert {i for row in client.steps for i in row["indices"]} == set(range(len(mine)))
    findings = verify(tmp_path / "run", recompute=1)
    assert findings.violations == []
    counts = {name: check.proven for name, check in findings.checks.items()}
    assert (counts["partition"], counts["aggregate"], counts["state"]) == (3, 2, 3)
    assert counts["replay"] == counts["steps"] > 0
    reason = "the data is at the nodes, which tell its hash and keep it"
    assert reason in findings.checks["recomputed"].reasons
    assert findings.checks["partition"].reasons == [f"class counts: {reason}"]
    assert fedsim(["inspect", str(tmp_path / "run")]) == 0
    assert fedsim(["report", str(tmp_path / "run"), "--output", str(tmp_path / "r.html")]) == 0
    capsys.readouterr()
    export = ["export", "breaching", str(tmp_path / "run"), "--round", "1", "--step", "0"]
    client = next(iter(run.round(1).clients))
    assert fedsim([*export, "--client", str(client), "--output", str(tmp_path / "x")]) == 2
    assert "has no images: its nodes trained on data of their own" in capsys.readouterr().err


def test_a_node_that_has_none_or_others_ends_the_run_before_it_begins(nodes, tmp_path):
    for change, told in (
        (lambda: None, "asks for data of each node's own, and that of partition 1 has none"),
        (
            lambda: write(tmp_path / "1", nodes, slice(0, 9), NAMES[:9]),
            "partition 1: the data of this node has 9 classes; expected 10, those of",
        ),
        (
            lambda: write(tmp_path / "1", nodes, slice(0, 9), ["zero", *NAMES[1:]]),
            "class 0 is 'zero' at the node of partition 1 and 'digit 0' at that of partition 0",
        ),
    ):
        change()
        with pytest.raises(RunFailedError, match=told):
            go(nodes, tmp_path, without=1 if told.startswith("asks") else None)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("lie", "told"),
    [
        ({"data-sha256": "x"}, "partition 1 reports data-sha256 = 'x'; expected a SHA-256 in 64"),
        ({"data-sha256": "0" * 64 + "\n"}, "reports data-sha256 = '0000"),
        ({"classes": ["a" * 256, *NAMES[1:]]}, "partition 1 reports a class 'aaaa"),
        ({"classes": [*range(10)]}, "partition 1 reports a class 0; expected names"),
    ],
)
def test_what_run_json_could_not_hold_ends_the_run_before_it_begins(nodes, tmp_path, lie, told):
    class Lying(LocalGrid):
        def _answer(self, message):
            reply = super()._answer(message)
            if self.partitions[message.metadata.dst_node_id] == 1:
                reply.content.config_records[wire.CONFIG].update(lie)
            return reply

    def node(partition):
        return {"data": str(tmp_path / str(partition) / "data")}

    with pytest.raises(RunFailedError, match=re.escape(told)) as caught:
        execute(
            Lying(app, 3, node_config=node),
            nodes,
            tmp_path / "run",
            observer=Memory(),
            workers=1,
            stop=threading.Event(),
        )
    assert len(str(caught.value)) < 300
    assert not (tmp_path / "run").exists()


def test_names_that_make_run_json_too_long_are_told_before_it_is_made(nodes, tmp_path, monkeypatch):
    monkeypatch.setattr(inventory, "MOST_JSON_BYTES", 1000)
    with pytest.raises(RunFailedError, match=r"the classes of 3 nodes take .* bytes; expected "):
        go(nodes, tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_node_that_left_after_it_was_found_ends_the_run_before_it_begins(nodes, tmp_path):
    class Leaving(LocalGrid):
        asked = 0

        def push_messages(self, messages):
            (message,) = list(messages)
            self.asked += self.partitions[message.metadata.dst_node_id] == 1
            return [""] if self.asked == 2 else super().push_messages([message])

    def node(partition):
        return {"data": str(tmp_path / str(partition) / "data")}

    grid = Leaving(app, 3, node_config=node)
    told = "the node of partition 1 could not say which data it has: its node is gone"
    with pytest.raises(RunFailedError, match=told):
        execute(grid, nodes, tmp_path / "run", observer=Memory(), workers=2, stop=threading.Event())
    assert not (tmp_path / "run").exists()


def test_data_that_changes_during_a_run_is_refused_by_the_node(nodes, tmp_path):
    class Changing(Memory):
        def round_finished(self, row):
            if row["round"] == 1:
                for partition in range(3):
                    write(tmp_path / str(partition), nodes, slice(0, SIZES[partition]))

    def node(partition):
        return {"data": str(tmp_path / str(partition) / "data")}

    from fedsim.flower.workplace import workplace_of

    class Fresh(LocalGrid):
        """Every message in a process of its own, as far as that matters here."""

        def _answer(self, message):
            workplace_of.cache_clear()
            return super()._answer(message)

    with pytest.raises(RunFailedError, match="the data of this node has changed since the run"):
        execute(
            Fresh(app, 3, node_config=node),
            nodes,
            tmp_path / "run",
            observer=Changing(),
            workers=1,
            stop=threading.Event(),
        )


def test_a_machine_has_no_nodes_of_its_own(nodes, capsys):
    with pytest.raises(ConfigError, match="partition = 'nodes' cannot be used; expected a split"):
        size_pool(nodes.config, cpus=2, machine_gpus=0)


def test_a_resumed_run_asks_for_the_same_data(nodes, tmp_path):
    go(nodes, tmp_path)
    longer = RunPlan.prepare(nodes.config.model_copy(update={"rounds": 3}))
    recovery = check_resume(load_run(tmp_path / "run"), longer)
    write(tmp_path / "1", nodes, slice(3, 3 + SIZES[1]))
    with pytest.raises(InputError, match="was recorded with other data at the nodes"):
        resume(longer, tmp_path, recovery)
    write(tmp_path / "1", nodes, slice(SIZES[0], SIZES[0] + SIZES[1]))
    resume(longer, tmp_path, recovery)
    assert verify(tmp_path / "run").violations == []


def resume(plan, folder, recovery):
    def node(partition):
        return {
            "data": str(folder / str(partition) / "data"), "recordings": str(folder),
            "capture": True,
        }  # fmt: skip

    execute(
        LocalGrid(app, 3, node_config=node),
        plan,
        folder / "run",
        observer=Memory(),
        workers=2,
        stop=threading.Event(),
        recovery=recovery,
    )
