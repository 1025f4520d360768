"""Recording the gradients of a client's local steps while it trains."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from fedsim.core.capture import CapturePolicy
from fedsim.core.training import Step
from fedsim.recording.files import LineFile, TensorWriter
from fedsim.recording.layout import gradient_key, shard_name

SHARD_BYTES = 256 * 2**20
"""Shards close at the step that fills them to about this size."""


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


class StepRecorder:
    """An observer of local training that writes ``steps.jsonl`` and the gradient shards.

    A thread writes while training computes the next step. It holds the gradients of one step;
    with those that training is making, two steps are in memory at most. A slower disk makes
    training wait: `seconds_waited` in its steps, `seconds_closing` after the last.

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
    shard_bytes : int
        Approximate size of a shard.
    """

    def __init__(
        self,
        folder: Path,
        policy: CapturePolicy,
        *,
        num_steps: int,
        shapes: Mapping[str, tuple[int, ...]],
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self._folder = folder
        self._policy = policy
        self._shapes = {name: shapes[name] for name in policy.layers_of(shapes)}
        self._kept = [s for s in range(num_steps) if policy.keeps_step(s)] if self._shapes else []
        step_bytes = 4 * sum(math.prod(shape) for shape in self._shapes.values())
        self._steps_per_shard = max(1, shard_bytes // max(1, step_bytes))
        self._queue: queue.SimpleQueue[tuple[Step, list[Tensor]] | None] = queue.SimpleQueue()
        self._free = threading.Semaphore(1)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="step-recorder", daemon=True)
        self.bytes_captured = step_bytes * len(self._kept)
        self.num_steps_captured = len(self._kept)
        self.seconds_waited = 0.0
        self.seconds_closing = 0.0

    def __enter__(self) -> Self:
        """Clear the folder and start the writer."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for leftover in self._folder.iterdir():
            leftover.unlink()
        self._lines = LineFile(self._folder / "steps.jsonl")
        self._shard: TensorWriter | None = None
        self._shards = 0
        self._written = 0
        self._thread.start()
        return self

    def __call__(self, step: Step) -> None:
        """Take one step; waits while the writer still holds the step before."""
        kept = self._shapes if self._policy.keeps_step(step.index) else ()
        gradients = [step.gradients[name] for name in kept]
        # GPU gradients are copied here, before anything can overwrite them; CPU ones are the
        # step's own tensors and need no copy.
        gradients = [g if g.device.type == "cpu" else g.cpu() for g in gradients]
        started = time.perf_counter()
        self._free.acquire()
        self.seconds_waited += time.perf_counter() - started
        if self._error is not None:
            raise self._error
        # Without the mapping: the parameters that are not kept can go as soon as training
        # drops them.
        self._queue.put((replace(step, gradients={}), gradients))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for the writer; put the files in place, or remove them after an error."""
        started = time.perf_counter()
        self._queue.put(None)
        self._thread.join()
        self.seconds_closing = time.perf_counter() - started
        failure = error or self._error
        if failure is None and self._written != len(self._kept):
            failure = RuntimeError(
                f"{self._written} of {len(self._kept)} steps to capture were made"
            )
        if failure is None:
            try:
                self._lines.close()
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

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                if self._error is None:
                    self._write(*item)
            except BaseException as error:
                self._error = error
            finally:
                del item
                self._free.release()

    def _write(self, step: Step, gradients: list[Tensor]) -> None:
        self._lines.write(
            {
                "step": step.index,
                "epoch": step.epoch,
                "batch_size": len(step.indices),
                "loss": float(step.loss),
                "learning_rate": step.learning_rate,
                "indices": step.indices.tolist(),
            }
        )
        if not gradients:
            return
        if self._shard is None:
            steps = self._kept[self._written : self._written + self._steps_per_shard]
            entries = {
                gradient_key(step, name): ("F32", shape)
                for step in steps
                for name, shape in self._shapes.items()
            }
            self._shard = TensorWriter(self._folder / shard_name(self._shards), entries)
        for gradient in gradients:
            self._shard.append(gradient.numpy())
        self._written += 1
        if self._written == len(self._kept) or self._written % self._steps_per_shard == 0:
            self._shard.close()
            self._shard = None
            self._shards += 1
