"""The lines of a run as tidy data frames: a number, a text or nothing in each cell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    Rows = Sequence[Mapping[str, Any]]

_SPREAD = ("seconds", "peak_memory")


def rounds_frame(rounds: Rows) -> pd.DataFrame:
    """Lines of ``rounds.jsonl``, with the numbers of participants and of those that failed."""
    return pd.DataFrame(
        [
            {
                "round": row["round"],
                "num_participants": len(row["participants"]),
                "num_failed": len(row["failed"]),
                **_scalars(row),
            }
            for row in rounds
        ]
    )


def clients_frame(clients: Rows) -> pd.DataFrame:
    """Lines of ``clients.jsonl``, without the lists that the other frames spread."""
    return pd.DataFrame([_scalars(row) for row in clients])


def steps_frame(clients: Rows) -> pd.DataFrame:
    """One row for each local step."""
    return pd.DataFrame(
        [
            (row["round"], row["partition"], step, size, loss)
            for row in _trained(clients)
            for step, (size, loss) in enumerate(
                zip(row["batch_sizes"], row["loss_history"], strict=True)
            )
        ],
        columns=["round", "partition", "step", "batch_size", "loss"],
    )


def layer_norms_frame(clients: Rows) -> pd.DataFrame:
    """One row for each parameter of each client in each round."""
    return pd.DataFrame(
        [
            (row["round"], row["partition"], name, norm)
            for row in _trained(clients)
            for name, norm in row["per_layer_norms"].items()
        ],
        columns=["round", "partition", "parameter", "gradient_norm"],
    )


def class_counts_frame(clients: Rows) -> pd.DataFrame:
    """One row for each class at each client that trained; its data do not change."""
    counts = {row["partition"]: row["class_distribution"] for row in _trained(clients)}
    return pd.DataFrame(
        [
            (partition, number, samples)
            for partition in sorted(counts)
            for number, samples in enumerate(counts[partition])
        ],
        columns=["partition", "class", "num_samples"],
    )


def _trained(clients: Rows) -> Iterable[Mapping[str, Any]]:
    return (row for row in clients if row["status"] == "ok")


def _scalars(row: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in row.items():
        if key in _SPREAD:
            found |= {f"{key}_{part}": number for part, number in value.items()}
        elif not isinstance(value, dict | list):
            found[key] = value
    return found
