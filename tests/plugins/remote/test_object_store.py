"""Copies in an object store: a real server that speaks S3, on this machine."""

import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest

from fedsim.core.config import RunConfig
from fedsim.core.errors import ConfigError, InputError, RunFailedError
from fedsim.core.plan import RunPlan
from fedsim.flower.client_app import app
from fedsim.flower.server_app import execute
from fedsim.plugins.remote.collect import collect
from fedsim.plugins.remote.folder import Folder
from fedsim.plugins.remote.mirror import check_new, fetch, push
from fedsim.recording.findings import BUFFERS
from fedsim.recording.reader import load_run
from fedsim.recording.verify import verify
from tests.local_grid import LocalGrid
from tests.observers import Memory
from tests.patience import PATIENCE
from tests.plugins.remote.test_mirror import files_of
from tests.ports import free_ports
from tests.recording.conftest import own_folder, record

# In an environment of its own: it wants older versions of what fedsim uses.
SERVER = "moto[server]==5.1.22"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Start the server; give what kills it and starts it anew."""
    if not (find_spec("obstore") or find_spec("s3fs")):
        pytest.skip("neither obstore nor s3fs is installed")
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    port = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [str(uv), "tool", "run", "--from", SERVER, "moto_server", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path_factory.mktemp("store"),
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 180
        while True:
            try:
                urllib.request.urlopen(f"{url}/moto-api/", timeout=5).close()  # noqa: S310
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.skip(f"{SERVER} could not be installed or started")
                time.sleep(0.2)
        urllib.request.urlopen(  # noqa: S310
            urllib.request.Request(f"{url}/bucket", method="PUT")  # noqa: S310
        ).close()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {
                "AWS_ENDPOINT_URL": url,
                "AWS_ALLOW_HTTP": "true",
                "AWS_REGION": "us-east-1",
                "AWS_ACCESS_KEY_ID": "key",
                "AWS_SECRET_ACCESS_KEY": "secret",
            }.items():
                patch.setenv(name, value)
            yield process
    finally:
        process.terminate()
        process.wait(PATIENCE)


def run(plan, path, memory, **values):
    asked = RunConfig.from_mapping({**plan.config.to_mapping(), **values})
    execute(
        LocalGrid(app, asked.clients, recordings=path.parent),
        RunPlan.prepare(asked),
        path,
        observer=memory,
        workers=2,
        stop=threading.Event(),
    )


@pytest.mark.matrix
def test_a_run_is_copied_while_it_is_made_and_comes_back_whole(store, plan, tmp_path):
    memory = Memory()
    check_new("s3://bucket/of/run", Path("run"))
    run(plan, tmp_path / "run", memory, mirror="s3://bucket/of/run")
    assert memory.of("warned") == []
    assert fetch("s3://bucket/of/run", tmp_path / "back") == 3
    assert files_of(tmp_path / "back") == files_of(tmp_path / "run")
    assert verify(tmp_path / "back").violations == []
    assert load_run(tmp_path / "back").status == "finished"
    assert push(tmp_path / "run", Folder("s3://bucket/of/run")) == 0
    with pytest.raises(ConfigError, match="expected a URL that holds no run"):
        check_new("s3://bucket/of/run", Path("run"))


def test_what_clients_kept_is_collected_from_a_bucket(store, plan, tmp_path):
    nodes = tmp_path / "nodes"
    record(plan, tmp_path / "run", own_folder(nodes))
    away = files_of(nodes)
    bucket = Folder("s3://bucket/hospitals")
    for name in away:
        bucket.put(name, nodes / name)
    sources = [f"s3://bucket/hospitals/{p.name}" for p in nodes.iterdir()]
    run = load_run(tmp_path / "run")
    with pytest.raises(InputError, match=r"^s3://bucket/none cannot be collected from: "):
        collect(run, ["s3://bucket/none"])
    last = sorted(away)[-1]
    bucket.put(last, b"x" * len(away[last]))
    found = collect(run, sources)
    assert (found.files, found.missing) == (len(away) - 1, [])
    (wrong,) = found.wrong
    assert wrong.startswith("s3://bucket/hospitals/")
    assert wrong.endswith("is not what the client wrote")
    bucket.put(last, nodes / last)
    assert collect(run, sources).files == 1
    findings = verify(tmp_path / "run")
    assert findings.violations == []
    assert findings.checks["replay"].reasons == [BUFFERS]
    assert not any("disks of clients" in r for c in findings.checks.values() for r in c.reasons)


def test_what_is_not_there_is_told_in_one_sentence(store, recorded, tmp_path):
    with pytest.raises(InputError, match=r"^s3://bucket/none holds no run: it has no run\.json$"):
        fetch("s3://bucket/none", tmp_path / "back")
    with pytest.raises(RunFailedError, match=r"^s3://nowhere/run/\S+ cannot be read: ") as caught:
        push(recorded.path, Folder("s3://nowhere/run"))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"^mirror = 's3://nowhere/run' cannot be used"):
        check_new("s3://nowhere/run", Path("run"))


def test_a_store_that_is_gone_harms_no_run(store, plan, tmp_path):
    store.terminate()
    store.wait(PATIENCE)
    memory = Memory()
    run(plan, tmp_path / "run", memory, mirror="s3://bucket/late")
    assert load_run(tmp_path / "run").status == "finished"
    assert verify(tmp_path / "run").violations == []
    told = [text for _, text in memory.of("warned")]
    assert told[-1].startswith("the copy is behind: s3://bucket/late/")
    assert told[-1].endswith(
        f"; `fedsim push {tmp_path / 'run'} s3://bucket/late` brings it up to date"
    )
