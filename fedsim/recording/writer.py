"""Writing a run directory from the server's side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.core.errors import InputError
from fedsim.recording.files import append_line, write_json, write_tensors
from fedsim.recording.layout import FORMAT, RunLayout

State = Mapping[str, NDArray[np.generic]]


def mark_failed(root: Path, error: str) -> None:
    """Give a run that failed, or never began, its true cause in place of what followed from it."""
    manifest = RunLayout(root).manifest
    if manifest.exists():
        write_json(
            manifest, {**json.loads(manifest.read_bytes()), "status": "failed", "error": error}
        )


class RunWriter:
    """The one writer of a run's manifest, rows, states, aggregates and deltas.

    Clients write their own gradients (`StepRecorder`) into `client_folder`.

    Parameters
    ----------
    root : Path
        An existing run directory; `create` makes a new one.
    manifest : mapping
        Contents of ``run.json``.
    """

    def __init__(self, root: Path, manifest: Mapping[str, Any]) -> None:
        self.layout = RunLayout(root)
        self._manifest = dict(manifest)

    @classmethod
    def create(
        cls,
        root: Path,
        manifest: Mapping[str, Any],
        partition: Sequence[NDArray[np.int64]],
    ) -> RunWriter:
        """Make a new run directory with its manifest and partition.

        Raises
        ------
        InputError
            When `root` exists already or cannot be made.
        """
        try:
            root.mkdir(parents=True)
        except FileExistsError:
            raise InputError(
                f"output = {str(root)!r} exists already; allowed is a folder that does not, "
                "since a run is never overwritten"
            ) from None
        except OSError as error:
            raise InputError(f"output = {str(root)!r} cannot be made: {error.strerror}") from None
        writer = cls(root, {"format": FORMAT, "status": "running", **manifest})
        write_json(writer.layout.manifest, writer._manifest)
        write_tensors(writer.layout.partition, {str(i): p for i, p in enumerate(partition)})
        writer.layout.clients.touch()
        writer.layout.rounds.touch()
        return writer

    def add_client(self, row: Mapping[str, Any], delta: State) -> None:
        """Keep one client's delta and telemetry of a round.

        Parameters
        ----------
        row : mapping
            A line of ``clients.jsonl``, with ``round`` and ``partition``.
        delta : mapping of str to ndarray
            Local minus global state.
        """
        path = self.layout.delta(row["round"], row["partition"])
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, delta)
        append_line(self.layout.clients, row)

    def add_failure(self, row: Mapping[str, Any]) -> None:
        """Keep the row of a client that failed."""
        append_line(self.layout.clients, row)

    def add_aggregate(self, round_number: int, aggregate: State) -> None:
        """Keep the sample-weighted mean delta of a round."""
        path = self.layout.aggregate(round_number)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, aggregate)

    def add_state(self, round_number: int, state: State) -> None:
        """Keep the global state after a round, or the initial one as round 0."""
        path = self.layout.state(round_number)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, state)

    def add_round(self, row: Mapping[str, Any]) -> None:
        """Write the row that makes a round exist; everything else of it is in place by now."""
        append_line(self.layout.rounds, row)

    def finish(self, status: str, error: str | None = None) -> None:
        """Set the final status, ``finished`` or ``failed``, and the cause of a failure."""
        self._manifest["status"] = status
        if error is not None:
            self._manifest["error"] = error
        write_json(self.layout.manifest, self._manifest)
