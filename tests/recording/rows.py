"""Lines of a run that are whole, for tests that care about some of their keys only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def round_row(number: int, participants: Sequence[int] = (), **changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "round": number,
        "participants": list(participants),
        "failed": [],
        "global_loss": 2.5,
        "global_accuracy": 0.1,
        "state_sha256": "0" * 64,
        "seconds": {"clients": 1.0, "evaluate": 1.0, "total": 2.0},
    }
    return row | changes


def client_row(number: int, partition: int, num_steps: int = 1, **changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "round": number,
        "partition": partition,
        "status": "ok",
        "num_samples": num_steps,
        "local_epochs": 1,
        "local_steps": None,
        "batch_size": 1,
        "learning_rate": 0.01,
        "loss_history": [1.0] * num_steps,
        "local_loss": 1.0,
        "batch_sizes": [1] * num_steps,
        "gradient_norm": 1.0,
        "per_layer_norms": {},
        "num_steps": num_steps,
        "num_steps_captured": 0,
        "bytes_captured": 0,
        "files": {},
        "class_distribution": [num_steps],
        "seconds": {"load": 0.0, "train": 0.0, "capture": 0.0, "write": 0.0, "total": 0.0},
        "peak_memory": {"process": 1},
    }
    return row | changes


class AllWhole:
    """Files that a proof may rely on, none of which holds what a strategy kept."""

    def whole(self, check: str, paths: Sequence[Any]) -> bool:
        return True

    def is_listed(self, path: Any) -> bool:
        return False
