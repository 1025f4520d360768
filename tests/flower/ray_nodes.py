"""Ray nodes of our own on this machine, each a raylet with its own processes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).parent / "ray"


@dataclass
class RayNode:
    process: subprocess.Popen[bytes]

    @property
    def raylet(self) -> psutil.Process:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return next(child for child in children if child.name() == "raylet")

    def workers(self) -> list[psutil.Process]:
        children = self.raylet.children(recursive=True)
        return [child for child in children if child.name().startswith("ray::ClientApp")]


@contextlib.contextmanager
def ray_node(folder: Path, head: str | None, *, hidden: Path | None = None) -> Iterator[RayNode]:
    """Start the head of a cluster, or a node that joins one, with one CPU.

    Parameters
    ----------
    folder
        For Ray's files; short, for sockets live there.
    head
        Address to join; None to be the head, at the port in the file ``port`` of the folder.
    hidden
        A folder in place of which the node sees an empty one: a disk that it does not share.
    """
    port = int((folder / "port").read_text())
    place = [f"--address={head}"] if head else ["--head", f"--port={port}", "--temp-dir", folder]
    command = [
        *(RAY, "start", *place, "--block", "--num-cpus=1", "--node-ip-address=127.0.0.1"),
        *("--object-store-memory=400000000", "--disable-usage-stats"),
        *("--min-worker-port=0", "--max-worker-port=0"),
    ]
    command += [] if head else ["--include-dashboard=false"]
    words = [str(word) for word in command]
    if hidden is not None:
        mount = f'mount -t tmpfs tmpfs "{hidden}" && exec "$@"'
        words = ["unshare", "-m", "sh", "-c", mount, "sh", *words]
    temporary = folder / "temporary"
    temporary.mkdir(exist_ok=True)
    cache = folder / f"cache-{port if head is None else 'of-node'}"
    process = subprocess.Popen(
        words,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "RAY_TMPDIR": str(folder),
            "TMPDIR": str(temporary),
            "RAY_raylet_start_wait_time_s": "180",
            "FEDSIM_CACHE": str(cache),
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield RayNode(process)
    finally:
        with contextlib.suppress(psutil.Error):
            family = [psutil.Process(process.pid)]
            family += family[0].children(recursive=True)
            for member in family:
                with contextlib.suppress(psutil.Error):
                    member.send_signal(signal.SIGKILL)
            psutil.wait_procs(family, timeout=PATIENCE)


def can_hide() -> bool:
    """Say whether this user may have mounts of its own."""
    probe = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(probe, capture_output=True).returncode == 0


def wait_for_nodes(head: str, count: int, timeout: float = 180) -> None:
    """Wait until a cluster has as many nodes that are alive."""
    from ray._raylet import GcsClient

    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        with contextlib.suppress(Exception):
            host, _, port = head.partition(":")
            socket.create_connection((host, int(port)), 1).close()
            nodes = GcsClient(address=head).get_all_node_info(timeout=5)
            if sum(node.state == 0 for node in nodes.values()) >= count:
                return
        time.sleep(0.2)
    raise AssertionError(f"the cluster did not get {count} nodes")
