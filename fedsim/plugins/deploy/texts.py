"""The text files of a federation."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from fedsim.plugins.deploy.federation import (
    CONNECTION,
    VARIABLES,
    Federation,
    at,
    superlink_command,
    supernode_command,
)

_SPECIAL = set(" \"'\\;")
_ALL = "0.0.0.0"  # noqa: S104 - of a container
_IMAGE = "${FEDSIM_IMAGE:-fedsim}"


def flower_config(federation: Federation, authority: Path) -> str:
    """Write ``config.toml`` of ``FLWR_HOME`` for the users who start runs on the server's host."""
    address = federation.here if federation.insecure else "127.0.0.1"
    security = (
        "insecure = true"
        if federation.insecure
        else f"root-certificates = {json.dumps(str(authority))}"
    )
    return (
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f'address = "{at(address, federation.own_port)}"\n{security}\n'
    )


def node_config(
    federation: Federation, node: int, *, recordings: Path, data_root: Path | None, capture: bool
) -> str:
    """Write what ``flower-supernode --node-config`` reads: the host's own word on its data."""
    root = f"data-root = {json.dumps(str(data_root))}" if data_root else '# data-root = "/path"'
    return f"""\
partition-id = {node}
num-partitions = {federation.supernodes}
# Where this host keeps the archives of the shared dataset.
{root}
# The node's own data, in place of its partition of the shared dataset.
# data = "/path"
# Where this node records, and whether gradients of it may be captured.
recordings = {json.dumps(str(recordings))}
capture = {str(capture).lower()}
"""


def superlink_unit(federation: Federation, folder: Path) -> str:
    """Write the systemd unit of the SuperLink; what it knows of nodes outlives it."""
    command = [*superlink_command(federation), "--database", "superlink.db"]
    return _unit("Flower SuperLink of a fedsim federation", folder, command)


def gateway_unit(folder: Path) -> str:
    """Write the systemd unit of the gateway."""
    command = ["fedsim", "deploy", "gateway", str(folder.parent)]
    return _unit("Gateway of a fedsim federation", folder, command, after="fedsim-superlink")


def supernode_unit(federation: Federation, node: int, folder: Path) -> str:
    """Write the systemd unit of a SuperNode."""
    command = supernode_command(federation, node)
    return _unit(f"Flower SuperNode of partition {node}", folder, command)


def _unit(what: str, folder: Path, command: list[str], after: str = "") -> str:
    commands = Path(sys.executable).parent
    program, *arguments = command
    variables = [("PATH", f"{commands}:/usr/bin:/bin"), ("FLWR_HOME", f"{folder}/flwr"), *VARIABLES]
    environment = "\n".join(f"Environment={_word(f'{name}={value}')}" for name, value in variables)
    words = [_word(f"{commands}/{program}"), *(_word(word, dollar="$$") for word in arguments)]
    following = f" {after}.service" if after else ""
    return f"""\
# Change the three folders to those of the host, and User to whom they belong.
[Unit]
Description={what}
Wants=network-online.target
After=network-online.target{following}

[Service]
User=fedsim
WorkingDirectory={str(folder).replace("%", "%%")}
{environment}
ExecStart={" ".join(words)}
# A SuperNode that was killed is refused until the SuperLink misses it, within a minute.
Restart=always
RestartSec=5
KillSignal=SIGINT
NoNewPrivileges=true
ProtectSystem=full
PrivateTmp=true
UMask=0077

[Install]
WantedBy=multi-user.target
"""


def _word(text: str, dollar: str = "$") -> str:
    """Write a word of a line of systemd's, as `systemd.syntax` and `systemd.service` want it."""
    written = text.replace("%", "%%").replace("$", dollar)
    if not _SPECIAL & set(text):
        return written
    escaped = written.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def server_compose(federation: Federation) -> str:
    """Write the compose file of the server; the SuperLink is reached through the gateway only."""
    # A container has addresses of its own; the host's is what Docker listens at.
    inside = replace(federation, listen=_ALL)
    superlink = [*superlink_command(inside), "--database", "superlink.db"]
    text = f"""\
services:
  superlink:
    image: {_IMAGE}
    command: {json.dumps(superlink)}
    working_dir: /federation/server
    volumes: ["./server:/federation/server"]
    environment: {_variables("/federation/server/flwr")}
    ports: ["{at(federation.listen, federation.port)}:{federation.port}"]
    restart: always
    stop_signal: SIGINT
"""
    if federation.insecure:
        return text
    return (
        text
        + f"""\
  gateway:
    image: {_IMAGE}
    command: ["fedsim", "deploy", "gateway", "--listen", "{_ALL}", "/federation"]
    # The SuperLink listens on loopback only: they share one.
    network_mode: "service:superlink"
    depends_on: [superlink]
    volumes: ["./server:/federation/server:ro", "./federation.toml:/federation/federation.toml:ro"]
    restart: always
    stop_signal: SIGINT
"""
    )


def node_compose(federation: Federation, node: int) -> str:
    """Write the compose file of a node, for its own host."""
    return f"""\
services:
  supernode:
    image: {_IMAGE}
    command: {json.dumps(supernode_command(federation, node))}
    working_dir: /node
    volumes: [".:/node"]
    environment: {_variables("/node/flwr")}
    restart: always
    stop_signal: SIGINT
"""


def _variables(home: str) -> str:
    return json.dumps({**dict(VARIABLES), "FLWR_HOME": home})


def dockerfile() -> str:
    """Write how the image of the compose files is built, in the folder of fedsim's sources."""
    return """\
FROM python:3.11-slim
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY fedsim fedsim
COPY strategies strategies
RUN pip install --no-cache-dir --constraint constraints.txt '.[deploy,remote]'
"""
