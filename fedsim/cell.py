"""A run in a process of its own, which ends when the process that started it does.

`fedsim compare` starts its cells so, by the arguments of a command, and `fedsim.simulate` its run,
by a request (`fedsim.apart`). Standard input is a pipe from the process that starts it. It ends
when that does, however that ends, and so does the run; a byte after a request asks it to stop.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

from fedsim.core.processes import start_module

REQUEST = "--request"
_LOOK = 2.0
"""Seconds between looks at the process that started this one."""


def start_cell(arguments: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a run in a process of its own.

    It is out of reach of a Ctrl-C at the terminal, which reaches the starter alone.

    Parameters
    ----------
    arguments : sequence of str
        Of the ``fedsim`` command, or `REQUEST` and what `fedsim.apart.serve` takes.
    **options
        Of `subprocess.Popen`.
    """
    return start_module("fedsim.cell", arguments, stdin=subprocess.PIPE, **options)


def _watch_parent(parent: int, stop: threading.Event) -> None:
    from fedsim.interrupts import INTERRUPTED

    # A process that the parent forked may hold the other end longer than the parent lives.
    while os.getppid() == parent:
        if select.select([0], [], [], _LOOK)[0]:
            if not os.read(0, 1):
                break
            stop.set()
    # At once: what is on the disk is whole at any moment, and the janitor ends the workers.
    os._exit(INTERRUPTED)


def _main() -> None:
    parent, stop = os.getppid(), threading.Event()
    request = b""
    if sys.argv[1:2] == [REQUEST]:
        while not request.endswith(b"\n") and (byte := os.read(0, 1)):
            request += byte
    threading.Thread(target=_watch_parent, args=[parent, stop], daemon=True).start()
    if request:
        from fedsim.apart import serve

        serve(request, int(sys.argv[2]), stop)
    from fedsim.cli import main

    main()


if __name__ == "__main__":
    _main()
