"""What is changed in Flower and Ray from outside; no other file assigns to what they define.

Each change says which versions it is for, and ``tests/flower/test_patches.py`` fails where a new
version does not do any more what the change is made for.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.task_identity import TaskIdentity
from ray._private import worker as ray_worker


@contextlib.contextmanager
def server_identity() -> Iterator[None]:
    """Let this process make messages (Flower 1.41 and 1.42).

    Every message names the task, the run and the node that made it. Flower's launchers tell the
    process which these are; where none of them is used, a message cannot be made.
    """
    before = TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, SUPERLINK_NODE_ID
    try:
        yield
    finally:
        TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = before


@contextlib.contextmanager
def silent_workers() -> Iterator[None]:
    """Keep what Ray says of its workers off the terminal (Ray 2.55).

    It announces retries and deaths of workers on stdout even where it is told not to log.
    """
    before = ray_worker.print_to_stdstream
    ray_worker.print_to_stdstream = lambda *_, **__: None
    try:
        yield
    finally:
        ray_worker.print_to_stdstream = before


def reclaim_sigterm() -> None:
    """Give SIGTERM back to this process's own handler (Ray 2.55); for the main thread.

    A driver's ``ray.init`` puts a handler of its own before it, which prints frames and aborts the
    process three seconds later.
    """
    if (handler := signal.getsignal(signal.SIGTERM)) is not None:
        signal.signal(signal.SIGTERM, handler)
