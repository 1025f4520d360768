"""Flower's pool of Ray workers, watched: late ones are replaced, dead ones explained."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from typing import Any, ClassVar

import ray
from flwr.app import MessageType
from flwr.simulation.ray_transport.ray_actor import BasicActorPool
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
)

from fedsim.core.errors import InputError, RunFailedError, RunInterruptedError
from fedsim.flower.actor import ClientAppWorker, Duty
from fedsim.flower.scratch import place_of

RETRIES = 2
"""How often a client is repeated whose worker died."""
_POLL, _PATIENCE = 0.2, 600.0
"""Seconds between looks at workers that start, and to wait for one where none is left."""
_LOST = (NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError)
"""What Ray raises where a worker is gone, or its node with what the worker had returned."""


class SupervisedPool(BasicActorPool):
    """Flower's pool of workers, but for what happens to workers that hang, die or are to end.

    Flower waits for ever for a worker that hangs, keeps one that died in its pool, where it
    swallows the clients to come, and asks workers to leave by a method call, which Ray takes for a
    crash. Ray itself repeats what a worker did that was killed for want of memory without end.

    A worker takes clients once it has started. One that is lost is asked for anew; where the
    cluster has no room for it, since a whole node was lost, the others do its work until there is.
    """

    client_timeout: ClassVar[float | None] = None
    """Seconds that a client may take once a worker is free for it; for ever if None."""
    most: ClassVar[int] = 1
    """Workers to start, where there is room for as many."""
    duty: ClassVar[Duty] = Duty()
    """What workers do before their first client, and around each."""
    ready: ClassVar[threading.Event] = threading.Event()
    """Set once a worker has started, or none can be."""
    _latest: ClassVar[SupervisedPool | None] = None

    def __init__(
        self, actor_type: Any, client_resources: dict[str, Any], actor_kwargs: dict[str, Any]
    ) -> None:
        super().__init__(ClientAppWorker, client_resources, actor_kwargs)
        worker_type: Any = ClientAppWorker
        self.create_actor_fn = lambda: worker_type.options(
            **client_resources, scheduling_strategy="SPREAD"
        ).remote()
        self.actors_capacity = min(self.actors_capacity, self.most)
        self._everyone: list[Any] = []
        self._starting: dict[Any, Any] = {}
        self._away: set[Any] = set()
        self._calls: dict[Any, tuple[Any, tuple[Any, Any, str, Any]]] = {}
        self._changed = threading.Condition()
        self._failed_starts = 0
        self._refusal = ""
        self._ended = False
        self._recruiter = threading.Thread(target=self._recruit, daemon=True)
        SupervisedPool._latest = self

    def add_actors_to_pool(self, num_actors: int) -> None:
        """Ask for workers; each takes clients once it has started."""
        with self._changed:
            for _ in range(num_actors):
                self._ask()
        self.num_actors += num_actors
        self._recruiter.start()

    def submit(self, actor_fn: Any, job: tuple[Any, Any, str, Any]) -> Any:
        """Hand a message to a worker once one is free, and remember it."""
        worker = self._take()
        future = actor_fn(worker, *job)
        with self._changed:
            self._future_to_actor[future] = worker
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
                worker = self._future_to_actor[future]
                if worker in self._away:
                    self.duty.bring_back(worker, message)
            except _LOST as error:
                deaths += 1
                self._replace(future)
                if deaths > RETRIES:
                    raise RunFailedError(_cause_of_death(error)) from None
                fresh = self._future_to_actor[future] = self._take()
                answer = call(fresh, app, message, partition, context)
            else:
                self.add_actor_back_to_pool(future)
                return reply, after

    def add_actor_back_to_pool(self, future: Any) -> None:
        """Let the worker that had a message take the next, unless it was replaced."""
        with self._changed:
            if worker := self._future_to_actor.pop(future, None):
                self.pool.append(worker)
                self._changed.notify()

    def _take(self) -> Any:
        """Give a free worker as soon as there is one."""
        none_since = None
        with self._changed:
            while not self.pool:
                if self._ended:
                    raise RunFailedError("the run has ended")
                if not self._everyone:
                    raise RunFailedError(f"no worker could be started: {self._refusal}")
                if len(self._everyone) > len(self._starting):
                    none_since = None
                elif none_since is None:
                    none_since = time.monotonic()
                elif time.monotonic() - none_since > _PATIENCE:
                    raise RunFailedError(f"no worker could be started for {_PATIENCE:.0f} s")
                self._changed.wait(1)
            return self.pool.pop()

    def _ask(self) -> None:
        worker: Any = self.create_actor_fn()  # type: ignore[no-untyped-call]
        self._everyone.append(worker)
        self._starting[worker.start.remote(self.duty)] = worker
        self._changed.notify_all()

    def _recruit(self) -> None:
        """Let workers take clients as they come, however late."""
        while True:
            with self._changed:
                while not self._starting and not self._ended:
                    self._changed.wait()
                if self._ended:
                    return
                started = list(self._starting)
            for start in ray.wait(started, timeout=_POLL)[0]:
                self._welcome(start)

    def _welcome(self, start: Any) -> None:
        error: Exception | None = None
        is_away = False
        try:
            is_away = ray.get(start)
        except (RayError, InputError) as failure:
            error = failure
        with self._changed:
            worker = self._starting.pop(start, None)
            if worker is None or self._ended:
                return
            if error is None:
                self._failed_starts = 0
                if is_away:
                    self._away.add(worker)
                self.pool.append(worker)
                self.ready.set()
            else:
                self._drop(worker)
                self._failed_starts += 1
                self._refusal = _reason_of(error)
                if self._failed_starts <= RETRIES:
                    self._ask()
                if not self._everyone:
                    self.ready.set()
            self._changed.notify_all()

    def _replace(self, future: Any) -> None:
        with self._changed:
            if self._ended:
                raise RunFailedError("the run has ended")
            self._drop(self._future_to_actor.pop(future))
            self._failed_starts = 0
            self._ask()

    def _drop(self, worker: Any) -> None:
        self._everyone.remove(worker)
        self._away.discard(worker)
        # Killed with all it waits for; one that only sleeps would answer a later message.
        with contextlib.suppress(RayError):
            ray.kill(worker, no_restart=True)

    def terminate_all_actors(self) -> None:
        """Kill the workers."""
        with self._changed:
            self._ended = True
            for worker in self._everyone:
                ray.kill(worker, no_restart=True)
            self._everyone.clear()
            self._starting.clear()
            self.pool.clear()
            self._changed.notify_all()
        # Asked by a thread after it is gone, Ray would start an engine of its own.
        if self._recruiter.ident is not None:
            self._recruiter.join()

    @classmethod
    def await_first(cls, stop: threading.Event, patience: float) -> None:
        """Wait until a worker of the pool made last has started.

        Raises
        ------
        RunInterruptedError
            Once the stop event is set.
        RunFailedError
            When none can be started.
        """
        limit = time.monotonic() + patience
        while not cls.ready.wait(_POLL):
            if stop.is_set():
                raise RunInterruptedError("interrupted")
            if time.monotonic() > limit:
                raise RunFailedError(f"no worker could be started for {patience:.0f} s")
        if cls._latest is not None and not cls._latest._everyone:
            raise RunFailedError(f"no worker could be started: {cls._latest._refusal}")

    @classmethod
    def kill_latest(cls) -> None:
        """Kill the workers of the pool made last, if there is one."""
        if cls._latest is not None:
            cls._latest.terminate_all_actors()


def _reason_of(error: Exception) -> str:
    """Say in a line why a worker did not start."""
    if isinstance(error, OutOfMemoryError):
        return f"the last was {_want_of_memory(error)}"
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def _cause_of_death(error: RayError) -> str:
    if isinstance(error, OutOfMemoryError):
        return f"its worker was {_want_of_memory(error)}"
    text = " ".join(str(error).split())
    return f"its worker process died {RETRIES + 1} times, the last time at this client: {text}"


def _want_of_memory(error: OutOfMemoryError) -> str:
    text = " ".join(str(error).split())
    usage = re.search(r"was ([\d.]+)GB / ([\d.]+)GB .*? threshold of ([\d.]+)", text)
    used = (
        f" with {usage[1]} of {usage[2]} GB in use, at most {float(usage[3]):.0%} allowed"
        if usage
        else ""
    )
    return f"killed for want of memory{used}; fewer workers need less"
