"""What a call of `fedsim.simulate` leaves of the caller's process: all of it. Real Ray."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fedsim import apart
from fedsim.core import errors
from fedsim.core.config import RunConfig
from fedsim.core.errors import ConfigError, DivergedError, FedsimError, RunFailedError
from fedsim.flower.simulation import EngineError
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[1]

CALLER = """
import json, logging, os, random, signal, sys, threading, warnings
from pathlib import Path

import numpy as np
import ray
import torch

import fedsim
from fedsim.core.errors import ConfigError, RunFailedError, RunInterruptedError

VALUES = {
    "model": "cnn", "clients": 4, "clients-per-round": 2, "rounds": 1, "capture": "none",
    "device": "cpu",
}
HERE = Path(sys.argv[1])

def pipes():
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append((int(number), os.readlink("/proc/self/fd/" + number)))
        except OSError:
            pass
    return sorted(one for one in found if one[1].startswith("pipe:"))

def snapshot():
    return {
        "signals": {n: signal.getsignal(n) for n in signal.valid_signals()},
        "blocked": signal.pthread_sigmask(signal.SIG_BLOCK, []),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "running": sorted(t.name for t in threading.enumerate()),
        "environment": dict(os.environ),
        "random": random.getstate(),
        "numpy": [str(x) for x in np.random.get_state()],
        "torch": torch.get_rng_state().tolist(),
        "deterministic": [
            torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic,
            torch.utils.deterministic.fill_uninitialized_memory, torch.get_default_dtype(),
        ],
        "optimizers": torch.optim.SGD.step,
        "warnings": list(warnings.filters),
        "logging": {
            name: (logger.level, list(logger.handlers), logger.disabled, logger.propagate)
            for name in ["root", *LOGGERS]
            for logger in [logging.getLogger(None if name == "root" else name)]
        },
        "path": list(sys.path),
        "folder": os.getcwd(),
        "umask": (os.umask(0o022), os.umask(0o022)),
        "streams": [sys.stdin, sys.stdout, sys.stderr, sys.excepthook, threading.excepthook],
        # The caller's Ray opens sockets when it likes.
        "pipes": pipes(),
    }

def unchanged(what, call):
    global LOGGERS
    LOGGERS = [n for n, x in logging.root.manager.loggerDict.items() if hasattr(x, "level")]
    before = snapshot()
    try:
        call()
    finally:
        after = snapshot()
        differ = [name for name in before if before[name] != after[name]]
        assert differ == [], {n: f"{before[n]} -> {after[n]}"[-2000:] for n in differ}
        assert ray.get(counter.add.remote()) == len(told) + 1
        assert ray.get(kept) == {"mine": 1}
        told.append(what)

def simulate(name, **values):
    keys = {key.replace("_", "-"): value for key, value in values.items()}
    return fedsim.simulate(VALUES | {"output": str(HERE / name)} | keys)

def succeeds_in_a_thread():
    outcome = []
    own = lambda: outcome.append(simulate("own", strategy="lab:Mine").status)
    thread = threading.Thread(target=own)
    thread.start()
    thread.join()
    assert outcome == ["finished"]

def is_refused():
    # By this process, and by that of the run.
    for key, value in (("alpha", -1.0), ("client_cpus", 4000)):
        try:
            simulate("refused", **{key: value})
        except ConfigError as error:
            assert (error.field, error.value) == (key.replace("_", "-"), value), vars(error)
            assert str(error).startswith(f"{error.field} = {value} cannot be used; expected ")
        else:
            raise AssertionError
    assert not (HERE / "refused").exists()

def fails():
    try:
        simulate("failed", strategy="lab:Broken")
    except RunFailedError as error:
        assert "out of luck" in str(error), error
    else:
        raise AssertionError

def is_interrupted():
    rows = HERE / "interrupted" / "rounds.jsonl"

    def interrupt():
        while not rows.exists() or rows.read_bytes().count(b"\\n") < 2:
            pass
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        simulate("interrupted", rounds=500)
    except RunInterruptedError as error:
        assert f"`fedsim resume {HERE}/interrupted` continues" in str(error)
    else:
        raise AssertionError
    thread.join()

@ray.remote
class Counter:
    def __init__(self):
        self.count = 0

    def add(self):
        self.count += 1
        return self.count

if __name__ == "__main__":
    sys.path.insert(0, str(HERE / "classes"))
    os.environ["PYTHONPATH"] = "nothing"
    warnings.simplefilter("error", FutureWarning)
    logging.getLogger("flwr").setLevel(logging.WARNING)
    random.seed(5), np.random.seed(5), torch.manual_seed(5), torch.set_num_threads(2)
    ray.init(address="local", num_cpus=1, log_to_driver=False)
    counter, kept, told = Counter.remote(), ray.put({"mine": 1}), []
    for call in (succeeds_in_a_thread, is_refused, fails, is_interrupted):
        unchanged(call.__name__, call)
    print("told", *told)
"""
LAB = """
from flwr.serverapp.strategy import FedAvg

class Mine(FedAvg):
    def aggregate_train(self, server_round, replies):
        print("my own line")
        return super().aggregate_train(server_round, replies)

class Broken(FedAvg):
    def aggregate_train(self, server_round, replies):
        raise ValueError("out of luck")
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="fs-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def caller(folder: Path, program: str) -> subprocess.Popen[str]:
    (folder / "tmp").mkdir()
    (folder / "script.py").write_text(program)
    return subprocess.Popen(
        [sys.executable, folder / "script.py", folder],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "tmp")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_the_callers_process_is_as_it_was_whatever_becomes_of_the_run(folder: Path) -> None:
    (folder / "classes").mkdir()
    (folder / "classes" / "lab.py").write_text(LAB)
    process = caller(folder, CALLER)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, out + err
    assert out.splitlines()[-1] == "told succeeds_in_a_thread is_refused fails is_interrupted"
    # What `fedsim run` prints, and what the user's own class does, there.
    assert out.splitlines().count("my own line") == 1
    assert "round 1/1  loss" in out
    assert "Traceback" not in err


LONG = """
import sys
import fedsim

if __name__ == "__main__":
    fedsim.simulate({"model": "cnn", "clients": 4, "clients-per-round": 2, "rounds": 500,
                     "capture": "none", "output": sys.argv[1] + "/run"}, progress=False)
"""


def those_of(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR") == str(folder / "tmp"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def under_way(folder: Path, process: subprocess.Popen[str]) -> None:
    rows = folder / "run" / "rounds.jsonl"
    while not rows.exists() or rows.read_bytes().count(b"\n") < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.matrix
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_run_ends_with_its_caller(folder: Path, number: signal.Signals) -> None:
    process = caller(folder, LONG)
    under_way(folder, process)
    family = those_of(folder)
    assert {"raylet", "gcs_server"} <= {p.name() for p in family}
    process.send_signal(number)
    assert process.wait(PATIENCE) == -number
    assert psutil.wait_procs(family, timeout=PATIENCE)[1] == []
    assert list((folder / "tmp").iterdir()) == []


@pytest.mark.matrix
@pytest.mark.slow
def test_a_second_interrupt_ends_the_run_at_once(folder: Path) -> None:
    process = caller(folder, LONG)
    under_way(folder, process)
    family = [p for p in those_of(folder) if p.pid != process.pid]
    run = next(p for p in family if "fedsim.cell" in p.cmdline())
    # It cannot do what it is asked. A thread that has not stopped yet would still take the word.
    run.suspend()
    while {"T"} != {
        stat.read_text().rpartition(") ")[2][0]
        for stat in Path(f"/proc/{run.pid}/task").glob("*/stat")
    }:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    with Path(f"/proc/{run.pid}/fd/0").open("rb") as asked:
        # The first is taken before the second is sent.
        while not int.from_bytes(fcntl.ioctl(asked, termios.FIONREAD, bytes(4)), sys.byteorder):
            time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert psutil.wait_procs(family, timeout=PATIENCE)[1] == []


@pytest.mark.matrix
@pytest.mark.slow
def test_a_run_whose_process_is_killed_is_a_failure_that_says_so(folder: Path) -> None:
    process = caller(folder, LONG)
    under_way(folder, process)
    next(p for p in those_of(folder) if "fedsim.cell" in p.cmdline()).kill()
    _, err = process.communicate(timeout=PATIENCE)
    assert err.splitlines()[-1].endswith("RunFailedError: the run's process was ended by signal 9")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConfigError("alpha", (1.0, 2.0), "a number"), ConfigError),
        (DivergedError("round 3 diverged"), DivergedError),
        (EngineError("Ray died"), RunFailedError),
    ],
)
def test_an_error_arrives_as_what_it_was(error: FedsimError, kind: type[FedsimError]) -> None:
    reader, writer = os.pipe()
    apart.EventWriter(writer).tell_failure(error)
    os.close(writer)
    with os.fdopen(reader) as lines:
        found = apart._error_of(json.loads(lines.read()))
    assert type(found) is kind
    assert str(found) == str(error)
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in vars(error).items()} == vars(
        found
    )


def test_every_error_can_be_named() -> None:
    kinds = [
        k for k in vars(errors).values() if isinstance(k, type) and k.__module__ == errors.__name__
    ]
    assert all(issubclass(kind, FedsimError) for kind in kinds)


def test_nobody_who_listens_ends_nothing() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    apart.EventWriter(writer).warned("nobody hears this")
    os.close(writer)


def test_the_configuration_arrives_as_it_was() -> None:
    config = RunConfig.from_mapping(
        {"batch-size": [16, 32, 8, 4], "clients": 4, "alpha": 0.1, "clients-per-round": 2}
    )
    assert RunConfig.from_json(config.to_json()) == config
