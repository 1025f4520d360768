"""Flower's pool of Ray workers, watched: late ones are replaced, dead ones explained."""

from __future__ import annotations

import contextlib
import re
from typing import Any, ClassVar

import ray
from flwr.app import MessageType
from flwr.simulation.ray_transport.ray_actor import BasicActorPool
from ray.exceptions import OutOfMemoryError, RayActorError, RayError

from fedsim.core.errors import RunFailedError
from fedsim.flower.scratch import place_of

RETRIES = 2
"""How often a client is repeated whose worker died."""


class SupervisedPool(BasicActorPool):
    """Flower's pool of workers, but for what happens to workers that hang, die or are to end.

    Flower waits for ever for a worker that hangs, says nothing of use of one that died, and asks
    workers to leave by a method call, which Ray takes for a crash and, because our workers may be
    restarted, announces to repeat.
    """

    client_timeout: ClassVar[float | None] = None
    """Seconds that a client may take once a worker is free for it; for ever if None."""
    _latest: ClassVar[SupervisedPool | None] = None

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._everyone: list[Any] = []
        self._clients: dict[Any, int] = {}
        SupervisedPool._latest = self

    def add_actors_to_pool(self, num_actors: int) -> None:
        """Start workers and remember them."""
        super().add_actors_to_pool(num_actors)
        self._everyone.extend(self.pool[-num_actors:])

    def submit(self, actor_fn: Any, job: tuple[Any, Any, str, Any]) -> Any:
        """Hand a message to a free worker, and remember whose training it is."""
        future = super().submit(actor_fn, job)
        _, message, partition, _ = job
        if message.metadata.message_type.startswith(MessageType.TRAIN):
            self._clients[future] = int(partition)
        return future

    def fetch_result_and_return_actor_to_pool(self, future: Any) -> Any:
        """Wait for a worker's answer, replacing the worker where none comes in time.

        Raises
        ------
        RunFailedError
            When the client took too long, or its worker died again and again.
        """
        partition = self._clients.pop(future, None)
        limit = None if partition is None else self.client_timeout
        if not ray.wait([future], timeout=limit)[0]:
            self._replace(future)
            place = f"; it was at {line}" if (line := place_of(partition)) else ""
            raise RunFailedError(f"took longer than client-timeout = {limit:g} s{place}")
        try:
            return super().fetch_result_and_return_actor_to_pool(future)
        except (OutOfMemoryError, RayActorError) as error:
            raise RunFailedError(_cause_of_death(error)) from None

    def _replace(self, future: Any) -> None:
        # Killed with all it waits for; one that only sleeps would answer a later client's message.
        late: Any = self._future_to_actor[future]
        self._everyone.remove(late)
        with contextlib.suppress(RayError):
            ray.kill(late, no_restart=True)
        fresh: Any = self.create_actor_fn()  # type: ignore[no-untyped-call]
        self._everyone.append(fresh)
        self._future_to_actor[future] = fresh

    def terminate_all_actors(self) -> None:
        """Kill the workers."""
        for actor in self._everyone:
            ray.kill(actor, no_restart=True)
        self._everyone.clear()

    @classmethod
    def kill_latest(cls) -> None:
        """Kill the workers of the pool made last, if there is one."""
        if cls._latest is not None:
            cls._latest.terminate_all_actors()


def _cause_of_death(error: RayError) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, OutOfMemoryError) or "memory" in text.lower():
        usage = re.search(r"Memory on the node.*?threshold of [\d.]+", text)
        return "its worker was killed to free memory" + (f": {usage[0]}" if usage else "")
    return f"its worker process died {RETRIES + 1} times, the last time at this client: {text}"
