"""Flower's pool of Ray workers, watched: late ones are replaced, dead ones explained."""

from __future__ import annotations

import contextlib
import re
import threading
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

    Flower waits for ever for a worker that hangs, keeps one that died in its pool, where it
    swallows the clients to come, and asks workers to leave by a method call, which Ray takes for a
    crash. Ray itself repeats what a worker did that was killed for want of memory without end.
    """

    client_timeout: ClassVar[float | None] = None
    """Seconds that a client may take once a worker is free for it; for ever if None."""
    _latest: ClassVar[SupervisedPool | None] = None

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._everyone: list[Any] = []
        self._calls: dict[Any, tuple[Any, tuple[Any, Any, str, Any]]] = {}
        self._lock = threading.Lock()
        self._ended = False
        SupervisedPool._latest = self

    def add_actors_to_pool(self, num_actors: int) -> None:
        """Start workers and remember them."""
        super().add_actors_to_pool(num_actors)
        self._everyone.extend(self.pool[-num_actors:])

    def submit(self, actor_fn: Any, job: tuple[Any, Any, str, Any]) -> Any:
        """Hand a message to a free worker, and remember it."""
        future = super().submit(actor_fn, job)
        self._calls[future] = (actor_fn, job)
        return future

    def fetch_result_and_return_actor_to_pool(self, future: Any) -> Any:
        """Wait for a worker's answer, and replace the worker where none comes.

        Raises
        ------
        RunFailedError
            When the client took too long, or its worker died again and again.
        """
        call, (app, message, partition, context) = self._calls.pop(future)
        trains = message.metadata.message_type.startswith(MessageType.TRAIN)
        limit = self.client_timeout if trains else None
        answer = future
        deaths = 0
        while True:
            if not ray.wait([answer], timeout=limit)[0]:
                self._replace(future)
                place = f"; it was at {line}" if (line := place_of(int(partition))) else ""
                raise RunFailedError(f"took longer than client-timeout = {limit:g} s{place}")
            try:
                _, reply, after = ray.get(answer)
            except (OutOfMemoryError, RayActorError) as error:
                deaths += 1
                fresh = self._replace(future)
                if deaths > RETRIES:
                    raise RunFailedError(_cause_of_death(error)) from None
                answer = call(fresh, app, message, partition, context)
            else:
                self.add_actor_back_to_pool(future)
                return reply, after

    def _replace(self, future: Any) -> Any:
        with self._lock:
            if self._ended:
                raise RunFailedError("the run has ended")
            # Killed with all it waits for; one that only sleeps would answer a later message.
            unfit: Any = self._future_to_actor[future]
            self._everyone.remove(unfit)
            with contextlib.suppress(RayError):
                ray.kill(unfit, no_restart=True)
            fresh: Any = self.create_actor_fn()  # type: ignore[no-untyped-call]
            self._everyone.append(fresh)
            self._future_to_actor[future] = fresh
            return fresh

    def terminate_all_actors(self) -> None:
        """Kill the workers."""
        with self._lock:
            self._ended = True
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
    if isinstance(error, OutOfMemoryError):
        usage = re.search(r"was ([\d.]+)GB / ([\d.]+)GB .*? threshold of ([\d.]+)", text)
        used = (
            f" with {usage[1]} of {usage[2]} GB in use, at most {float(usage[3]):.0%} allowed"
            if usage
            else ""
        )
        return f"its worker was killed for want of memory{used}; fewer workers need less"
    return f"its worker process died {RETRIES + 1} times, the last time at this client: {text}"
