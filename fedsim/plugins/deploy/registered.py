"""Which nodes the SuperLink of this host knows, by their keys."""

from __future__ import annotations

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.proto.control_pb2 import ListNodesRequest
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedsim.core.errors import RunFailedError
from fedsim.plugins.deploy.federation import Federation, Places, at

_GONE = "unregistered"


def node_id_of(places: Places, federation: Federation, public_key: bytes) -> int | None:
    """Ask the SuperLink under which id a key is registered, if it is.

    Parameters
    ----------
    places : Places
        Where the certificate of the authority is.
    federation : Federation
        Whose SuperLink is asked.
    public_key : bytes
        One line as OpenSSH writes it.

    Raises
    ------
    RunFailedError
        When the SuperLink does not answer.
    """
    key = load_ssh_public_key(public_key)
    wanted = public_key_to_bytes(key) if isinstance(key, ec.EllipticCurvePublicKey) else b""
    address = at("127.0.0.1", federation.own_port)
    client = ControlHttpClient.from_server_address(
        address, False, places.authority.read_bytes(), interceptors=[]
    )
    try:
        nodes = client.ListNodes(ListNodesRequest()).nodes_info
    except httpx.HTTPError as error:
        raise RunFailedError(f"the SuperLink at {address} does not answer: {error}") from None
    finally:
        client.close()
    found = (n.node_id for n in nodes if n.public_key == wanted and n.status != _GONE)
    return next(found, None)
