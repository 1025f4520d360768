"""Recording a client's local steps while it trains: the lines about them, and captures."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from fedsim.core.capture import Capture, Observer, Pending
from fedsim.core.support import Taps, count_nonzero, join_taps, live_taps, pack
from fedsim.core.training import Step
from fedsim.recording.files import Checksum, LineFile
from fedsim.recording.layout import STEPS

AT_ONCE_BYTES = 2**20
"""Steps of which fewer bytes are kept are written faster than handed over to another thread."""


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


class _Packing:
    """Leaves out the taps that have been dead in every step so far."""

    def __init__(self) -> None:
        self.taps: dict[str, Taps | None] = {}

    def pack(self, gradients: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Pack gradients; count the nonzero entries of those with dead taps, all looked at."""
        packed: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for name, gradient in gradients.items():
            if name not in self.taps:
                self.taps[name] = live_taps(gradient)
            taps = self.taps[name]
            packed[name] = pack(gradient, taps)
            if taps is None:
                continue
            counts[name] = count_nonzero(gradient)
            if count_nonzero(packed[name]) != counts[name]:
                joined = join_taps(taps, live_taps(gradient))
                # Live throughout: nothing is left to leave out.
                whole = joined is None or len(joined) == gradient[0, 0].numel()
                self.taps[name] = None if whole else joined
                packed[name] = pack(gradient, self.taps[name])
        return packed, counts


class _Seen:
    """A `SeenStep`."""

    def __init__(
        self, index: int, gradients: dict[str, Tensor], row: dict[str, Any], packing: _Packing
    ) -> None:
        self.index = index
        self.gradients = gradients
        self.row = row
        self._packing = packing

    @cached_property
    def _packed(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        return self._packing.pack(self.gradients)

    @property
    def packed(self) -> dict[str, Tensor]:
        return self._packed[0]

    @property
    def taps(self) -> dict[str, Taps | None]:
        return self._packing.taps

    @property
    def nonzero(self) -> int:
        counts = self._packed[1]
        return sum(
            counts[name] if name in counts else count_nonzero(gradient)
            for name, gradient in self.gradients.items()
        )


@dataclass
class _Unmeasured:
    """A step whose gradients lie on a GPU, on its way to the writer."""

    step: Step
    gradients: dict[str, Tensor]
    observers: list[Observer]
    ready: torch.cuda.Event


@dataclass
class _Measured:
    """What is to be written of a step."""

    row: dict[str, Any]
    pending: list[tuple[Observer, Pending]] = field(default_factory=list)

    @property
    def is_light(self) -> bool:
        """Whether it is to be written at once."""
        return sum(pending.nbytes for _, pending in self.pending) < AT_ONCE_BYTES


class StepRecorder:
    """An observer of local training that writes ``steps.jsonl``, and what captures keep.

    A thread writes while training computes the next step. It holds what is kept of one step; with
    the gradients that training is making, two steps are in memory at most. A slower disk makes
    training wait: `seconds_waited` in its steps, `seconds_closing` after the last. Steps of small
    models are written at once, without a thread, until one is large.

    On a CPU the tensors themselves of the backward pass are written, without a copy. Packing and
    measuring them is computing, not waiting, and a worker's cores are busy with training anyway:
    it is done in between, without two threads competing for them. On a GPU the thread does that
    too, on a stream of its own that waits for the backward pass by an event; it copies into pinned
    memory, waits for the copy, and writes before it touches that memory again.

    Use it as a context manager: a clean end puts the files in place, an error removes them.

    Parameters
    ----------
    folder : Path
        The client's folder of the round. Files of an earlier attempt in it are removed.
    captures : sequence of Capture
        What to keep, in the order in which they see a step.
    num_steps : int
        Local steps that will be made.
    shapes : mapping of str to tuple of int
        All parameters of the model and their shapes, in ``model.parameters()`` order.
    model : torch.nn.Module, optional
        The model in training, for captures that look into it.

    Attributes
    ----------
    files : dict of str to Checksum
        The finished files by name, once closed.
    """

    def __init__(
        self,
        folder: Path,
        captures: Sequence[Capture],
        *,
        num_steps: int,
        shapes: Mapping[str, tuple[int, ...]],
        model: nn.Module | None = None,
    ) -> None:
        self.folder = folder
        self.num_steps = num_steps
        self.shapes: Mapping[str, tuple[int, ...]] = dict(shapes)
        self.model = model
        self.at_end = contextlib.ExitStack()
        self._captures = captures
        self._observers: list[Observer] = []
        self._packing = _Packing()
        self._queue: queue.SimpleQueue[_Measured | _Unmeasured | None] = queue.SimpleQueue()
        self._free = threading.Semaphore(1)
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._stream: torch.cuda.Stream | None = None
        self._pinned: Tensor | None = None
        self.files: dict[str, Checksum] = {}
        self.seconds_waited = 0.0
        self.seconds_closing = 0.0

    @property
    def bytes_captured(self) -> int:
        """Bytes that captures keep so far."""
        return sum(observer.nbytes for observer in self._observers)

    @property
    def num_steps_captured(self) -> int:
        """Steps of which a capture keeps something."""
        return max((observer.kept for observer in self._observers), default=0)

    def __enter__(self) -> Self:
        """Clear the folder and open the first file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.iterdir():
            leftover.unlink()
        self._lines = LineFile(self.folder / STEPS)
        for capture in self._captures:
            if (observer := capture.record(self)) is not None:
                self._observers.append(observer)
        return self

    def __call__(self, step: Step) -> None:
        """Take one step; waits while the writer still holds the step before."""
        observers, wanted = [], set[str]()
        for observer in self._observers:
            if (names := observer.wants(step)) is not None:
                observers.append(observer)
                wanted.update(names)
        gradients = {name: g for name, g in step.gradients.items() if name in wanted}
        device = step.loss.device
        item: _Measured | _Unmeasured
        if device.type == "cuda":
            self._stream = self._stream or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            ready = torch.cuda.current_stream(device).record_event()
            # Without the mapping: parameters that are not wanted can go as soon as training drops
            # them.
            item = _Unmeasured(replace(step, gradients={}), gradients, observers, ready)
        else:
            item = self._measure(step, gradients, observers)
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
        self.at_end.close()
        self.seconds_closing = time.perf_counter() - started
        failure = error or self._error
        short = next((o for o in self._observers if o.kept != o.due), None)
        if failure is None and short is not None:
            failure = RuntimeError(f"{short.kept} of {short.due} steps to capture were made")
        if failure is None:
            try:
                for observer in self._observers:
                    observer.finish()
                self.files[STEPS] = self._lines.close()
                return
            except OSError as full:
                failure = full
        self._lines.discard()
        for observer in self._observers:
            observer.discard()
        # Finished files too: nothing will ever refer to them, and they may be gigabytes.
        for path in self.folder.iterdir():
            path.unlink()
        if error is None:
            raise failure

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                if self._error is None and isinstance(item, _Unmeasured):
                    with self._after(item.ready):
                        self._write(self._measure(item.step, item.gradients, item.observers))
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

    def _measure(
        self, step: Step, gradients: dict[str, Tensor], observers: Sequence[Observer]
    ) -> _Measured:
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
        seen, measured = _Seen(step.index, gradients, row, self._packing), _Measured(row)
        for observer in observers:
            if (pending := observer.measure(seen)) is not None:
                measured.pending.append((observer, pending))
        return measured

    def _write(self, measured: _Measured) -> None:
        for observer, pending in measured.pending:
            observer.write(pending)
        self._lines.write(measured.row)

    def to_host(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """Give tensors on the CPU in a dtype; those of a GPU in pinned memory.

        They are valid until the next call.
        """
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
