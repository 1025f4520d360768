"""Writing a run directory from the server's side."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fedsim.core.aggregation import state_sha256
from fedsim.core.errors import InputError
from fedsim.recording.checksums import checksum_line
from fedsim.recording.continuation import check_places, whole_rounds
from fedsim.recording.files import (
    Checksum,
    Digest,
    append_line,
    json_document,
    json_line,
    read_lines,
    temporary,
    write_tensors,
)
from fedsim.recording.layout import FORMAT, RunLayout
from fedsim.recording.reader import TensorFile, load_run

State = Mapping[str, NDArray[np.generic]]


def mark_failed(root: Path, error: str) -> None:
    """Give a run that failed, or never began, its true cause in place of what followed from it."""
    manifest = RunLayout(root).manifest
    if manifest.exists():
        RunWriter(root, json.loads(manifest.read_bytes())).finish("failed", error)


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
        self._round_files: dict[str, Checksum] = {}
        self._lock_file: BinaryIO | None = None
        self._grown = {path: Digest() for path in (self.layout.clients, self.layout.rounds)}

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
        writer._lock()
        layout = writer.layout
        arrays = {str(i): p for i, p in enumerate(partition)}
        writer._seal({layout.partition: write_tensors(layout.partition, arrays)})
        writer._write_manifest()
        layout.clients.touch()
        layout.rounds.touch()
        return writer

    @classmethod
    def reopen(cls, root: Path, config: Mapping[str, Any]) -> RunWriter:
        """Continue a run directory after its last whole round.

        What an unfinished round left is removed: its folder, its rows, its checksums.

        Parameters
        ----------
        root : Path
            A run directory that nobody else writes to.
        config : mapping
            The configuration to go on with; it may have more rounds.

        Raises
        ------
        InputError
            When it is no run directory, is in use, or holds no whole round.
        """
        run = load_run(root)
        check_places(root)
        manifest = {k: v for k, v in run.manifest.items() if k != "error"}
        writer = cls(root, {**manifest, "status": "running", "config": dict(config)})
        writer._lock()
        layout = writer.layout
        kept = whole_rounds(run)
        for path in (layout.rounds, layout.clients):
            os.truncate(path, kept[-1].files[path.name].size)
        writer._grown = {p: Digest.of_file(p) for p in (layout.clients, layout.rounds)}
        # The present run.json stays listed until the new one is there.
        present = Checksum.of_file(layout.manifest)
        seals = [checksum_line(line.files) for line in kept]
        with temporary(layout.checksums) as unfinished:
            unfinished.write_bytes(b"".join([*seals, checksum_line({"run.json": present})]))
        writer._write_manifest()
        writer.drop_unfinished_round()
        return writer

    @property
    def last_round(self) -> int:
        """The last whole round."""
        return max(int(row["round"]) for row in read_lines(self.layout.rounds))

    def state(self, round_number: int) -> dict[str, NDArray[np.generic]]:
        """Read a global state back.

        Raises
        ------
        InputError
            When it is not the one that the round's row tells of.
        """
        path = self.layout.state(round_number)
        state = {name: tensor.numpy().copy() for name, tensor in TensorFile(path).items()}
        hashes = {row["round"]: row["state_sha256"] for row in read_lines(self.layout.rounds)}
        if state_sha256(state) != hashes[round_number]:
            raise InputError(f"{path} is not the state that round {round_number} ended with")
        return state

    def _lock(self) -> None:
        """Keep every other writer out for as long as this process lives."""
        # The kernel gives the lock of a dead process back, however it died.
        self._lock_file = self.layout.lock.open("ab")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"{self.layout.root} is being written by another process; allowed is one at a time"
            ) from None

    def close(self) -> None:
        """Let others write to the run."""
        if self._lock_file is not None:
            self._lock_file.close()

    def add_client(self, row: Mapping[str, Any], delta: State) -> None:
        """Keep one client's delta and telemetry of a round.

        Parameters
        ----------
        row : mapping
            A line of ``clients.jsonl``, with ``round`` and ``partition``; ``files`` says what
            the client wrote.
        delta : mapping of str to ndarray
            Local minus global state.
        """
        path = self.layout.delta(row["round"], row["partition"])
        self._write_tensors(path, delta)
        for name, file in row.get("files", {}).items():
            self._round_files[self._name(path.parent / name)] = Checksum(
                file["bytes"], file["xxh3_128"]
            )
        self._append(self.layout.clients, json_line(row))

    def add_failure(self, row: Mapping[str, Any]) -> None:
        """Keep the row of a client that failed."""
        self._append(self.layout.clients, json_line(row))

    def add_aggregate(self, round_number: int, aggregate: State) -> None:
        """Keep the sample-weighted mean delta of a round."""
        self._write_tensors(self.layout.aggregate(round_number), aggregate)

    def add_state(self, round_number: int, state: State) -> None:
        """Keep the global state after a round, or the initial one as round 0."""
        self._write_tensors(self.layout.state(round_number), state)

    def add_round(self, row: Mapping[str, Any]) -> None:
        """Write the row that makes a round exist; everything else of it is in place by now."""
        line = json_line(row)
        self._grown[self.layout.rounds].update(line)
        grown = {self._name(path): digest.checksum() for path, digest in self._grown.items()}
        self._seal(self._round_files | grown)
        self._round_files = {}
        append_line(self.layout.rounds, line)

    def drop_unfinished_round(self) -> None:
        """Remove the files of the round that has no row, however many gigabytes they are."""
        finished = {row["round"] for row in read_lines(self.layout.rounds)}
        for folder in (self.layout.root / "rounds").glob("*"):
            if folder.name.isdecimal() and int(folder.name) not in finished:
                shutil.rmtree(folder, ignore_errors=True)

    def finish(self, status: str, error: str | None = None) -> None:
        """Set the final status, ``finished`` or ``failed``, and the cause of a failure."""
        self._manifest["status"] = status
        if error is not None:
            self._manifest["error"] = error
        self._write_manifest()

    def _write_manifest(self) -> None:
        document = json_document(self._manifest)
        # Before the file: a kill in between leaves the former one, whose checksum stays listed.
        self._seal({self.layout.manifest: Checksum.of(document)})
        with temporary(self.layout.manifest) as unfinished:
            unfinished.write_bytes(document)

    def _write_tensors(self, path: Path, arrays: State) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._round_files[self._name(path)] = write_tensors(path, arrays)

    def _append(self, path: Path, line: bytes) -> None:
        append_line(path, line)
        self._grown[path].update(line)

    def _seal(self, files: Mapping[str, Checksum] | Mapping[Path, Checksum]) -> None:
        """List what was written since the last time."""
        named = {self._name(path): checksum for path, checksum in files.items()}
        append_line(self.layout.checksums, checksum_line(named))

    def _name(self, path: str | Path) -> str:
        return path if isinstance(path, str) else path.relative_to(self.layout.root).as_posix()
