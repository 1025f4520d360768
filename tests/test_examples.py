"""What the guides give people to copy: parsed, as far as can be without their clusters."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fedsim.core.config import RunConfig
from fedsim.recording.reader import load_run

ROOT = Path(__file__).parents[1]


def test_the_slurm_script_is_bash():
    script = ROOT / "examples" / "slurm.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.stat().st_mode & 0o111


@pytest.fixture
def job():
    documents = list(yaml.safe_load_all((ROOT / "examples" / "kuberay.yaml").read_text()))
    assert len(documents) == 1
    return documents[0]


def test_the_kubernetes_job_has_what_the_operator_asks_for(job):
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"ray=={cluster['rayVersion']}" in pinned
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    images = set()
    for group in (head, workers):
        spec = group["template"]["spec"]
        (container,) = spec["containers"]
        images.add(container["image"])
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["volumes"]}
        # The operator reads these as texts.
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    assert len(images) == 1


def test_the_kubernetes_job_calls_what_exists(job):
    words = job["spec"]["entrypoint"].replace("'", "").replace(";", "").split()
    keys = {f"--{name.replace('_', '-')}" for name in RunConfig.model_fields}
    assert {word for word in words if word.startswith("--")} <= keys
    file = Path(next(word for word in words if word.endswith(".toml")))
    assert (ROOT / file.relative_to("/opt/fedsim")).is_file()


def test_the_guide_names_files_that_are_there():
    guide = (ROOT / "docs" / "cluster.md").read_text()
    for name in ("slurm.sh", "kuberay.yaml"):
        assert f"(../examples/{name})" in guide
        assert (ROOT / "examples" / name).is_file()
    assert "-f examples/Dockerfile" in guide


@pytest.mark.slow
def test_the_example_of_drift_can_be_called_where_one_was(tmp_path):
    (tmp_path / "runs" / "before").mkdir(parents=True)
    page = tmp_path / "drift.html"
    page.write_text("a page of before")
    script = ROOT / "examples" / "drift.py"
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("preparing  digits, the partition and the model\ndata ")
    assert "round 3/3" in done.stdout
    assert done.stdout.endswith("written: drift.html\n")
    assert "Client drift" in page.read_text(encoding="utf-8")
    (run,) = (path for path in (tmp_path / "runs").iterdir() if path.name != "before")
    assert load_run(run).status == "finished"
