"""The one door of a federation: what SuperNodes ask of the SuperLink, and nothing else.

A SuperLink serves on one port what its nodes need and what starts runs and registers keys; the
latter asks nobody who he is. So it listens on loopback only, and this stands before it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime
import hashlib
import logging
import resource
import socket
import ssl
import time
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.error.catalog import API_ERROR_MAP
from flwr.supercore.primitives.asymmetric import verify_signature
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from fedsim.core.errors import InputError
from fedsim.plugins.deploy.door import KNOWN, Door
from fedsim.plugins.deploy.federation import Federation, Places, listen_at

MOST_BYTES = 64 * 2**20
"""Most bytes of one request: Flower sends a model in parts of 5 MB."""
_FLEET = "/v1/fleet/"
ROUTES = frozenset(
    _FLEET + what
    for what in (
        *("register-node", "activate-node", "deactivate-node", "unregister-node"),
        *("send-node-heartbeat", "pull-messages", "push-messages", "get-run", "get-fab"),
        *("push-object", "pull-object", "confirm-message-received"),
    )
)
"""All that a SuperNode asks, each by POST."""
_REGISTER, _ACTIVATE = _FLEET + "register-node", _FLEET + "activate-node"
_OF_FLOWER, _OF_HTTP = b"flwr-", (b"accept", b"content-type", b"user-agent")
"""Headers that are passed on: those that begin so, and these."""
_OF_ONE_HOP = {"connection", "content-length", "keep-alive", "transfer-encoding"}
_SECONDS, _SUPERLINK_SECONDS = float(TIMESTAMP_TOLERANCE), 60.0
"""For how long a request may come in, as a signature is valid, and the SuperLink may take."""
_CLOCK_STEP = 1_000_000_000
"""Nanoseconds after which a change of a folder has another time than the one before."""
_REUSE = 4.0
"""Seconds; the SuperLink ends a connection that is idle for five."""
_OF_A_NODE, _MOST_AT_ONCE, _STRANGERS = 4, 256, 256
"""Connections that a node needs at a time, those to the SuperLink, and those without a key."""
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

    Raises
    ------
    InputError
        When a key or a certificate cannot be read, or it cannot listen there.
    """
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    # Certificates and their names are checked below; a warning of each refusal is what is told.
    logging.getLogger("httpx").setLevel(logging.ERROR)
    _, handles = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (handles, handles))
    door(places, federation, listen_at(federation.listen, federation.port)).run()


def door(places: Places, federation: Federation, listener: socket.socket) -> Door:
    """Make the server; parameters as of `serve`, and where it listens."""
    trusted, context = _contexts(places)
    config = uvicorn.Config(
        make_app(federation, trusted, Keys(places, federation)),
        log_config=None,
        access_log=False,
        # The peer of the connection is the one that asks, not the one that a header names.
        proxy_headers=False,
        server_header=False,
        date_header=False,
        ws="none",
        lifespan="off",
        timeout_keep_alive=10,
        timeout_graceful_shutdown=5,
    )
    return Door(config, context, listener, _STRANGERS + _OF_A_NODE * federation.supernodes)


def _contexts(places: Places) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Give what the SuperLink is known by, and what the nodes know this server by."""
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.sslobject_class = _Handshake
        context.load_cert_chain(places.server / "server.crt", places.server / "server.key")
        return ssl.create_default_context(cafile=places.server / "ca.crt"), context
    except OSError as error:
        reason = getattr(error, "reason", None) or error.strerror
        raise InputError(
            f"ca.crt, server.crt and server.key of {places.server} cannot be used: {reason}; "
            "expected those of one federation, and `fedsim deploy renew` makes the server's two"
        ) from None


class Keys:
    """The public keys of the nodes, as they are in the folder at any moment.

    Parameters
    ----------
    places : Places
        Where they are.
    federation : Federation
        How many.

    Raises
    ------
    InputError
        Naming the file that is not a public key.
    """

    def __init__(self, places: Places, federation: Federation) -> None:
        self._paths = [places.public_key(number) for number in range(federation.supernodes)]
        self._read_at = -1
        self._partitions = {_of_file(path): number for number, path in enumerate(self._paths)}

    def partition_of(self, print_: str | None) -> int | None:
        """Give the partition that a key is for, by the key's fingerprint."""
        # A key is replaced by a rename, which its folder notes.
        changed = self._paths[0].parent.stat().st_mtime_ns
        if changed != self._read_at:
            self._partitions = {}
            for number, path in enumerate(self._paths):
                with contextlib.suppress(InputError):
                    self._partitions[_of_file(path)] = number
            # What changed this very moment may change again and bear the same time.
            settled = time.time_ns() - changed > _CLOCK_STEP
            self._read_at = changed if settled else -1
        return self._partitions.get(print_ or "")


def _of_file(path: Path) -> str:
    try:
        return fingerprint(serialization.load_ssh_public_key(path.read_bytes()))
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise InputError(f"{path} is not a public key: {error}") from None


def make_app(federation: Federation, trusted: ssl.SSLContext, keys: Keys) -> ASGIApp:
    """Make the server's app.

    It reads what a node sends only when the node has proven its key, and asks the SuperLink only
    when it has all of it: a node that is slow, or stops, does not keep others waiting.

    Parameters
    ----------
    federation : Federation
        Whose SuperLink is asked.
    trusted : SSLContext
        What the SuperLink is known by.
    keys : Keys
        Of the nodes.
    """
    superlink = httpx.AsyncClient(
        base_url=f"https://127.0.0.1:{federation.own_port}",
        verify=trusted,
        timeout=_SUPERLINK_SECONDS,
        headers={"accept-encoding": "identity"},
        limits=httpx.Limits(
            max_connections=min(_OF_A_NODE * federation.supernodes, _MOST_AT_ONCE),
            keepalive_expiry=_REUSE,
        ),
        trust_env=False,
    )

    async def forward(request: Request) -> Response:
        if refusal := _judge(request, keys):
            return refusal
        request.scope["state"][KNOWN]()
        try:
            async with asyncio.timeout(_SECONDS):
                content = await request.body()
        except ClientDisconnect:
            return Response(status_code=400)
        except TimeoutError:
            reason = f"it took more than {_SECONDS:.0f} s to send a message"
            return _refuse(request, reason, PlainTextResponse(reason, 408))
        # The first of a name is the one that is judged, here and there.
        headers = {
            name: value
            for name, value in reversed(request.headers.raw)
            if name.startswith(_OF_FLOWER) or name in _OF_HTTP
        }
        try:
            answer = await superlink.post(_path(request), headers=headers, content=content)
        except httpx.HTTPError as error:
            _log.warning("the SuperLink does not answer: %s", str(error) or type(error).__name__)
            return PlainTextResponse("the SuperLink does not answer", 503)
        if answer.status_code >= 400:
            partition = keys.partition_of(_fingerprint_of(request))
            reason = _reason(request, answer.status_code, answer.text, partition)
            _log.warning("refused %s: %s", _who(request), reason)
        kept = {k: v for k, v in answer.headers.items() if k not in _OF_ONE_HOP}
        return Response(answer.content, answer.status_code, kept)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        response = await forward(request)
        try:
            async with asyncio.timeout(_SECONDS):
                await response(scope, receive, send)
        except TimeoutError:
            _log.warning("gave up on %s: it does not read what it asked for", _who(request))

    return app


def _judge(request: Request, keys: Keys) -> Response | None:
    """Give the refusal of a request by its headers, or none."""
    path = _path(request)
    if request.method != "POST" or path not in ROUTES or request.scope["query_string"]:
        what = path[:200] if request.method == "POST" else f"{request.method} {path[:200]}"
        answer: Response = PlainTextResponse("for the host of the SuperLink alone", 403)
        return _refuse(request, f"{what} is for this host alone", answer)
    if _length(request) > MOST_BYTES:
        answer = PlainTextResponse(f"a request has at most {MOST_BYTES} bytes", 413)
        return _refuse(request, f"a message of {_length(request)} bytes", answer)
    print_ = _fingerprint_of(request)
    if keys.partition_of(print_) is None:
        if path == _REGISTER:
            code = ApiErrorCode.FLEET_SUPERNODE_REGISTRATION_DISABLED
            reason = "it has no key of its own, and none may register itself"
            return _refuse(request, reason, _as_flower(code))
        answer = _not_authenticated()
        if path == _ACTIVATE:
            answer = _as_flower(ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED)
        reason = "this key is not registered" if print_ else f"{_what(request)} needs a key"
        return _refuse(request, reason, answer)
    if problem := _unproven(request):
        return _refuse(request, problem, _not_authenticated())
    return None


def _refuse(request: Request, reason: str, answer: Response) -> Response:
    _log.warning("refused %s: %s", _who(request), reason)
    return answer


def _as_flower(code: ApiErrorCode) -> Response:
    spec = API_ERROR_MAP[code]
    return JSONResponse(FlowerError(code, "").to_json(spec.public_message), spec.http_status_code)


def _not_authenticated() -> Response:
    # A SuperNode that gets this ends itself.
    return JSONResponse({"detail": "Invalid SuperNode authentication"}, 401)


def _unproven(request: Request) -> str | None:
    """Say why a request is not proven to be of the key that it names, if so."""
    try:
        moment = request.headers[TIMESTAMP_HEADER]
        signature = base64.b64decode(request.headers[FLEET_HTTP_SIGNATURE_HEADER], validate=True)
        behind = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(moment)
        seconds = behind.total_seconds()
        if not verify_signature(_key_of(request), moment.encode(), signature):
            return "its signature was not made with this key"
    except (KeyError, ValueError, TypeError):
        return "it signed nothing"
    if not -SYSTEM_TIME_TOLERANCE < seconds < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
        return f"its clock is {abs(seconds):.0f} s {'behind' if seconds > 0 else 'ahead'}"
    return None


def _path(request: Request) -> str:
    # As it came: what is decoded here may be decoded again there.
    raw: bytes = request.scope["raw_path"]
    return raw.decode("latin-1")


def _what(request: Request) -> str:
    return _path(request).removeprefix(_FLEET)


def _length(request: Request) -> int:
    # Without a length, as no node sends, it is as good as too long.
    text = request.headers.get("content-length", "")
    return int(text) if text.isdecimal() else MOST_BYTES + 1


def _who(request: Request) -> str:
    host = request.client.host if request.client else "somebody"
    print_ = _fingerprint_of(request)
    return f"{host} with the key {print_}" if print_ else f"{host} without a key"


def _key_of(request: Request) -> Any:
    key = base64.b64decode(request.headers[FLEET_HTTP_PUBLIC_KEY_HEADER], validate=True)
    return serialization.load_pem_public_key(key)


def _fingerprint_of(request: Request) -> str | None:
    try:
        return fingerprint(_key_of(request))
    except (KeyError, ValueError, TypeError, UnsupportedAlgorithm):
        return None


def fingerprint(public_key: Any) -> str:
    """Give the fingerprint of a public key as ``ssh-keygen -l`` prints it."""
    line = public_key.public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def _reason(request: Request, status: int, text: str, partition: int | None) -> str:
    error = FlowerError.from_json(text)
    if error is None:
        return f"{_what(request)}: {status} {' '.join(text[:200].split())}"
    if error.code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
        return (
            f"the node of partition {partition} is here already, or its key is not registered yet"
        )
    return f"{_what(request)}: {' '.join(error.message.split())}"
