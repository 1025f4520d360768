"""Waiting for the first worker of an engine, without an engine."""

from __future__ import annotations

import threading

import pytest

from fedsim.core.errors import RunFailedError, RunInterruptedError
from fedsim.flower.workers import Workers


@pytest.fixture
def workers() -> Workers:
    """Give workers of which none has started yet."""
    made = Workers.__new__(Workers)
    made._everyone, made._refusal, made._ready = [object()], "", threading.Event()
    return made


def test_the_wait_for_a_worker_ends_at_a_signal_and_some_time(workers: Workers) -> None:
    stop = threading.Event()
    with pytest.raises(RunFailedError, match="no worker could be started for 0 s"):
        workers.await_first(stop, 0)
    stop.set()
    with pytest.raises(RunInterruptedError):
        workers.await_first(stop, 1e9)


def test_workers_that_do_not_start_say_why(workers: Workers) -> None:
    workers._ready.set()
    workers.await_first(threading.Event(), 1)
    workers._everyone, workers._refusal = [], "no module named torch"
    with pytest.raises(RunFailedError, match="could be started: no module named torch"):
        workers.await_first(threading.Event(), 1)
