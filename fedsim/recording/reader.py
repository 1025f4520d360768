"""Reading a run directory lazily: nothing is loaded before it is asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedsim.core.config import RunConfig
from fedsim.core.errors import InputError
from fedsim.recording.files import read_lines
from fedsim.recording.layout import FORMAT, RunLayout

if TYPE_CHECKING:
    import pandas


class TensorFile(Mapping[str, Tensor]):
    """A safetensors file as a mapping of names to tensors on the CPU.

    Opening reads the header alone; a tensor's pages are mapped, not copied, and come from the
    disk when they are looked at.

    Parameters
    ----------
    path : Path
        The file.

    Raises
    ------
    InputError
        When the file is missing or not a safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
        except FileNotFoundError:
            raise InputError(f"{path} is not there") from None
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} is not a whole safetensors file: {error}") from None
        # In the order of the file, which the library's keys() would sort by name.
        self._names: dict[str, None] = dict.fromkeys(self._file.offset_keys())  # type: ignore[no-untyped-call]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)  # type: ignore[no-untyped-call]
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"<{self.path.name}: {len(self)} tensors>"


class Gradient(Mapping[str, Tensor]):
    """The gradient of one local step: parameter name to float32 tensor."""

    def __init__(self, files: Mapping[str, TensorFile], step: int, order: list[str]) -> None:
        prefix = f"{step:06d}/"
        self._files = {n: files[prefix + n] for n in order if prefix + n in files}
        self._prefix = prefix
        self.step = step

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name][self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __repr__(self) -> str:
        return f"<gradient of step {self.step}: {len(self)} parameters>"


class Client:
    """What one client left in one round.

    Attributes
    ----------
    partition : int
        The client's partition id.
    telemetry : dict
        Its line of ``clients.jsonl``.
    """

    def __init__(self, run: Run, round_number: int, telemetry: dict[str, Any]) -> None:
        self._run = run
        self._round = round_number
        self.telemetry = telemetry
        self.partition: int = telemetry["partition"]

    @cached_property
    def delta(self) -> Mapping[str, Tensor]:
        """Local minus global state, ``state_dict`` names."""
        return TensorFile(self._run.layout.delta(self._round, self.partition))

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of ``steps.jsonl``: one for each local step."""
        return _rows(self._run.layout.steps(self._round, self.partition), "step")

    @cached_property
    def captured_steps(self) -> list[int]:
        """The local steps whose gradients were kept, ascending."""
        return sorted({int(key.partition("/")[0]) for key in self._gradient_files})

    def gradient(self, step: int) -> Gradient:
        """Give the gradient of a local step.

        Parameters
        ----------
        step : int
            Local step of the round, from 0.

        Returns
        -------
        Gradient
            Parameter name to d(mean loss)/dp before the update, without weight decay, in
            ``model.parameters()`` order.

        Raises
        ------
        InputError
            When that step was not captured.
        """
        order = [p["name"] for p in self._run.parameters]
        gradient = Gradient(self._gradient_files, step, order)
        if not gradient:
            raise InputError(
                f"step {step} of client {self.partition} in round {self._round} was not captured; "
                f"captured are {_ranges(self.captured_steps)}"
            )
        return gradient

    @cached_property
    def _gradient_files(self) -> dict[str, TensorFile]:
        folder = self._run.layout.client(self._round, self.partition)
        files = [TensorFile(p) for p in sorted(folder.glob("gradients-*.safetensors"))]
        return {key: file for file in files for key in file}

    def __repr__(self) -> str:
        return f"<client {self.partition} in round {self._round}>"


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
    def state(self) -> Mapping[str, Tensor]:
        """Global state after the round, ``state_dict`` names."""
        return TensorFile(self._run.layout.state(self.number))

    @cached_property
    def aggregate(self) -> Mapping[str, Tensor]:
        """Sample-weighted mean delta of the round."""
        return TensorFile(self._run.layout.aggregate(self.number))

    @cached_property
    def clients(self) -> dict[int, Client]:
        """The clients whose work is in the round, by partition id."""
        return {
            row["partition"]: Client(self._run, self.number, row)
            for row in self._run.client_rows
            if row["round"] == self.number and row["status"] == "ok"
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


class Run:
    """A run directory.

    Parameters
    ----------
    path : path-like
        The run directory.

    Raises
    ------
    InputError
        When it is no run directory of a format this version reads.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.layout = RunLayout(self.path)
        try:
            self.manifest: dict[str, Any] = json.loads(self.layout.manifest.read_bytes())
            found = self.manifest["format"]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"{self.path} is no run directory: it has no whole run.json") from None
        if found != FORMAT:
            raise InputError(f"{self.path} has format {found!r}; this version reads {FORMAT}")

    @property
    def status(self) -> str:
        """``running``, ``finished`` or ``failed``."""
        return str(self._entry("status"))

    @cached_property
    def config(self) -> RunConfig:
        """The complete configuration of the run."""
        return RunConfig.from_mapping(
            {k: v for k, v in self._entry("config").items() if v is not None}
        )

    def _entry(self, key: str) -> Any:
        if key not in self.manifest:
            raise InputError(f"{self.layout.manifest} has no {key}")
        return self.manifest[key]

    @property
    def parameters(self) -> list[dict[str, Any]]:
        """Name, shape and dtype of the model's parameters, in ``model.parameters()`` order."""
        return list(self._entry("model")["parameters"])

    @cached_property
    def partition(self) -> dict[int, NDArray[np.int64]]:
        """Indices into the training split, by partition id."""
        file = TensorFile(self.layout.partition)
        return {int(key): file[key].numpy() for key in sorted(file, key=int)}

    @cached_property
    def round_rows(self) -> list[dict[str, Any]]:
        """The lines of ``rounds.jsonl``."""
        return _rows(self.layout.rounds, "round", absent_is_empty=True)

    @cached_property
    def client_rows(self) -> list[dict[str, Any]]:
        """The lines of ``clients.jsonl`` that belong to finished rounds."""
        finished = {row["round"] for row in self.round_rows}
        rows = _rows(self.layout.clients, "round", "partition", "status", absent_is_empty=True)
        return [row for row in rows if row["round"] in finished]

    def rounds(self) -> pandas.DataFrame:
        """Give the finished rounds as a data frame, one row each, round 0 first."""
        import pandas as pd

        return pd.DataFrame(self.round_rows)

    def telemetry(self) -> pandas.DataFrame:
        """Give the telemetry of all clients in all finished rounds as a data frame."""
        import pandas as pd

        return pd.DataFrame(self.client_rows)

    def round(self, number: int) -> Round:
        """Give one finished round; 0 is the untrained model.

        Raises
        ------
        InputError
            When the round is not finished.
        """
        for row in self.round_rows:
            if row["round"] == number:
                return Round(self, row)
        rounds = _ranges([row["round"] for row in self.round_rows])
        raise InputError(f"round {number} of {self.path} is not finished; finished are {rounds}")

    def __repr__(self) -> str:
        return f"<run {self.path.name}: {self.status}, {len(self.round_rows)} rounds with round 0>"


def _rows(path: Path, *keys: str, absent_is_empty: bool = False) -> list[dict[str, Any]]:
    try:
        rows = list(read_lines(path))
    except FileNotFoundError:
        if absent_is_empty:
            return []
        raise InputError(f"{path} is not there") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise InputError(f"{path} holds a line that is not JSON") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or any(key not in row for key in keys):
            raise InputError(f"{path}: line {number} is no object with {', '.join(keys)}")
    return rows


def _ranges(numbers: list[int]) -> str:
    if not numbers:
        return "none"
    if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(str(n) for n in numbers)


def load_run(path: str | Path) -> Run:
    """Open a run directory for reading.

    Parameters
    ----------
    path : path-like
        The run directory.

    Returns
    -------
    Run
        ``load_run(path).round(3).client(7).gradient(0)["fc.weight"]`` and so on.

    Raises
    ------
    InputError
        When it is no run directory of a format this version reads.
    """
    return Run(path)
