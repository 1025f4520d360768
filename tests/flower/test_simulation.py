"""Real Ray, real processes. Everything here is slow."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from fedsim.core.config import RunConfig
from fedsim.core.errors import ConfigError
from fedsim.core.rng import draw_participants
from fedsim.flower import simulation
from fedsim.flower.simulation import WorkerPool, _ray_settings, size_pool
from fedsim.recording.reader import load_run
from fedsim.recording.verify import verify
from tests.patience import PATIENCE
from tests.ports import free_ports

ROOT = Path(__file__).parents[2]
SMALL = ["--model", "cnn", "--clients", "4", "--clients-per-round", "3", "--rounds", "2"]
BIN = Path(sys.executable).parent


def start(arguments, cwd, **variables):
    """Start ``fedsim run`` with its own folder for temporary files."""
    scratch = Path(cwd) / "tmp"
    scratch.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "fedsim", "run", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(scratch), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def folder():
    # Ray's sockets live below it, and the path of a socket has room for 107 characters.
    path = Path(tempfile.mkdtemp(prefix="fs-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def finish(process, timeout=PATIENCE):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def leftovers(folder):
    """Processes that know the folder, and files that a run leaves in it for temporary use."""
    running = [
        p.info["pid"]
        for p in psutil.process_iter(["pid", "cmdline"])
        if any(str(folder) in part for part in p.info["cmdline"] or [])
    ]
    return running, list((folder / "tmp").iterdir())


def wait_for(condition, process, timeout=PATIENCE):
    """Wait for another process to get somewhere."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if found := condition():
            return found
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError("the run did not get there")


def hashes(path):
    return [row["state_sha256"] for row in load_run(path).round_rows]


@pytest.fixture(scope="module")
def reference():
    """The record of a small run with two workers, and what it printed."""
    path = Path(tempfile.mkdtemp(prefix="fs-"))
    code, out, err = finish(start([*SMALL, "--output", "run", "--workers", "2"], path))
    assert (code, err) == (0, "")
    assert leftovers(path) == ([], [])
    yield path / "run", out
    shutil.rmtree(path)


@pytest.mark.slow
def test_a_run_tells_its_story_and_nothing_else(reference):
    path, out = reference
    loading, preparing, starting, *lines = out.splitlines()
    assert loading == "loading    torch, Flower and Ray"
    assert preparing == "preparing  digits, the partition and the model"
    assert starting == "starting   Ray and 2 workers"
    assert lines[0].startswith("data       digits: 1,438 + 359 samples, 10 classes")
    rounds = [line for line in lines if re.match(r"round \d", line)]
    assert [line.split()[1] for line in rounds] == ["0/2", "1/2", "2/2"]
    assert re.fullmatch(r"run +run *", lines[-1])
    assert "Ray" not in "".join(lines)
    assert "flwr" not in out
    run = load_run(path)
    assert run.status == "finished"
    for number in (1, 2):
        assert run.round(number).participants == draw_participants(42, number, 4, 3)
        for client in run.round(number).clients.values():
            assert client.captured_steps == [0]
            assert len(client.gradient(0)) == len(run.manifest["model"]["parameters"])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, pytest.param(4, marks=pytest.mark.matrix)])
def test_the_number_of_workers_does_not_change_a_bit(reference, folder, workers):
    flags = [*SMALL, "--output", "run", "--workers", str(workers)]
    code, _, err = finish(start(flags, folder))
    assert (code, err) == (0, "")
    assert hashes(folder / "run") == hashes(reference[0])
    shards = "rounds/*/clients/*/gradients-*.safetensors"
    ours = {p.relative_to(folder / "run"): p.read_bytes() for p in (folder / "run").glob(shards)}
    theirs = {p.relative_to(reference[0]): p.read_bytes() for p in reference[0].glob(shards)}
    assert len(ours) == 6
    assert ours == theirs


@pytest.mark.matrix
@pytest.mark.slow
def test_with_more_threads_a_worker_the_number_of_workers_changes_nothing_either(folder):
    made = []
    for workers in (1, 2):
        flags = [*SMALL, "--rounds", "1", "--client-cpus", "2", "--workers", str(workers)]
        code, _, err = finish(start([*flags, "--output", f"run{workers}"], folder))
        assert (code, err) == (0, "")
        made.append(folder / f"run{workers}")
        assert load_run(made[-1]).manifest["device"]["worker_threads"] == 2
    assert hashes(made[0]) == hashes(made[1])


@pytest.mark.matrix
@pytest.mark.slow
def test_a_client_that_fails_ends_the_run_with_exit_1_and_its_traceback(folder):
    process = start([*SMALL, "--output", "run"], folder)
    wait_for((folder / "run" / "rounds.jsonl").exists, process)
    # A file where the clients of round 1 want their folder.
    (folder / "run" / "rounds" / "0001").mkdir(parents=True, exist_ok=True)
    (folder / "run" / "rounds" / "0001" / "clients").write_text("in the way")
    code, out, err = finish(process)
    assert code == 1
    assert re.fullmatch(r"fedsim: client \d failed in round 1 \(max-failures = 0\): .*\n", err)
    assert "NotADirectoryError: [Errno 20]" in err
    assert re.search(r"round 1: client \d failed:\n", out)
    # The client's own frames, not those of the engine around it.
    assert "in train" in out
    assert "ray::" not in out
    assert "ray_actor.py" not in out
    assert leftovers(folder) == ([], [])
    run = load_run(folder / "run")
    assert (run.status, [row["round"] for row in run.round_rows]) == ("failed", [0])


@pytest.mark.slow
def test_an_interrupt_keeps_the_finished_rounds_and_leaves_nothing_behind(folder):
    process = start([*SMALL, "--rounds", "500", "--output", "run"], folder)
    rows = folder / "run" / "rounds.jsonl"
    wait_for(lambda: rows.exists() and rows.read_bytes().count(b"\n") >= 2, process)
    # As a wrapper forwards what the terminal sent too: one request, not two.
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 130
    # But for the words of the start.
    assert "ray" not in out.lower().partition("data ")[2]
    assert "interrupted; the finished rounds are kept in run" in err
    assert "Traceback" not in err
    assert leftovers(folder) == ([], [])
    run = load_run(folder / "run")
    assert run.status == "failed"
    assert len(run.round_rows) >= 2


FAKE_GPUS = """
import sys, threading
from pathlib import Path
import ray
from fedsim.core.config import RunConfig
from fedsim.core.errors import FedsimError
from fedsim.core.plan import RunPlan
from fedsim.flower.simulation import WorkerPool, simulate
from tests.observers import Memory

class Watching(Memory):
    def round_started(self, round_number, participants):
        used = {k: ray.cluster_resources()[k] - ray.available_resources().get(k, 0)
                for k in ("CPU", "GPU")}
        print("used", used["CPU"], used["GPU"], flush=True)

if __name__ == "__main__":
    config = RunConfig.from_mapping({
        "model": "cnn", "clients": 4, "clients-per-round": 3, "rounds": 2,
        "device": "cpu", "client-gpus": float(sys.argv[1]),
    })
    pool = WorkerPool(workers=4, cpus=1, gpus=config.client_gpus)
    try:
        simulate(RunPlan.prepare(config), Path("run"), pool, observer=Watching(),
                 stop=threading.Event(), ray_gpus=1)
    except FedsimError as error:
        print("failed:", error, flush=True)
    import os
    os._exit(0)
"""


def with_fake_gpu(folder, share):
    (folder / "tmp").mkdir()
    finished = subprocess.run(
        [sys.executable, "-c", FAKE_GPUS, str(share)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "tmp")},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    return finished.stdout


@pytest.mark.matrix
@pytest.mark.slow
def test_a_fraction_of_a_gpu_decides_how_many_workers_share_it(reference, folder):
    out = with_fake_gpu(folder, 0.5)
    # Four processors have room for four workers, one GPU for two halves.
    assert out.splitlines() == ["used 2.0 1.0", "used 2.0 1.0"]
    assert hashes(folder / "run") == hashes(reference[0])


@pytest.mark.matrix
@pytest.mark.slow
def test_an_engine_that_cannot_start_fails_and_ends(folder):
    out = with_fake_gpu(folder, 2)
    cause = "Flower's Ray engine could not run: ActorPool is empty"
    assert f"failed: {cause}" in out
    assert leftovers(folder) == ([], [])
    # The same command is not refused for what it left.
    assert not (folder / "run").exists()


@pytest.mark.matrix
@pytest.mark.slow
@pytest.mark.parametrize("name", ["job_1234567890_of_a_batch_system_with_long_names", "Zoë"])
def test_any_temporary_folder_will_do(reference, folder, name):
    (folder / name).mkdir()
    flags = [*SMALL, "--output", "run", "--workers", "2"]
    code, _, err = finish(start(flags, folder, TMPDIR=str(folder / name)))
    assert (code, err) == (0, "")
    assert hashes(folder / "run") == hashes(reference[0])
    assert list((folder / name).iterdir()) == []


@pytest.mark.matrix
@pytest.mark.slow
def test_a_warning_of_the_batch_system_ends_the_run_after_its_round(folder):
    process = start([*SMALL, "--rounds", "500", "--output", "run"], folder)
    rows = folder / "run" / "rounds.jsonl"
    wait_for(lambda: rows.exists() and rows.read_bytes().count(b"\n") >= 2, process)
    # It goes to all processes of a job's step.
    group = os.getpgid(process.pid)
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        if os.getpgid(one.pid) == group:
            one.send_signal(signal.SIGUSR1)
    code, out, err = finish(process, timeout=PATIENCE)
    run = load_run(folder / "run")
    last = run.round_rows[-1]["round"]
    assert code == 130
    assert err.splitlines() == [
        "fedsim: stopping after this round, as SIGUSR1 asks; an interrupt ends it now",
        f"fedsim: stopped after round {last}; the finished rounds are kept in run, and "
        "`fedsim resume run` continues",
    ]
    assert "failed" not in out
    assert verify(folder / "run").violations == []
    assert leftovers(folder) == ([], [])


@pytest.mark.matrix
@pytest.mark.slow
def test_a_second_interrupt_says_how_to_go_on(folder):
    process = start([*SMALL, "--rounds", "500", "--output", "run"], folder)
    rows = folder / "run" / "rounds.jsonl"
    wait_for(lambda: rows.exists() and rows.read_bytes().count(b"\n") >= 2, process)
    # It could not end by itself meanwhile.
    children = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in children if "ClientAppWorker" in " ".join(child.cmdline())]
    assert len(workers) == 2
    for worker in workers:
        worker.suspend()
    process.send_signal(signal.SIGINT)
    first = process.stderr.readline()
    # Those that come too soon count as the first.
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
    code, _, err = finish(process, timeout=PATIENCE)
    assert first == "fedsim: stopping after an interrupt; a second one ends at once\n"
    assert err == (
        "fedsim: ended at once; the finished rounds are kept in run, and `fedsim resume run` "
        "continues\n"
    )
    assert code == 130


FEDERATION = ("--federation-config", "num-supernodes=4 client-resources-num-cpus=1")


@pytest.fixture
def flower(folder):
    """Run ``flwr`` with a SuperLink of our own."""
    port = free_ports(2)
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(folder / "flwr"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
        "FLWR_LOCAL_CONTROL_API_PORT": str(port + 1),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "FEDSIM_RECORDINGS": str(folder),
        "FEDSIM_CAPTURE": "true",
        "TMPDIR": str(folder),
    }

    def call(*arguments):
        finished = subprocess.run(
            [str(BIN / "flwr"), *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        return finished.stdout

    (folder / "flwr").mkdir()
    yield call
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in part for part in process.info["cmdline"] or []):
            process.kill()
            process.wait(PATIENCE)


@pytest.mark.slow
def test_flwr_run_starts_the_same_run_and_shows_its_true_outcome(reference, folder, flower):
    keys = "model='cnn' clients=4 clients-per-round=3 rounds=2 "
    out = flower(
        "run", ".", "--stream", "--run-config", f"{keys} output='{folder}/run'", *FEDERATION
    )
    assert "round 2/2  loss" in out, out
    assert hashes(folder / "run") == hashes(reference[0])
    assert verify(folder / "run").checks["gradients"].proven > 0
    assert statuses(flower) == ["finished:completed"]


def statuses(flower):
    return [run["status"] for run in json.loads(flower("ls", "--format", "json"))["runs"]]


@pytest.mark.matrix
@pytest.mark.slow
def test_flwr_run_shows_that_a_run_was_refused(flower):
    out = flower("run", ".", "--stream", "--run-config", "alpha=-1.0", *FEDERATION)
    assert "alpha = -1.0 cannot be used; expected a value above 0" in out, out
    assert statuses(flower) == ["finished:failed"]


def config(**values):
    return RunConfig.from_mapping({key.replace("_", "-"): v for key, v in values.items()})


@pytest.mark.parametrize(
    ("values", "cpus", "gpus", "expected"),
    [
        ({}, 2, 0, (2, 1, 0.0)),
        ({}, 16, 0, (4, 1, 0.0)),
        ({"client_cpus": 4}, 16, 0, (4, 4, 0.0)),
        ({"client_cpus": 8}, 16, 0, (2, 8, 0.0)),
        ({"workers": 3}, 2, 0, (3, 1, 0.0)),
        ({}, 16, 1, (4, 1, 0.25)),
        ({}, 16, 2, (4, 1, 0.5)),
        ({}, 16, 3, (4, 1, 0.5)),
        ({"workers": 3}, 16, 1, (3, 1, 0.3333)),
        ({"client_gpus": 0.5}, 16, 1, (2, 1, 0.5)),
        ({"client_gpus": 0.6}, 16, 2, (2, 1, 0.6)),
        ({"client_gpus": 2}, 16, 4, (2, 1, 2.0)),
        ({"clients_per_round": 10, "clients": 10}, 4, 0, (4, 1, 0.0)),
    ],
)
def test_the_pool_fits_the_machine(values, cpus, gpus, expected):
    pool = size_pool(config(**values), cpus=cpus, machine_gpus=gpus)
    assert pool == WorkerPool(workers=expected[0], cpus=expected[1], gpus=expected[2])


@pytest.mark.parametrize(("gib", "workers"), [(0.5, 1), (2, 1), (3, 2), (8, 4)])
def test_a_limit_of_memory_bounds_the_workers(gib, workers):
    pool = size_pool(config(), cpus=64, machine_gpus=0, memory=int(gib * 2**30))
    assert pool.workers == workers


def test_ray_is_told_of_no_more_memory_than_may_be_used(monkeypatch):
    monkeypatch.setattr(simulation, "usable_memory", lambda: 2 * 10**9)
    told = _ray_settings(WorkerPool(workers=1, cpus=1, gpus=0), "x", verbose=False, ray_gpus=0)
    shares = [told[name] for name in ("object_store_memory", "_memory")]
    assert shares == [600_000_000, 1_400_000_000]


@pytest.mark.parametrize(
    ("values", "cpus", "gpus", "said"),
    [
        ({"client_cpus": 3}, 2, 0, "client-cpus = 3"),
        ({"client_gpus": 0.5}, 2, 0, "client-gpus = 0.5"),
        ({"client_gpus": 2}, 2, 1, "client-gpus = 2"),
        ({"client_gpus": 0}, 2, 1, "client-gpus = 0"),
        ({"workers": 3, "client_gpus": 0.5}, 8, 1, "workers = 3"),
        ({"workers": 7}, 2, 0, "workers = 7"),
    ],
)
def test_what_the_machine_does_not_have_is_refused(values, cpus, gpus, said):
    with pytest.raises(ConfigError, match=said):
        size_pool(config(**values), cpus=cpus, machine_gpus=gpus)


@pytest.mark.matrix
@pytest.mark.slow
def test_a_thousand_clients_of_whom_those_of_a_round_share_files(folder):
    flags = (
        "--model cnn --dataset synthetic:4000:4 --partition iid --min-samples 1 --clients 1000 "
        "--clients-per-round 70 --rounds 2 --batch-size 4 --capture none --workers 2 --output run"
    )
    code, _, err = finish(start(flags.split(), folder))
    assert (code, err) == (0, "")
    run = load_run(folder / "run")
    assert run.manifest["format"] == 2
    assert [len(run.round(number).clients) for number in (1, 2)] == [70, 70]
    files = [path for path in (folder / "run").rglob("*") if path.is_file()]
    # Those of the run, the state of round 0, and of each round state, aggregate, deltas, steps.
    assert len(files) == 6 + 1 + 2 * 4
    found = verify(folder / "run")
    assert found.violations == []
    assert found.checks["steps"].proven == 2 * 70
    assert found.checks["aggregate"].proven == 2
    assert leftovers(folder) == ([], [])
