"""A worker: the Ray actor that trains clients."""

from __future__ import annotations

from typing import Any

import ray
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.simulation.ray_transport.ray_actor import VirtualClientEngineActor


class Duty:
    """What a worker does before its first client and around each; nothing, beside the server."""

    def begin(self) -> bool:
        """Get ready for clients, and say whether their files have to be brought to the server.

        Called once, in the worker.

        Raises
        ------
        InputError
            When its machine cannot take part.
        """
        return False

    def prepare(self, message: Message) -> None:
        """Get ready for one client; called in the worker."""

    def bring_back(self, worker: Any, message: Message) -> None:
        """Bring what a worker's last client recorded to the server; called there.

        Parameters
        ----------
        worker : actor handle
            A `ClientAppWorker` whose `begin` gave True.
        message : Message
            What the client was asked.

        Raises
        ------
        RayError
            When the worker dies meanwhile.
        RunFailedError
            When a file does not arrive whole.
        """


@ray.remote
class ClientAppWorker(VirtualClientEngineActor):
    """A process that trains one client after the other.

    Parameters
    ----------
    app : ClientApp
        What the clients run.
    """

    def __init__(self, app: ClientApp) -> None:
        self._app = app

    def start(self, duty: Duty) -> bool:
        """Take up a duty; gives what its `begin` gives."""
        self._duty = duty
        return duty.begin()

    def run(  # type: ignore[override]
        self, message: Message, cid: str, context: Context
    ) -> Message:
        """Train a client."""
        self._duty.prepare(message)
        _, reply, _ = super().run(lambda: self._app, message, cid, context)
        return reply

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of the duty here."""
        return getattr(self._duty, method)(*arguments)
