"""``fedsim deploy``."""

from __future__ import annotations

import shlex
import signal
import threading
from dataclasses import replace
from pathlib import Path

import click

from fedsim.command import Command, Group, Whole, say, tell
from fedsim.core.errors import FedsimError, InputError

folder_argument = click.argument(
    "folder", type=Path, metavar="DIR", help="the folder of the federation"
)
_INSECURE = "insecure: anyone who reaches the server may join, listen and change what is sent"


@click.group("deploy", cls=Group, short_help="make and start a federation of real Flower nodes")
def deploy() -> None:
    """Make and start a federation of real Flower nodes, for `flwr run`."""


@deploy.command(
    "init",
    cls=Command,
    short_help="make the folder of a federation: certificates, keys, configuration, services",
)
@folder_argument
@click.option(
    "--supernodes", type=Whole(), default=4, metavar="N", help="one for each client (default: 4)"
)
@click.option(
    "--address",
    default="127.0.0.1",
    metavar="ADDRESS",
    help="host name or IP address of the server for the nodes (default: 127.0.0.1)",
)
@click.option(
    "--listen",
    default="",
    metavar="IP",
    help="address of the server's host at which it takes connections (default: the address, where "
    "that is loopback, and all of the host otherwise)",
)
@click.option(
    "--port",
    type=Whole(),
    default=9092,
    metavar="PORT",
    help="port for the nodes; those after it are used too (default: 9092)",
)
@click.option(
    "--data-root", type=Path, metavar="FOLDER", help="where the nodes have the shared dataset"
)
@click.option("--capture", is_flag=True, help="nodes allow that gradients are captured")
@click.option("--insecure", is_flag=True, help="no TLS and no keys: anyone may join and listen")
@click.option(
    "--days",
    type=Whole(),
    default=365,
    metavar="DAYS",
    help="validity of the server's certificate (default: 365)",
)
def init(
    folder: Path,
    supernodes: int,
    address: str,
    listen: str,
    port: int,
    data_root: Path | None,
    capture: bool,
    insecure: bool,
    days: int,
) -> None:
    """Make the folder of a federation.

    It holds an authority, the certificate of the server, a key for each node, and the
    configuration, systemd units and compose files of all.
    """
    from fedsim.plugins.deploy.federation import Federation
    from fedsim.plugins.deploy.init import init

    init(
        folder,
        Federation(
            address=address, listen=listen, port=port, supernodes=supernodes, insecure=insecure
        ),
        days=days,
        data_root=data_root.absolute() if data_root else None,
        capture=capture,
    )
    if insecure:
        say(_INSECURE)
    tell(f"written: {folder}; `fedsim deploy start {folder}` starts it here")


@deploy.command(
    "start", cls=Command, short_help="run all of a federation on this machine until Ctrl-C"
)
@folder_argument
def start(folder: Path) -> None:
    """Run the SuperLink, its gateway and all SuperNodes on this machine.

    Ctrl-C ends all of them.
    """
    from fedsim.plugins.deploy.federation import Federation
    from fedsim.plugins.deploy.start import start

    if Federation.read(folder).insecure:
        say(_INSECURE)
    stop = threading.Event()
    # A second one must not leave processes behind; the end takes seconds.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    start(folder, tell, stop)


@deploy.command(
    "register",
    cls=Command,
    short_help="register the keys of all nodes at the SuperLink of this host",
)
@folder_argument
def register(folder: Path) -> None:
    """Register the public keys of all nodes at the SuperLink of this host, each for its client."""
    from fedsim.plugins.deploy.start import register

    register(folder, tell)


@deploy.command("gateway", cls=Command, short_help="let the nodes reach the SuperLink of this host")
@folder_argument
@click.option(
    "--listen", default="", metavar="IP", help="listen there (default: as `init` was told)"
)
def gateway(folder: Path, listen: str) -> None:
    """Pass on to the SuperLink of this host what its nodes may ask, and nothing else.

    It logs the nodes that it refuses.
    """
    from fedsim.plugins.deploy.federation import Federation, Places

    federation = Federation.read(folder)
    if federation.insecure:
        raise InputError(f"{folder} is insecure: its nodes reach the SuperLink itself")

    from fedsim.plugins.deploy.gateway import serve

    serve(Places(folder.absolute()), replace(federation, listen=listen or federation.listen))


@deploy.command(
    "renew",
    cls=Command,
    short_help="make another certificate for the server, or another key for a node",
)
@folder_argument
@click.option(
    "--node",
    type=Whole(),
    metavar="N",
    help="the node of client N, whose key was lost or disclosed",
)
@click.option(
    "--days",
    type=Whole(),
    metavar="DAYS",
    help="validity of the server's certificate (default: 365)",
)
def renew(folder: Path, node: int | None, days: int | None) -> None:
    """Make another certificate for the server, with the key of the authority.

    The SuperLink and the gateway take it when they are started again. With --node, make another key
    for a node instead, to be registered and brought to its host.
    """
    from fedsim.plugins.deploy.init import renew, renew_node

    if node is None:
        renew(folder, days=365 if days is None else days)
        tell(f"written: {folder}/server/server.crt, server.key")
        return
    if days is not None:
        raise InputError("--days is for the server's certificate; a node's key does not expire")
    private, public, replaced = renew_node(folder, node)
    tell(f"written: {private}, for the host of the node")
    tell(f"         {public}, which `fedsim deploy register {folder}` registers")
    if replaced:
        _tell_how_to_unregister(folder, replaced)


def _tell_how_to_unregister(folder: Path, public_key: bytes) -> None:
    from fedsim.plugins.deploy.federation import CONNECTION, Federation, Places
    from fedsim.plugins.deploy.registered import node_id_of

    places = Places(folder.absolute())
    try:
        node: int | str | None = node_id_of(places, Federation.read(folder), public_key)
    except FedsimError as error:
        tell(f"{error}; if it knows the old key, under the id that the node's log says,")
        node = "NODE-ID"
    if node is not None:
        command = f"flwr supernode unregister {node} {CONNECTION}"
        tell(f"FLWR_HOME={shlex.quote(str(places.user))} {command}   (takes the old key away)")


COMMANDS = [deploy]
