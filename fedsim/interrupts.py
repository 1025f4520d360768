"""Ending a run when a person, a terminal or a batch system asks for it."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from fedsim.core.characters import NEAREST

INTERRUPTED = 130
"""Exit code of a command that was interrupted."""
_ONE_REQUEST_S = 0.5


_early = threading.Event()


def remember_warning() -> None:
    """Let SIGUSR1 wait for `stop_on_signals`: by itself it ends a process that still loads."""
    signal.signal(signal.SIGUSR1, lambda number, frame: _early.set())


def stop_on_signals(
    stop: threading.Event, stop_after_round: threading.Event, how_to_go_on: Callable[[], str]
) -> None:
    """End a run at an interrupt, at once at a second one, and after the round at SIGUSR1.

    Parameters
    ----------
    stop, stop_after_round : threading.Event
        Set when the run is to end.
    how_to_go_on : callable
        Says what is left and which command continues, for a run that is ended at once.
    """
    asked = -math.inf

    def interrupt(number: int, frame: object) -> None:
        nonlocal asked
        if stop.is_set():
            # One request can arrive twice: from the terminal, and forwarded by what started this.
            if time.monotonic() - asked < _ONE_REQUEST_S:
                return
            _say_at_once(f"ended at once; {how_to_go_on()}")
            os._exit(INTERRUPTED)
        asked = time.monotonic()
        stop.set()
        _say_at_once("stopping after an interrupt; a second one ends at once")

    def warn(number: int, frame: object) -> None:
        if not stop_after_round.is_set():
            _say_at_once("stopping after this round, as SIGUSR1 asks; an interrupt ends it now")
        stop_after_round.set()

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    # With it batch systems say that the time is nearly over.
    signal.signal(signal.SIGUSR1, warn)
    if _early.is_set():
        warn(signal.SIGUSR1, None)
    # The terminal was closed, and not under nohup.
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, interrupt)


def _say_at_once(text: str) -> None:
    # A signal may arrive in the midst of what Python writes to the same stream.
    with contextlib.suppress(OSError):
        os.write(2, f"fedsim: {text}\n".encode(sys.stderr.encoding or "ascii", NEAREST))
