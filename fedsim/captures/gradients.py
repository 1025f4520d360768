"""Gradients of local steps: recording, reading, replaying and proving them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.core.capture import (
    Capture,
    Observer,
    SeenStep,
    Sink,
    Sizes,
    first_fitting,
    parse_form,
)
from fedsim.core.config import RunConfig
from fedsim.core.errors import InputError
from fedsim.core.inputs import parse_json, read_text_bytes
from fedsim.core.support import Taps, packed_shape, packed_size, unpack
from fedsim.core.training import Autocast, Objective, OptimizerSettings, Replay, Step
from fedsim.recording.evidence import DamagedFileError, Evidence
from fedsim.recording.files import Checksum, TensorWriter, json_document, temporary
from fedsim.recording.findings import BUFFERS, GRADIENTS, REPLAY, ROWS, STEPS, Findings
from fedsim.recording.proofs import other_instructions
from fedsim.recording.reader import Client, Run, ranges
from fedsim.recording.row_proofs import NO_SHARDS, settle_replayed
from fedsim.recording.rows import updates_of
from fedsim.recording.tensor_files import MOST_KEYS, TensorFile

Dtype = Literal["float32", "bfloat16", "float16"]
Encoding = Literal["support", "dense"]

SHARD_BYTES = 256 * 2**20
"""Shards close at the step that fills them to about this size."""
SHARD_INDEX = "gradients.safetensors.index.json"
REPLAY_TOLERANCE = 1e-4
"""Relative error of a replay where bit for bit cannot be asked for."""
REPLAY_ROUNDINGS = 2
"""How much farther from the delta a replay of rounded gradients may land than another rounding."""
_TRIES = 8
"""Other roundings of small parameters: a bias of two entries may happen not to notice one."""
_ALONE = 2**16
"""Parameters of at least so many entries are replayed one by one, which keeps them in cache."""
_LARGEST = 0.99 * torch.finfo(torch.float32).max
_STORED = {
    "float32": ("F32", torch.float32, np.float32),
    "bfloat16": ("BF16", torch.bfloat16, np.int16),
    "float16": ("F16", torch.float16, np.float16),
}
# A number has one name: "0000001" would be the step of "000001" again.
_STEP = re.compile(r"[0-9]{6}|[1-9][0-9]{6,11}")
_SHARD = re.compile(r"gradients-[0-9]{5,9}\.safetensors")


def shard_name(shard: int) -> str:
    """File name of a shard of captured gradients, from 0."""
    return f"gradients-{shard:05d}.safetensors"


def is_shard(name: str) -> bool:
    """Say whether a file of that name holds captured gradients."""
    return bool(_SHARD.fullmatch(name))


def gradient_key(step: int, parameter: str) -> str:
    """Key of one parameter's gradient at one local step inside a shard."""
    return f"{step:06d}/{parameter}"


def support_key(parameter: str) -> str:
    """Key of the live taps of a parameter inside a shard that leaves the others out."""
    return f"support/{parameter}"


@dataclass(frozen=True, kw_only=True)
class Gradients(Capture):
    """The gradients of chosen steps and parameters: ``none``, ``all``, ``first:K`` and so on.

    Parameters
    ----------
    steps : {"none", "all", "first", "last", "every"}
        Which steps of a client's round, counted from 0.
    count : int
        The K of ``first:K`` and ``last:K`` (so many steps) and ``every:K`` (steps 0, K, 2K, ...).
    layers : tuple of str
        Globs; a parameter is kept when one of them matches its whole name.
    dtype : {"float32", "bfloat16", "float16"}
        Of the stored numbers; training computes float32 gradients.
    encoding : {"support", "dense"}
        Whether kernel taps that never get a gradient are left out.
    shard_bytes : int
        Approximate size of a shard.
    """

    reads: ClassVar[frozenset[str]] = frozenset(
        {
            *("gradient", "layer", "parameters_at", "replay", "shard", "shards"),
            *("captured_steps", "captured_parameters", "has_all_parameters", "is_replayable"),
        }
    )
    steps: Literal["none", "all", "first", "last", "every"]
    count: int = 1
    layers: tuple[str, ...] = ("*",)
    dtype: Dtype = "float32"
    encoding: Encoding = "support"
    shard_bytes: int = SHARD_BYTES

    @classmethod
    def of(cls, config: RunConfig) -> Self:
        """Read ``capture``, ``capture-layers``, ``capture-dtype`` and ``capture-encoding``."""
        _, steps, count = parse_form(config.capture)
        return cls(
            steps=cast(Any, steps),
            count=count,
            layers=config.capture_layers,
            dtype=config.capture_dtype,
            encoding=config.capture_encoding,
        )

    def __str__(self) -> str:
        return self.steps if self.steps in ("none", "all") else f"{self.steps}:{self.count}"

    @property
    def keeps_files(self) -> bool:
        """Whether any step is kept."""
        return self.steps != "none"

    @property
    def form(self) -> list[str]:
        """Name dtype and encoding."""
        return [self.dtype, self.encoding]

    def kept_steps(self, num_steps: int) -> range:
        """Give the kept steps among `num_steps` local steps of a round."""
        match self.steps:
            case "none":
                return range(0)
            case "first":
                return range(min(self.count, num_steps))
            case "last":
                return range(max(0, num_steps - self.count), num_steps)
            case "every":
                return range(0, num_steps, self.count)
            case "all":
                return range(num_steps)

    def step_bytes(self, sizes: Sizes) -> int:
        """Count the bytes of one step, as far as the first gradients tell."""
        supports = sizes.supports if self.encoding == "support" else {}
        return _STORED[self.dtype][1].itemsize * sum(
            packed_size(sizes.parameters[name], supports.get(name))
            for name in self.layers_of(sizes.parameters)
        )

    def most_step_bytes(self, sizes: Sizes) -> int:
        """Count the bytes of a step without dead taps."""
        return replace(self, encoding="dense").step_bytes(sizes)

    def smaller(self) -> Iterator[tuple[str, Capture]]:
        """Leave out dead taps, which loses nothing; then round."""
        if self.steps != "none" and self.encoding == "dense":
            yield "capture-encoding = 'support'", replace(self, encoding="support")
        if self.steps != "none" and self.dtype == "float32":
            yield "capture-dtype = 'bfloat16'", replace(self, dtype="bfloat16")

    def fewer(self, most_steps: int, fits: Callable[[Capture], bool]) -> Capture | None:
        """Thin out the steps as little as possible."""
        if self.steps in ("all", "every"):
            base, counts = replace(self, steps="every"), range(self.count + 1, most_steps + 1)
        else:
            base, counts = self, range(self.count - 1, 0, -1)
        return first_fitting(counts, lambda count: replace(base, count=count), fits)

    @classmethod
    def owns(cls, name: str) -> bool:
        """Say whether it is a shard, or the index of shards."""
        return name == SHARD_INDEX or is_shard(name)

    @classmethod
    def may_remove(cls, name: str) -> bool:
        """Say the same: everything else of a run follows without them."""
        return cls.owns(name)

    def record(self, sink: Sink) -> Observer | None:
        """Write shards."""
        names = self.layers_of(sink.shapes)
        kept = self.kept_steps(sink.num_steps)
        return _Writing(self, sink, names, kept) if names and kept else None

    @classmethod
    def open(cls, client: Client) -> ClientGradients:
        """Read shards."""
        return ClientGradients(client)

    def vector(self, client: Client, step: int) -> _TapByTap:
        """Give the captured gradient of a step."""
        return _TapByTap(client, step)

    def basis(self, parameters: Sequence[str]) -> str:
        """Name the parameters where not all were captured."""
        if len(self.layers_of(parameters)) == len(parameters):
            return ""
        return f"captured parameters only ({', '.join(self.layers)})."

    # Proof

    def work(self, client: Client) -> int:
        """Count what is replayed."""
        return int(client.telemetry["bytes_captured"]) if is_replayable(client) else 0

    def check(self, evidence: Evidence) -> None:
        """Replay the local optimizer over the gradients, or at least measure them."""
        client, findings = evidence.client, evidence.findings
        shards = sorted(name for name in evidence.own if is_shard(name.rpartition("/")[2]))
        if not evidence.are_here:
            for check in (GRADIENTS, REPLAY) if shards else ():
                findings.leave(check, evidence.why_away, at=client.place)
            if shards:
                findings.leave(ROWS, NO_SHARDS, at=client.place)
        elif shards and is_replayable(client) and not client.run.config.clients_clip:
            others = [name for name in evidence.own if name not in shards]
            if evidence.whole(GRADIENTS, others):
                with findings.guarded(REPLAY, evidence.folder):
                    self._check_replay(evidence, shards)
        elif evidence.whole(GRADIENTS if shards else STEPS, evidence.own):
            with findings.guarded(GRADIENTS, evidence.folder):
                self._check_some(evidence)

    def _check_some(self, evidence: Evidence) -> None:
        client, findings, config = evidence.client, evidence.findings, evidence.client.run.config
        at = client.place
        if not self.keeps_files:
            evidence.leave_replay()
        elif client.telemetry.get("not_captured"):
            if client.captured_steps:
                findings.violate(GRADIENTS, f"{evidence.folder} has gradients")
            findings.leave(REPLAY, "nodes do not allow capture", at=at)
        elif self._holds_what_is_kept(evidence):
            reason = f"capture = {config.capture!r} keeps some of the steps"
            if len(client.captured_steps) == client.telemetry["num_steps"]:
                reason = "autocast = 'float16' takes all layers to tell which steps made an update"
            if config.clients_clip:
                reason = f"with strategy.dp = {config.strategy.dp!r} clients clip their deltas"
            reason = client.unknown_correction or reason
            findings.leave(REPLAY, reason, at=at)
            measures = _Measures(client, findings)
            for shard in dict.fromkeys(client.shards.values()):
                measures.follow(shard)
            measures.finish()

    def _holds_what_is_kept(self, evidence: Evidence) -> bool:
        client = evidence.client
        steps = self.kept_steps(client.telemetry["num_steps"])
        names = self.layers_of(client.run.shapes)
        expected = {gradient_key(step, name) for step in steps for name in names}
        if odd := sorted(expected.symmetric_difference(client.shards)):
            problem = f"{evidence.folder}: gradient {odd[0]} is missing or unexpected"
            evidence.findings.violate(GRADIENTS, problem)
        return not odd

    def _check_replay(self, evidence: Evidence, names: Sequence[str]) -> None:
        client, run = evidence.client, evidence.client.run
        needed = [run.layout.state(client.round - 1), client.delta_path]
        paths = [path.relative_to(run.path).as_posix() for path in needed]
        if not evidence.whole(REPLAY, paths, client.place):
            return
        if not self._holds_what_is_kept(evidence):
            return
        shards = (Shard(path, run.shapes, content) for path, content in evidence.read(names))
        try:
            prove_replay(client, shards, evidence.findings)
        except DamagedFileError as damaged:
            for check in (GRADIENTS, REPLAY):
                evidence.findings.leave(check, f"{damaged} is damaged")

    def retrace(self, client: Client, whole: frozenset[str]) -> _Retrace:
        """Compare gradients where they are; there may be no room for a second copy."""
        return _Retrace(client, whole)


def is_replayable(client: Client) -> bool:
    """Say whether a client is replayable; not with a damaged header, which other checks report."""
    try:
        return bool(client.is_replayable)
    except InputError:
        return False


# Recording


@dataclass
class _Kept:
    """The gradients of a step that are to be written."""

    step: int
    tensors: dict[str, Tensor]
    taps: dict[str, Taps | None]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


class _Writing(Observer):
    """Writes shards of the steps that a policy keeps."""

    def __init__(self, policy: Gradients, sink: Sink, names: list[str], kept: range) -> None:
        self._policy = policy
        self._sink = sink
        self._names = names
        self._kept = kept
        self._shard: TensorWriter | None = None
        self._shard_taps: dict[str, Taps | None] = {}
        self._shard_steps_left = 0
        self._shards = 0
        self._keys: dict[str, str] = {}
        self.due = len(kept)

    def wants(self, step: Step) -> Collection[str] | None:
        return self._names if step.index in self._kept else None

    def measure(self, seen: SeenStep) -> _Kept:
        dense = self._policy.encoding == "dense"
        source = seen.gradients if dense else seen.packed
        tensors = {name: source[name] for name in self._names}
        taps = {name: None if dense else seen.taps[name] for name in self._names}
        return _Kept(seen.index, tensors, taps)

    def write(self, pending: _Kept) -> None:
        if self._shard is not None and pending.taps != self._shard_taps:
            self._close_shard()
        if self._shard is None:
            self._shard = self._open_shard(pending.taps)
        _, dtype, bits = _STORED[self._policy.dtype]
        before = self._shard.data_bytes
        for tensor in self._sink.to_host(pending.tensors, dtype).values():
            numbers = tensor.view(torch.int16) if dtype == torch.bfloat16 else tensor
            self._shard.append(numbers.numpy().view(bits))
        self.nbytes += self._shard.data_bytes - before
        name = shard_name(self._shards)
        self._keys.update((gradient_key(pending.step, n), name) for n in pending.tensors)
        self.kept += 1
        self._shard_steps_left -= 1
        if not self._shard_steps_left:
            self._close_shard()

    def _open_shard(self, taps: dict[str, Taps | None]) -> TensorWriter:
        code, dtype, _ = _STORED[self._policy.dtype]
        shapes = {name: packed_shape(self._sink.shapes[name], t) for name, t in taps.items()}
        step_bytes = dtype.itemsize * sum(map(math.prod, shapes.values()))
        room = min(self._policy.shard_bytes // max(1, step_bytes), MOST_KEYS // len(taps))
        steps = self._kept[self.kept : self.kept + max(1, room)]
        supports = {n: np.array(t, dtype=np.int64) for n, t in taps.items() if t is not None}
        entries: dict[str, tuple[str, tuple[int, ...]]] = {
            support_key(n): ("I64", t.shape) for n, t in supports.items()
        }
        entries.update(
            (gradient_key(step, name), (code, shape))
            for step in steps
            for name, shape in shapes.items()
        )
        shard = TensorWriter(self._sink.folder / shard_name(self._shards), entries)
        self._shard_taps = taps
        self._shard_steps_left = len(steps)
        for support in supports.values():
            shard.append(support)
        return shard

    def _close_shard(self) -> None:
        assert self._shard is not None  # noqa: S101
        self._sink.files[shard_name(self._shards)] = self._shard.close()
        self._shards += 1
        self._shard = None

    def finish(self) -> None:
        if self._shards > 1:
            index = {"metadata": {"total_size": self.nbytes}, "weight_map": self._keys}
            document = json_document(index)
            with temporary(self._sink.folder / SHARD_INDEX) as unfinished:
                unfinished.write_bytes(document)
            self._sink.files[SHARD_INDEX] = Checksum.of(document)

    def discard(self) -> None:
        if self._shard is not None:
            self._shard.discard()


# Reading


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
    """A file of captured gradients of any encoding and dtype.

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
        self.file = TensorFile(path, content)
        self._shapes = shapes
        self._taps: dict[str, Taps | None] = {}

    @cached_property
    def steps(self) -> list[int]:
        """The local steps in it, ascending."""
        return sorted({int(key.partition("/")[0]) for key in self.keys})

    @cached_property
    def keys(self) -> list[str]:
        """Names of the gradients in it, ``SSSSSS/<parameter>``, in the order of the file.

        Raises
        ------
        InputError
            When there are other names.
        """
        keys = [key for key in self.file if not key.startswith(support_key(""))]
        for key in keys:
            step, _, parameter = key.partition("/")
            if not _STEP.fullmatch(step) or parameter not in self._shapes:
                raise InputError(f"{self.path}: {key} is not a gradient of a step of this model")
        return keys

    @property
    def packed_parameters(self) -> list[str]:
        """The parameters of which taps are left out."""
        return [name for name in self._shapes if support_key(name) in self.file]

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
        if not tensor.dtype.is_floating_point:
            raise InputError(f"{self.path}: {key} holds no floating-point numbers")
        return tensor

    def gradient(self, step: int, parameter: str, *, out: Tensor | None = None) -> Tensor:
        """Read a gradient in its own shape, float32; `out` as for `unpack`."""
        packed = self.packed(step, parameter).float()
        return unpack(packed, self._shapes[parameter], self.taps(parameter), out=out)


def _are_taps(tensor: Tensor, kernel: tuple[int, ...]) -> bool:
    if tensor.ndim != 1 or tensor.dtype != torch.int64 or not kernel:
        return False
    taps = tensor.tolist()
    return taps == sorted(set(taps)) and all(0 <= tap < math.prod(kernel) for tap in taps)


class ClientGradients:
    """The gradients that a client left in one round, and what follows from them.

    Parameters
    ----------
    client : Client
        Whose.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._run = client.run
        self._whose = f"client {client.partition} in round {client.round}"

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
        """Whether the optimizer can be replayed over all local steps.

        Every step must have been kept. With float16 autocast a step whose gradient overflowed
        made no update, so every parameter must have been kept too.
        """
        captured = self.captured_steps
        complete = len(captured) == self._client.telemetry["num_steps"] and _has_no_gap(captured)
        complete = complete and not self._client.unknown_correction
        return complete and (self._autocast != "float16" or self.has_all_parameters)

    def gradient(
        self, step: int, *, weight_decay: bool = False, objective: bool = False
    ) -> Mapping[str, Tensor]:
        """Give the gradient of a local step.

        Parameters
        ----------
        step : int
            Local step of the round, from 0.
        weight_decay : bool
            Add ``weight-decay * p`` with the parameters before the step, which are found by
            replaying the steps before it.
        objective : bool
            Add what the strategy adds: ``proximal_mu * (p - p_global)``, the gradient of a
            proximal term, likewise; and its `correction`.

        Returns
        -------
        mapping of str to Tensor of float32
            Parameter name to d(mean loss)/dp before the update, without weight decay and what
            the strategy adds unless asked for, in ``model.parameters()`` order.

        Raises
        ------
        InputError
            When that step was not captured, or what is asked for takes one before it that was
            not.
        """
        gradient = Gradient(self.shards, step, list(self._run.shapes))
        if not gradient:
            raise InputError(f"step {step} of {self._whose} was {self._why_without(step)}")
        if not (weight_decay or objective):
            return gradient
        parameters = self.parameters_at(step)
        added = (self._client.proximal_mu, self._client.correction) if objective else (0.0, None)
        terms = Objective(self._start, *added)
        whole = {n: terms.gradient(n, g, parameters[n]) for n, g in gradient.items()}
        if not weight_decay:
            return whole
        decay = self._run.config.weight_decay
        return {n: g.add(parameters[n], alpha=decay) for n, g in whole.items()}

    def _why_without(self, step: int) -> str:
        made = self._client.telemetry["num_steps"]
        if not 0 <= step < made:
            return f"not made; it made 0 to {made - 1}"
        kept = f"capture = {self._run.config.capture!r} keeps steps {ranges(self.captured_steps)}"
        return f"not captured: {self._why_no_gradients() or kept}"

    def _why_no_gradients(self) -> str:
        """Say why nothing of the client was captured; empty where something was."""
        if self.captured_steps:
            return ""
        policy = self._run.config.policy
        if not (isinstance(policy, Gradients) and policy.keeps_files):
            return f"capture = {self._run.config.capture!r} keeps no gradients"
        return str(self._client.telemetry.get("not_captured", "the client kept none"))

    def _what_layers(self) -> str:
        globs = list(self._run.config.capture_layers)
        return f"capture-layers = {globs} keeps {', '.join(self.captured_parameters)}"

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
                f"{parameter} of {self._whose} was not captured: "
                f"{self._why_no_gradients() or self._what_layers()}"
            )
        # Says whether the shape is true before there is memory of that shape.
        self.shards[gradient_key(self.captured_steps[0], parameter)].packed(
            self.captured_steps[0], parameter
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
        if not 0 <= step <= self._client.telemetry["num_steps"]:
            raise InputError(
                f"step {step} of {self._whose} was not made; "
                f"expected 0 to {self._client.telemetry['num_steps']}"
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
        for step in range(self._client.telemetry["num_steps"]):
            gradient = Gradient(self.shards, step, self.captured_parameters)
            if not gradient:
                self.gradient(step)
            yield gradient, replay.parameters
            replay.step(gradient)

    def shard(self, step: int, parameter: str) -> Shard:
        """Give the file that holds a parameter's gradient of a step.

        Raises
        ------
        InputError
            When it was not captured.
        """
        key = gradient_key(step, parameter)
        if key not in self.shards:
            raise InputError(f"{self._client.folder} holds no gradient {key}")
        return self.shards[key]

    @cached_property
    def shards(self) -> dict[str, Shard]:
        """The file of each captured gradient, by its key ``SSSSSS/<parameter>``."""
        if not self._run.has_captured(self._client.telemetry):
            where = "are on the client's disk; `fedsim collect` brings them"
            if self._run.has_removed(self._client.telemetry):
                where = "were removed to make room; `fedsim collect` brings them from a copy"
            raise InputError(f"gradients of {self._whose} {where}")
        # Other files there were not listed.
        listed = sorted(name for name in self._client.telemetry["files"] if is_shard(name))
        shards = [Shard(self._client.folder / name, self._run.shapes) for name in listed]
        for shard in shards:
            for name in shard.packed_parameters:
                self._check_kernel(shard, name)
        found = {key: shard for shard in shards for key in shard.keys}
        steps, names = (
            ({*part} for part in zip(*(k.split("/", 1) for k in found), strict=True))
            if found
            else ((), ())
        )
        if len(found) != len(steps) * len(names):
            raise InputError(f"{self._client.folder} holds steps with some of their gradients only")
        return found

    def _check_kernel(self, shard: Shard, name: str) -> None:
        # Few taps on the disk may speak of any number of them in memory.
        described = self._start.described.get(name)
        if described is None or described[1] != self._run.shapes[name]:
            raise InputError(
                f"{shard.path}: {name} has another shape in run.json than in {self._start.path}"
            )

    def _new_replay(self) -> Replay:
        if not self.shards:
            # Says that there is nothing to follow.
            self.gradient(0)
        if self._client.unknown_correction:
            raise InputError(f"{self._whose} cannot be replayed: {self._client.unknown_correction}")
        if self._autocast == "float16" and not self.has_all_parameters:
            raise InputError(
                f"{self._whose} cannot be replayed: with autocast "
                "= 'float16' all parameters decide whether a step made an update, and not all "
                "were captured"
            )
        return Replay(
            self._start,
            self.captured_parameters,
            self._optimizer,
            self._autocast,
            self._client.proximal_mu,
            self._client.correction,
            self._client.rates,
        )

    @property
    def _start(self) -> TensorFile:
        return self._run.round(self._client.round - 1).state

    @property
    def _optimizer(self) -> OptimizerSettings:
        return self._run.config.training_of(self._client.partition).optimizer

    @property
    def _autocast(self) -> Autocast:
        return self._run.config.autocast


def _has_no_gap(numbers: list[int]) -> bool:
    return numbers == list(range(len(numbers)))


class _TapByTap:
    """The gradient of a local step; the pieces of a layer are the taps of its kernels.

    So a gradient of which taps are left out never takes the memory of a whole one.
    """

    def __init__(self, client: Client, step: int) -> None:
        self._client = client
        self._step = step

    def pieces(self, name: str) -> Mapping[int, Tensor]:
        """Give the taps that are in the file, or the whole of another parameter."""
        shard = self._client.shard(self._step, name)
        packed, taps = shard.packed(self._step, name), shard.taps(name)
        if taps is not None:
            return dict(zip(taps, packed, strict=True))
        if packed.ndim < 3:
            return {0: packed}
        return dict(enumerate(packed.flatten(2).unbind(2)))


# Proof


class _Measures:
    """Looks at all captured gradients of a client, for itself and for other captures.

    Parameters
    ----------
    client : Client
        Of which gradients were captured, of some steps or all.
    findings : Findings
        Told of the first step that is not as it must be.
    """

    def __init__(self, client: Client, findings: Findings) -> None:
        self._client = client
        self._findings = findings
        self._names = client.captured_parameters
        self._dtype = client.run.config.capture_dtype
        found = (c.measures(client, findings) for c in client.run.config.captures)
        self._others = [other for other in found if other is not None]
        self._bytes = 0
        self._failed = False

    def follow(self, shard: Shard) -> None:
        """Measure the steps of a shard; its memory may be gone when this returns."""
        stored = _STORED[self._dtype][1]
        for step in shard.steps:
            packed = {name: shard.packed(step, name) for name in self._names}
            self._bytes += sum(tensor.nbytes for tensor in packed.values())
            if self._failed or any(other.failed for other in self._others):
                continue
            if odd := next((n for n, t in packed.items() if t.dtype != stored), None):
                problem = f"{shard.path}: step {step}, {odd} is not stored as {self._dtype}"
                self._findings.violate(GRADIENTS, problem)
                self._failed = True
                continue
            taps = {name: shard.taps(name) for name in self._names}
            for other in self._others:
                other.follow(shard.path, step, packed, taps)
        for other in self._others:
            other.hold()

    def finish(self) -> None:
        """Compare what was counted, and say what was proven."""
        client, findings = self._client, self._findings
        telemetry = client.telemetry
        if self._bytes != telemetry["bytes_captured"]:
            row = f"clients.jsonl: client {client.partition} in round {client.round}"
            findings.violate(ROWS, f"{row} has other bytes_captured than {self._bytes}")
        if SHARD_INDEX in telemetry["files"] and not self._is_index():
            path = client.folder / SHARD_INDEX
            findings.violate(ROWS, f"{path} is not the index of the shards beside it")
        for other in () if self._failed else self._others:
            other.finish()

    def _is_index(self) -> bool:
        found = parse_json(read_text_bytes(self._client.folder / SHARD_INDEX))
        keys = {key: shard.path.name for key, shard in self._client.shards.items()}
        return bool(
            isinstance(found, dict)
            and found.get("weight_map") == keys
            and found.get("metadata") == {"total_size": self._bytes}
        )


def prove_replay(client: Client, shards: Iterable[Shard], findings: Findings) -> None:
    """Check that the local optimizer over the recorded gradients lands on the delta.

    Parameters
    ----------
    client : Client
        Must be replayable.
    shards : iterable of Shard
        Its shards in order; each is looked at before the next is asked for.
    findings : Findings
        Told what was found.
    """
    run = client.run
    start, delta = run.round(client.round - 1).state, client.delta
    path = client.delta_path
    settings = run.config.training_of(client.partition).optimizer
    lossy, why = run.config.capture_dtype != "float32", _why_not_exact(run, client.round)
    courses = []
    objective = None
    try:
        rates, behavior = client.rates, client.behavior
    except InputError as unloaded:
        findings.leave(REPLAY, str(unloaded), at=client.place)
        return
    dishonest = behavior.explain()
    if dishonest is not None and (lossy or not client.has_all_parameters):
        reason = f"{dishonest}: only gradients of all layers in float32 tell what was sent"
        findings.leave(REPLAY, reason, at=client.place)
        return
    if client.proximal_mu or client.correction is not None:
        objective = Objective(start, client.proximal_mu, client.correction)
    for group in _groups(run, client.captured_parameters):
        what = (
            *(start, group, settings, run.config.autocast),
            *(client.proximal_mu, client.correction, rates),
        )
        replay = Replay(*what)
        small = any(math.prod(run.shapes[name]) < _ALONE for name in group)
        tries = (_TRIES if small else 1) if lossy else 0
        others = [Replay(*what) for _ in range(tries)]
        courses.append(_Course(group, replay, others, start, objective))
    measures = _Measures(client, findings)
    for shard in shards:
        for course in courses:
            course.follow(shard)
        measures.follow(shard)
    measures.finish()
    led = {name: t for course in courses for name, t in course.replay.parameters.items()}
    if dishonest is not None:
        # No gradient tells of buffers: the parameters that are sent must not depend on them.
        before = {name: tensor.numpy() for name, tensor in start.items()}
        honest = {**before, **{name: tensor.numpy() for name, tensor in led.items()}}
        sent = behavior.update(before, honest)
        led = {name: torch.from_numpy(np.asarray(sent[name])) for name in led}
    for course in courses:
        for name in course.group:
            moved = led[name] - start[name]
            if torch.equal(moved.view(torch.int32), delta[name].contiguous().view(torch.int32)):
                continue
            allowed = REPLAY_TOLERANCE * _norm(delta[name])
            # Each update is rounded to what a float32 of the size of the parameter resolves.
            allowed += (
                client.telemetry["num_steps"] * 2**-24 * _norm(course.replay.parameters[name])
            )
            if lossy:
                allowed += REPLAY_ROUNDINGS * course.spread(name)
                if not course.finite or not math.isfinite(allowed):
                    dtype = run.config.capture_dtype
                    reason = f"gradients are not finite, or too large for {dtype}"
                    findings.leave(REPLAY, reason, at=client.place)
                    return
            off = _norm(moved - delta[name])
            if not why or not off <= allowed:
                error = off / (_norm(delta[name]) or 1)
                findings.violate(
                    REPLAY, f"{path}: {name} is not where the gradients lead, off by {error:.1e}"
                )
                return
    if not lossy and any(c.replay.num_updates != updates_of(client.telemetry) for c in courses):
        findings.violate(REPLAY, f"clients.jsonl: client {client.partition} made other updates")
        return
    if client.has_all_parameters and not lossy and objective is not None:
        squares = [course.squares for course in courses]
        prove_objective(client, squares, client.proximal_mu, findings)
    elif objective is not None:
        reason = "proximal, objective_norm: only gradients of all layers in float32 tell"
        findings.leave(ROWS, reason, at=client.place)
    if client.has_all_parameters:
        settle_replayed(client, findings, exact=not lossy)
    findings.prove(REPLAY, client.telemetry["num_steps"])
    if not client.has_all_parameters:
        count = f"{len(client.captured_parameters)} of {len(run.shapes)} parameters"
        reason = f"{count} were captured: the deltas of the others are not followed"
        findings.leave(REPLAY, reason, at=client.place)
    if run.described.keys() - run.shapes.keys():
        findings.leave(REPLAY, BUFFERS, at=client.place)
    findings.note(REPLAY, f"within rounding: {why}" if why else "bit for bit")


class _Course:
    """Parameters on their way through the recorded gradients of a client.

    Gradients that were rounded when they were stored do not lead to the delta exactly; how far off
    depends on the optimizer and on how its steps add up. So the replay is made again with every
    entry moved by a unit of its last place, up or down by chance, which is twice as far as rounding
    can have moved it.

    Parameters
    ----------
    group : sequence of str
        Their names.
    replay : Replay
        Over the gradients as they are.
    others : sequence of Replay
        Over those that are moved.
    start : mapping of str to Tensor
        The global parameters.
    objective : Objective or None
        What is minimised, where that is more than the loss.
    """

    def __init__(
        self,
        group: Sequence[str],
        replay: Replay,
        others: Sequence[Replay],
        start: Mapping[str, Tensor],
        objective: Objective | None,
    ) -> None:
        self.group = group
        self._start = start
        self._objective = objective
        self.squares: dict[int, tuple[float, float]] = {}
        self.replay = replay
        self._others = others
        self.finite = True
        self._signs = np.random.Generator(np.random.PCG64(0))

    def follow(self, shard: Shard) -> None:
        """Make the steps of a shard."""
        # Zeros of dead taps are written once for a shard, not at every step.
        kept: dict[str, Tensor] = {}
        for step in shard.steps:
            for name in self.group:
                kept[name] = shard.gradient(step, name, out=kept.get(name))
            if self._objective is not None:
                self.squares[step] = self._squares(self._objective, kept)
            self.replay.step(kept)
            if self._others:
                self.finite = self.finite and all(bool(g.isfinite().all()) for g in kept.values())
            for other in self._others:
                other.step({name: self._moved(shard, step, name) for name in self.group})

    def _squares(
        self, objective: Objective, gradients: Mapping[str, Tensor]
    ) -> tuple[float, float]:
        """Give the square of the distance from the global parameters, and of the gradient."""
        moved = whole = 0.0
        for name in self.group:
            here = self.replay.parameters[name]
            moved += _norm(here - self._start[name]) ** 2
            whole += _norm(objective.gradient(name, gradients[name], here)) ** 2
        return moved, whole

    def spread(self, name: str) -> float:
        """Give how far another rounding would have led a parameter at most."""
        here = self.replay.parameters[name]
        return max(_norm(other.parameters[name] - here) for other in self._others)

    def _moved(self, shard: Shard, step: int, name: str) -> Tensor:
        stored, shape = shard.packed(step, name), self.replay.parameters[name].shape
        unit = stored.float().abs() * torch.finfo(stored.dtype).eps + _least(stored.dtype)
        ups = torch.from_numpy(self._signs.integers(0, 2, tuple(stored.shape), dtype=np.int8))
        return unpack(stored.float() + unit * (2 * ups - 1), shape, shard.taps(name))


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.double()))


def _least(dtype: torch.dtype) -> float:
    """Give the unit of the last place of the smallest numbers, and of zero."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def _why_not_exact(run: Run, number: int) -> str:
    """Say why a replay here need not land on the exact bits of a round; empty where it must."""
    versions, device = run.made_by(number)
    if run.config.capture_dtype != "float32":
        return f"gradients are stored as {run.config.capture_dtype}"
    if versions["torch"] != version("torch"):
        return f"the run used torch {versions['torch']}, and this is {version('torch')}"
    if device["type"] != "cpu":
        return f"the run trained on {device['type']}"
    return other_instructions(device)


def _groups(run: Run, names: Sequence[str]) -> list[list[str]]:
    # What a step of float16 autocast does depends on all of its gradients.
    if run.config.autocast == "float16":
        return [list(names)]
    large = [n for n in names if math.prod(run.shapes[n]) >= _ALONE]
    small = [n for n in names if math.prod(run.shapes[n]) < _ALONE]
    return [*([n] for n in large), *([small] if small else [])]


def prove_objective(
    client: Client, squares: Iterable[dict[int, tuple[float, float]]], mu: float, findings: Findings
) -> None:
    """Check what rows say of a proximal term and of the whole gradient, as a replay had them.

    Parameters
    ----------
    client : Client
        Of which every step was replayed with all layers.
    squares : iterable of dict
        Of some parameters each, by step: the square of their distance from the global ones, and
        of their gradient with what the strategy added.
    mu : float
        Factor of the term; 0 for none.
    findings : Findings
        Told of the first step that says otherwise.
    """
    groups = list(squares)
    for row in client.steps:
        step = row["step"]
        distance = sum(group[step][0] for group in groups)
        whole = math.sqrt(sum(group[step][1] for group in groups))
        figures = [("objective_norm", whole, whole**2)]
        figures += [("proximal", distance * mu / 2, distance)] if mu else []
        for key, value, square in figures:
            told = row.get(key)
            # Training squares in float32, where a number that is large here may overflow.
            if told is None and key in row and not square < _LARGEST:
                continue
            if told is None or not abs(told - value) <= 1e-4 * abs(value) + 1e-30:
                path = client.steps_path
                findings.violate(ROWS, f"{path}: {key} of step {step} is {told}, not {value:.6g}")
                return


class _Retrace:
    """The first gradient of a repeated training that is not the captured one, to the bit."""

    def __init__(self, client: Client, whole: frozenset[str]) -> None:
        self._client = client
        has_shards = all(name in whole for name in client.telemetry["files"] if is_shard(name))
        self._captured = frozenset(client.captured_steps if has_shards else ())
        self.difference: str | None = None

    def __call__(self, step: Step) -> None:
        if step.index not in self._captured or self.difference:
            return
        for name, kept in self._client.gradient(step.index).items():
            stored = self._client.shard(step.index, name).packed(step.index, name)
            made = step.gradients[name].cpu().to(stored.dtype).float().contiguous()
            if not torch.equal(made.view(torch.int32), kept.contiguous().view(torch.int32)):
                self.difference = f"the gradient of {name} in step {step.index} differs"
                return
