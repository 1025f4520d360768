"""Asking nodes with data of their own what they have."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedsim.core.errors import InputError, RunFailedError, shorten
from fedsim.core.fields import MOST
from fedsim.core.inputs import MOST_JSON_BYTES
from fedsim.core.own_data import MOST_NAME, check_classes
from fedsim.core.plan import RunPlan
from fedsim.core.task import classes_of
from fedsim.flower import messages as wire
from fedsim.flower.grid import stream_replies
from fedsim.flower.membership import membership_of
from fedsim.recording.files import json_document


def ask_data(
    grid: Grid,
    plan: RunPlan,
    *,
    window: int,
    stop: threading.Event,
    tell: Callable[[str], None],
) -> RunPlan:
    """Learn the samples, classes and hash of each node's own data, once all nodes are there.

    Parameters
    ----------
    grid : Grid
        Any of Flower's grids.
    plan : RunPlan
        Without a partition.
    window, stop
        As in `stream_replies`.
    tell : callable
        Told whom the run waits for.

    Returns
    -------
    RunPlan
        With the samples of each client.

    Raises
    ------
    RunFailedError
        When nodes are missing, or one has no data, or that of other classes.
    """
    clients, patience = range(plan.config.clients), plan.config.node_timeout
    membership = membership_of(grid, clients=len(clients), stop=stop, tell=tell)
    membership.wait_for_all(patience)
    nodes = membership.nodes_of(clients, spare=0, patience=patience)
    queries = [
        Message(wire.query_content(), nodes[partition], MessageType.QUERY) for partition in clients
    ]
    replies = stream_replies(grid, queries, window=window, stop=stop)
    samples: list[int] = []
    told: list[dict[str, Any]] = []
    for partition, reply in zip(clients, replies, strict=True):
        count, about = _told_by(reply, partition)
        try:
            check_classes(len(about["classes"]), classes_of(plan.dataset.spec), plan.config.dataset)
        except InputError as error:
            raise RunFailedError(f"partition {partition}: {error}") from None
        samples.append(count)
        told.append(about)
        first = told[0]["classes"]
        for label, (here, there) in enumerate(zip(about["classes"], first, strict=True)):
            if here != there:
                raise RunFailedError(
                    f"class {label} is {shorten(here)} at the node of partition {partition} and "
                    f"{shorten(there)} at that of partition 0; expected the same names on all nodes"
                )
    # Half is left for the rest of run.json, which is one JSON text.
    if (size := len(json_document({"nodes": told}))) > MOST_JSON_BYTES // 2:
        raise RunFailedError(
            f"the names of the classes of {len(told)} nodes take {size:,} bytes; expected at most "
            f"{MOST_JSON_BYTES // 2:,}, so choose shorter ones"
        )
    return plan.of_nodes(samples, told)


def _told_by(reply: Message, partition: int) -> tuple[int, dict[str, Any]]:
    if reply.has_error():
        raise RunFailedError(
            f"the node of partition {partition} could not say which data it has: "
            f"{wire.cause_of(reply)}"
        )
    if (data := wire.data_told_by(reply)) is None:
        raise RunFailedError(
            f"partition = 'nodes' asks for data of each node's own, and that of partition "
            f"{partition} has none"
        )
    count, sha256, classes = data
    if not (isinstance(count, int) and isinstance(classes, list) and 0 < count <= MOST):
        raise RunFailedError(f"the node of partition {partition} reports no number of samples")
    if not (isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)):
        raise RunFailedError(
            f"the node of partition {partition} reports {wire.DATA_SHA256} = {shorten(sha256)}; "
            "expected a SHA-256 in 64 hexadecimal digits"
        )
    for name in classes:
        if not (isinstance(name, str) and len(name) <= MOST_NAME):
            raise RunFailedError(
                f"the node of partition {partition} reports a class {shorten(name)}; expected "
                f"names of at most {MOST_NAME} characters"
            )
    return count, {"sha256": sha256, "classes": classes}
