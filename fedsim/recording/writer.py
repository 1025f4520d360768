"""Writing a run directory from the server's side."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fedsim.core.errors import InputError, RunFailedError
from fedsim.core.inputs import open_regular
from fedsim.recording.checksums import checksum_line, files_of, read_checksums
from fedsim.recording.files import (
    Checksum,
    Digest,
    append_line,
    cut_unfinished_line,
    json_document,
    json_line,
    read_lines,
    temporary,
    write_tensors,
)
from fedsim.recording.layout import (
    FORMAT,
    SHARED_FORMAT,
    STEPS,
    RunLayout,
    format_of,
    newest_controls,
)
from fedsim.recording.places import new_run_id
from fedsim.recording.reader import load_run
from fedsim.recording.recovery import Recovery, check_places, read_state
from fedsim.recording.shared import SharedFiles
from fedsim.recording.tensor_files import TensorFile

State = Mapping[str, NDArray[np.generic]]

_LOCK_PATIENCE, _LOCK_POLL = 1.0, 0.02
"""Seconds to wait for the lock, which readers of a run hold for a moment, and between tries."""


def mark_failed(root: Path, error: str) -> None:
    """Give a run that was begun and failed its true cause, in place of what followed from it.

    Parameters
    ----------
    root : Path
        The run directory. One that another process writes to by now, or that is finished, is left
        as it is.
    error : str
        The cause.
    """
    manifest = RunLayout(root).manifest
    if not manifest.exists():
        return
    writer = RunWriter(root, {})
    try:
        writer._lock()
    except InputError:
        return
    # What can no longer change.
    writer._manifest = json.loads(manifest.read_bytes())
    if writer._manifest["status"] != "finished":
        writer.finish("failed", error)
    writer.close()


def is_being_written(root: Path) -> bool:
    """Say whether a living process writes to a run directory."""
    try:
        with os.fdopen(open_regular(RunLayout(root).lock), "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@contextlib.contextmanager
def only_writer(root: Path) -> Iterator[None]:
    """Keep every writer out of a run directory.

    Raises
    ------
    InputError
        When a living process writes to it.
    """
    writer = RunWriter(root, {})
    writer._lock()
    try:
        yield
    finally:
        writer.close()


class RunWriter:
    """The one writer of a run's manifest, rows, states, aggregates and deltas.

    Clients write what they capture (`StepRecorder`) into `client_folder`.

    Parameters
    ----------
    root : Path
        An existing run directory; `create` makes a new one.
    manifest : mapping
        Contents of ``run.json``.

    Attributes
    ----------
    on_change : callable
        Called when a round was closed or ``run.json`` written.
    """

    def __init__(self, root: Path, manifest: Mapping[str, Any]) -> None:
        self.layout = RunLayout(root)
        self.on_change: Callable[[], None] = lambda: None
        self._manifest = dict(manifest)
        self._round_files: dict[str, Checksum] = {}
        self._shared: SharedFiles | None = None
        self._elsewhere: set[str] = set()
        self._lock_file: BinaryIO | None = None
        self._sealed: int | None = None

    @cached_property
    def _grown(self) -> dict[Path, Digest]:
        paths = (self.layout.clients, self.layout.rounds)
        return {path: Digest.of_file(path) if path.exists() else Digest() for path in paths}

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
                f"output = {str(root)!r} exists already; expected a new folder, "
                "since a run is never overwritten"
            ) from None
        except OSError as error:
            raise InputError(f"output = {str(root)!r} cannot be made: {error.strerror}") from None
        described = {"format": FORMAT, "id": new_run_id(), "status": "running", **manifest}
        writer = cls(root, described)
        writer._lock()
        # First of all: with it, a run that is killed at once can be resumed.
        writer._write_manifest()
        writer._begin(partition)
        return writer

    def _begin(self, partition: Sequence[NDArray[np.int64]]) -> None:
        layout = self.layout
        arrays = {str(i): p for i, p in enumerate(partition)}
        self._seal({layout.partition: write_tensors(layout.partition, arrays)})
        layout.clients.touch()
        layout.rounds.touch()

    @classmethod
    def reopen(
        cls,
        root: Path,
        config: Mapping[str, Any],
        partition: Sequence[NDArray[np.int64]],
        recovery: Recovery,
        versions: Mapping[str, str],
        device: Mapping[str, Any],
        code: Mapping[str, str] | None = None,
    ) -> RunWriter:
        """Continue a run directory after a whole round.

        What later rounds left is removed: their folders, their rows, their checksums.

        Parameters
        ----------
        root : Path
            A run directory that nobody else writes to.
        config : mapping
            The configuration to go on with; it may have more rounds.
        partition : sequence of ndarray of int64
            The samples of each client.
        recovery : Recovery
            From `find_recovery`.
        versions : mapping
            The libraries to go on with, by name; added to ``resumed`` in ``run.json``.
        device : mapping
            What they compute on, as ``device`` in ``run.json``; added there too.
        code : mapping, optional
            Hashes of the user's own code, as ``code`` in ``run.json``; added there where there is
            any.

        Raises
        ------
        InputError
            When it is not a run directory, or is in use.
        """
        run = load_run(root)
        check_places(root)
        manifest = {k: v for k, v in run.manifest.items() if k not in ("error", "diverged")}
        manifest.setdefault("id", new_run_id())
        rounds = config.get("rounds")
        before = run.rounds_of(recovery.round) if "config" in manifest else rounds
        resumed = [
            *(entry for entry in manifest.get("resumed", []) if entry["after"] < recovery.round),
            {
                "after": recovery.round,
                "versions": dict(versions),
                "device": dict(device),
                **({"rounds": before} if before != rounds else {}),
                **({"code": dict(code)} if code else {}),
            },
        ]
        writer = cls(
            root, {**manifest, "status": "running", "config": dict(config), "resumed": resumed}
        )
        writer._lock()
        layout = writer.layout
        kept = list(read_checksums(layout.checksums))[: recovery.line]
        for path in (layout.rounds, layout.clients):
            path.touch()
            os.truncate(path, kept[-1].files[path.name].size if kept else 0)
        # The present run.json stays listed until the new one is there.
        present = Checksum.of_file(layout.manifest)
        seals = [checksum_line(line.files, line.elsewhere, line.removed) for line in kept]
        with temporary(layout.checksums) as unfinished:
            unfinished.write_bytes(b"".join([*seals, checksum_line({"run.json": present})]))
        writer._sealed = _size_of(layout.checksums)
        writer._write_manifest()
        writer.drop_unfinished_round()
        if not kept:
            writer._begin(partition)
        return writer

    @property
    def run_id(self) -> str:
        """The id by which hosts that share no disk know the run."""
        return str(self._manifest["id"])

    def state(self, round_number: int) -> dict[str, NDArray[np.generic]]:
        """Read a global state back.

        Raises
        ------
        InputError
            When it is not the one that the round's row names.
        """
        hashes = {row["round"]: row["state_sha256"] for row in read_lines(self.layout.rounds)}
        state = read_state(self.layout, round_number, hashes[round_number])
        return {name: array.copy() for name, array in state.items()}

    def strategy_state(self, round_number: int) -> dict[str, NDArray[np.generic]]:
        """Read back what the strategy kept after a round; empty where it kept nothing.

        Raises
        ------
        InputError
            When the file is not there, or not what was written.
        """
        path = self.layout.strategy(round_number)
        checksum = files_of(read_checksums(self.layout.checksums)).get(self._name(path))
        if checksum is None:
            return {}
        if not path.is_file() or not checksum.matches(path):
            raise InputError(f"{path} is not what the strategy kept after round {round_number}")
        return {name: tensor.numpy().copy() for name, tensor in TensorFile(path).items()}

    def _lock(self) -> None:
        """Keep every other writer out for as long as this process lives."""
        # The kernel releases the lock of a dead process, however it died.
        self._lock_file = self.layout.lock.open("ab")
        deadline = time.monotonic() + _LOCK_PATIENCE
        while not self._take_lock(self._lock_file):
            if time.monotonic() >= deadline:
                raise InputError(
                    f"{self.layout.root} is being written by another process; wait until that ends"
                )
            time.sleep(_LOCK_POLL)

    def _take_lock(self, file: BinaryIO) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Let others write to the run."""
        if self._lock_file is not None:
            self._lock_file.close()

    def begin_round(self, round_number: int, clients: int) -> None:
        """Prepare for the clients of a round: where there are many, they share files."""
        # A run that was begun without shared files goes on without them.
        shared = format_of(clients) == self._manifest["format"] == SHARED_FORMAT
        self._shared = SharedFiles(self.layout, round_number) if shared else None

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
        folder = self.layout.client(row["round"], row["partition"])
        row = {key: value for key, value in row.items() if key != "shard"}
        if self._shared is None:
            self._write_tensors(self.layout.delta(row["round"], row["partition"]), delta)
        else:
            row |= {"shard": self._shared.shard, "files": {**row.get("files", {})}}
            here = row.get("place", "run") == "run"
            steps = self._taken_steps(folder, row["files"]) if here else b""
            self._list(self._shared.add(row["partition"], delta, steps))
        for name, file in row.get("files", {}).items():
            listed = self._name(folder / name)
            self._round_files[listed] = Checksum(file["bytes"], file["xxh3_128"])
            if row.get("place") == "node":
                self._elsewhere.add(listed)
        self._append(self.layout.clients, json_line(row))

    def _taken_steps(self, folder: Path, files: dict[str, Any]) -> bytes:
        """Take the lines of a client's steps out of its folder and out of its list of files."""
        path, told = folder / STEPS, files.pop(STEPS, None)
        if told is None:
            return b""
        with os.fdopen(open_regular(path), "rb") as file:
            content = file.read()
        if Checksum.of(content).to_json() != told:
            raise RunFailedError(f"{path} was changed by another program")
        path.unlink()
        # Gradients stay there. The folder above is not touched: other clients are making theirs.
        with contextlib.suppress(OSError):
            folder.rmdir()
        return content

    def add_failure(self, row: Mapping[str, Any]) -> None:
        """Keep the row of a client that failed, and nothing else that it left."""
        shutil.rmtree(self.layout.client(row["round"], row["partition"]), ignore_errors=True)
        self._append(self.layout.clients, json_line(row))

    def add_control(self, round_number: int, partition: int, arrays: State) -> None:
        """Keep a client's control variate for its next round."""
        path = self.layout.control(round_number, partition)
        self._write_tensors(path, arrays)
        name = self._name(path)
        self._controls[partition] = name, self._round_files[name]

    def control(self, partition: int) -> dict[str, NDArray[np.generic]]:
        """Give what `add_control` kept of a client last; empty before.

        Raises
        ------
        RunFailedError
            When the file no longer exists, or not what was written.
        """
        if partition not in self._controls:
            return {}
        name, checksum = self._controls[partition]
        path = self.layout.inside(name)
        if not path.is_file() or not checksum.matches(path):
            raise RunFailedError(f"{path} was changed by another program")
        return {name: tensor.numpy() for name, tensor in TensorFile(path).items()}

    @cached_property
    def _controls(self) -> dict[int, tuple[str, Checksum]]:
        """Say which file holds a client's newest control variate, and what it must hash to."""
        listed = files_of(read_checksums(self.layout.checksums))
        return {p: (name, listed[name]) for p, name in newest_controls(listed).items()}

    def add_aggregate(self, round_number: int, aggregate: State) -> None:
        """Keep the sample-weighted mean delta of a round."""
        self._write_tensors(self.layout.aggregate(round_number), aggregate)

    def add_state(self, round_number: int, state: State) -> None:
        """Keep the global state after a round, or the initial one as round 0."""
        self._write_tensors(self.layout.state(round_number), state)

    def add_strategy_state(self, round_number: int, arrays: State) -> None:
        """Keep what the strategy needs for the next round."""
        self._write_tensors(self.layout.strategy(round_number), arrays)

    def add_round(self, row: Mapping[str, Any]) -> None:
        """Write the row that makes a round exist; everything else of it is in place by now.

        Raises
        ------
        RunFailedError
            When a file of the round no longer exists, or has another size.
        """
        if self._shared is not None:
            self._list(self._shared.close())
            with contextlib.suppress(OSError):
                self.layout.client(row["round"], 0).parent.rmdir()
        for name, checksum in self._round_files.items():
            if name in self._elsewhere:
                continue
            if (size := _size_of(self.layout.root / name)) != checksum.size:
                raise RunFailedError(
                    f"{self.layout.root / name} was changed by another program: it has {size} "
                    f"bytes, not {checksum.size}"
                )
        line = json_line(row)
        before = self._grown[self.layout.rounds].size
        self._grown[self.layout.rounds].update(line)
        grown = {self._name(path): digest.checksum() for path, digest in self._grown.items()}
        self._seal(self._round_files | grown)
        self._round_files, self._elsewhere = {}, set()
        append_line(self.layout.rounds, line, at=before)
        self.on_change()

    def drop_unfinished_round(self) -> None:
        """Remove the files of the round that has no row, however many gigabytes they are."""
        finished = {row["round"] for row in read_lines(self.layout.rounds)}
        for folder in (self.layout.root / "rounds").glob("*"):
            if folder.name.isdecimal() and int(folder.name) not in finished:
                shutil.rmtree(folder, ignore_errors=True)

    def finish(self, status: str, error: str | None = None, *, diverged: bool = False) -> None:
        """Set the final status, ``finished`` or ``failed``, and the cause of a failure."""
        self._manifest["status"] = status
        if diverged:
            self._manifest["diverged"] = True
        if error is not None:
            self._manifest["error"] = error
        self._write_manifest()

    def _write_manifest(self) -> None:
        document = json_document(self._manifest)
        # Before the file: a kill in between leaves the former one, whose checksum stays listed.
        self._seal({self.layout.manifest: Checksum.of(document)})
        with temporary(self.layout.manifest) as unfinished:
            unfinished.write_bytes(document)
        self.on_change()

    def _write_tensors(self, path: Path, arrays: State) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._list({path: write_tensors(path, arrays)})

    def _list(self, files: Mapping[Path, Checksum]) -> None:
        self._round_files.update((self._name(path), c) for path, c in files.items())

    def _append(self, path: Path, line: bytes) -> None:
        append_line(path, line, at=self._grown[path].size)
        self._grown[path].update(line)

    def _seal(self, files: Mapping[str, Checksum] | Mapping[Path, Checksum]) -> None:
        """List what was written since the last time."""
        named = {self._name(path): checksum for path, checksum in files.items()}
        line = checksum_line(named, self._elsewhere & named.keys())
        if self._sealed is None:
            # A writer that was killed may have left the beginning of a line.
            self._sealed = cut_unfinished_line(self.layout.checksums)
        append_line(self.layout.checksums, line, at=self._sealed)
        self._sealed += len(line)

    def _name(self, path: str | Path) -> str:
        return path if isinstance(path, str) else path.relative_to(self.layout.root).as_posix()


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
