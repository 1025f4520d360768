"""Reading a run directory lazily: nothing is loaded before it is asked for."""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.core import registry
from fedsim.core.aggregation import State
from fedsim.core.algorithm import Algorithm, ArraySpec, Setup, make_algorithm, make_users
from fedsim.core.behavior import ClientInRound, behavior_of
from fedsim.core.capture import Capture, all_captures
from fedsim.core.config import RunConfig
from fedsim.core.errors import ConfigError, InputError, shorten
from fedsim.core.inputs import parse_json, read_text_bytes
from fedsim.core.schedule import Rates, rates_of
from fedsim.core.task import classes_of, task_of
from fedsim.recording import rows
from fedsim.recording.checksums import files_removed, read_checksums
from fedsim.recording.files import DTYPES
from fedsim.recording.layout import (
    FORMAT,
    SHARED_FORMAT,
    STEPS,
    RunLayout,
)
from fedsim.recording.tensor_files import TensorFile, TensorPart

if TYPE_CHECKING:
    import pandas

T = TypeVar("T")
F = TypeVar("F", TensorFile, TensorPart)

_PARTITION = re.compile(r"0|[1-9][0-9]{0,9}")
_SHARED_OPEN = 4


class Client:
    """What one client left in one round.

    Attributes
    ----------
    round : int
        The round.
    partition : int
        The client's partition id.
    telemetry : dict
        Its line of ``clients.jsonl``.
    """

    def __init__(self, run: Run, round_number: int, telemetry: dict[str, Any]) -> None:
        self._run = run
        self.round = round_number
        self.telemetry = telemetry
        self.partition: int = telemetry["partition"]
        self._views: dict[type[Capture], Any] = {}

    def __getattr__(self, name: str) -> Any:
        """Look a name up in what captures bring: ``gradient(step)``, ``layer(name)`` and others."""
        if not name.startswith("_"):
            found = next((c for c in all_captures() if name in c.reads), None)
            # Loads a class of the user's where the run has one.
            capture = found or type(self._run.config.policy)
            if name in capture.reads:
                if capture not in self._views:
                    self._views[capture] = capture.open(self)
                return getattr(self._views[capture], name)
        raise AttributeError(f"a client has no {name}", name=name, obj=self)

    def __dir__(self) -> Iterator[str]:
        yield from super().__dir__()
        for capture in all_captures():
            yield from capture.reads

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    @property
    def place(self) -> tuple[int, int]:
        """Its round and its partition id."""
        return self.round, self.partition

    @cached_property
    def delta(self) -> Mapping[str, Tensor]:
        """Local minus global state, ``state_dict`` names."""
        if (shard := self._shard) is None:
            return self._run.state_file(self.delta_path)
        part = self._run.shared_deltas(self.round, shard).get(self.partition)
        return self._run.as_described(self._found(part, self.delta_path))

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """The lines about its steps: one for each local step."""
        if (shard := self._shard) is None or STEPS in self.telemetry["files"]:
            return rows.read_rows(self.steps_path, rows.StepRow)
        return self._found(
            self._run.shared_steps(self.round, shard).get(self.partition), self.steps_path
        )

    @property
    def delta_path(self) -> Path:
        """The file that holds the delta, alone or with those of other clients."""
        layout, shard = self._run.layout, self._shard
        if shard is None:
            return layout.delta(self.round, self.partition)
        return layout.shared_deltas(self.round, shard)

    @property
    def steps_path(self) -> Path:
        """The file that holds the lines about the steps, alone or with those of other clients."""
        layout, shard = self._run.layout, self._shard
        if shard is None or STEPS in self.telemetry["files"]:
            return layout.steps(self.round, self.partition)
        return layout.shared_steps(self.round, shard)

    @property
    def _shard(self) -> int | None:
        return self.telemetry.get("shard")

    def _found(self, part: T | None, path: Path) -> T:
        if part is None:
            raise InputError(f"{path} holds nothing of client {self.partition}")
        return part

    @property
    def proximal_mu(self) -> float:
        """Factor of the proximal term that was minimised in addition to the loss; 0 without one."""
        return float(self.telemetry.get("proximal_mu", 0.0))

    @cached_property
    def control(self) -> Mapping[str, Tensor]:
        """What the strategy keeps of this client after the round, like a control variate.

        Raises
        ------
        InputError
            Where it keeps nothing.
        """
        return self._control_of(self.round)

    @cached_property
    def former_control(self) -> Mapping[str, Tensor]:
        """What was kept when the round began; empty before the client's first."""
        return {} if self.control_round is None else self._control_of(self.control_round)

    @cached_property
    def control_round(self) -> int | None:
        """The round of this client before this one; what was kept then, it began with."""
        rounds = self._run.rounds_of_client(self.partition)
        return max((r for r in rounds if r < self.round), default=None)

    def _control_of(self, round_number: int) -> Mapping[str, Tensor]:
        file = TensorFile(self._run.layout.control(round_number, self.partition))
        if (algorithm := self._run.algorithm) is not None:
            check_arrays(file, algorithm.keeps_of_client())
        return file

    @cached_property
    def correction(self) -> dict[str, Tensor] | None:
        """What the strategy added to every gradient of the round, by parameter; None for nothing.

        None, too, where the strategy is a class of the user's that was not named: see `load_run`.
        """
        algorithm = self._run.algorithm
        if algorithm is None or not algorithm.corrects:
            return None
        own = {name: tensor.numpy() for name, tensor in self.former_control.items()}
        found = algorithm.correction(self._run.kept_before(self.round), own)
        if found is None:
            return None
        return {name: torch.from_numpy(np.asarray(array)) for name, array in found.items()}

    @cached_property
    def unknown_correction(self) -> str:
        """Why it is not known what was added to the gradients; empty where it is known."""
        steps = self.steps if self._run.algorithm is None else []
        if any("objective_norm" in row and "proximal" not in row for row in steps):
            return (
                f"what {self._run.config.strategy.name} adds to gradients follows from its own "
                "code, which was not named"
            )
        return ""

    @property
    def folder(self) -> Path:
        """Where the client's files of the round are."""
        return self._run.layout.client(self.round, self.partition)

    @property
    def rates(self) -> Rates:
        """The rate of each local step, as the configuration's schedule gives it.

        Raises
        ------
        InputError
            When the schedule is code that the user did not name to this process.
        """
        samples = len(self._run.partition[self.partition])
        rounds = self._run.rounds_of(self.round)
        config = self._run.config.model_copy(update={"rounds": rounds})
        return rates_of(config, self.partition, self.round, samples)

    @property
    def behavior(self) -> ClientInRound:
        """What the client did with its samples and its update.

        Raises
        ------
        InputError
            When it is code that the user did not name to this process.
        """
        return behavior_of(self._run.config, self.partition, self.round)

    def __repr__(self) -> str:
        return f"<client {self.partition} in round {self.round}>"


class Round:
    """One finished round, or round 0 with the initial state.

    Attributes
    ----------
    number : int
        0 for the untrained model.
    row : dict
        Its line of ``rounds.jsonl``.
    """

    def __init__(self, run: Run, row: dict[str, Any]) -> None:
        self._run = run
        self.row = row
        self.number: int = row["round"]

    @property
    def participants(self) -> list[int]:
        """Partition ids that were asked to take part, in the order of the draw."""
        return list(self.row["participants"])

    @cached_property
    def state(self) -> TensorFile:
        """Global state after the round, ``state_dict`` names."""
        return self._run.state_file(self._run.layout.state(self.number))

    @cached_property
    def aggregate(self) -> Mapping[str, Tensor]:
        """Sample-weighted mean delta of the round, with every strategy."""
        return self._run.state_file(self._run.layout.aggregate(self.number))

    @property
    def movement(self) -> Mapping[str, Tensor]:
        """What the round did to the global state: that after it less that before it.

        With the default strategy it is the aggregate up to rounding; with others, which may
        weigh, clip or alter what clients sent, only this says where the model went.

        Raises
        ------
        InputError
            For round 0, which nothing came before.
        """
        if not self.number:
            raise InputError("round 0 is the untrained model: nothing moved it")
        return Movement(self._run.round(self.number - 1).state, self.state)

    @cached_property
    def strategy_state(self) -> Mapping[str, Tensor]:
        """What the strategy kept for the next round, like ``m/<parameter>``.

        Strategies that keep nothing have no such file.
        """
        return TensorFile(self._run.layout.strategy(self.number))

    @cached_property
    def clients(self) -> dict[int, Client]:
        """The clients whose work is in the round, by partition id."""
        return {
            row["partition"]: Client(self._run, self.number, row)
            for row in self._run.client_rows_of(self.number)
            if row["status"] == "ok"
        }

    def client(self, partition: int) -> Client:
        """Give one client of the round.

        Raises
        ------
        InputError
            When that partition has no work in the round.
        """
        if partition not in self.clients:
            raise InputError(
                f"client {partition} has no work in round {self.number}; "
                f"clients of the round are {sorted(self.clients)}"
            )
        return self.clients[partition]

    def __repr__(self) -> str:
        return f"<round {self.number} of {self._run.path.name}>"


class Movement(Mapping[str, Tensor]):
    """The difference of two states, array by array as they are looked at.

    Parameters
    ----------
    before, after : mapping of str to Tensor
        States of the same names.
    """

    def __init__(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
        self._before = before
        self._after = after

    def __getitem__(self, name: str) -> Tensor:
        return self._after[name] - self._before[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._after)

    def __len__(self) -> int:
        return len(self._after)


class Run:
    """A run directory.

    Parameters
    ----------
    path : path-like
        The run directory.
    strategy : str, optional
        The user's class that the run was made with, as ``module:Class`` or ``FILE.py:Class``.

    Raises
    ------
    InputError
        When it is not a run directory of a format this version reads, or its strategy is no
        class of that name.
    """

    def __init__(self, path: str | Path, strategy: str | None = None) -> None:
        self.path = Path(path)
        self._users = strategy
        self.layout = RunLayout(self.path)
        try:
            self.manifest: dict[str, Any] = parse_json(read_text_bytes(self.layout.manifest))
            found = self.manifest["format"]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(
                f"{self.path} is not a run directory: it has no whole run.json"
            ) from None
        if type(found) is not int or found not in (FORMAT, SHARED_FORMAT):
            raise InputError(
                f"{self.path} has format {shorten(found)}; this version reads {FORMAT} and "
                f"{SHARED_FORMAT}"
            )
        rows.check(rows.Manifest, self.manifest, str(self.layout.manifest))
        if strategy is not None:
            recorded = self.config.strategy.name
            if not strategy.endswith(recorded[recorded.rfind(":") :]) or ":" not in recorded:
                raise ConfigError("strategy", strategy, f"{recorded!r}, which made {self.path}")

    @property
    def status(self) -> str:
        """``running``, ``finished`` or ``failed``."""
        return str(self.entry("status"))

    @cached_property
    def config(self) -> RunConfig:
        """The complete configuration of the run."""
        return RunConfig.from_mapping(
            {k: v for k, v in self.entry("config").items() if v is not None}
        )

    def made_by(self, round_number: int) -> tuple[dict[str, str], dict[str, Any]]:
        """Give the versions and the device of the part of the run that a round belongs to.

        Raises
        ------
        InputError
            When ``run.json`` does not say.
        """
        found = self.entry("versions"), self.entry("device")
        for entry in self.manifest.get("resumed", []):
            if entry["after"] < round_number:
                # Earlier versions did not record what they went on with.
                found = entry["versions"], entry.get("device") or found[1]
        return found

    def rounds_of(self, round_number: int) -> int:
        """Give how many rounds the run was to have when it made a round."""
        for entry in self.manifest.get("resumed", []):
            if "rounds" in entry and round_number <= entry["after"]:
                return int(entry["rounds"])
        return self.config.rounds

    def code_of(self, round_number: int) -> dict[str, str]:
        """Give the sha256 of the source of the user's own code that made a round, by its name.

        Code whose hash was not recorded is left out.
        """
        found = dict(self.manifest.get("code", {}))
        for entry in self.manifest.get("resumed", []):
            if entry["after"] < round_number:
                found.update(entry.get("code", {}))
        return found

    def code_at_hand(self) -> dict[str, str]:
        """Give what `code_of` gives, of the source that the user named to this process."""
        named = {name: name for name in self.config.code if registry.may_load(name)}
        if self._users is not None:
            named[self.config.strategy.name] = self._users
        found = registry.sources(named.values())
        return {name: found[own] for name, own in named.items() if own in found}

    @cached_property
    def algorithm(self) -> Algorithm | None:
        """The strategy; None where it is a class of the user's that was not named."""
        setup = Setup.of(self.config, self.shapes)
        if self._users is not None:
            return make_users(self._users, self.config.strategy, setup)
        return make_algorithm(self.config.strategy, setup)

    def kept_before(self, round_number: int) -> State:
        """Give what the strategy kept when a round began; nothing where it was not named.

        Raises
        ------
        InputError
            When the file holds other arrays than the strategy keeps.
        """
        if self.algorithm is None:
            return {}
        if round_number == 1 or not (keeps := self.algorithm.keeps()):
            return self.algorithm.begin()
        kept = TensorFile(self.layout.strategy(round_number - 1))
        check_arrays(kept, keeps)
        return {key: kept[key].numpy() for key in keeps}

    def entry(self, key: str) -> Any:
        """Give what ``run.json`` has under a key.

        Raises
        ------
        InputError
            When it has nothing there.
        """
        if self.manifest.get(key) is None:
            raise InputError(f"{self.layout.manifest} has no {key}")
        return self.manifest[key]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the model's parameters by name, in ``model.parameters()`` order."""
        return {p["name"]: tuple(p["shape"]) for p in self.parameters}

    @property
    def parameters(self) -> list[dict[str, Any]]:
        """Name, shape and dtype of the model's parameters, in ``model.parameters()`` order."""
        return list(self.entry("model")["parameters"])

    @cached_property
    def described(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The safetensors dtype and the shape of each array of a state, by name."""
        arrays = self.parameters + self.entry("model")["buffers"]
        return {a["name"]: (DTYPES.get(a["dtype"], ""), tuple(a["shape"])) for a in arrays}

    def has_captured(self, row: Mapping[str, Any]) -> bool:
        """Say whether everything that a client captured is in the run directory.

        Parameters
        ----------
        row : mapping
            The line of ``clients.jsonl``, of a client that trained.
        """
        if row.get("place") != "node":
            return not self.has_removed(row)
        folder = self.layout.client(row["round"], row["partition"])
        return all(os.path.lexists(folder / name) for name in row["files"] if name != STEPS)

    def has_removed(self, row: Mapping[str, Any]) -> bool:
        """Say whether gradients that a client captured were removed, and not brought back."""
        folder = PurePosixPath(f"rounds/{row['round']:04d}/clients/{row['partition']:04d}")
        names = {str(folder / name) for name in row["files"]} & self._removed
        return any(not os.path.lexists(self.path / name) for name in names)

    @property
    def removed(self) -> list[str]:
        """Files of gradients that were removed to make room, and not brought back."""
        return [n for n in sorted(self._removed) if not os.path.lexists(self.path / n)]

    @cached_property
    def _removed(self) -> frozenset[str]:
        try:
            return files_removed(read_checksums(self.layout.checksums))
        except InputError:
            # Nothing says so: then a file that is not there is damage.
            return frozenset()

    def state_file(self, path: Path) -> TensorFile:
        """Open a state or a delta.

        Raises
        ------
        InputError
            When it does not hold the arrays that ``run.json`` describes.
        """
        return self.as_described(TensorFile(path))

    def as_described(self, file: F) -> F:
        """Check what `state_file` opens."""
        if odd := set(file.described.items()).symmetric_difference(self.described.items()):
            name = min(name for name, _ in odd)
            raise InputError(f"{file.path}: {name} is not there as run.json describes it")
        return file

    def shared_deltas(self, round_number: int, shard: int) -> Mapping[int, TensorPart]:
        """Open a file with the deltas of many clients, by partition id.

        Raises
        ------
        InputError
            When it is not such a file.
        """
        return self._open_deltas(self.layout.shared_deltas(round_number, shard))

    def shared_steps(self, round_number: int, shard: int) -> Mapping[int, list[dict[str, Any]]]:
        """Read a file with the lines of many clients' steps, by partition id.

        Raises
        ------
        InputError
            When it is not such a file.
        """
        return self._read_steps(self.layout.shared_steps(round_number, shard))

    # A loop over the clients of a round opens the same few files again and again.
    @cached_property
    def _open_deltas(self) -> Callable[[Path], dict[int, TensorPart]]:
        return functools.lru_cache(maxsize=_SHARED_OPEN)(_deltas_in)

    @cached_property
    def _read_steps(self) -> Callable[[Path], dict[int, list[dict[str, Any]]]]:
        return functools.lru_cache(maxsize=_SHARED_OPEN)(_steps_in)

    def check_sizes(self) -> None:
        """Check that the files hold as many samples and classes as the configuration asks for.

        Data and models are made from the configuration, which from a stranger may ask for any
        amount of memory.

        Raises
        ------
        InputError
            When they hold other numbers of them.
        """
        # A task of the user's own is not loaded to look at a run.
        spec = None if registry.is_code(self.config.task) else task_of(self.config).spec
        held = sum(len(indices) for indices in self.partition.values())
        samples = self.entry("dataset")["train_size"] if spec is None else spec.train_size
        if self.config.own_data:
            samples = sum(self.entry("partition")["sizes"])
        if (held, len(self.partition)) != (samples, self.config.clients):
            raise InputError(
                f"{self.layout.partition} deals {held} samples to {len(self.partition)} clients; "
                f"expected as config says, {samples} to {self.config.clients}"
            )
        for indices in self.partition.values():
            if len(indices) and not 0 <= indices.min() <= indices.max() < held:
                raise InputError(f"{self.layout.partition} has positions outside 0 to {held - 1}")
        # No more than a fifth of the samples, by the name of the dataset.
        name, shape = list(self.shapes.items())[-1]
        if spec is not None and shape != (classes := classes_of(spec),):
            raise InputError(
                f"{self.layout.manifest}: {name} has shape {shape}; expected ({classes},), "
                f"the classes of {self.config.dataset}"
            )

    @cached_property
    def partition(self) -> dict[int, NDArray[np.int64]]:
        """Indices into the training split, by partition id.

        Raises
        ------
        InputError
            When it is not a list of positions for each of the clients from 0 on.
        """
        path = self.layout.partition
        file = TensorFile(path)
        if {*file} != {str(number) for number in range(len(file))}:
            raise InputError(f"{path} has other names than the clients from 0 on")
        for key, (dtype, shape) in file.described.items():
            if dtype != "I64" or len(shape) != 1:
                raise InputError(f"{path}: {key} is not a list of positions")
        return {number: file[str(number)].numpy() for number in range(len(file))}

    @cached_property
    def round_rows(self) -> list[dict[str, Any]]:
        """The lines of ``rounds.jsonl``."""
        return rows.read_rows(self.layout.rounds, rows.RoundRow, absent_is_empty=True)

    @cached_property
    def client_rows(self) -> list[dict[str, Any]]:
        """The lines of ``clients.jsonl`` that belong to finished rounds."""
        finished = {row["round"] for row in self.round_rows}
        return [row for row in self._all_client_rows if row["round"] in finished]

    @cached_property
    def unfinished_client_rows(self) -> list[dict[str, Any]]:
        """The lines of ``clients.jsonl`` that belong to no finished round."""
        finished = {row["round"] for row in self.round_rows}
        return [row for row in self._all_client_rows if row["round"] not in finished]

    @cached_property
    def _all_client_rows(self) -> list[dict[str, Any]]:
        return rows.read_rows(self.layout.clients, None, absent_is_empty=True)

    def client_rows_of(self, number: int) -> list[dict[str, Any]]:
        """Give those of `client_rows` that belong to a round."""
        return self._client_rows_by_round.get(number, [])

    @cached_property
    def _client_rows_by_round(self) -> dict[int, list[dict[str, Any]]]:
        grouped: dict[int, list[dict[str, Any]]] = {}
        for row in self.client_rows:
            grouped.setdefault(row["round"], []).append(row)
        return grouped

    def rounds_of_client(self, partition: int) -> list[int]:
        """Give the finished rounds in which a client trained."""
        return self._rounds_by_client.get(partition, [])

    @cached_property
    def _rounds_by_client(self) -> dict[int, list[int]]:
        grouped: dict[int, list[int]] = {}
        for row in self.client_rows:
            if row["status"] == "ok":
                grouped.setdefault(row["partition"], []).append(row["round"])
        return grouped

    @cached_property
    def _round_row(self) -> dict[int, dict[str, Any]]:
        return {row["round"]: row for row in reversed(self.round_rows)}

    def rounds(self) -> pandas.DataFrame:
        """Give the finished rounds as a data frame, one row each, round 0 first.

        Its columns are scalars: ``seconds_total`` and so on, and the numbers of participants and
        of those that failed. Who they are is in `round_rows` and `telemetry`.
        """
        from fedsim.recording.frames import rounds_frame

        return rounds_frame(self.round_rows)

    def telemetry(self) -> pandas.DataFrame:
        """Give what clients reported as a data frame, one row for each client in each round.

        Its columns are scalars. What a client reported of each step, parameter and class is in
        `steps`, `layer_norms` and `class_counts`.
        """
        from fedsim.recording.frames import clients_frame

        return clients_frame(self.client_rows)

    def steps(self) -> pandas.DataFrame:
        """Give batch size and loss of each local step, one row each."""
        from fedsim.recording.frames import steps_frame

        return steps_frame(self.client_rows)

    def layer_norms(self) -> pandas.DataFrame:
        """Give the norm of each parameter's first local gradient, by round and client."""
        from fedsim.recording.frames import layer_norms_frame

        return layer_norms_frame(self.client_rows)

    def class_counts(self) -> pandas.DataFrame:
        """Give the samples of each class at each client that has trained."""
        from fedsim.recording.frames import class_counts_frame

        return class_counts_frame(self.client_rows)

    def round(self, number: int) -> Round:
        """Give one finished round; 0 is the untrained model.

        Raises
        ------
        InputError
            When the round is not finished.
        """
        if number in self._round_row:
            return Round(self, self._round_row[number])
        rounds = ranges([row["round"] for row in self.round_rows])
        raise InputError(f"round {number} of {self.path} is not finished; finished are {rounds}")

    def __repr__(self) -> str:
        return f"<run {self.path.name}: {self.status}, {len(self.round_rows)} rounds with round 0>"


def check_arrays(file: TensorFile, expected: Mapping[str, ArraySpec]) -> None:
    """Refuse a file that holds anything but the arrays that a strategy keeps.

    Raises
    ------
    InputError
        Naming the first that is not.
    """
    described = {name: (DTYPES[spec.dtype], spec.shape) for name, spec in expected.items()}
    for name in sorted({*described} | {*file.described}):
        if described.get(name) != file.described.get(name):
            raise InputError(f"{file.path}: {name} is not what a run keeps there")


def _deltas_in(path: Path) -> dict[int, TensorPart]:
    file = TensorFile(path)
    keys: dict[int, dict[str, str]] = {}
    for key in file:
        partition, _, name = key.partition("/")
        if not _PARTITION.fullmatch(partition):
            raise InputError(f"{path}: {shorten(key)} is not an array of a client's delta")
        keys.setdefault(int(partition), {})[name] = key
    return {partition: TensorPart(file, names) for partition, names in keys.items()}


def _steps_in(path: Path) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for row in rows.read_rows(path, rows.SharedStepRow):
        found.setdefault(row.pop("partition"), []).append(row)
    return found


def ranges(numbers: list[int]) -> str:
    """Write numbers, like ``0 to 4`` or ``0, 3, 6``."""
    if not numbers:
        return "none"
    if len(numbers) > 1 and all(b - a == 1 for a, b in itertools.pairwise(numbers)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(str(n) for n in numbers)


def load_run(path: str | Path, strategy: str | None = None) -> Run:
    """Open a run directory for reading.

    Parameters
    ----------
    path : path-like
        The run directory.
    strategy : str, optional
        The user's class that the run was made with, as ``module:Class`` or ``FILE.py:Class``. It
        is loaded because it is named here; what a run says is never loaded. Without it, what
        only that class knows, like a client's correction, is not there.

    Returns
    -------
    Run
        ``load_run(path).round(3).client(7).gradient(0)["fc.weight"]`` and so on.

    Raises
    ------
    InputError
        When it is not a run directory of a format this version reads.
    """
    return Run(path, strategy)
