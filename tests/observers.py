"""An observer that remembers what it was told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsim.core.plan import RunPlan


class Memory:
    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def run_started(self, plan: RunPlan, workers: int, path: Path) -> None:
        self.events.append(("run started", workers, path))

    def warned(self, text: str) -> None:
        self.events.append(("warned", text))

    def round_started(self, round_number: int, participants: Sequence[int]) -> None:
        self.events.append(("round started", round_number, list(participants)))

    def client_finished(self, row: Mapping[str, Any]) -> None:
        self.events.append(("client finished", row["round"], row["partition"]))

    def client_failed(self, round_number: int, partition: int, reason: str) -> None:
        self.events.append(("client failed", round_number, partition, reason))

    def round_finished(self, row: Mapping[str, Any]) -> None:
        self.events.append(("round finished", row["round"]))

    def run_finished(self, path: Path) -> None:
        self.events.append(("run finished", path))

    def of(self, kind: str) -> list[tuple[Any, ...]]:
        return [event for event in self.events if event[0] == kind]
