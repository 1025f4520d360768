"""The one door of a federation: what SuperNodes ask of the SuperLink, and nothing else.

A SuperLink serves on one port what its nodes need and what starts runs and registers keys; the
latter asks nobody who he is. So it listens on loopback only, and this stands before it.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import ssl
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx
import uvicorn
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from flwr.supercore.error import ApiErrorCode, FlowerError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from fedsim.core.errors import InputError
from fedsim.deploy.federation import Federation, Places

MOST_BYTES = 64 * 2**20
"""Most bytes of one request: Flower sends a model in parts of 5 MB."""
_FLEET = "/v1/fleet/"
_PUBLIC_KEY = "flwr-public-key"
_OF_ONE_HOP = {"connection", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"}
_HANDSHAKES = {
    "HTTP_REQUEST": "plain HTTP where TLS is needed",
    "TLSV1_ALERT_UNKNOWN_CA": "it does not trust the authority of this federation",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "the certificate of this server has expired",
}

_log = logging.getLogger("fedsim.gateway")


class _Handshake(ssl.SSLObject):
    """Tells why a handshake failed, of which asyncio says nothing."""

    def do_handshake(self) -> None:
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            reason = error.reason or str(error)
            _log.warning("refused a connection: %s", _HANDSHAKES.get(reason, reason))
            raise


def serve(places: Places, federation: Federation) -> None:
    """Let the nodes in until the process is told to end.

    Parameters
    ----------
    places : Places
        Where the certificates are.
    federation : Federation
        Where to listen, and before whom.
    """
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    # Certificates and their names are checked below; a warning of each refusal is what is told.
    logging.getLogger("httpx").setLevel(logging.ERROR)
    certificate, key = places.server / "server.crt", places.server / "server.key"
    config = uvicorn.Config(
        make_app(
            federation,
            ssl.create_default_context(cafile=places.server / "ca.crt"),
            partitions_of_keys(places, federation),
        ),
        host=federation.address,
        port=federation.port,
        ssl_certfile=certificate,
        ssl_keyfile=key,
        log_config=None,
        access_log=False,
    )
    config.load()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.sslobject_class = _Handshake
    context.load_cert_chain(certificate, key)
    config.ssl = context
    uvicorn.Server(config).run()


def make_app(
    federation: Federation, trusted: ssl.SSLContext | bool, partitions: Mapping[str, int]
) -> Starlette:
    """Make the server's app.

    Parameters
    ----------
    federation : Federation
        Whose SuperLink is asked.
    trusted : SSLContext or bool
        What the SuperLink is known by.
    partitions : mapping of str to int
        Fingerprint of each node's key, and its partition.
    """
    superlink = httpx.AsyncClient(
        base_url=f"https://127.0.0.1:{federation.own_port}", verify=trusted, timeout=60.0
    )

    async def forward(request: Request) -> Response:
        who = _who(request)
        if not request.url.path.startswith(_FLEET) or ".." in request.url.path:
            _log.warning("refused %s: %s is for this host alone", who, request.url.path)
            return PlainTextResponse("for the host of the SuperLink alone", 403)
        if _length(request) > MOST_BYTES:
            _log.warning("refused %s: a message of %d bytes", who, _length(request))
            return PlainTextResponse(f"a request has at most {MOST_BYTES} bytes", 413)
        kept = [(k, v) for k, v in request.headers.raw if k.decode("latin-1") not in _OF_ONE_HOP]
        asked = superlink.build_request(
            request.method, request.url.path, headers=kept, content=request.stream()
        )
        try:
            answer = await superlink.send(asked, stream=True)
        except ClientDisconnect:
            return Response(status_code=400)
        except httpx.HTTPError as error:
            _log.warning("the SuperLink does not answer: %s", error or type(error).__name__)
            return PlainTextResponse("the SuperLink does not answer", 503)
        if answer.status_code >= 400:
            text = (await answer.aread()).decode("utf-8", "replace")
            _log.warning(
                "refused %s: %s", who, _reason(request, answer.status_code, text, partitions)
            )
        return StreamingResponse(_body(answer), answer.status_code, headers=_single(answer.headers))

    return Starlette(routes=[Route("/{path:path}", forward, methods=["GET", "POST"])])


async def _body(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        if answer.is_stream_consumed:
            yield answer.content
        else:
            async for part in answer.aiter_raw():
                yield part
    finally:
        await answer.aclose()


def _single(headers: httpx.Headers) -> dict[str, str]:
    return {k: v for k, v in headers.items() if k.lower() not in _OF_ONE_HOP}


def _length(request: Request) -> int:
    # Without a length, as no node sends, it is as good as too long.
    text = request.headers.get("content-length", "")
    empty = request.method == "GET"
    return int(text) if text.isdecimal() else (0 if empty else MOST_BYTES + 1)


def _who(request: Request) -> str:
    host = request.client.host if request.client else "somebody"
    print_ = _fingerprint_of(request)
    return f"{host} with the key {print_}" if print_ else f"{host} without a key"


def _fingerprint_of(request: Request) -> str | None:
    try:
        key = base64.b64decode(request.headers[_PUBLIC_KEY], validate=True)
        return fingerprint(serialization.load_pem_public_key(key))
    except (KeyError, ValueError, TypeError, UnsupportedAlgorithm):
        return None


def fingerprint(public_key: Any) -> str:
    """Give the fingerprint of a public key as ``ssh-keygen -l`` prints it."""
    line = public_key.public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def partitions_of_keys(places: Places, federation: Federation) -> dict[str, int]:
    """Give the partition for which each key is to be registered, by the key's fingerprint.

    Raises
    ------
    InputError
        Naming the file that is no public key.
    """
    found = {}
    for number in range(federation.supernodes):
        path = places.public_key(number)
        try:
            found[fingerprint(serialization.load_ssh_public_key(path.read_bytes()))] = number
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            raise InputError(f"{path} is no public key: {error}") from None
    return found


def _reason(request: Request, status: int, text: str, partitions: Mapping[str, int]) -> str:
    error = FlowerError.from_json(text)
    what = request.url.path.removeprefix(_FLEET)
    if error is None:
        return f"{what}: {status} {' '.join(text[:200].split())}"
    if error.code == ApiErrorCode.FLEET_SUPERNODE_REGISTRATION_DISABLED:
        return "it has no key of its own, and none may register itself"
    if error.code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
        number = partitions.get(_fingerprint_of(request) or "")
        if number is None:
            return "this key is not registered"
        return f"the node of partition {number} is here already, or its key is not registered yet"
    return f"{what}: {' '.join(error.message.split())}"
