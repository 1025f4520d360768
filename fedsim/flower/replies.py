"""Telling whether a client's reply can be folded, and if not why."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message
from flwr.supercore.differential_privacy import KEY_NORM_BIT
from numpy.typing import NDArray

from fedsim.core.aggregation import check_like, first_not_finite
from fedsim.core.config import RunConfig
from fedsim.core.errors import InputError, shorten
from fedsim.core.inputs import parse_json
from fedsim.core.plan import RunPlan
from fedsim.core.training import TrainingSettings
from fedsim.core.units import format_bytes
from fedsim.flower import messages as wire
from fedsim.recording import rows
from fedsim.recording.files import json_line
from fedsim.recording.layout import is_of_client
from strategies.folding import MOST_TELEMETRY, telemetry_of, view_of

State = Mapping[str, NDArray[np.generic]]

NOT_FINITE = "with values that are not finite"
"""In the cause of a client that failed because it diverged."""


def problem_of(
    reply: Message,
    reference: State,
    *,
    partition: int,
    num_samples: int,
    config: RunConfig,
    folder: Path,
) -> str | None:
    """Say why a reply to a training message cannot be folded.

    Parameters
    ----------
    reply : Message
        Of the client.
    reference : mapping of str to ndarray
        The global state that was sent.
    partition : int
        Who was asked.
    num_samples : int
        Samples of that partition: the weight.
    config : RunConfig
        What the client was asked, and whether values that are not finite are taken.
    folder : Path
        Where the client left its files of the round.

    Returns
    -------
    str or None
        The cause, the last line of it one sentence about the client; None for a good reply.
    """
    if reply.has_error():
        return traceback_of(reply.error.reason or "")
    try:
        row = telemetry_of(reply)
        (record,) = reply.content.array_records.values()
        (metrics,) = reply.content.metric_records.values()
        local = {name: view_of(array) for name, array in record.items()}
        weight = metrics[wire.NUM_EXAMPLES]
        check_like(local, reference)
        if row["partition"] != partition:
            return f"returned the telemetry of client {shorten(row['partition'])}"
        if weight != num_samples:
            told = f"{wire.NUM_EXAMPLES} = {shorten(weight)}"
            return f"returned {told}; its partition has {num_samples}"
        _check_telemetry(row)
        _check_asked(row, config.training_of(partition), num_samples)
        if (config.autocast == "float16") != ("num_updates" in row):
            raise ValueError("its telemetry has num_updates missing or one too many")
        _check_metrics(metrics, config)
        sizes = {str(name): int(file["bytes"]) for name, file in row["files"].items()}
    except (ValueError, InputError) as error:
        return f"returned what cannot be folded: {_one_line(error)}"
    except Exception as error:
        # Whatever a reply makes of the libraries that decode it is a failure of who sent it.
        return f"returned what cannot be folded: {type(error).__name__}: {_one_line(error)}"
    # What a client keeps on its own disk is known by its hashes.
    for name, size in sizes.items() if row.get("place", "run") == "run" else ():
        if (found := _size_of(folder / Path(name).name)) != size:
            there = "is gone" if found is None else f"has {found} bytes"
            return f"wrote {size} bytes to {folder / name}, which {there}"
    if not config.allow_divergence and (layer := first_not_finite(local)):
        return f"returned {layer} {NOT_FINITE}{loss_of(row)}"
    return None


def problem_of_files(reply: Message, plan: RunPlan, partition: int) -> str | None:
    """Say why no client of a plan wrote the files that a reply lists; None where one may have."""
    files = telemetry_of(reply)["files"]
    size = sum(file["bytes"] for file in files.values())
    most_files, most_bytes = plan.most_files_of(partition), plan.most_bytes_of(partition)
    if len(files) <= most_files and size <= most_bytes:
        return None
    return (
        f"returned what cannot be folded: its telemetry lists {len(files):,} files of "
        f"{format_bytes(size)}; expected at most {most_files:,} of {format_bytes(most_bytes)}"
    )


def _check_telemetry(row: dict[str, Any]) -> None:
    """Refuse what could not be read back from ``clients.jsonl``, or speaks of foreign files."""
    if "round" in row:
        raise ValueError("its telemetry names a round")
    line = json_line({"round": 0, **row})
    # Letters beyond ASCII are written in more bytes than they had.
    if len(line) > MOST_TELEMETRY:
        raise ValueError(
            f"its telemetry makes a line of {len(line):,} bytes; expected at most "
            f"{MOST_TELEMETRY:,}"
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
        raise ValueError(f"its metrics have {shorten(odd)} missing or one too many")
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


def traceback_of(reason: str) -> str:
    """Give the client's own traceback out of the text that Flower sends for a failure."""
    # Flower and Ray raise their own exceptions from the client's; a chain has its cause first.
    first = reason.replace("\\n", "\n").partition("\nThe above exception was")[0]
    lines = first.removesuffix("'>").rstrip().splitlines()
    frames = [i for i, line in enumerate(lines) if line.lstrip().startswith("File ")]
    if frames:
        return "\n".join(lines[frames[0] :])
    # Of what was not raised in the client, Flower tells "<class 'name'>:<'text'>".
    return "\n".join(lines).partition(">:<'")[2] or "\n".join(lines) or "no reason given"


def cause_of(reply: Message) -> str:
    """Give the sentence that ends the client's traceback, of a reply that is an error."""
    return writable(traceback_of(reply.error.reason or "")).splitlines()[-1].strip()


_HEAD, _TAIL = 16_384, 16_384
"""Characters that are kept of the beginning and the end of what a client says of its failure."""


def writable(reason: str) -> str:
    """Make of a client's words what can be written and read back, whatever they are."""
    # A surrogate without its other half is no Unicode, which no reader of JSON takes.
    text = reason.encode(errors="replace").decode()
    if len(text) <= _HEAD + _TAIL:
        return text
    return f"{text[:_HEAD]} ... {text[-_TAIL:]}"


def _size_of(path: Path) -> int | None:
    try:
        return path.lstat().st_size
    except OSError:
        return None
