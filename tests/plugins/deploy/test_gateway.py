"""The gateway on a port of loopback, before a stand-in for the SuperLink."""

from __future__ import annotations

import base64
import contextlib
import datetime
import json
import logging
import re
import socket
import ssl
import threading

import httpx
import pytest
import uvicorn
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

from fedsim.plugins.deploy import door as door_module
from fedsim.plugins.deploy.certificates import make_node_key
from fedsim.plugins.deploy.federation import Federation, Places
from fedsim.plugins.deploy.gateway import ROUTES, door
from fedsim.plugins.deploy.init import init, renew_node
from tests.patience import PATIENCE
from tests.plugins.deploy.conftest import until
from tests.ports import free_ports

PULL = "/v1/fleet/pull-messages"
STRANGERS = 40


class SuperLink:
    """Answers what it was asked, and keeps it."""

    def __init__(self):
        self.asked = []

    async def __call__(self, scope, receive, send):
        body = b""
        more = True
        while more:
            event = await receive()
            body += event.get("body", b"")
            more = event.get("more_body", False)
        headers = {k.decode(): v.decode() for k, v in scope["headers"]}
        self.asked.append((scope["method"], scope["path"], headers, body))
        start = {"type": "http.response.start", "status": 200, "headers": [(b"x-it", b"is")]}
        await send(start)
        await send({"type": "http.response.body", "body": b"answer to " + body})


@contextlib.contextmanager
def running(server):
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        yield
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


class Here:
    """A gateway that runs, and what reaches the SuperLink."""

    def __init__(self, places, federation, superlink):
        self.places, self.port, self.superlink = places, federation.port, superlink
        self.trusted = ssl.create_default_context(cafile=places.authority)

    def key(self, number):
        content = (self.places.node(number) / "node.key").read_bytes()
        return serialization.load_ssh_private_key(content, None)

    def client(self):
        base = f"https://127.0.0.1:{self.port}"
        return httpx.Client(base_url=base, verify=self.trusted, trust_env=False, timeout=PATIENCE)

    def ask(self, key, path=PULL, content=b"body", **headers):
        with self.client() as client:
            return client.post(path, content=content, headers={**signed(key), **headers})

    def half(self, headers, length=10):
        """Open a connection, send the beginning of a request and no more."""
        plain = socket.create_connection(("127.0.0.1", self.port), 20)
        connection = self.trusted.wrap_socket(plain, server_hostname="127.0.0.1")
        lines = [f"POST {PULL} HTTP/1.1", "host: here", f"content-length: {length}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        return connection


def signed(key, ago=0.0, by=None):
    moment = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=ago)
    signature = (by or key).sign(moment.isoformat().encode(), ec.ECDSA(hashes.SHA256()))
    return {
        "flwr-public-key": base64.b64encode(public_key_to_bytes(key.public_key())).decode(),
        "flwr-timestamp": moment.isoformat(),
        "flwr-signature": base64.b64encode(signature).decode(),
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    places = Places(tmp_path_factory.mktemp("gateway") / "federation")
    federation = Federation(port=free_ports(4), supernodes=2)
    init(places.root, federation)
    superlink = SuperLink()
    config = uvicorn.Config(
        superlink,
        port=federation.own_port,
        log_config=None,
        lifespan="off",
        ssl_certfile=places.server / "server.crt",
        ssl_keyfile=places.server / "server.key",
    )
    with running(uvicorn.Server(config)):
        yield places, federation, superlink


@pytest.fixture
def here(made, monkeypatch):
    places, federation, superlink = made
    superlink.asked.clear()
    monkeypatch.setattr("fedsim.plugins.deploy.gateway._STRANGERS", STRANGERS - 8)
    listener = socket.create_server(("127.0.0.1", federation.port), backlog=512)
    with running(door(places, federation, listener)):
        yield Here(places, federation, superlink)


@pytest.fixture
def lines(caplog):
    """Give the lines of the gateway's log."""
    caplog.set_level(logging.WARNING, "fedsim.gateway")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "fedsim.gateway"]


def test_what_a_node_asks_is_passed_on_and_answered(here, lines):
    content = bytes(range(256)) * 40_000
    answer = here.ask(here.key(0), content=content)
    assert (answer.status_code, answer.content) == (200, b"answer to " + content)
    assert answer.headers["x-it"] == "is"
    ((method, path, _, body),) = here.superlink.asked
    assert (method, path, body) == ("POST", PULL, content)
    assert lines() == []


def test_headers_of_proxies_are_not_passed_on(here, lines):
    spoofed = {"x-forwarded-for": "10.9.9.9", "forwarded": "for=10.9.9.9", "cookie": "a=b"}
    assert here.ask(here.key(0), accept="application/protobuf", **spoofed).status_code == 200
    assert here.ask(make_key(), **spoofed).status_code == 401
    ((_, _, headers, _),) = here.superlink.asked
    assert headers["accept"] == "application/protobuf"
    assert not {"x-forwarded-for", "forwarded", "cookie"} & set(headers)
    (line,) = lines()
    assert line.startswith("refused 127.0.0.1 with the key SHA256:")


def make_key():
    return serialization.load_ssh_private_key(make_node_key("stranger").private_key, None)


@pytest.mark.parametrize(
    ("path", "status", "said", "reason"),
    [
        (PULL, 401, "Invalid SuperNode authentication", "this key is not registered"),
        (
            "/v1/fleet/activate-node",
            412,
            "Failed to activate SuperNode.",
            "this key is not registered",
        ),
        (
            "/v1/fleet/register-node",
            412,
            "SuperNode authentication is enabled. All SuperNodes must be registered via the CLI.",
            "it has no key of its own, and none may register itself",
        ),
    ],
)
def test_a_key_that_is_not_of_the_federation_is_refused_as_flower_does(
    here, lines, path, status, said, reason
):
    answer = here.ask(make_key(), path)
    assert (answer.status_code, json.loads(answer.text)["detail"]) == (status, said)
    assert [line.partition(": ")[2] for line in lines()] == [reason]
    assert here.superlink.asked == []


def test_a_public_key_alone_proves_nothing(here, lines):
    ours = here.key(1)
    late, early = here.ask(ours, **signed(ours, ago=400)), here.ask(ours, **signed(ours, ago=-60))
    with here.client() as client:
        unsigned = {"flwr-public-key": signed(ours)["flwr-public-key"]}
        answers = [
            client.post(PULL, content=b"x"),
            client.post(PULL, content=b"x", headers=unsigned),
            client.post(PULL, content=b"x", headers=signed(ours, by=make_key())),
        ]
    assert {a.status_code for a in (late, early, *answers)} == {401}
    behind, ahead, *told = [line.partition(": ")[2] for line in lines()]
    # Seconds pass between signing and being judged.
    assert re.fullmatch(r"its clock is 4[0-3]\d s behind", behind)
    assert re.fullmatch(r"its clock is (60|[3-5]\d) s ahead", ahead)
    assert told == [
        "pull-messages needs a key",
        "it signed nothing",
        "its signature was not made with this key",
    ]
    assert here.superlink.asked == []


@pytest.mark.parametrize(
    ("method", "path", "told"),
    [
        ("POST", "/v1/control/start-run", "/v1/control/start-run"),
        ("POST", "/v1/fleet/%1b[31m", "/v1/fleet/%1b"),
        ("POST", "/v1/fleet/%252e%252e/control/start-run", "/v1/fleet/%252e%252e/control"),
        ("POST", "/v1/fleet/../fleet/pull-messages", "/v1/fleet/../fleet"),
        ("POST", "/v1/fleet/pull%2dmessages", "/v1/fleet/pull%2dmessages"),
        ("POST", "/v1/fleet/pull-messages/", "/v1/fleet/pull-messages/"),
        ("POST", PULL + "?a=b", PULL),
        ("GET", PULL, "GET " + PULL),
        ("PUT", PULL, "PUT " + PULL),
    ],
)
def test_nothing_is_passed_on_but_what_a_node_asks(here, lines, method, path, told):
    plain = socket.create_connection(("127.0.0.1", here.port), 20)
    headers = "".join(f"{name}: {value}\r\n" for name, value in signed(here.key(0)).items())
    with here.trusted.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
        asked = f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n{headers}\r\nab"
        connection.sendall(asked.encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 403 ")
    (line,) = lines()
    assert f": {told}" in line
    assert line.endswith(" is for this host alone")
    assert here.superlink.asked == []


def test_the_routes_are_those_of_this_flower():
    fleet = {(m, p) for m, p in PROTOBUF_REQUEST_TYPES if p.startswith("/v1/fleet/")}
    assert fleet == {("POST", route) for route in ROUTES}


def test_who_has_no_key_keeps_nobody_out(here, lines, monkeypatch):
    """With more half requests and idle connections than there may be of any kind."""
    held = [here.half({}) for _ in range(STRANGERS + 5)]
    for connection in held[-5:]:
        assert connection.recv(1000).startswith(b"HTTP/1.1 401 ")
    idle = [socket.create_connection(("127.0.0.1", here.port)) for _ in range(3 * STRANGERS)]
    assert here.ask(here.key(0)).status_code == 200
    # The first ones had to make room.
    assert everything(idle[0]) == b""
    assert len(here.superlink.asked) == 1
    assert [line for line in lines() if "dropped" in line] == [
        f"dropped a connection of 127.0.0.1: {STRANGERS} of {STRANGERS} that have shown no key "
        "are from there"
    ]
    for connection in [*held, *idle]:
        connection.close()


def everything(connection):
    """Read until the other end ends it."""
    said = b""
    with connection, contextlib.suppress(ConnectionError, ssl.SSLError):
        while part := connection.recv(1000):
            said += part
    return said


def test_who_shows_no_key_in_time_is_sent_away(here, monkeypatch):
    # What must be in time here takes milliseconds, on a busy machine more.
    monkeypatch.setattr(door_module, "_GREETING", 2.0)
    plain = socket.create_connection(("127.0.0.1", here.port), 20)
    silent = here.trusted.wrap_socket(
        socket.create_connection(("127.0.0.1", here.port), 20), server_hostname="127.0.0.1"
    )
    refused = here.half({})
    with here.client() as node:
        assert node.post(PULL, content=b"1", headers=signed(here.key(0))).status_code == 200
        for connection, said in ((plain, b""), (silent, b""), (refused, b"HTTP/1.1 401")):
            assert everything(connection)[:12] == said
        # One that is known is not: it asks again on the same connection.
        answer = node.post(PULL, content=b"2", headers=signed(here.key(0)))
        assert answer.content == b"answer to 2"


def test_a_slow_node_keeps_no_other_from_the_superlink(here):
    """Of the 8 connections to the SuperLink none is taken before a message is whole."""
    slow = [here.half(signed(here.key(0))) for _ in range(20)]
    assert here.ask(here.key(1)).status_code == 200
    slow[0].sendall(b"0123456789")
    assert slow[0].recv(1000).startswith(b"HTTP/1.1 200 ")
    assert [body for *_, body in here.superlink.asked] == [b"body", b"0123456789"]
    for connection in slow:
        connection.close()


def test_a_message_that_does_not_come_is_given_up(here, lines, monkeypatch):
    monkeypatch.setattr("fedsim.plugins.deploy.gateway._SECONDS", 0.2)
    with here.half(signed(here.key(0))) as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")
    assert [line.partition(": ")[2] for line in lines()] == [
        "it took more than 0 s to send a message"
    ]


@pytest.mark.parametrize("length", [2**26 + 1, 10**19])
def test_too_large_a_message_is_refused_before_it_comes(here, lines, length):
    with here.half(signed(here.key(0)), length) as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
    assert [line.partition(": ")[2] for line in lines()] == [f"a message of {length} bytes"]


def test_a_key_that_was_replaced_is_refused_at_once_and_the_new_one_let_in(here):
    before = here.key(1)
    assert here.ask(before).status_code == 200
    renew_node(here.places.root, 1)
    assert here.ask(before).status_code == 401
    assert here.ask(here.key(1)).status_code == 200
    assert here.ask(here.key(0)).status_code == 200


def test_a_superlink_that_is_away_is_told_with_its_reason(made, lines):
    places, *_ = made
    away = Federation(port=free_ports(4), supernodes=2)
    listener = socket.create_server(("127.0.0.1", away.port))
    with running(door(places, away, listener)):
        here = Here(places, away, None)
        assert here.ask(here.key(0)).status_code == 503
    assert lines() == ["the SuperLink does not answer: All connection attempts failed"]
