from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from fedsim.plugins.deploy.federation import Places, environment
from tests.patience import PATIENCE
from tests.ports import free_ports

ROOT = Path(__file__).parents[3]
# Flower has no setting for it: a killed node is missed after twice these seconds, not 60.
HEARTBEAT = """\
import sys
if any(a.endswith("/flower-supernode") for a in sys.orig_argv):
    from flwr.supercore import heartbeat
    from flwr.supernode import fleet_http_connection
    heartbeat.HEARTBEAT_DEFAULT_INTERVAL = 10
    fleet_http_connection.HEARTBEAT_DEFAULT_INTERVAL = 10
"""


def until(what: Callable[[], object], why: Callable[[], str] = lambda: "") -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline, why()
        time.sleep(0.05)


class Lab:
    """A federation on this machine, started as a user does."""

    def __init__(self, folder: Path, supernodes: int) -> None:
        self.places = Places(folder / "federation")
        self.supernodes = supernodes
        self.port = free_ports(2 + supernodes)
        (folder / "short").mkdir()
        (folder / "short" / "sitecustomize.py").write_text(HEARTBEAT)
        self.environment = {
            **environment(self.places.user),
            "PYTHONPATH": f"{folder / 'short'}{os.pathsep}{ROOT}",
            "PYTHONUNBUFFERED": "1",
        }
        self.fedsim(
            *("deploy", "init", self.places.root, "--port", self.port, "--capture"),
            *("--supernodes", supernodes),
        )
        self.told = folder / "start.log"
        with self.told.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fedsim", "deploy", "start", self.places.root],
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        until(lambda: "Ctrl-C" in self.told.read_text(), self.logs)

    def fedsim(self, *arguments: object) -> str:
        command = [sys.executable, "-m", "fedsim", *map(str, arguments)]
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=True
        )
        return done.stdout

    def run(self, **values: object) -> subprocess.Popen[str]:
        """Start a run of it."""
        keys = " ".join(f"{k.replace('_', '-')}={v!r}" for k, v in values.items())
        return subprocess.Popen(
            ["flwr", "run", ".", "federation", "--stream", "--run-config", keys],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def log(self, name: str) -> str:
        return (self.places.logs / f"{name}.log").read_text(errors="replace")

    def logs(self) -> str:
        texts = [self.told.read_text()]
        texts += [f"{p}:\n{p.read_text()[-3000:]}" for p in sorted(self.places.logs.iterdir())]
        return "\n".join(texts)

    def supernode(self, number: int) -> psutil.Process:
        """Give the SuperNode that is there, which is not always the first one."""
        return self._process("flower-supernode", self.places.node(number))

    def server_app(self) -> psutil.Process:
        return self._process("flwr-serverapp", self.places.server)

    def _process(self, name: str, folder: Path) -> psutil.Process:
        found = [p for p in self.processes(folder) if any(name in a for a in _arguments(p))]
        return min(found, key=lambda p: p.create_time())

    def processes(self, folder: Path | None = None) -> list[psutil.Process]:
        """Give all processes that keep what they need in a folder of the federation."""
        found = []
        for process in psutil.process_iter():
            try:
                home = process.environ().get("FLWR_HOME", "")
            except (psutil.Error, OSError):
                continue
            if Path(home).is_relative_to(folder or self.places.root):
                found.append(process)
        return found

    def end(self) -> None:
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(PATIENCE) == 0
        left = [p for p in self.processes() if "deploy" not in _arguments(p)]
        for process in left:
            process.kill()
        assert left == []


def _arguments(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    made = Lab(tmp_path_factory.mktemp("lab"), 2)
    try:
        yield made
    finally:
        made.end()
