"""A server with TLS that those without a key cannot fill."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from collections import Counter
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

KNOWN = "known"
"""What an app calls from the state of a request once it knows who asks."""
_GREETING, _PARTING = 20.0, 5.0
"""Seconds in which a peer must show its key, and in which TLS is ended."""
_QUIET = 60.0
"""Seconds until the same thing is told again."""
_NO_HANDLES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

_log = logging.getLogger("fedsim.gateway")


class Door(uvicorn.Server):
    """A server that keeps a bounded number of strangers, each for a bounded time.

    A connection is a stranger's until the app knows who asks. When there are too many, the oldest
    one of the address that has the most makes room: one address can only drive out itself.

    Parameters
    ----------
    config : uvicorn.Config
        The app, and what is said of HTTP.
    context : SSLContext
        The certificate.
    listener : socket
        Where to listen; closed at the end.
    strangers : int
        How many there may be at a time.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        context: ssl.SSLContext,
        listener: socket.socket,
        strangers: int,
    ) -> None:
        super().__init__(config)
        self._context = context
        self._listener = listener
        self._listener.setblocking(False)
        self._most = strangers
        self._strangers: dict[asyncio.Task[None], str] = {}
        self._accepting: asyncio.Task[None] | None = None
        self._told = -_QUIET

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen; uvicorn itself listens nowhere."""
        await super().startup(sockets=[])
        self._accepting = asyncio.create_task(self._accept())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen no more, send strangers away and wait for the others."""
        ended = [task for task in (self._accepting, *self._strangers) if task]
        for task in ended:
            task.cancel()
        await asyncio.gather(*ended, return_exceptions=True)
        self._listener.close()
        await super().shutdown(sockets=[])

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(self._listener)
            except OSError as error:
                if error.errno in _NO_HANDLES:
                    self._tell(f"cannot take a connection: {error.strerror}")
                    await asyncio.sleep(1.0)
                continue
            if len(self._strangers) >= self._most:
                self._make_room()
            task = loop.create_task(self._meet(connection))
            self._strangers[task] = address[0]
            task.add_done_callback(lambda done: self._strangers.pop(done, None))

    def _make_room(self) -> None:
        ((host, count),) = Counter(self._strangers.values()).most_common(1)
        oldest = next(task for task, of in self._strangers.items() if of == host)
        del self._strangers[oldest]
        oldest.cancel()
        self._tell(
            f"dropped a connection of {host}: {count} of {self._most} that have shown no key are "
            "from there"
        )

    async def _meet(self, connection: socket.socket) -> None:
        """Wait until a stranger is known; end the connection of one who is not in time."""
        visit = _Visit(self.config, self.server_state, self.lifespan.state)
        try:
            async with asyncio.timeout(_GREETING):
                await asyncio.get_running_loop().connect_accepted_socket(
                    lambda: visit,
                    connection,
                    ssl=self._context,
                    ssl_handshake_timeout=_GREETING,
                    ssl_shutdown_timeout=_PARTING,
                )
                await visit.met.wait()
        except OSError:
            # Out of time, gone, or without TLS, which the handshake itself tells.
            pass
        finally:
            visit.end_unless_met()

    def _tell(self, line: str) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._told >= _QUIET:
            self._told = now
            _log.warning("%s", line)


class _Visit(H11Protocol):
    """A connection, which the app makes known by its first proof of a key.

    Of uvicorn's two protocols the one that bounds the size of headers.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: Any,
        app_state: dict[str, Any],
    ) -> None:
        self.met = asyncio.Event()
        super().__init__(config, server_state, {**app_state, KNOWN: self.met.set})

    def end_unless_met(self) -> None:
        if self.transport is not None and not self.met.is_set():
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.met.set()
