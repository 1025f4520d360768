"""Recording the gradients of a client's local steps while it trains."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.core.capture import ITEM_BYTES, CapturePolicy
from fedsim.core.sketch import Sketcher
from fedsim.core.statistics import GradientStatistics
from fedsim.core.support import (
    Taps,
    count_nonzero,
    join_taps,
    live_taps,
    pack,
    packed_shape,
    packed_size,
)
from fedsim.core.training import Step
from fedsim.recording import layout
from fedsim.recording.files import (
    Checksum,
    LineFile,
    TensorWriter,
    json_document,
    temporary,
    write_tensors,
)

MOST_KEYS = 2**16
"""Gradients in a shard, or those of one step: a header is read whole before any of them."""
SHARD_BYTES = 256 * 2**20
"""Shards close at the step that fills them to about this size."""
AT_ONCE_BYTES = 2**20
"""Steps of which fewer bytes are kept are written faster than handed over to another thread."""

_STORED = {
    "float32": ("F32", torch.float32, np.float32),
    "bfloat16": ("BF16", torch.bfloat16, np.int16),
    "float16": ("F16", torch.float16, np.float16),
}


class FirstStepNorms:
    """An observer of local training that keeps the gradient norms of the first step.

    Attributes
    ----------
    per_layer : dict of str to float
        Euclidean norm of each parameter's gradient, without weight decay.
    """

    def __init__(self) -> None:
        self.per_layer: dict[str, float] = {}

    def __call__(self, step: Step) -> None:
        """Take one step."""
        if step.index == 0:
            norms = {n: torch.linalg.vector_norm(g) for n, g in step.gradients.items()}
            self.per_layer = {name: float(norm) for name, norm in norms.items()}


@dataclass
class _Unmeasured:
    """A step whose gradients lie on a GPU, on its way to the writer."""

    step: Step
    gradients: dict[str, Tensor]
    ready: torch.cuda.Event


@dataclass
class _Measured:
    """What is to be written of a step."""

    row: dict[str, Any]
    gradients: dict[str, Tensor]
    taps: dict[str, Taps | None]
    sketch: NDArray[np.float32] | None

    @property
    def is_light(self) -> bool:
        """Whether it is to be written at once."""
        if self.sketch is not None:
            return True
        return sum(tensor.nbytes for tensor in self.gradients.values()) < AT_ONCE_BYTES


class StepRecorder:
    """An observer of local training that writes ``steps.jsonl`` and what the policy keeps.

    A thread writes while training computes the next step. It holds what is kept of one step; with
    the gradients that training is making, two steps are in memory at most. A slower disk makes
    training wait: `seconds_waited` in its steps, `seconds_closing` after the last. Steps of small
    models are written at once, without a thread, until one is large.

    On a CPU the very tensors of the backward pass are written, without a copy. What they are
    packed and measured for takes no waiting but computing, for which a worker's cores are busy
    with training anyway: it is done in between, without two threads fighting for them. On a GPU the
    thread does that too, on a stream of its own that waits for the backward pass by an event; it
    copies into pinned memory, waits for the copy, and writes before it touches that memory
    again.

    Use it as a context manager: a clean end puts the files in place, an error removes them.

    Parameters
    ----------
    folder : Path
        The client's folder of the round. Files of an earlier attempt in it are removed.
    policy : CapturePolicy
        What to keep.
    num_steps : int
        Local steps that will be made.
    shapes : mapping of str to tuple of int
        All parameters of the model and their shapes, in ``model.parameters()`` order.
    statistics : bool
        Whether to measure the gradient of every step, kept or not.
    sketcher : Sketcher, optional
        For a policy ``sketch:K``.
    shard_bytes : int
        Approximate size of a shard.

    Attributes
    ----------
    bytes_captured : int
        Bytes of gradients or sketches so far.
    num_steps_captured : int
        Steps of which gradients or sketches are kept.
    files : dict of str to Checksum
        The finished files by name, once closed.
    """

    def __init__(
        self,
        folder: Path,
        policy: CapturePolicy,
        *,
        num_steps: int,
        shapes: Mapping[str, tuple[int, ...]],
        statistics: bool = True,
        sketcher: Sketcher | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self._folder = folder
        self._policy = policy
        self._shapes = dict(shapes)
        self._names = policy.layers_of(shapes)
        self._kept = policy.kept_steps(num_steps) if self._names else range(0)
        self._statistics = GradientStatistics() if statistics else None
        self._sketcher = sketcher
        self._shard_bytes = shard_bytes
        self._taps: dict[str, Taps | None] = {}
        self._sketches: list[NDArray[np.float32]] = []
        self._queue: queue.SimpleQueue[_Measured | _Unmeasured | None] = queue.SimpleQueue()
        self._free = threading.Semaphore(1)
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._stream: torch.cuda.Stream | None = None
        self._pinned: Tensor | None = None
        self.bytes_captured = 0
        self.num_steps_captured = 0
        self.files: dict[str, Checksum] = {}
        self.seconds_waited = 0.0
        self.seconds_closing = 0.0

    def __enter__(self) -> Self:
        """Clear the folder and open the first file."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for leftover in self._folder.iterdir():
            leftover.unlink()
        self._lines = LineFile(self._folder / layout.STEPS)
        self._shard: TensorWriter | None = None
        self._shard_taps: dict[str, Taps | None] = {}
        self._shard_steps_left = 0
        self._keys: dict[str, str] = {}
        return self

    def __call__(self, step: Step) -> None:
        """Take one step; waits while the writer still holds the step before."""
        if self._statistics is not None:
            gradients = dict(step.gradients)
        elif step.index in self._kept:
            gradients = {name: step.gradients[name] for name in self._names}
        else:
            gradients = {}
        device = step.loss.device
        item: _Measured | _Unmeasured
        if device.type == "cuda":
            self._stream = self._stream or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            ready = torch.cuda.current_stream(device).record_event()
            # Without the mapping: parameters that are not wanted can go as soon as training drops
            # them.
            item = _Unmeasured(replace(step, gradients={}), gradients, ready)
        else:
            item = self._measure(step, gradients)
        del gradients
        started = time.perf_counter()
        if self._thread is None and isinstance(item, _Measured) and item.is_light:
            self._write(item)
        else:
            self._hand_over(item)
        self.seconds_waited += time.perf_counter() - started

    def _hand_over(self, item: _Measured | _Unmeasured) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="step-recorder", daemon=True)
            self._thread.start()
        self._free.acquire()
        if self._error is not None:
            raise self._error
        self._queue.put(item)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for the writer; put the files in place, or remove them after an error."""
        started = time.perf_counter()
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
        self.seconds_closing = time.perf_counter() - started
        failure = error or self._error
        if failure is None and self.num_steps_captured != len(self._kept):
            failure = RuntimeError(
                f"{self.num_steps_captured} of {len(self._kept)} steps to capture were made"
            )
        if failure is None:
            try:
                self._finish()
                return
            except OSError as full:
                failure = full
        self._lines.discard()
        if self._shard is not None:
            self._shard.discard()
        # Finished shards too: nothing will ever refer to them, and they may be gigabytes.
        for path in self._folder.iterdir():
            path.unlink()
        if error is None:
            raise failure

    def _finish(self) -> None:
        shards = list(self.files)
        if self._sketches:
            name = layout.SKETCH
            self.files[name] = write_tensors(
                self._folder / name, {layout.SKETCH_KEY: np.stack(self._sketches)}
            )
        if len(shards) > 1:
            name = layout.SHARD_INDEX
            index = {"metadata": {"total_size": self.bytes_captured}, "weight_map": self._keys}
            document = json_document(index)
            with temporary(self._folder / name) as unfinished:
                unfinished.write_bytes(document)
            self.files[name] = Checksum.of(document)
        self.files[layout.STEPS] = self._lines.close()

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                if self._error is None and isinstance(item, _Unmeasured):
                    with self._after(item.ready):
                        self._write(self._measure(item.step, item.gradients))
                elif self._error is None and isinstance(item, _Measured):
                    self._write(item)
            except BaseException as error:
                self._error = error
            finally:
                del item
                self._free.release()

    @contextlib.contextmanager
    def _after(self, ready: torch.cuda.Event) -> Iterator[None]:
        assert self._stream is not None  # noqa: S101
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            try:
                yield
            finally:
                # Training frees these gradients next; nothing here may still read them.
                self._stream.synchronize()

    def _measure(self, step: Step, gradients: dict[str, Tensor]) -> _Measured:
        row: dict[str, Any] = {
            "step": step.index,
            "epoch": step.epoch,
            "batch_size": len(step.indices),
            "loss": float(step.loss),
            "learning_rate": step.learning_rate,
            "indices": step.indices.tolist(),
        }
        if step.proximal is not None:
            row["proximal"] = float(step.proximal)
        if step.objective_norm is not None:
            row["objective_norm"] = float(step.objective_norm)
        measured = _Measured(row, {}, {}, None)
        if not gradients:
            return measured
        dense = self._policy.keeps_gradients and self._policy.encoding == "dense"
        as_they_are = dense and self._statistics is None
        packed, nonzero = (gradients, 0) if as_they_are else self._pack(gradients)
        if self._statistics is not None:
            figures = self._statistics.add(packed, self._taps, self._shapes, nonzero=nonzero)
            row.update(_named({**vars(figures)}))
        if step.index in self._kept:
            source = gradients if dense else packed
            measured.gradients = {name: source[name] for name in self._names}
            measured.taps = {n: None if dense else self._taps[n] for n in self._names}
        if measured.gradients and self._sketcher is not None:
            host = self._to_host(measured.gradients, torch.float32)
            measured.sketch = self._sketcher.sketch(host, measured.taps)
            if self._statistics is None:
                norms = {n: float(torch.linalg.vector_norm(g)) for n, g in host.items()}
                row["per_layer_norms"] = norms
        return measured

    def _write(self, measured: _Measured) -> None:
        if measured.sketch is not None:
            self._sketches.append(measured.sketch)
            self.bytes_captured += measured.sketch.nbytes
        elif measured.gradients:
            self._store(measured.row["step"], measured.gradients, measured.taps)
        if measured.gradients:
            self.num_steps_captured += 1
        self._lines.write(measured.row)

    def _pack(self, gradients: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        """Leave out dead taps, having looked at every entry; count the nonzero ones."""
        packed: dict[str, Tensor] = {}
        nonzero = 0
        for name, gradient in gradients.items():
            if name not in self._taps:
                self._taps[name] = live_taps(gradient)
            taps = self._taps[name]
            packed[name] = pack(gradient, taps)
            if taps is None and self._statistics is None:
                continue
            count = count_nonzero(gradient)
            nonzero += count
            if taps is not None and count_nonzero(packed[name]) != count:
                joined = join_taps(taps, live_taps(gradient))
                # Live throughout: nothing is left to leave out.
                whole = joined is None or len(joined) == gradient[0, 0].numel()
                self._taps[name] = None if whole else joined
                packed[name] = pack(gradient, self._taps[name])
        return packed, nonzero

    def _store(self, step: int, gradients: dict[str, Tensor], taps: dict[str, Taps | None]) -> None:
        if self._shard is not None and taps != self._shard_taps:
            self._close_shard()
        if self._shard is None:
            self._open_shard(taps)
        assert self._shard is not None  # noqa: S101
        _, dtype, bits = _STORED[self._policy.dtype]
        before = self._shard.data_bytes
        for tensor in self._to_host(gradients, dtype).values():
            numbers = tensor.view(torch.int16) if dtype == torch.bfloat16 else tensor
            self._shard.append(numbers.numpy().view(bits))
        self.bytes_captured += self._shard.data_bytes - before
        name = layout.shard_name(len(self.files))
        self._keys.update((layout.gradient_key(step, n), name) for n in gradients)
        self._shard_steps_left -= 1
        if not self._shard_steps_left:
            self._close_shard()

    def _open_shard(self, taps: dict[str, Taps | None]) -> None:
        code, item = _STORED[self._policy.dtype][0], ITEM_BYTES[self._policy.dtype]
        shapes = {name: packed_shape(self._shapes[name], t) for name, t in taps.items()}
        step_bytes = item * sum(packed_size(self._shapes[n], t) for n, t in taps.items())
        room = min(self._shard_bytes // max(1, step_bytes), MOST_KEYS // len(taps))
        room = max(1, room)
        steps = self._kept[self.num_steps_captured : self.num_steps_captured + room]
        supports = {n: np.array(t, dtype=np.int64) for n, t in taps.items() if t is not None}
        entries: dict[str, tuple[str, tuple[int, ...]]] = {
            layout.support_key(n): ("I64", t.shape) for n, t in supports.items()
        }
        entries.update(
            (layout.gradient_key(step, name), (code, shape))
            for step in steps
            for name, shape in shapes.items()
        )
        self._shard = TensorWriter(self._folder / layout.shard_name(len(self.files)), entries)
        self._shard_taps = taps
        self._shard_steps_left = len(steps)
        for support in supports.values():
            self._shard.append(support)

    def _close_shard(self) -> None:
        assert self._shard is not None  # noqa: S101
        self.files[layout.shard_name(len(self.files))] = self._shard.close()
        self._shard = None

    def _to_host(self, tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """Give tensors on the CPU in the dtype to store; those of a GPU in pinned memory."""
        tensors = {name: t.detach().to(dtype) for name, t in tensors.items()}
        if self._stream is None:
            return {name: tensor.cpu() for name, tensor in tensors.items()}
        needed = sum(t.numel() for t in tensors.values())
        if self._pinned is None or self._pinned.numel() < needed or self._pinned.dtype != dtype:
            self._pinned = torch.empty(needed, dtype=dtype, pin_memory=True)
        host: dict[str, Tensor] = {}
        offset = 0
        for name, tensor in tensors.items():
            host[name] = self._pinned[offset : offset + tensor.numel()].view(tensor.shape)
            host[name].copy_(tensor, non_blocking=True)
            offset += tensor.numel()
        # Not a byte is read before the copies have arrived.
        copied = self._stream.record_event()
        copied.synchronize()
        return host


def _named(figures: dict[str, Any]) -> dict[str, Any]:
    return {"gradient_norm": figures.pop("norm"), **figures}
