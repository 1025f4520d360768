"""Reading a run directory lazily: nothing is loaded before it is asked for."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedsim.core.config import RunConfig
from fedsim.core.errors import InputError
from fedsim.core.support import Taps, packed_shape, unpack
from fedsim.core.training import Autocast, OptimizerSettings, Replay
from fedsim.recording.files import read_lines
from fedsim.recording.layout import (
    FORMAT,
    SKETCH,
    SKETCH_KEY,
    RunLayout,
    gradient_key,
    support_key,
)

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
    """The gradient of one local step: parameter name to float32 tensor, read when looked up.

    Attributes
    ----------
    step : int
        Local step of the round, from 0.
    """

    def __init__(self, shards: Mapping[str, Shard], step: int, order: list[str]) -> None:
        self._shards = {n: s for n in order if (s := shards.get(gradient_key(step, n)))}
        self.step = step

    def __getitem__(self, name: str) -> Tensor:
        return self._shards[name].gradient(self.step, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)

    def numpy(self) -> dict[str, NDArray[np.float32]]:
        """Read all of it as numpy arrays."""
        return {name: tensor.numpy() for name, tensor in self.items()}

    def __repr__(self) -> str:
        return f"<gradient of step {self.step}: {len(self)} parameters>"


class Shard:
    """A file of captured gradients, whatever their encoding and dtype.

    Parameters
    ----------
    path : Path
        ``gradients-SSSSS.safetensors``.
    shapes : mapping of str to tuple of int
        Shapes of the model's parameters.
    content : memoryview, optional
        The bytes of the file, where they have been read already.
    """

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, ...]],
        content: memoryview | None = None,
    ) -> None:
        self.path = path
        self.file: Mapping[str, Tensor] = (
            TensorFile(path) if content is None else _tensors_in(path, content)
        )
        self._shapes = shapes
        self._taps: dict[str, Taps | None] = {}

    @cached_property
    def steps(self) -> list[int]:
        """The local steps in it, ascending."""
        return sorted({int(key.partition("/")[0]) for key in self.keys})

    @cached_property
    def keys(self) -> list[str]:
        """Names of the gradients in it, ``SSSSSS/<parameter>``, in the order of the file."""
        return [key for key in self.file if not key.startswith(support_key(""))]

    def taps(self, parameter: str) -> Taps | None:
        """Give the taps that are in the file; None where all are.

        Raises
        ------
        InputError
            When they cannot be those of the parameter.
        """
        if parameter not in self._taps:
            key = support_key(parameter)
            kernel = self._shapes[parameter][2:]
            taps = self.file.get(key)
            if taps is not None and not _are_taps(taps, kernel):
                raise InputError(f"{self.path}: {key} does not fit a kernel of shape {kernel}")
            self._taps[parameter] = None if taps is None else tuple(taps.tolist())
        return self._taps[parameter]

    def packed(self, step: int, parameter: str) -> Tensor:
        """Read a gradient as it is stored.

        Raises
        ------
        InputError
            When its shape is not that of the parameter and its taps.
        """
        key = gradient_key(step, parameter)
        tensor, taps = self.file[key], self.taps(parameter)
        expected = packed_shape(self._shapes[parameter], taps)
        if tuple(tensor.shape) != expected:
            raise InputError(f"{self.path}: {key} has shape {tuple(tensor.shape)}, not {expected}")
        return tensor

    def gradient(self, step: int, parameter: str, *, out: Tensor | None = None) -> Tensor:
        """Read a gradient in its own shape, float32; `out` as for `unpack`."""
        packed = self.packed(step, parameter).float()
        return unpack(packed, self._shapes[parameter], self.taps(parameter), out=out)


_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}


def _tensors_in(path: Path, content: memoryview) -> dict[str, Tensor]:
    """Look at the tensors of a safetensors file in memory; the library would copy each of them."""
    try:
        (length,) = struct.unpack_from("<Q", content)
        header = json.loads(bytes(content[8 : 8 + length]))
        header.pop("__metadata__", None)
        data = content[8 + length :]
        return {name: _tensor_in(data, entry) for name, entry in header.items()}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path} is not a whole safetensors file: {error}") from None


def _tensor_in(data: memoryview, entry: dict[str, Any]) -> Tensor:
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end <= len(data) or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError("offsets that do not fit")
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data[begin:end], dtype=dtype).view(shape)


def _are_taps(tensor: Tensor, kernel: tuple[int, ...]) -> bool:
    if tensor.ndim != 1 or tensor.dtype != torch.int64 or not kernel:
        return False
    taps = tensor.tolist()
    return taps == sorted(set(taps)) and {*taps} <= {*range(math.prod(kernel))}


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

    @cached_property
    def delta(self) -> Mapping[str, Tensor]:
        """Local minus global state, ``state_dict`` names."""
        return TensorFile(self._run.layout.delta(self.round, self.partition))

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of ``steps.jsonl``: one for each local step."""
        return _rows(self._run.layout.steps(self.round, self.partition), "step")

    @cached_property
    def captured_steps(self) -> list[int]:
        """The local steps whose gradients were kept, ascending."""
        return sorted({int(key.partition("/")[0]) for key in self.shards})

    @cached_property
    def captured_parameters(self) -> list[str]:
        """The parameters whose gradients were kept, in ``model.parameters()`` order."""
        kept = {key.partition("/")[2] for key in self.shards}
        return [name for name in self._run.shapes if name in kept]

    @property
    def has_all_parameters(self) -> bool:
        """Whether the gradients of every parameter were kept, in the steps that were."""
        return self.captured_parameters == list(self._run.shapes)

    @property
    def is_replayable(self) -> bool:
        """Whether the optimiser can be replayed over all local steps.

        Every step must have been kept. With float16 autocast a step whose gradient overflowed
        made no update, so every parameter must have been kept too.
        """
        complete = self.captured_steps == list(range(self.telemetry["num_steps"]))
        return complete and (self._autocast != "float16" or self.has_all_parameters)

    def gradient(self, step: int, *, weight_decay: bool = False) -> Mapping[str, Tensor]:
        """Give the gradient of a local step.

        Parameters
        ----------
        step : int
            Local step of the round, from 0.
        weight_decay : bool
            Add ``weight-decay * p`` with the parameters before the step, which are found by
            replaying the steps before it.

        Returns
        -------
        mapping of str to Tensor of float32
            Parameter name to d(mean loss)/dp before the update, without weight decay unless
            asked for, in ``model.parameters()`` order.

        Raises
        ------
        InputError
            When that step was not captured, or with `weight_decay` one before it was not.
        """
        gradient = Gradient(self.shards, step, list(self._run.shapes))
        if not gradient:
            raise InputError(
                f"step {step} of client {self.partition} in round {self.round} was not captured; "
                f"captured are {_ranges(self.captured_steps)}"
            )
        if not weight_decay:
            return gradient
        decay = self._run.config.weight_decay
        parameters = self.parameters_at(step)
        return {n: g.add(parameters[n], alpha=decay) for n, g in gradient.items()}

    def layer(self, parameter: str, steps: slice = slice(None)) -> Tensor:
        """Stack the gradients of one parameter over captured steps, reading no other parameter.

        Parameters
        ----------
        parameter : str
            Its name.
        steps : slice
            Of `captured_steps`.

        Returns
        -------
        Tensor of float32, shape (steps, ...)

        Raises
        ------
        InputError
            When the parameter was not captured.
        """
        if parameter not in self.captured_parameters:
            raise InputError(
                f"{parameter} of client {self.partition} in round {self.round} was not captured; "
                f"captured are {', '.join(self.captured_parameters) or 'none'}"
            )
        chosen = self.captured_steps[steps]
        stacked = torch.empty(len(chosen), *self._run.shapes[parameter])
        for position, step in enumerate(chosen):
            shard = self.shards[gradient_key(step, parameter)]
            stacked[position] = shard.gradient(step, parameter)
        return stacked

    def parameters_at(self, step: int) -> dict[str, Tensor]:
        """Give the captured parameters as they were before a local step, by replay.

        Parameters
        ----------
        step : int
            Local step of the round, from 0; the number of steps gives the end of the round.

        Returns
        -------
        dict of str to Tensor of float32
            Bit for bit those of the training on the same version of torch and kind of device;
            beside them by rounding errors elsewhere. Buffers do not follow from gradients.

        Raises
        ------
        InputError
            When a step before it was not captured.
        """
        if not 0 <= step <= self.telemetry["num_steps"]:
            raise InputError(
                f"step {step} of client {self.partition} in round {self.round} was not made; "
                f"allowed is 0 to {self.telemetry['num_steps']}"
            )
        replay = self._new_replay()
        for before in range(step):
            replay.step(self.gradient(before))
        return replay.parameters

    def replay(self) -> Iterator[tuple[Gradient, dict[str, Tensor]]]:
        """Go through all local steps in one pass.

        Yields
        ------
        tuple of (Gradient, dict of str to Tensor)
            The step's gradient and the parameters before its update; the tensors of the
            latter change in place with the next step.

        Raises
        ------
        InputError
            When a step was not captured.
        """
        replay = self._new_replay()
        for step in range(self.telemetry["num_steps"]):
            gradient = Gradient(self.shards, step, self.captured_parameters)
            if not gradient:
                self.gradient(step)
            yield gradient, replay.parameters
            replay.step(gradient)

    def sketch(self, step: int) -> NDArray[np.float32]:
        """Give the random projection of a step's gradient, kept by ``capture = "sketch:K"``.

        Returns
        -------
        ndarray of float32, shape (K,)
            Inner products of sketches estimate those of gradients, over all steps, clients and
            rounds of a run.

        Raises
        ------
        InputError
            When there is no sketch of that step.
        """
        path = self.folder / SKETCH
        sketches = TensorFile(path)[SKETCH_KEY] if path.exists() else torch.empty(0, 0)
        if not 0 <= step < len(sketches):
            raise InputError(
                f"step {step} of client {self.partition} in round {self.round} has no sketch; "
                f"there are {len(sketches)}"
            )
        vector: NDArray[np.float32] = sketches[step].numpy()
        return vector

    def shard(self, step: int, parameter: str) -> Shard:
        """Give the file that holds a parameter's gradient of a step.

        Raises
        ------
        InputError
            When it was not captured.
        """
        key = gradient_key(step, parameter)
        if key not in self.shards:
            raise InputError(f"{self.folder} holds no gradient {key}")
        return self.shards[key]

    @property
    def folder(self) -> Path:
        """Where the client's files of the round are."""
        return self._run.layout.client(self.round, self.partition)

    @cached_property
    def shards(self) -> dict[str, Shard]:
        """The file of each captured gradient, by its key ``SSSSSS/<parameter>``."""
        paths = sorted(self.folder.glob("gradients-*.safetensors"))
        shards = [Shard(path, self._run.shapes) for path in paths]
        return {key: shard for shard in shards for key in shard.keys}

    def _new_replay(self) -> Replay:
        if not self.shards:
            # There is nothing to follow; this says so.
            self.gradient(0)
        if self._autocast == "float16" and not self.has_all_parameters:
            raise InputError(
                f"client {self.partition} in round {self.round} cannot be replayed: with autocast "
                "= 'float16' all parameters decide whether a step made an update, and not all "
                "were captured"
            )
        return Replay(self._start, self.captured_parameters, self._optimizer, self._autocast)

    @property
    def _start(self) -> Mapping[str, Tensor]:
        return self._run.round(self.round - 1).state

    @property
    def _optimizer(self) -> OptimizerSettings:
        return self._run.config.training_of(self.partition).optimizer

    @property
    def _autocast(self) -> Autocast:
        return self._run.config.autocast

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
    def state(self) -> Mapping[str, Tensor]:
        """Global state after the round, ``state_dict`` names."""
        return TensorFile(self._run.layout.state(self.number))

    @cached_property
    def aggregate(self) -> Mapping[str, Tensor]:
        """Sample-weighted mean delta of the round."""
        return TensorFile(self._run.layout.aggregate(self.number))

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

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the model's parameters by name, in ``model.parameters()`` order."""
        return {p["name"]: tuple(p["shape"]) for p in self.parameters}

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
