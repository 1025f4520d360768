"""Runs on Ray clusters: two nodes, of which one shares no disk with the server and is lost."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from fedsim.core.config import RunConfig
from fedsim.core.errors import ConfigError
from fedsim.flower.simulation import WorkerPool
from fedsim.plugins.cluster import machines
from fedsim.plugins.cluster.cluster import Node, connected, size_pool, slots_of
from fedsim.recording.reader import load_run
from fedsim.recording.verify import verify
from fedsim.tasks.vision.datasets import store_dataset
from tests.flower.ray_nodes import ROOT, can_hide, ray_node, wait_for_nodes
from tests.patience import PATIENCE
from tests.ports import free_ports

SMALL = {
    "dataset": "synthetic:240:10",
    "model": "cnn",
    "clients": 6,
    "clients-per-round": 4,
    "batch-size": 16,
    "rounds": 8,
    "capture": "all",
    "device": "cpu",
}


def config(**values):
    return RunConfig.from_mapping({**SMALL, **{k.replace("_", "-"): v for k, v in values.items()}})


@pytest.fixture(scope="module")
def home():
    path = Path(tempfile.mkdtemp(prefix="fs-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def ray_cluster(home):
    """Address of a cluster of two nodes, and the second, which sees no run directory."""
    (home / "runs").mkdir()
    (home / "port").write_text(str(free_ports(1)))
    address = f"127.0.0.1:{(home / 'port').read_text()}"
    hidden = home / "runs" if can_hide() else None
    with ray_node(home, None):
        wait_for_nodes(address, 1)
        with ray_node(home, address, hidden=hidden) as second:
            wait_for_nodes(address, 2)
            yield address, second, hidden is not None


def drive(home, *arguments, module="tests.plugins.cluster.on_cluster", **variables):
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=home / "runs",
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "FEDSIM_CACHE": str(home / "ours"),
            **variables,
        },
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def hashes(path):
    return [row["state_sha256"] for row in load_run(path).round_rows]


@pytest.mark.matrix
@pytest.mark.slow
def test_nodes_that_differ_are_refused_before_anything_is_written(home, ray_cluster):
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this processor has no other kind to be taken for")
    address, _, _ = ray_cluster
    before = sorted((home / "runs").iterdir())
    done = drive(
        home,
        *("run", "--model", "cnn", "--ray-address", address, "--output", "refused"),
        module="fedsim",
        ATEN_CPU_CAPABILITY="default",
    )
    assert done.returncode == 2
    assert re.fullmatch(
        rf"fedsim: ray-address = '{address}' cannot be used; expected a cluster whose nodes "
        r"compute what this machine does: \S+ has processor \w+, here DEFAULT\n",
        done.stderr,
    )
    assert sorted((home / "runs").iterdir()) == before


@pytest.mark.matrix
@pytest.mark.slow
def test_data_is_sent_once_to_nodes_that_lack_it(home, ray_cluster, monkeypatch):
    address, _, is_hidden = ray_cluster
    draw = np.random.default_rng(0)
    images = {
        name: torch.from_numpy(draw.integers(0, 256, (size, 3, 32, 32), np.uint8))
        for name, size in (("train_images", 50_000), ("test_images", 10_000))
    }
    labels = {
        name: torch.arange(size) % 10
        for name, size in (("train_labels", 50_000), ("test_labels", 10_000))
    }
    ours = home / "ours" / "cifar10-v1.safetensors"
    monkeypatch.setenv("FEDSIM_CACHE", str(ours.parent))
    store_dataset("cifar10", {**images, **labels}, seed=0)
    asked = config(dataset="cifar10", ray_address=address, data_root=str(home / "nowhere"))
    done = drive(home, "prepare", asked.to_json(), "run")
    assert done.returncode == 0, done.stderr
    sharing = 1 if is_hidden else 2
    # The second time, all have it.
    assert json.loads(done.stdout) == {
        "cpus": [1, 1],
        "seen": [[True, sharing, True], [True, sharing, False]],
    }
    theirs = list(home.glob("cache-*/cifar10-v1.safetensors"))
    assert len(theirs) == 2
    assert {path.read_bytes() == ours.read_bytes() for path in theirs} == {True}
    assert list((home / "runs").iterdir()) == []


@pytest.mark.slow
def test_a_node_lost_in_mid_round_changes_no_bit(home, ray_cluster, run_locally):
    address, second, _ = ray_cluster
    alone = run_locally(**{key.replace("-", "_"): value for key, value in SMALL.items()}).path
    asked = config(ray_address=address)
    done = drive(home, "run", asked.to_json(), "run", second.raylet.pid)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    # Both nodes had a worker, and only one is left.
    assert seen["workers"] == 2
    assert 2 <= seen["killed"] < SMALL["rounds"]
    assert not psutil.pid_exists(second.process.pid) or second.process.wait(PATIENCE)
    run = home / "runs" / "run"
    assert hashes(run) == hashes(alone)
    shards = "rounds/*/clients/*/*.safetensors"
    theirs = {p.relative_to(alone): p.read_bytes() for p in alone.glob(shards)}
    assert {p.relative_to(run): p.read_bytes() for p in run.glob(shards)} == theirs
    assert len(theirs) == SMALL["rounds"] * 4 * 2
    assert verify(run).violations == []
    assert not list(run.rglob("*.partial"))
    # What the killed worker had begun stays until the next starts there, and nothing else does.
    left = list((home / "temporary").glob("fedsim-worker-*"))
    assert [p.stat().st_mode & 0o777 for p in left] == [0o700] * min(len(left), 1)


def test_nobody_at_the_address_is_told_at_once():
    address = f"127.0.0.1:{free_ports(1)}"
    sentence = (
        f"ray-address = '{address}' cannot be used; expected the address of a running cluster's "
        "head (Connection refused)"
    )
    with pytest.raises(ConfigError) as caught, connected(address):
        pass
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    "address",
    ["", "here", "ray://10.0.0.1:6379", "10.0.0.1", "10.0.0.1:0", "a:65536", "a b:1", ":1"],
)
def test_what_is_no_address_is_refused(address):
    with pytest.raises(ConfigError) as caught:
        config(ray_address=address)
    assert str(caught.value) == (
        f"ray-address = {address!r} cannot be used; expected 'local', 'auto' or HOST:PORT of the "
        "head of a Ray cluster, like '10.0.0.1:6379'"
    )


@pytest.mark.parametrize(
    ("address", "cluster"),
    [
        ("local", None),
        ("auto", "auto"),
        ("head-0.ray.svc:6379", "head-0.ray.svc:6379"),
        ("[::1]:6379", "[::1]:6379"),
    ],
)
def test_where_a_run_trains_follows_from_the_address(address, cluster):
    assert config(ray_address=address).cluster == cluster


NODES = [Node("a", "10.0.0.1", 4, 0), Node("b", "10.0.0.2", 7, 3), Node("c", "10.0.0.3", 0, 0)]


@pytest.mark.parametrize(
    ("cpus", "gpus", "slots"),
    [
        (1, 0, [4, 7, 0]),
        (2, 0, [2, 3, 0]),
        (8, 0, [0, 0, 0]),
        (1, 0.6, [0, 3, 0]),
        (1, 0.5, [0, 6, 0]),
        (1, 0.1, [0, 7, 0]),
        (1, 2, [0, 1, 0]),
    ],
)
def test_a_node_has_room_for_whole_workers(cpus, gpus, slots):
    assert [slots_of(node, cpus=cpus, gpus=gpus) for node in NODES] == slots


@pytest.mark.parametrize(
    ("values", "workers"), [({}, 4), ({"client_cpus": 4}, 2), ({"workers": 11}, 11)]
)
def test_the_pool_is_what_the_cluster_has_free(values, workers):
    asked = config(ray_address="a:1", **values)
    pool = WorkerPool(workers=workers, cpus=asked.client_cpus, gpus=0.0)
    assert size_pool(asked, NODES) == pool


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"workers": 12},
            "workers = 12 cannot be used; expected 1 to 11, for which the cluster has room now",
        ),
        (
            {"client_cpus": 8},
            "ray-address = 'a:1' cannot be used; expected a cluster with room for a worker: none "
            "of its 3 nodes has 8 CPU cores free",
        ),
        (
            {"client_gpus": 4},
            "ray-address = 'a:1' cannot be used; expected a cluster with room for a worker: none "
            "of its 3 nodes has 1 CPU cores and 4 GPUs free",
        ),
    ],
)
def test_what_the_cluster_has_not_is_refused(values, sentence):
    with pytest.raises(ConfigError) as caught:
        size_pool(config(ray_address="a:1", **values), NODES)
    assert str(caught.value) == sentence


def test_the_first_difference_of_two_machines_is_named():
    ours = machines.facts_of(config())
    assert machines.difference(ours, ours) is None
    assert machines.difference({**ours, "torch": "2.0"}, ours) == f"torch 2.0, here {ours['torch']}"
    lacking = {name: fact for name, fact in ours.items() if name != "code"}
    assert machines.difference(lacking, ours) == f"code none, here {ours['code']}"


def test_a_mark_is_known_by_its_content_and_leaves_nothing(tmp_path):
    with machines.Mark.beside(tmp_path / "to" / "come" / "run") as mark:
        assert Path(mark.path).parent == tmp_path
        assert mark.is_writable_here()
        assert len(list(tmp_path.iterdir())) == 1
        assert not machines.Mark(mark.path, "another", mark.user).is_writable_here()
    assert not mark.is_writable_here()
    assert list(tmp_path.iterdir()) == []
