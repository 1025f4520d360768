"""Waiting for the first worker of an engine, without an engine."""

from __future__ import annotations

import threading

import pytest

from fedsim.core.errors import RunFailedError, RunInterruptedError
from fedsim.flower.workers import SupervisedPool


@pytest.fixture(autouse=True)
def _nobody_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SupervisedPool, "ready", threading.Event())
    monkeypatch.setattr(SupervisedPool, "_latest", None)


def test_the_wait_for_an_engine_ends_at_a_signal_and_some_time() -> None:
    stop = threading.Event()
    with pytest.raises(RunFailedError, match="no worker could be started for 0 s"):
        SupervisedPool.await_first(stop, 0)
    stop.set()
    with pytest.raises(RunInterruptedError):
        SupervisedPool.await_first(stop, 1e9)


def test_an_engine_whose_workers_do_not_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = SupervisedPool.__new__(SupervisedPool)
    pool._everyone, pool._refusal = [], "no module named torch"
    monkeypatch.setattr(SupervisedPool, "_latest", pool)
    SupervisedPool.ready.set()
    with pytest.raises(RunFailedError, match="could be started: no module named torch"):
        SupervisedPool.await_first(threading.Event(), 1)
    pool._everyone = [object()]
    SupervisedPool.await_first(threading.Event(), 1)
