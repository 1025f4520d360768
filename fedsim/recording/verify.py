"""Proving that a run directory holds what happened, and saying what cannot be proven."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.core.aggregation import DeltaMean, apply_delta, state_sha256
from fedsim.core.datasets import Dataset, load_dataset
from fedsim.core.errors import InputError
from fedsim.core.models import build_model, resolve_device
from fedsim.core.partition import class_counts, fold_order, partition_sha256
from fedsim.core.rng import Purpose, generator
from fedsim.core.training import (
    Arrays,
    Replay,
    TrainingSettings,
    load_batches,
    schedule,
    state_arrays,
)
from fedsim.recording.checksums import ChecksumLine, read_checksums
from fedsim.recording.files import Checksum
from fedsim.recording.reader import Client, Run, load_run

TOLERANCE = {"float32": 1e-4, "float16": 2**-9, "bfloat16": 2**-6}
"""Relative error allowed where a proof bit for bit is not possible, by ``capture-dtype``."""

_NORM_TOLERANCE = {"float32": 1e-5, "float16": 2**-10, "bfloat16": 2**-7}
_ALONE = 2**16
"""Parameters of at least so many entries are replayed one by one, which keeps them in cache."""

FILES, PARTITION, PARTICIPANTS = "files", "partition", "participants"
INITIAL, STEPS, GRADIENTS = "initial state", "steps", "gradients"
REPLAY, AGGREGATE, STATE, RECOMPUTED = "replay", "aggregate", "state", "recomputed"

_MEANING = {
    FILES: "bytes equal their checksums",
    PARTITION: "every sample at one client; hash, sizes and class counts as recorded",
    PARTICIPANTS: "equal to the list, or to the draw from the seed",
    INITIAL: "equal to the model drawn from the seed",
    STEPS: "batches equal to the draw from the seed; losses and sizes equal to telemetry",
    GRADIENTS: "norms equal to those measured when they were made",
    REPLAY: "the local optimiser over recorded gradients lands on the recorded delta",
    AGGREGATE: "equal to the weighted mean of the deltas, bit for bit",
    STATE: "equal to the state before plus the aggregate, bit for bit, and to its hash",
    RECOMPUTED: "gradients computed once more from data, draws and parameters",
}


@dataclass
class Check:
    """What came of one kind of check.

    Parameters
    ----------
    name : str
        Like ``replay``.
    meaning : str
        What is proven where it holds.
    proven : int
        How many times it held.
    unit : str
        Of what: files, rounds, clients, steps.
    notes : list of str
        What was proven less strictly, and how.
    unproven : list of str
        What could not be proven, and why.
    violations : list of str
        What is wrong: file, tensor, step.
    """

    name: str
    meaning: str
    unit: str
    proven: int = 0
    notes: list[str] = field(default_factory=list)
    unproven: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)


@dataclass
class Verification:
    """The outcome of `verify`.

    Parameters
    ----------
    checks : list of Check
        One for each kind.
    bytes_read : int
        Bytes that were looked at.
    """

    checks: list[Check]
    bytes_read: int = 0

    @property
    def violations(self) -> list[str]:
        """All violations."""
        return [violation for check in self.checks for violation in check.violations]


Progress = Callable[[int, int], None]


def verify(
    path: Path,
    *,
    rounds: Collection[int] | None = None,
    clients: Collection[int] | None = None,
    recompute: int = 0,
    data_root: str | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Check a run directory against itself.

    Parameters
    ----------
    path : Path
        The run directory.
    rounds, clients : collection of int, optional
        Check these only; what a round is made of is checked with all of its clients.
    recompute : int
        Gradients to compute once more from the data, spread over the captured steps.
    data_root : str, optional
        Folder of the data, where it is not the one of the run.
    jobs : int, optional
        Threads; as many as there are cores by default.
    progress : callable, optional
        Told bytes done and bytes in all, from several threads.

    Returns
    -------
    Verification
        Whatever is wrong with the directory is in it.

    Raises
    ------
    InputError
        When `path` is no folder, or a round or client asked for does not exist.
    """
    if not path.is_dir():
        raise InputError(f"{path} is no folder; allowed is a run directory")
    # Each thread of ours works on one client: more threads inside would only compete.
    with _torch_threads(1):
        return _Verifier(path, rounds, clients, recompute, data_root, jobs, progress).verify()


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Verifier:
    def __init__(
        self,
        path: Path,
        rounds: Collection[int] | None,
        clients: Collection[int] | None,
        recompute: int,
        data_root: str | None,
        jobs: int | None,
        progress: Progress | None,
    ) -> None:
        self._path = path
        self._rounds = rounds
        self._clients = clients
        self._recompute = recompute
        self._data_root = data_root
        self._jobs = jobs or os.cpu_count() or 1
        self._progress = progress
        units = {FILES: "files", PARTITION: "clients", PARTICIPANTS: "rounds", INITIAL: "states"}
        units |= {STEPS: "steps", GRADIENTS: "steps", REPLAY: "steps", RECOMPUTED: "steps"}
        units |= {AGGREGATE: "rounds", STATE: "rounds"}
        self._checks = {n: Check(n, meaning, units[n]) for n, meaning in _MEANING.items()}
        self._lock = threading.Lock()
        self._listed: dict[str, Checksum] = {}
        self._hashed: set[str] = set()
        self._damaged: set[str] = set()
        self._read = 0
        self._to_read = 0

    # Results come from several threads.

    def _prove(self, check: str, count: int = 1) -> None:
        with self._lock:
            self._checks[check].proven += count

    def _violate(self, check: str, violation: str) -> None:
        with self._lock:
            self._checks[check].violations.append(violation)

    def _note(self, check: str, note: str) -> None:
        with self._lock:
            if note not in self._checks[check].notes:
                self._checks[check].notes.append(note)

    def _leave(self, check: str, reason: str) -> None:
        with self._lock:
            if reason not in self._checks[check].unproven:
                self._checks[check].unproven.append(reason)

    def _advance(self, count: int) -> None:
        with self._lock:
            self._read += count
            done, total = self._read, max(self._read, self._to_read)
        if self._progress is not None:
            self._progress(done, total)

    @contextmanager
    def _guarded(self, check: str, what: str) -> Iterator[None]:
        """Turn whatever a damaged or forged file makes of a check into a violation."""
        try:
            yield
        except InputError as error:
            self._violate(check, str(error))
        except Exception as error:
            self._violate(check, f"{what} cannot be checked: {type(error).__name__}: {error}")

    def verify(self) -> Verification:
        run = self._open()
        if run is None:
            chosen = list(self._listed)
            self._to_read = sum(self._listed[name].size for name in chosen)
            self._in_parallel([partial(self._hash, [name]) for name in chosen])
            self._leave(STATE, "run.json, rounds.jsonl or clients.jsonl is damaged: files only")
        else:
            self._check_all(run)
        return Verification(list(self._checks.values()), self._read)

    def _open(self) -> Run | None:
        """Check the files that say what there is; give the run where they can be relied on."""
        lines: list[ChecksumLine] = []
        try:
            lines = list(read_checksums(self._path / "checksums.jsonl"))
        except InputError as error:
            self._violate(FILES, str(error))
        try:
            run = load_run(self._path)
            finished = run.status == "finished"
            rows, client_rows = run.round_rows, run.client_rows
        except InputError as error:
            self._violate(FILES, str(error))
            run, finished, rows, client_rows = None, True, [], []
        except Exception as error:
            self._violate(FILES, f"run.json cannot be read: {type(error).__name__}: {error}")
            run, finished, rows, client_rows = None, True, [], []
        lines = self._of_whole_rounds(lines, finished)
        for line in lines:
            self._listed.update(line.files)
        manifests = [line.files["run.json"] for line in lines if "run.json" in line.files]
        for name, allowed in {
            "run.json": manifests,
            "rounds.jsonl": [self._listed[n] for n in ("rounds.jsonl",) if n in self._listed],
            "clients.jsonl": [self._listed[n] for n in ("clients.jsonl",) if n in self._listed],
        }.items():
            self._listed.pop(name, None)
            grows = name != "run.json"
            if not self._check_root_file(name, allowed, grows=grows, whole=finished or not grows):
                run = None
        if run is not None:
            known = {row["round"] for row in rows}
            self._refuse_unknown(known, {row["partition"] for row in client_rows})
        return run

    def _of_whole_rounds(self, lines: list[ChecksumLine], finished: bool) -> list[ChecksumLine]:
        """Leave out the last line of a run that was killed between that and the round's row."""
        listed = [line for line in lines if "rounds.jsonl" in line.files]
        if not listed or finished:
            return lines
        try:
            size = (self._path / "rounds.jsonl").stat().st_size
        except OSError:
            return lines
        if listed[-1].files["rounds.jsonl"].size <= size:
            return lines
        return [line for line in lines if line.number != listed[-1].number]

    def _check_root_file(
        self, name: str, allowed: Sequence[Checksum], *, grows: bool, whole: bool
    ) -> bool:
        path = self._path / name
        if not allowed:
            self._violate(FILES, f"{name} is not listed in checksums.jsonl")
            return False
        try:
            for checksum in reversed(allowed):
                size = checksum.size if grows and not whole else None
                if Checksum.of_file(path, size) == checksum:
                    self._prove(FILES)
                    self._advance(checksum.size)
                    return True
        except OSError as error:
            self._violate(FILES, f"{name} cannot be read: {error.strerror}")
            return False
        self._violate(FILES, f"{name} is not what was written")
        return False

    def _refuse_unknown(self, rounds: set[int], clients: set[int]) -> None:
        for field_name, asked, known in (
            ("--round", self._rounds, rounds),
            ("--client", self._clients, clients),
        ):
            for number in sorted(set(asked or ()) - known):
                allowed = ", ".join(map(str, sorted(known)[:20])) or "none"
                raise InputError(f"{field_name} = {number} is not in the run; there are {allowed}")

    def _check_all(self, run: Run) -> None:
        self._dataset: Dataset | None = None
        self._no_data = "the data was not needed"
        numbers = [row["round"] for row in run.round_rows]
        chosen = [n for n in numbers if self._rounds is None or n in self._rounds]
        if numbers != list(range(len(numbers))):
            self._violate(PARTICIPANTS, f"rounds.jsonl: rounds are {numbers}, not 0 and upwards")
        clients = [
            client
            for number in chosen
            for client in run.round(number).clients.values()
            if self._clients is None or client.partition in self._clients
        ]
        self._count_bytes(run, chosen, clients)
        if self._recompute or self._rounds is None:
            self._load_data(run)
        with self._guarded(PARTITION, "partition.safetensors"):
            if self._whole(PARTITION, ["partition.safetensors"]):
                self._check_partition(run)
        # The longest first: the last task decides when all is done.
        longest = sorted(clients, key=lambda c: -int(c.telemetry.get("bytes_captured", 0)))
        self._in_parallel([partial(self._check_client, run, client) for client in longest])
        self._in_parallel([partial(self._check_round, run, number) for number in chosen])
        if self._recompute:
            self._recompute_steps(run, clients)
        left = set(self._listed) - self._hashed
        if self._rounds is None and self._clients is None:
            self._in_parallel([partial(self._hash, [name]) for name in sorted(left)])

    def _in_parallel(self, tasks: Sequence[Callable[[], object]]) -> None:
        with ThreadPoolExecutor(self._jobs) as pool:
            for future in [pool.submit(task) for task in tasks]:
                future.result()

    def _count_bytes(self, run: Run, rounds: Sequence[int], clients: Sequence[Client]) -> None:
        everything = self._rounds is None and self._clients is None
        for name, checksum in self._listed.items():
            parts = Path(name).parts
            number = int(parts[1]) if parts[0] == "rounds" and len(parts) > 1 else None
            if everything or number is None or number in rounds:
                self._to_read += checksum.size
        self._to_read += sum(c.telemetry["bytes_captured"] for c in clients if c.is_replayable)
        self._to_read += self._read

    # Files

    def _whole(self, check: str, names: Sequence[str]) -> bool:
        """Check files by their checksums; say whether all of them can be relied on."""
        self._hash(names)
        damaged = sorted(set(names) & self._damaged)
        for name in damaged:
            self._leave(check, f"{name} is damaged")
        return not damaged

    def _hash(self, names: Sequence[str]) -> None:
        for name in names:
            with self._lock:
                if name in self._hashed:
                    continue
                self._hashed.add(name)
            problem = self._problem_of(name)
            if problem is None:
                self._prove(FILES)
                self._advance(self._listed[name].size)
            else:
                with self._lock:
                    self._damaged.add(name)
                self._violate(FILES, problem)

    def _problem_of(self, name: str) -> str | None:
        if name not in self._listed:
            return f"{name} is not listed in checksums.jsonl"
        path = self._path / name
        try:
            # A name from a forged list may lead anywhere.
            if not path.resolve().is_relative_to(self._path.resolve()):
                return f"{name} leads out of the run directory"
            if path.stat().st_size != self._listed[name].size:
                return f"{name} has {path.stat().st_size} bytes, not {self._listed[name].size}"
            if Checksum.of_file(path) != self._listed[name]:
                return f"{name} is not what was written"
        except FileNotFoundError:
            return f"{name} is not there"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        return None

    def _name(self, path: Path) -> str:
        return path.relative_to(self._path).as_posix()

    # Data

    def _load_data(self, run: Run) -> None:
        config = run.config
        root = self._data_root or config.data_root
        try:
            dataset = load_dataset(config.dataset, data_root=root, seed=config.seed)
        except InputError as error:
            self._no_data = f"the data is not at hand: {error}"
            return
        if dataset.sha256() != run.manifest["dataset"]["sha256"]:
            self._no_data = "the data at hand has another hash than that of the run"
            return
        self._dataset = dataset

    # Partition and participants

    def _check_partition(self, run: Run) -> None:
        manifest, partition = run.manifest["partition"], run.partition
        ids = list(range(run.config.clients))
        if list(partition) != ids:
            self._violate(PARTITION, f"partition.safetensors has other clients than 0 to {ids[-1]}")
            return
        ordered = [partition[p] for p in ids]
        joined = np.sort(np.concatenate(ordered))
        samples = run.manifest["dataset"]["train_size"]
        before = len(self._checks[PARTITION].violations)
        if not np.array_equal(joined, np.arange(samples)):
            self._violate(
                PARTITION, f"partition.safetensors does not deal each of {samples} samples once"
            )
        if [len(p) for p in ordered] != manifest["sizes"]:
            self._violate(PARTITION, "partition.safetensors has other sizes than run.json")
        if partition_sha256(ordered) != manifest["sha256"]:
            self._violate(PARTITION, "partition.safetensors has another hash than run.json")
        if self._dataset is None:
            self._leave(PARTITION, f"class counts: {self._no_data}")
        else:
            labels = self._dataset.train_labels.numpy()
            counts = class_counts(ordered, labels, self._dataset.spec.classes)
            for row in run.client_rows:
                told = row.get("class_distribution")
                if row["status"] == "ok" and told != counts[row["partition"]].tolist():
                    self._violate(
                        PARTITION,
                        f"clients.jsonl: class_distribution of client {row['partition']} in round "
                        f"{row['round']} is not that of its samples",
                    )
        if len(self._checks[PARTITION].violations) == before:
            self._prove(PARTITION, len(ids))

    def _check_participants(self, run: Run, number: int) -> None:
        row = run.round(number).row
        drawn = run.config.participants_of(number)
        if row["participants"] != drawn:
            self._violate(
                PARTICIPANTS,
                f"rounds.jsonl: round {number} has participants {row['participants']}, "
                f"and {drawn} follow from the seed",
            )
            return
        there = [r for r in run.client_rows if r["round"] == number]
        told = {r["partition"]: r["status"] for r in there}
        if len(there) != len(told) or set(told) != set(drawn):
            self._violate(
                PARTICIPANTS,
                f"clients.jsonl: round {number} has {sorted(told)}, not {drawn}",
            )
        elif sorted(row["failed"]) != sorted(p for p, status in told.items() if status != "ok"):
            self._violate(PARTICIPANTS, f"rounds.jsonl: round {number} names other failed clients")
        else:
            self._prove(PARTICIPANTS)

    # Rounds

    def _check_round(self, run: Run, number: int) -> None:
        whole = run.round(number)
        state = self._name(run.layout.state(number))
        if number == 0:
            with self._guarded(INITIAL, state):
                if self._whole(INITIAL, [state]):
                    self._check_initial(run)
            with self._guarded(STATE, state):
                if self._whole(STATE, [state]):
                    self._check_state(number, _arrays(whole.state), None, whole.row)
            return
        with self._guarded(PARTICIPANTS, f"round {number}"):
            self._check_participants(run, number)
        aggregate = self._name(run.layout.aggregate(number))
        with self._guarded(AGGREGATE, aggregate):
            clients = whole.clients
            deltas = [self._name(run.layout.delta(number, p)) for p in clients]
            if self._whole(AGGREGATE, [aggregate, *deltas]):
                sizes = [len(run.partition[p]) for p in range(run.config.clients)]
                mean = DeltaMean()
                for partition in fold_order(list(clients), sizes):
                    mean.add(_arrays(clients[partition].delta), sizes[partition])
                self._compare(AGGREGATE, aggregate, _arrays(whole.aggregate), mean.mean())
        with self._guarded(STATE, state):
            before = self._name(run.layout.state(number - 1))
            if self._whole(STATE, [state, before, aggregate]):
                expected = apply_delta(
                    _arrays(run.round(number - 1).state), _arrays(whole.aggregate)
                )
                self._check_state(number, _arrays(whole.state), expected, whole.row)

    def _check_initial(self, run: Run) -> None:
        config = run.config
        model = build_model(
            config.model,
            classes=run.manifest["dataset"]["classes"],
            norm=config.norm,
            seed=config.seed,
        )
        name = self._name(run.layout.state(0))
        if _same_torch(run):
            self._compare(INITIAL, name, _arrays(run.round(0).state), state_arrays(model))
        else:
            self._leave(INITIAL, f"drawn by torch {run.manifest['versions']['torch']}")

    def _check_state(
        self,
        number: int,
        state: Arrays,
        expected: Arrays | None,
        row: Mapping[str, Any],
    ) -> None:
        name = f"rounds/{number:04d}/global.safetensors"
        if expected is not None and (odd := _first_difference(state, expected)):
            self._violate(STATE, f"{name}: {odd} is not the state before plus the aggregate")
        elif state_sha256(state) != row["state_sha256"]:
            self._violate(STATE, f"{name} has another hash than round {number} in rounds.jsonl")
        else:
            self._prove(STATE)

    def _compare(self, check: str, name: str, found: Arrays, expected: Arrays) -> None:
        if odd := _first_difference(found, expected):
            self._violate(check, f"{name}: {odd} is not {self._checks[check].meaning}")
        else:
            self._prove(check)

    # Clients

    def _check_client(self, run: Run, client: Client) -> None:
        folder = self._name(client.folder)
        steps = f"{folder}/steps.jsonl"
        written = [f"{folder}/{name}" for name in client.telemetry.get("files", {})]
        for name, told in client.telemetry.get("files", {}).items():
            listed = self._listed.get(f"{folder}/{name}")
            if listed is not None and listed.to_json() != told:
                self._violate(FILES, f"clients.jsonl: {folder}/{name} has another checksum there")
        with self._guarded(STEPS, steps):
            if self._whole(STEPS, [steps, "partition.safetensors"]):
                self._check_steps(run, client, steps)
        with self._guarded(GRADIENTS, folder):
            shards = [name for name in written if "/gradients-" in name]
            found = [self._name(p) for p in sorted(client.folder.glob("gradients-*.safetensors"))]
            if sorted(shards) != found:
                self._violate(FILES, f"{folder}: shards are {found}, not {sorted(shards)}")
                return
            self._hash(written)
            if not shards:
                kept = run.config.capture
                self._leave(REPLAY, f"no gradients were kept (capture = {kept})")
                return
            if not self._whole(GRADIENTS, [steps, *written]):
                self._leave(REPLAY, f"files of {folder} are damaged")
                return
            self._check_captured(run, client)

    def _check_captured(self, run: Run, client: Client) -> None:
        folder = self._name(client.folder)
        policy, num_steps = run.config.policy, client.telemetry["num_steps"]
        kept = list(policy.kept_steps(num_steps))
        names = policy.layers_of(run.shapes)
        expected = {f"{step:06d}/{name}" for step in kept for name in names}
        if odd := sorted(expected.symmetric_difference(client.shards)):
            self._violate(
                GRADIENTS,
                f"{folder}: gradient {odd[0]} is missing or too many",
            )
            return
        if not client.is_replayable:
            self._leave(
                REPLAY,
                f"capture = {run.config.capture} kept {len(kept)} of {num_steps} steps"
                if len(kept) < num_steps
                else "the gradients of float16 autocast need all layers to say which steps count",
            )
            self._check_norms(run, client, kept)
            return
        start = self._name(run.layout.state(client.round - 1))
        delta = self._name(run.layout.delta(client.round, client.partition))
        if not self._whole(REPLAY, [start, delta]):
            return
        with self._guarded(REPLAY, folder):
            odd_name, error = self._replay(run, client, names)
            if odd_name is None:
                self._prove(REPLAY, num_steps)
                if error:
                    self._note(REPLAY, f"within {error:.1e} of the delta: {_why(run)}")
            else:
                self._violate(
                    REPLAY,
                    f"{delta}: {odd_name} is not where the gradients lead, off by {error:.1e}",
                )
            if odd_name is not None:
                self._check_norms(run, client, kept)

    def _replay(self, run: Run, client: Client, names: list[str]) -> tuple[str | None, float]:
        """Replay the optimiser; give the first parameter that lands elsewhere, and how far."""
        start, delta = run.round(client.round - 1).state, client.delta
        settings = run.config.training_of(client.partition).optimizer
        exact = _is_exact(run)
        worst = 0.0
        for group in _groups(run, names):
            replay = Replay(start, group, settings, run.config.autocast)
            for step in range(client.telemetry["num_steps"]):
                replay.step({n: client.shard(step, n).gradient(step, n) for n in group})
            for name in group:
                moved = replay.parameters[name] - start[name]
                if torch.equal(_bits(moved), _bits(delta[name])):
                    continue
                size = float(torch.linalg.vector_norm(delta[name]))
                off = float(torch.linalg.vector_norm(moved - delta[name]))
                error = off / size if size else off
                if exact or not error <= TOLERANCE[run.config.capture_dtype]:
                    return name, error
                worst = max(worst, error)
            share = sum(np.prod(run.shapes[n]) for n in group) / sum(
                np.prod(run.shapes[n]) for n in names
            )
            self._advance(int(client.telemetry["bytes_captured"] * share))
        return None, worst

    def _check_norms(self, run: Run, client: Client, kept: Sequence[int]) -> None:
        tolerance = _NORM_TOLERANCE[run.config.capture_dtype]
        folder = self._name(client.folder)
        for step in kept:
            told = client.steps[step].get("per_layer_norms")
            if told is None:
                self._leave(GRADIENTS, "gradient-statistics = false: no norms to compare with")
                return
            for name in client.captured_parameters:
                shard = client.shard(step, name)
                norm = float(torch.linalg.vector_norm(shard.packed(step, name).float()))
                if told[name] is None or abs(norm - told[name]) > tolerance * max(norm, 1e-30):
                    self._violate(
                        GRADIENTS,
                        f"{folder}/{shard.path.name}: step {step}, {name} has norm {norm:.6g}, "
                        f"and {told[name]} was measured",
                    )
                    return
        self._prove(GRADIENTS, len(kept))

    def _check_steps(self, run: Run, client: Client, name: str) -> None:
        telemetry, rows = client.telemetry, client.steps
        settings = run.config.training_of(client.partition)
        indices = run.partition[client.partition]
        drawn = schedule(
            len(indices),
            settings,
            generator(run.config.seed, Purpose.BATCHES, client.round, client.partition),
        )
        expected = [(epoch, indices[positions]) for epoch, positions in drawn]
        if len(rows) != len(expected) or telemetry["num_steps"] != len(expected):
            self._violate(STEPS, f"{name} has {len(rows)} steps, not {len(expected)}")
            return
        for number, (row, (epoch, batch)) in enumerate(zip(rows, expected, strict=True)):
            told = (row["step"], row["epoch"], row["batch_size"], row["learning_rate"])
            if told != (number, epoch, len(batch), settings.optimizer.learning_rate):
                self._violate(STEPS, f"{name}: step {number} is not as the configuration says")
                return
            if not np.array_equal(row["indices"], batch):
                self._violate(STEPS, f"{name}: the batch of step {number} is not the one drawn")
                return
        if [row["loss"] for row in rows] != telemetry["loss_history"]:
            self._violate(STEPS, f"{name} has other losses than clients.jsonl")
        elif [row["batch_size"] for row in rows] != telemetry["batch_sizes"]:
            self._violate(STEPS, f"{name} has other batch sizes than clients.jsonl")
        elif telemetry["num_samples"] != len(indices):
            self._violate(STEPS, f"{name}: the client has {len(indices)} samples")
        else:
            self._prove(STEPS, len(rows))

    # Recomputing

    def _recompute_steps(self, run: Run, clients: Sequence[Client]) -> None:
        if self._dataset is None:
            self._leave(RECOMPUTED, self._no_data)
            return
        if run.config.autocast == "float16":
            self._leave(RECOMPUTED, "autocast = float16 scales its losses by what came before")
            return
        candidates = [
            (client, step)
            for client in clients
            if not self._damaged
            for step in _recomputable(client)
        ]
        if not candidates:
            self._leave(RECOMPUTED, "no step was captured with all layers and all steps before it")
            return
        count = min(self._recompute, len(candidates))
        chosen = [candidates[i * len(candidates) // count] for i in range(count)]
        device = resolve_device(run.config.device)
        model = build_model(
            run.config.model,
            classes=self._dataset.spec.classes,
            norm=run.config.norm,
            seed=run.config.seed,
        ).to(device)
        with _torch_threads(run.manifest["device"]["worker_threads"]):
            for client, step in chosen:
                with self._guarded(RECOMPUTED, f"{self._name(client.folder)}, step {step}"):
                    self._recompute_step(run, client, step, model)

    def _recompute_step(self, run: Run, client: Client, step: int, model: torch.nn.Module) -> None:
        assert self._dataset is not None  # noqa: S101
        settings: TrainingSettings = run.config.training_of(client.partition)
        device = next(model.parameters()).device
        seed, number, partition = run.config.seed, client.round, client.partition
        batches = load_batches(
            self._dataset.train_images,
            self._dataset.train_labels,
            run.partition[partition],
            self._dataset.spec,
            settings,
            order=generator(seed, Purpose.BATCHES, number, partition),
            augmentation=generator(seed, Purpose.AUGMENTATION, number, partition),
            device=device,
        )
        batch = next(b for position, b in enumerate(batches) if position == step)
        state = dict(run.round(number - 1).state) | client.parameters_at(step)
        model.load_state_dict(state)
        model.train()
        model.zero_grad(set_to_none=True)
        precision = torch.autocast(
            device.type, dtype=torch.bfloat16, enabled=run.config.autocast == "bfloat16"
        )
        with precision:
            loss = torch.nn.functional.cross_entropy(model(batch.inputs), batch.targets)
        loss.backward()  # type: ignore[no-untyped-call]
        recorded = client.gradient(step)
        off = size = 0.0
        for name, parameter in model.named_parameters():
            made = parameter.grad
            if made is None:
                continue
            difference = made.cpu() - recorded[name]
            off += float(torch.linalg.vector_norm(difference).double() ** 2)
            size += float(torch.linalg.vector_norm(recorded[name]).double() ** 2)
        error = (off / size) ** 0.5 if size else off**0.5
        tolerance = 10 * TOLERANCE[run.config.capture_dtype]
        if not error <= tolerance:
            self._violate(
                RECOMPUTED,
                f"{self._name(client.folder)}: the gradient of step {step} is off by {error:.1e} "
                f"(allowed {tolerance:.1e})",
            )
            return
        self._prove(RECOMPUTED)
        self._note(RECOMPUTED, "bit for bit" if off == 0 else f"others within {tolerance:.0e}")


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, NDArray[np.generic]]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32)


def _first_difference(found: Arrays, expected: Arrays) -> str | None:
    """Name the first array that is not the same to the last bit."""
    if list(found) != list(expected):
        return sorted(set(found).symmetric_difference(expected) or {"the order"})[0]
    for name, array in expected.items():
        same = found[name].dtype == array.dtype and found[name].shape == array.shape
        if not same or found[name].tobytes() != array.tobytes():
            return name
    return None


def _same_torch(run: Run) -> bool:
    return str(run.manifest["versions"]["torch"]) == version("torch")


def _is_exact(run: Run) -> bool:
    return run.config.capture_dtype == "float32" and not _why(run)


def _why(run: Run) -> str:
    """Say why a replay here need not land on the very bits of the run; empty where it must."""
    device = run.manifest["device"]
    if run.config.capture_dtype != "float32":
        return f"gradients are stored as {run.config.capture_dtype}"
    if not _same_torch(run):
        return f"the run has torch {run.manifest['versions']['torch']}, here is {version('torch')}"
    if device["type"] != "cpu":
        return f"the run trained on {device['type']}"
    here = torch.backends.cpu.get_cpu_capability()
    if device["cpu_capability"] != here:
        return f"the run used {device['cpu_capability']} instructions, here are {here}"
    return ""


def _recomputable(client: Client) -> list[int]:
    """Give the steps with all layers whose parameters follow from the steps before."""
    if not client.has_all_parameters:
        return []
    captured = client.captured_steps
    return [step for position, step in enumerate(captured) if position == step]


def _groups(run: Run, names: Sequence[str]) -> list[list[str]]:
    if run.config.autocast == "float16":
        return [list(names)]
    large = [n for n in names if np.prod(run.shapes[n]) >= _ALONE]
    small = [n for n in names if n not in large]
    return [*([n] for n in large), *([small] if small else [])]
