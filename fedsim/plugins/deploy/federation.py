"""What a federation is, where its files are, and how its processes are started."""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fedsim.core.errors import ConfigError, InputError

CONNECTION = "federation"
"""The name of the federation for ``flwr run``."""
_MOST_SUPERNODES = 10_000
_BACKLOG = 2048


@dataclass(frozen=True, kw_only=True)
class Federation:
    """A SuperLink, and SuperNodes that hold one partition each.

    Parameters
    ----------
    address : str
        Host name or IP address by which the nodes reach the server.
    listen : str
        IP address of the server's host at which it takes their connections, which is another one
        in a container and behind a router. Empty for `address` where that is the host itself, and
        all addresses of the host otherwise.
    port : int
        Port for the nodes. The next one is the SuperLink's own, on loopback only, and those that
        follow are those of SuperNodes on this machine.
    supernodes : int
        How many; node `i` holds partition `i`.
    insecure : bool
        Without TLS and without keys.

    Raises
    ------
    ConfigError
        Naming the value that cannot be.
    """

    address: str = "127.0.0.1"
    listen: str = ""
    port: int = 9092
    supernodes: int = 4
    insecure: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.supernodes <= _MOST_SUPERNODES:
            raise ConfigError("supernodes", self.supernodes, f"1 to {_MOST_SUPERNODES}")
        last = 65_535 - 1 - self.supernodes
        if not 1 <= self.port <= last:
            raise ConfigError("port", self.port, f"1 to {last}, the ports after it being used too")
        if not is_host(self.address):
            allowed = "a host name or an IP address by which one host is reached, without a zone"
            raise ConfigError("address", self.address, allowed)
        if not self.listen:
            object.__setattr__(self, "listen", _listen_for(self.address))
        if _ip(self.listen) is None:
            raise ConfigError("listen", self.listen, "an IP address of the server's host")

    @property
    def own_port(self) -> int:
        """Port of the SuperLink itself; with the gateway before it, not that of the nodes."""
        return self.port if self.insecure else self.port + 1

    def port_of(self, node: int) -> int:
        """Port on which a SuperNode of this machine talks to its own processes."""
        return self.port + 2 + node

    @property
    def here(self) -> str:
        """Address by which the server's host itself reaches the port for the nodes."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.listen, self.listen)  # noqa: S104

    @property
    def hosts(self) -> list[str]:
        """Names that the certificate of the server is valid for."""
        return list(dict.fromkeys([self.address, "localhost", "127.0.0.1"]))

    def to_toml(self) -> str:
        """Write it as `read` takes it."""
        values = {
            "address": self.address,
            "listen": self.listen,
            "port": self.port,
            "supernodes": self.supernodes,
            "insecure": self.insecure,
        }
        return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the federation of a folder.

        Raises
        ------
        InputError
            When it is not a folder of `fedsim deploy init`.
        """
        path = Places(folder).federation
        try:
            values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
            return cls(**values)
        except FileNotFoundError:
            raise InputError(
                f"{folder} is not a federation; expected a folder that `fedsim deploy init` made"
            ) from None
        except (OSError, TypeError, ValueError) as error:
            raise InputError(f"{path} cannot be read: {error}") from None


@dataclass(frozen=True)
class Places:
    """Where the files of a federation are.

    Parameters
    ----------
    root : Path
        Its folder.
    """

    root: Path

    @property
    def federation(self) -> Path:
        """What `Federation.read` reads."""
        return self.root / "federation.toml"

    @property
    def authority(self) -> Path:
        """The certificate of the authority, which may be known to all."""
        return self.root / "ca" / "ca.crt"

    @property
    def authority_key(self) -> Path:
        """The key of the authority, needed for nothing but another certificate."""
        return self.root / "ca" / "ca.key"

    @property
    def server(self) -> Path:
        """Folder of the host of the SuperLink."""
        return self.root / "server"

    @property
    def user(self) -> Path:
        """Folder that ``FLWR_HOME`` names for the users who start runs."""
        return self.root / "flwr"

    @property
    def logs(self) -> Path:
        """Folder of what the processes of this machine print."""
        return self.root / "logs"

    def public_key(self, number: int) -> Path:
        """Give the public key of a node, as the host of the SuperLink keeps it."""
        return self.server / "nodes" / f"{number}.pub"

    def node_config(self, number: int) -> Path:
        """Give what says which data a node has; where it is, the node is."""
        return self.node(number) / "node.toml"

    def node(self, number: int) -> Path:
        """Give the folder of a node; it is all that its host needs."""
        return self.root / "nodes" / str(number)


def listen_at(host: str, port: int) -> socket.socket:
    """Listen at an address of this host; at `::`, for both kinds of addresses.

    Raises
    ------
    InputError
        When that cannot be.
    """
    try:
        if ":" not in host:
            return socket.create_server((host, port), backlog=_BACKLOG)
        return socket.create_server(
            (host, port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=host == "::"
        )
    except OSError as error:
        raise InputError(
            f"{at(host, port)} cannot be listened on: {os.strerror(error.errno or 0)}; expected "
            "an address of this host, with a port that is free"
        ) from None


def _listen_for(address: str) -> str:
    ip = _ip(address)
    if address == "localhost" or (ip is not None and ip.is_loopback):
        return "127.0.0.1" if ip is None else address
    return "0.0.0.0" if ip is None or ip.version == 4 else "::"  # noqa: S104 - behind the gateway


def _ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        # With a zone it is one host's name for one of its links.
        return None if "%" in text else ipaddress.ip_address(text)
    except ValueError:
        return None


def is_host(text: str) -> bool:
    """Say whether a text may be the name or the IP address of one host."""
    if ip := _ip(text):
        return not (ip.is_unspecified or ip.is_multicast)
    labels = text.split(".")
    # What ends in a number is a wrong IP address, and no name.
    return (
        len(text) <= 253
        and not labels[-1].isdecimal()
        and all(
            0 < len(label) <= 63
            and label.isascii()
            and label.replace("-", "a").isalnum()
            and label[0] != "-" != label[-1]
            for label in labels
        )
    )


def at(host: str, port: int) -> str:
    """Join a host and a port."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def superlink_command(federation: Federation) -> list[str]:
    """Give the command of the SuperLink, run in the folder of the server."""
    host = federation.listen if federation.insecure else "127.0.0.1"
    command = ["flower-superlink", "--host", host, "--port", str(federation.own_port)]
    if federation.insecure:
        return [*command, "--insecure"]
    return [
        *command,
        *("--ssl-ca-certfile", "ca.crt"),
        *("--ssl-certfile", "server.crt"),
        *("--ssl-keyfile", "server.key"),
        "--enable-supernode-auth",
    ]


def supernode_command(federation: Federation, node: int) -> list[str]:
    """Give the command of a SuperNode, run in the folder of the node."""
    command = [
        *("flower-supernode", "--superlink", at(federation.address, federation.port)),
        *("--node-config", "node.toml", "--port", str(federation.port_of(node))),
    ]
    if federation.insecure:
        return [*command, "--insecure"]
    return [
        *command,
        *("--root-certificates", "ca.crt", "--auth-supernode-private-key", "node.key"),
    ]


def register_command(node: int, key: str) -> list[str]:
    """Give the command that registers the public key of a node for its partition."""
    return ["flwr", "supernode", "register", key, CONNECTION, "--name", f"partition-{node}"]


def environment(home: Path) -> dict[str, str]:
    """Give the environment of Flower's commands, which keep what they need in a folder."""
    # Flower starts its other commands by their names.
    commands = Path(sys.executable).parent
    return {
        **os.environ,
        **dict(VARIABLES),
        "PATH": f"{commands}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "FLWR_HOME": str(home),
    }


VARIABLES = (
    ("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1"),
    ("FLWR_DISABLE_UPDATE_CHECK", "1"),
    ("FLWR_TELEMETRY_ENABLED", "0"),
)
"""With these Flower installs nothing for a run, and tells nobody of it."""
