"""A federation of real SuperNodes on loopback, with TLS and keys, from its folder to its end."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import ssl
import subprocess
import sys

import httpx
import pytest

from fedsim.plugins.deploy.certificates import make_authority, make_node_key
from fedsim.plugins.deploy.federation import Federation, at
from fedsim.plugins.deploy.init import init
from fedsim.recording.files import read_lines
from fedsim.recording.reader import load_run
from fedsim.recording.verify import verify
from tests.patience import PATIENCE
from tests.plugins.deploy.conftest import ROOT, until
from tests.ports import free_ports

pytestmark = pytest.mark.slow

VALUES = {
    # Each message starts a process, which takes a processor four seconds.
    "dataset": "synthetic:60:3",
    "model": "cnn",
    "clients": 2,
    "clients_per_round": 2,
    "min_samples": 8,
    "batch_size": 8,
    "rounds": 2,
    "capture": "all",
    "device": "cpu",
    "node_timeout": 600,
}


def hashes(path):
    return [row["state_sha256"] for row in read_lines(path / "rounds.jsonl")]


def rounds(path):
    with contextlib.suppress(FileNotFoundError):
        return (path / "rounds.jsonl").read_text().count("\n")
    return 0


def restart(lab, number):
    """Have a SuperNode leave as a shutdown does; whoever started it starts another."""
    before = lab.log(f"supernode-{number}").count("SuperNode ID")
    lab.supernode(number).send_signal(signal.SIGINT)
    until(lambda: lab.log(f"supernode-{number}").count("SuperNode ID") > before, lab.logs)


def test_a_real_federation_ends_where_the_simulation_does(lab, tmp_path):
    """With one node that first claims another's partition, and the server app killed."""
    node = lab.places.node(1) / "node.toml"
    honest = node.read_text()
    node.write_text(honest.replace("partition-id = 1", "partition-id = 0"))
    restart(lab, 1)

    path = tmp_path / "run"
    run = lab.run(output=str(path), **VALUES)
    told = ""
    for line in run.stdout:
        told += line
        if "refused a node" in line:
            assert line.strip().endswith("claims partition 0 and is registered for partition 1")
            # Late, and now under the partition that it was registered for.
            node.write_text(honest)
            restart(lab, 1)
            break
    assert "refused a node" in told, told + lab.logs()
    until(lambda: rounds(path) == 2, lab.logs)
    lab.server_app().kill()
    assert rounds(path) == 2
    run.kill()
    run.wait()
    assert load_run(path).status == "running"

    resumed = lab.run(resume=str(path))
    told, _ = resumed.communicate(timeout=PATIENCE)
    assert "continuing after round 1" in told, told + lab.logs()
    assert load_run(path).status == "finished", told + lab.logs()
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in VALUES.items()]
    lab.fedsim("run", "--output", tmp_path / "simulated", *flags)
    assert hashes(path) == hashes(tmp_path / "simulated")
    assert verify(path).violations == []
    recordings = [lab.places.node(number) / "recordings" for number in range(2)]
    lab.fedsim("collect", path, *recordings)
    findings, expected = verify(path), verify(tmp_path / "simulated")
    assert findings.violations == []
    assert findings.checks["replay"].proven == expected.checks["replay"].proven > 0
    secrets = [f.read_bytes().splitlines()[1] for f in lab.places.root.rglob("*.key")]
    written = [f.read_bytes() for f in path.rglob("*") if f.is_file()]
    assert not any(secret in content for secret in secrets for content in written)


@pytest.fixture
def refused(lab, tmp_path):
    """Start a SuperNode that must not be let in, and give what is said when it is not."""
    started = []
    first = free_ports(8)

    def refuse(*, superlink=None, authority=None, key=None, insecure=False):
        number = len(started)
        command = [
            *("flower-supernode", "--superlink", superlink or at("127.0.0.1", lab.port)),
            *("--port", str(first + number), "--node-config", "partition-id=0"),
        ]
        command += ["--insecure"] if insecure else []
        command += ["--root-certificates", str(authority)] if authority else []
        command += ["--auth-supernode-private-key", str(key)] if key else []
        log = tmp_path / f"{number}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                env={**lab.environment, "FLWR_HOME": str(tmp_path / str(number))},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        started.append(process)
        return process, log

    yield refuse
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def expired(tmp_path):
    """A gateway whose certificate is of the past."""
    federation = Federation(port=free_ports(3), supernodes=1)
    long_ago = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=9)
    init(tmp_path / "expired", federation, days=1, now=long_ago)
    log = tmp_path / "gateway.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "fedsim", "deploy", "gateway", tmp_path / "expired"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    yield federation, tmp_path / "expired" / "ca" / "ca.crt", log
    process.kill()
    process.wait()


def test_whoever_does_not_belong_is_refused_in_one_line(lab, tmp_path, refused, expired):
    until(lambda: "SuperNode ID" in lab.log("supernode-0"), lab.logs)
    other, stranger = tmp_path / "other.crt", tmp_path / "stranger.key"
    now = datetime.datetime.now(datetime.UTC)
    other.write_bytes(make_authority("other", now, 9).certificate)
    stranger.write_bytes(make_node_key("stranger").private_key)
    stranger.chmod(0o600)
    ours, taken = lab.places.authority, lab.places.node(0) / "node.key"
    federation, late, log = expired

    nodes = [
        refused(authority=other, key=taken),
        refused(authority=ours),
        refused(authority=ours, key=stranger),
        refused(authority=ours, key=taken),
        refused(superlink=at("127.0.0.1", federation.port), authority=late, key=taken),
    ]
    plain, _ = refused(insecure=True)
    told = []
    for process, said in nodes:
        assert process.wait(PATIENCE) == 1, said.read_text()
        told.append(said.read_text())
    assert "certificate verify failed: unable to get local issuer certificate" in told[0]
    assert "All SuperNodes must be registered" in told[1]
    assert "Failed to activate SuperNode" in told[2]
    assert "Failed to activate SuperNode" in told[3]
    assert "certificate verify failed: certificate has expired" in told[4]

    def refusals():
        return [line.partition(" refused ")[2] for line in lab.log("gateway").splitlines()]

    until(lambda: any("plain HTTP" in line for line in refusals()), lab.logs)
    assert plain.poll() is None
    lines = refusals()
    assert lines.count("a connection: it does not trust the authority of this federation") == 1
    wanted = [
        "it has no key of its own, and none may register itself",
        "this key is not registered",
        "the node of partition 0 is here already, or its key is not registered yet",
    ]
    for ending in wanted:
        (line,) = [line for line in lines if line.endswith(ending)]
        assert line.startswith("127.0.0.1 with the key SHA256:")
    assert "refused a connection: the certificate of this server has expired" in log.read_text()

    replayed = subprocess.run(
        [
            *("flwr", "supernode", "register", lab.places.public_key(1), "federation"),
            *("--name", "partition-0"),
        ],
        env=lab.environment,
        capture_output=True,
        text=True,
    )
    assert replayed.returncode == 1
    assert "Public key already in use" in replayed.stdout + replayed.stderr

    # What starts runs and registers keys asks nobody who he is: it is not for the network.
    trusted = ssl.create_default_context(cafile=ours)
    client = httpx.Client(base_url=f"https://127.0.0.1:{lab.port}", verify=trusted)
    paths = ("/v1/control/list-nodes", "/v1/runtime/acquire-task", "/v1/fleet/../control/start-run")
    for path in paths:
        assert client.post(path, content=b"").status_code == 403
    assert client.post("/v1/fleet/push-object", content=b"0" * (2**26 + 1)).status_code == 413
    client.close()
    assert "without a key: a message of 67108865 bytes" in lab.log("gateway")


@pytest.mark.matrix
def test_a_killed_node_is_a_failure_and_serves_again(lab, tmp_path):
    path = tmp_path / "run"
    values = {**VALUES, "capture": "none", "max_failures": 1}
    trained, came = (lab.log("supernode-1").count(t) for t in ("Receiving: train", "SuperNode ID"))
    run = lab.run(output=str(path), **values)
    until(lambda: lab.log("supernode-1").count("Receiving: train") > trained, lab.logs)
    lab.supernode(1).kill()
    told, _ = run.communicate(timeout=PATIENCE)
    assert "client 1 failed" in told, told + lab.logs()
    failed = [row["failed"] for row in read_lines(path / "rounds.jsonl")]
    assert failed[:2] == [[], [1]]
    assert load_run(path).status == "finished"

    until(lambda: lab.log("supernode-1").count("SuperNode ID") > came, lab.logs)
    told, _ = lab.run(resume=str(path), rounds=3).communicate(timeout=PATIENCE)
    assert load_run(path).status == "finished", told + lab.logs()
    rows = list(read_lines(path / "rounds.jsonl"))
    assert (sorted(rows[3]["participants"]), rows[3]["failed"]) == ([0, 1], [])
    assert verify(path).violations == []


@pytest.mark.matrix
def test_a_key_that_was_replaced_is_let_in_no_more(lab):
    came = lab.log("supernode-0").count("SuperNode ID")
    *_, command = lab.fedsim("deploy", "renew", lab.places.root, "--node", 0).splitlines()
    # The node still signs with the key that it read when it was started, and ends; the one that is
    # started in its place has the new one, which is not registered.
    until(lambda: "partition 0 is here already, or its key is not" in lab.log("gateway"), lab.logs)
    words = command.partition("   ")[0].split()
    assert words[0] == f"FLWR_HOME={lab.places.user}"
    taken = subprocess.run(words[1:], env=lab.environment, capture_output=True)
    assert taken.returncode == 0, taken
    lab.fedsim("deploy", "register", lab.places.root)
    until(lambda: lab.log("supernode-0").count("SuperNode ID") > came, lab.logs)
