"""Starting a federation on this machine, and ending all of it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from fedsim.core.allowance import usable_cpus
from fedsim.core.errors import InputError, RunFailedError
from fedsim.plugins.deploy.federation import (
    CONNECTION,
    Federation,
    Places,
    environment,
    listen_at,
    register_command,
    superlink_command,
    supernode_command,
)

_POLL, _AGAIN = 0.2, 3.0
"""Seconds between looks at the processes, and until a SuperNode that ended is started again."""
_STARTING, _ENDING = 90.0, 10.0
"""Seconds that a server has to come up, and that all have to end before they are killed."""
_USED = "[code: 23]"
"""How Flower says that a key is registered already."""


def start(folder: Path, tell: Callable[[str], None], stop: threading.Event) -> None:
    """Run the SuperLink, its gateway and the SuperNodes of this machine until told to stop.

    A node whose folder was moved away runs elsewhere, by Flower's own command. Keys are registered
    at the start, for the SuperLink keeps nothing. A SuperNode that ends is started again.

    Parameters
    ----------
    folder : Path
        What `fedsim deploy init` made.
    tell : callable
        Called with a line about each event.
    stop : threading.Event
        Set to end it.

    Raises
    ------
    InputError
        When there is no federation, a file of it is missing, a port is taken, or an address is not
        of this host.
    RunFailedError
        When a server ended.
    """
    places = Places(folder.absolute())
    federation = Federation.read(places.root)
    numbers = [n for n in range(federation.supernodes) if places.node_config(n).is_file()]
    _check_files(places, federation, numbers)
    for port, host in _ports(federation, numbers).items():
        listen_at(host, port).close()
    places.logs.mkdir(mode=0o700, exist_ok=True)
    processes: dict[str, subprocess.Popen[bytes]] = {}
    homes: set[str] = set()

    def run(name: str, command: Sequence[str], where: Path) -> None:
        homes.add(str(where / "flwr"))
        with open(places.logs / f"{name}.log", "ab", opener=_private) as log:
            processes[name] = subprocess.Popen(  # noqa: S603 - Flower's commands and ours
                command,
                cwd=where,
                env=environment(where / "flwr"),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A Ctrl-C in the terminal reaches us alone: nodes end before their SuperLink.
                start_new_session=True,
            )

    def check() -> None:
        for name in ("superlink", "gateway"):
            if name in processes and processes[name].poll() is not None:
                raise RunFailedError(f"the {name} ended; {places.logs / name}.log says why")

    try:
        run("superlink", superlink_command(federation), places.server)
        if not federation.insecure:
            gateway = [sys.executable, "-m", "fedsim", "deploy", "gateway", str(places.root)]
            run("gateway", gateway, places.server)
        if not _wait_for_servers(places, federation, check, stop):
            return
        if not federation.insecure:
            register(folder, lambda line: None)
        for number in numbers:
            run(f"supernode-{number}", supernode_command(federation, number), places.node(number))
        tell(
            f"{len(numbers)} SuperNodes at {federation.address}:{federation.port}; "
            f"their logs are in {places.logs}"
        )
        if away := sorted(set(range(federation.supernodes)) - set(numbers)):
            tell(f"elsewhere, since their folders are: the nodes of partitions {_listed(away)}")
        tell(f"FLWR_HOME={places.user} flwr run . {CONNECTION} --stream   (Ctrl-C here ends all)")
        ended: dict[int, float] = {}
        while not stop.wait(_POLL):
            check()
            for number in numbers:
                name = f"supernode-{number}"
                if processes[name].poll() is None:
                    continue
                if number not in ended:
                    ended[number] = time.monotonic()
                    tell(f"{name} ended; it is started again until it is let in")
                elif time.monotonic() - ended[number] > _AGAIN:
                    del ended[number]
                    run(name, supernode_command(federation, number), places.node(number))
    finally:
        nodes = [p for name, p in processes.items() if name.startswith("supernode-")]
        _end(nodes)
        _end([p for p in processes.values() if p not in nodes])
        _kill_what_is_left(homes)


def register(folder: Path, tell: Callable[[str], None]) -> None:
    """Register the public keys of all nodes at the SuperLink, each for its partition.

    Parameters
    ----------
    folder : Path
        What `fedsim deploy init` made.
    tell : callable
        Told a line for each node.

    Raises
    ------
    InputError
        When there is no federation, or its nodes have no keys.
    RunFailedError
        When the SuperLink does not take a key.
    """
    places = Places(folder.absolute())
    federation = Federation.read(places.root)
    if federation.insecure:
        raise InputError(f"{folder} is insecure: its nodes have no keys and register themselves")

    def one(number: int) -> tuple[int, str]:
        command = register_command(number, str(places.public_key(number)))
        done = subprocess.run(  # noqa: S603 - Flower's command
            command, env=environment(places.user), capture_output=True, text=True, check=False
        )
        # Flower draws a frame around what went wrong.
        said = re.sub("[\u2500-\u257f]", " ", done.stdout + done.stderr)
        return done.returncode, " ".join(said.split())

    with ThreadPoolExecutor(usable_cpus()) as pool:
        for number, (code, said) in enumerate(pool.map(one, range(federation.supernodes))):
            if code and _USED not in said:
                raise RunFailedError(f"the key of partition {number} was not registered: {said}")
            tell(f"partition {number}: {'registered before' if code else 'registered'}")


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _check_files(places: Places, federation: Federation, numbers: Sequence[int]) -> None:
    needed = [places.server]
    if not federation.insecure:
        needed += [
            places.authority,
            *(places.server / name for name in ("ca.crt", "server.crt", "server.key")),
        ]
        needed += [places.public_key(number) for number in range(federation.supernodes)]
        needed += [places.node(n) / name for n in numbers for name in ("ca.crt", "node.key")]
    for path in needed:
        if not path.exists():
            raise InputError(
                f"{path} does not exist; expected what `fedsim deploy init` made, of which only "
                "whole folders of nodes may be elsewhere"
            )


def _listed(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return ", ".join(map(str, numbers[:8])) + more


def _ports(federation: Federation, numbers: Sequence[int]) -> dict[int, str]:
    """Give the ports that are used, and at which address each."""
    own = [federation.own_port, *map(federation.port_of, numbers)]
    # Without a gateway the SuperLink's own port is that for the nodes.
    return {federation.port: federation.listen} | {
        port: "127.0.0.1" for port in own if port != federation.port
    }


def _wait_for_servers(
    places: Places, federation: Federation, check: Callable[[], None], stop: threading.Event
) -> bool:
    """Wait until both answer; say whether they do, and not that they were told to stop."""
    hosts = {federation.own_port: "127.0.0.1", federation.port: federation.address}
    if federation.insecure:
        hosts = {federation.port: federation.address}
    deadline = time.monotonic() + _STARTING
    for port, host in hosts.items():
        while not _answers(host, port, None if federation.insecure else places.authority):
            check()
            if time.monotonic() > deadline:
                raise RunFailedError(
                    f"nothing answers at {host}:{port} after {_STARTING:.0f} s; {places.logs} "
                    "says why"
                )
            if stop.wait(_POLL):
                return False
    return True


def _answers(host: str, port: int, authority: Path | None) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), 5.0) as connection:
        if authority is None:
            return True
        context = ssl.create_default_context(cafile=authority)
        try:
            with context.wrap_socket(connection, server_hostname=host):
                return True
        except ssl.SSLCertVerificationError as error:
            raise RunFailedError(
                f"the certificate of {host}:{port} is not trusted: {error.verify_message}"
            ) from None
    return False


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + _ENDING
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))


def _kill_what_is_left(homes: Collection[str]) -> None:
    """Kill what Flower's commands started, some of it out of the reach of signals to a group."""
    left = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get("FLWR_HOME") in homes:
                process.kill()
                left.append(process)
    psutil.wait_procs(left, timeout=_ENDING)
