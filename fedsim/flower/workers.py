"""The workers of a run, watched: late ones are replaced, dead ones explained."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from typing import Any

import ray
from flwr.app import Context, Message, MessageType
from flwr.clientapp import ClientApp
from flwr.simulation.ray_transport.ray_actor import pool_size_from_resources
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


class Workers:
    """Ray actors that run clients: those that hang or die are replaced, and it is said why.

    Flower waits for ever for a worker that hangs, keeps one that died in its pool, where it
    swallows the clients to come, and asks workers to leave by a method call, which Ray takes for a
    crash. Ray itself repeats what a worker did that was killed for want of memory without end.

    A worker takes clients once it has started. One that is lost is asked for anew; where the
    cluster has no room for it, since a whole node was lost, the others do its work until there is.

    Parameters
    ----------
    app : ClientApp
        What the clients run.
    resources : dict of str to float
        ``num_cpus`` and ``num_gpus`` of each worker.
    most : int
        Workers to start, where there is room for as many.
    client_timeout : float or None
        Seconds that a client may take once a worker is free for it; for ever if None.
    duty : Duty
        What workers do before their first client, and around each.

    Attributes
    ----------
    count : int
        Workers that were asked for.

    Raises
    ------
    ValueError
        When there is no room for a single one.
    """

    def __init__(
        self,
        app: ClientApp,
        resources: dict[str, int | float],
        *,
        most: int,
        client_timeout: float | None,
        duty: Duty,
    ) -> None:
        self._app = app
        self._resources = resources
        self._client_timeout = client_timeout
        self._duty = duty
        self._idle: list[Any] = []
        self._everyone: list[Any] = []
        self._starting: dict[Any, Any] = {}
        self._away: set[Any] = set()
        self._changed = threading.Condition()
        self._failed_starts = 0
        self._refusal = ""
        self._ended = False
        self._ready = threading.Event()
        self._recruiter = threading.Thread(target=self._recruit, daemon=True)
        self.count = min(pool_size_from_resources(resources), most)
        with self._changed:
            for _ in range(self.count):
                self._ask()
        self._recruiter.start()

    def run(self, message: Message, client: int, context: Context) -> Message:
        """Let a worker answer a message once one is free, and replace it where it does not.

        Raises
        ------
        RunFailedError
            When the client took too long, or its worker died again and again.
        RayTaskError
            What the client raised.
        """
        trains = message.metadata.message_type.startswith(MessageType.TRAIN)
        limit = self._client_timeout if trains else None
        deaths = 0
        while True:
            worker = self._take()
            answer = worker.run.remote(message, str(client), context)
            if not ray.wait([answer], timeout=limit)[0]:
                self._replace(worker)
                place = f"; it was at {line}" if (line := place_of(client)) else ""
                raise RunFailedError(f"took longer than client-timeout = {limit:g} s{place}")
            try:
                reply: Message = ray.get(answer)
                if worker in self._away:
                    self._duty.bring_back(worker, message)
            except _LOST as error:
                deaths += 1
                self._replace(worker)
                if deaths > RETRIES:
                    raise RunFailedError(_cause_of_death(error)) from None
                continue
            except BaseException:
                self._give_back(worker)
                raise
            self._give_back(worker)
            return reply

    def _give_back(self, worker: Any) -> None:
        with self._changed:
            self._idle.append(worker)
            self._changed.notify()

    def _take(self) -> Any:
        """Give a free worker as soon as there is one."""
        none_since = None
        with self._changed:
            while not self._idle:
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
            return self._idle.pop()

    def _ask(self) -> None:
        kind: Any = ClientAppWorker
        options = kind.options(**self._resources, scheduling_strategy="SPREAD")
        worker = options.remote(self._app)
        self._everyone.append(worker)
        self._starting[worker.start.remote(self._duty)] = worker
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
                self._idle.append(worker)
                self._ready.set()
            else:
                self._drop(worker)
                self._failed_starts += 1
                self._refusal = _reason_of(error)
                if self._failed_starts <= RETRIES:
                    self._ask()
                if not self._everyone:
                    self._ready.set()
            self._changed.notify_all()

    def _replace(self, worker: Any) -> None:
        with self._changed:
            if self._ended:
                raise RunFailedError("the run has ended")
            self._drop(worker)
            self._failed_starts = 0
            self._ask()

    def _drop(self, worker: Any) -> None:
        self._everyone.remove(worker)
        self._away.discard(worker)
        # Killed with all it waits for; one that only sleeps would answer a later message.
        with contextlib.suppress(RayError):
            ray.kill(worker, no_restart=True)

    def end(self) -> None:
        """Kill the workers."""
        with self._changed:
            self._ended = True
            for worker in self._everyone:
                ray.kill(worker, no_restart=True)
            self._everyone.clear()
            self._starting.clear()
            self._idle.clear()
            self._changed.notify_all()
        # Asked by a thread after it is gone, Ray would start an engine of its own.
        self._recruiter.join()

    def await_first(self, stop: threading.Event, patience: float) -> None:
        """Wait until a worker has started.

        Raises
        ------
        RunInterruptedError
            Once the stop event is set.
        RunFailedError
            When none can be started.
        """
        limit = time.monotonic() + patience
        while not self._ready.wait(_POLL):
            if stop.is_set():
                raise RunInterruptedError("interrupted")
            if time.monotonic() > limit:
                raise RunFailedError(f"no worker could be started for {patience:.0f} s")
        if not self._everyone:
            raise RunFailedError(f"no worker could be started: {self._refusal}")


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
