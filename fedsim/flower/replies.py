"""Accepting a client's reply, or saying why it cannot be folded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.supercore.differential_privacy import KEY_NORM_BIT

from fedsim.core.aggregation import check_like, first_not_finite
from fedsim.core.config import RunConfig
from fedsim.core.errors import InputError, shorten
from fedsim.core.inputs import parse_json
from fedsim.core.training import TrainingSettings
from fedsim.core.units import format_bytes
from fedsim.flower import messages as wire
from fedsim.flower.messages import State
from fedsim.recording import rows
from fedsim.recording.files import json_line
from fedsim.recording.layout import is_of_client

NOT_FINITE = "with values that are not finite"
"""In the cause of a client that failed because it diverged."""


class UnusableReplyError(Exception):
    """Why a reply cannot be folded; the last line is one sentence about the client."""


def accept(
    message: Message,
    reference: State,
    *,
    partition: int,
    num_samples: int,
    most: tuple[int, int],
    config: RunConfig,
    folder: Path,
) -> wire.Reply:
    """Decode a reply to a training message and check that it can be folded.

    Parameters
    ----------
    message : Message
        From the client.
    reference : mapping of str to ndarray
        The global state that was sent.
    partition : int
        The client that was asked.
    num_samples : int
        Samples of that client: its weight.
    most : tuple of (int, int)
        Files, and bytes of files, that the client can have written.
    config : RunConfig
        What the client was asked, and whether values that are not finite are taken.
    folder : Path
        Where the client left its files of the round.

    Raises
    ------
    UnusableReplyError
        With the cause.
    """
    if message.has_error():
        raise UnusableReplyError(wire.traceback_of(message))
    try:
        reply = wire.Reply.of(message)
        row = reply.telemetry
        local, weight = reply.state, reply.metrics[wire.NUM_EXAMPLES]
        check_like(local, reference)
        if row["partition"] != partition:
            raise UnusableReplyError(
                f"returned the telemetry of client {shorten(row['partition'])}"
            )
        if weight != num_samples:
            told = f"{wire.NUM_EXAMPLES} = {shorten(weight)}"
            raise UnusableReplyError(f"returned {told}; its partition has {num_samples}")
        _check_telemetry(row)
        _check_asked(row, config.training_of(partition), num_samples)
        if (config.autocast == "float16") != ("num_updates" in row):
            raise ValueError("its telemetry has num_updates missing or unexpected")
        _check_metrics(reply.metrics, config)
        sizes = {str(name): int(file["bytes"]) for name, file in row["files"].items()}
    except UnusableReplyError:
        raise
    except (ValueError, InputError) as error:
        raise UnusableReplyError(f"returned what cannot be folded: {_one_line(error)}") from None
    except Exception as error:
        # What a reply makes the libraries raise that decode it is a failure of its sender.
        raise UnusableReplyError(
            f"returned what cannot be folded: {type(error).__name__}: {_one_line(error)}"
        ) from None
    # What a client keeps on its own disk is known by its hashes.
    for name, size in sizes.items() if row.get("place", "run") == "run" else ():
        if (found := _size_of(folder / Path(name).name)) != size:
            there = "is gone" if found is None else f"has {found} bytes"
            raise UnusableReplyError(f"wrote {size} bytes to {folder / name}, which {there}")
    if not config.allow_divergence and (layer := first_not_finite(local)):
        raise UnusableReplyError(f"returned {layer} {NOT_FINITE}{loss_of(row)}")
    if len(sizes) > most[0] or sum(sizes.values()) > most[1]:
        raise UnusableReplyError(
            f"returned what cannot be folded: its telemetry lists {len(sizes):,} files of "
            f"{format_bytes(sum(sizes.values()))}; expected at most {most[0]:,} of "
            f"{format_bytes(most[1])}"
        )
    return reply


def _check_telemetry(row: dict[str, Any]) -> None:
    """Refuse what could not be read back from ``clients.jsonl``, or speaks of foreign files."""
    if "round" in row:
        raise ValueError("its telemetry names a round")
    line = json_line({"round": 0, **row})
    # Letters beyond ASCII are written in more bytes than they had.
    if len(line) > wire.MOST_TELEMETRY:
        raise ValueError(
            f"its telemetry makes a line of {len(line):,} bytes; expected at most "
            f"{wire.MOST_TELEMETRY:,}"
        )
    rows.check_described(rows.TrainedClientRow, parse_json(line), "its telemetry")
    # One that is not finite has a name in a reply, and none in a row.
    if None in (
        *(row["local_loss"], row["gradient_norm"]),
        *(*row["loss_history"], *row["per_layer_norms"].values()),
    ):
        raise ValueError("its telemetry has null for a loss or a norm")
    for name in row["files"]:
        if not is_of_client(name):
            raise ValueError(f"its telemetry lists {shorten(name)}, which no client writes")
    if row["files"] and row.get("place") == "none":
        raise ValueError("its telemetry lists files and says that there are none")


def _check_asked(row: Mapping[str, Any], settings: TrainingSettings, num_samples: int) -> None:
    """Refuse the work of a client that trained otherwise than it was asked to."""
    asked = {
        "num_samples": num_samples,
        "batch_size": settings.batch_size,
        "local_epochs": settings.local_epochs,
        "local_steps": settings.local_steps,
        "learning_rate": settings.optimizer.learning_rate,
        "num_steps": settings.num_steps(num_samples),
    }
    for key, value in asked.items():
        if row[key] != value:
            raise ValueError(f"its telemetry has {key} = {shorten(row[key])}, not {value}")


def _check_metrics(metrics: Mapping[str, Any], config: RunConfig) -> None:
    """Refuse what a strategy stumbles over that averages the figures of all clients."""
    expected = {wire.NUM_EXAMPLES, wire.LOSS}
    if config.clients_clip or (":" in config.strategy.name and KEY_NORM_BIT in metrics):
        expected.add(KEY_NORM_BIT)
    if odd := min(expected.symmetric_difference(metrics), default=None):
        raise ValueError(f"its metrics have {shorten(odd)} missing or unexpected")
    loss, exceeded = metrics[wire.LOSS], metrics.get(KEY_NORM_BIT, 0)
    if not isinstance(loss, float) or loss < 0:
        raise ValueError(f"its metrics have {wire.LOSS} = {shorten(loss)}")
    if exceeded not in (0, 1):
        raise ValueError(f"its metrics have {KEY_NORM_BIT} = {shorten(exceeded)}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def loss_of(row: Mapping[str, Any]) -> str:
    """Say, after a semicolon, at which local step a client's loss stopped to be finite."""
    for step, loss in enumerate(row.get("loss_history", [])):
        if not math.isfinite(loss):
            return f"; its loss was not finite from local step {step} on"
    return ""


def _size_of(path: Path) -> int | None:
    try:
        return path.lstat().st_size
    except OSError:
        return None
