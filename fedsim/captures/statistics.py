"""Figures of every step's gradient (``gradient-statistics``), measured while it is in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from fedsim.core.capture import Capture, Observer, SeenStep, Sink, Sizes
from fedsim.core.config import RunConfig
from fedsim.core.support import Taps, count_nonzero, pack, unpack
from fedsim.recording.findings import GRADIENTS, ROWS, STATISTICS, Findings
from fedsim.recording.reader import Client

NORM_TOLERANCE = {"float32": 1e-5, "float16": 2**-10, "bfloat16": 2**-7}
"""Relative error of a recorded gradient's norm, by ``capture-dtype``."""
_STORED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Statistics(Capture):
    """Norms, cosines and zeros of the gradient of every local step, kept or not.

    Parameters
    ----------
    on : bool
        Whether they are measured.
    """

    on: bool = True

    @classmethod
    def of(cls, config: RunConfig) -> Self:
        """Follow ``gradient-statistics``."""
        return cls(config.gradient_statistics)

    @property
    def keeps_files(self) -> bool:
        """Never: they are in the lines of ``steps.jsonl``."""
        return False

    def step_bytes(self, sizes: Sizes) -> int:
        """Give 0: rows are not counted."""
        return 0

    def record(self, sink: Sink) -> Observer | None:
        """Measure every step."""
        return _Measuring(sink.shapes) if self.on else None

    def leave(self, client: Client, findings: Findings) -> None:
        """Name the figures of all steps, until something is measured again."""
        _leave(client, findings)

    def check_steps(self, client: Client, findings: Findings) -> None:
        """Check that steps have figures or not, and the first the norms of ``clients.jsonl``."""
        # Missing in the configurations of versions that had no such choice.
        chosen = "gradient-statistics" in client.run.entry("config")
        odd = next((r for r in client.steps if ("gradient_norm" in r) != self.on), None)
        if chosen and odd is not None:
            which = f"step {odd['step']} {'lacks' if self.on else 'has'} figures of its gradient"
            reason = f"gradient-statistics = {str(self.on).lower()}"
            findings.violate(ROWS, f"{client.steps_path}: {which}, with {reason}")
            return
        if not client.steps or "per_layer_norms" not in client.steps[0]:
            return
        mine, tolerance = client.telemetry["per_layer_norms"], NORM_TOLERANCE["float32"]
        for name, told in client.steps[0]["per_layer_norms"].items():
            other = mine.get(name)
            same = told == other or (
                None not in (told, other) and abs(told - other) <= tolerance * max(told, other)
            )
            if not same:
                findings.violate(
                    ROWS,
                    f"clients.jsonl: client {client.partition} in round {client.round} has another "
                    f"norm of {name} than {client.steps_path}",
                )
                return

    def measures(self, client: Client, findings: Findings) -> Remeasured:
        """Measure captured gradients again."""
        return Remeasured(client, findings)


class _Measuring(Observer):
    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self._statistics = GradientStatistics()

    def measure(self, seen: SeenStep) -> None:
        figures = self._statistics.add(seen.packed, seen.taps, self._shapes, nonzero=seen.nonzero)
        named: dict[str, Any] = {**vars(figures)}
        seen.row.update(gradient_norm=named.pop("norm"), **named)


@dataclass(frozen=True, kw_only=True)
class StepStatistics:
    """Figures of one step's gradient, all parameters, without weight decay.

    Parameters
    ----------
    norm : float
        Euclidean norm.
    per_layer_norms : dict of str to float
        The same of each parameter.
    cosine_to_previous : float or None
        Cosine to the gradient of the step before; None for the first step and for a zero.
    cosine_to_mean : float or None
        Cosine to the mean of the gradients of all steps before.
    zero_fraction : float
        Share of entries that are exactly +0.
    """

    norm: float
    per_layer_norms: dict[str, float]
    cosine_to_previous: float | None
    cosine_to_mean: float | None
    zero_fraction: float


class GradientStatistics:
    """Follows the gradients of a client's local steps.

    Works on packed gradients: what is left out is zero and adds nothing to a norm or a product.
    Keeps the gradient of the step before and the sum of all.
    """

    def __init__(self) -> None:
        self._previous: dict[str, Tensor] = {}
        self._sum: dict[str, Tensor] = {}
        self._taps: dict[str, Taps | None] = {}
        self._previous_norm = 0.0
        self._sum_square = 0.0

    def add(
        self,
        packed: Mapping[str, Tensor],
        taps: Mapping[str, Taps | None],
        shapes: Mapping[str, tuple[int, ...]],
        *,
        nonzero: int,
    ) -> StepStatistics:
        """Measure the next step.

        Parameters
        ----------
        packed : mapping of str to Tensor
            The step's gradient; kept until the next step.
        taps : mapping of str to tuple of int or None
            Support of each.
        shapes : mapping of str to tuple of int
            Shapes of the parameters.
        nonzero : int
            Entries that are not +0.
        """
        self._repack(taps, shapes)
        measured = []
        first = not self._sum
        for name, tensor in packed.items():
            flat = tensor.detach().reshape(-1)
            figures = [torch.linalg.vector_norm(flat)]
            if first:
                self._sum[name] = flat.clone()
            else:
                total = self._sum[name]
                figures += [torch.dot(flat, self._previous[name]), torch.dot(flat, total)]
                total.add_(flat)
            self._previous[name] = flat
            measured.append(torch.stack(figures))
        # One transfer for all figures where they lie on a GPU.
        table = torch.stack(measured).double().cpu().numpy()
        norm = math.sqrt(float((table[:, 0] ** 2).sum()))
        to_previous = to_mean = None
        if first:
            self._sum_square = norm**2
        else:
            with_previous, with_sum = (float(column.sum()) for column in table[:, 1:].T)
            to_previous = _cosine(with_previous, norm, self._previous_norm)
            to_mean = _cosine(with_sum, norm, self.sum_norm)
            # Exact arithmetic over what was measured: the sum need not be read again.
            self._sum_square += 2 * with_sum + norm**2
        self._previous_norm = norm
        entries = sum(math.prod(shape) for shape in shapes.values())
        return StepStatistics(
            norm=norm,
            per_layer_norms={n: float(r[0]) for n, r in zip(packed, table, strict=True)},
            cosine_to_previous=to_previous,
            cosine_to_mean=to_mean,
            zero_fraction=1 - nonzero / entries if entries else 0.0,
        )

    @property
    def sum_norm(self) -> float:
        """Euclidean norm of the sum of all gradients so far."""
        return math.sqrt(max(0.0, self._sum_square))

    def hold(self) -> None:
        """Copy what was kept of the last step, whose memory is about to be used again."""
        self._previous = {name: tensor.clone() for name, tensor in self._previous.items()}

    def _repack(
        self, taps: Mapping[str, Taps | None], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        """Lay out what is kept as the next step is packed."""
        for name, live in taps.items():
            if self._sum and self._taps[name] != live:
                for kept in (self._sum, self._previous):
                    before = self._taps[name]
                    shape = shapes[name]
                    packed = kept[name] if before is None else kept[name].view(-1, *shape[:2])
                    dense = unpack(packed.view(shape) if before is None else packed, shape, before)
                    kept[name] = pack(dense, live).reshape(-1)
            self._taps[name] = live


def _cosine(product: float, first: float, second: float) -> float | None:
    if not first * second:
        return None
    cosine = product / (first * second)
    # Rounding may pass the ends; what is not finite stays so.
    return max(-1.0, min(1.0, cosine)) if math.isfinite(cosine) else cosine


class Remeasured:
    """Measures captured gradients as training did, and compares with what the rows say.

    Parameters
    ----------
    client : Client
        Of which gradients were captured, of some steps or all.
    findings : Findings
        Told of the first step that is measured otherwise, and by `finish` of what was proven.

    Attributes
    ----------
    failed : bool
        Whether a step was: then no other is measured.
    """

    def __init__(self, client: Client, findings: Findings) -> None:
        self.failed = False
        self._client = client
        self._findings = findings
        self._rows = client.steps
        self._dtype = client.run.config.capture_dtype
        self._statistics = GradientStatistics()
        self._lengths = 0.0
        self._normed = 0
        self._proven = 0

    def follow(
        self, path: Path, step: int, stored: Mapping[str, Tensor], taps: Mapping[str, Taps | None]
    ) -> None:
        """Measure a step.

        Parameters
        ----------
        path : Path
            The file it is in.
        step : int
            Local step of the round.
        stored : mapping of str to Tensor
            Packed gradients in ``capture-dtype``.
        taps : mapping of str to (tuple of int or None)
            Their supports.
        """
        if not self.failed and (problem := self._problem_of(step, stored, taps)):
            self._findings.violate(GRADIENTS, f"{path}: step {step}{problem}")
            self.failed = True

    def _problem_of(
        self, step: int, stored: Mapping[str, Tensor], taps: Mapping[str, Taps | None]
    ) -> str | None:
        row, shapes = self._rows[step], self._client.run.shapes
        floats = {name: tensor.float() for name, tensor in stored.items()}
        # Cosines are to all steps before: where one is missing, norms are left.
        follows = list(stored) == list(shapes) and self._proven == step
        if follows:
            nonzero = sum(count_nonzero(tensor) for tensor in floats.values())
            # A sum that cancels to a share of its terms has that many times their relative error.
            length = self._statistics.sum_norm
            cancelled = 1 + (self._lengths / length) ** 2 if length else math.inf
            found = self._statistics.add(floats, taps, shapes, nonzero=nonzero)
            norms = found.per_layer_norms
            self._lengths += found.norm
        else:
            norms = {n: float(torch.linalg.vector_norm(t)) for n, t in floats.items()}
        told = row.get("per_layer_norms")
        if told is None:
            if step != 0:
                return None
            told = self._client.telemetry["per_layer_norms"]
        for name, tensor in stored.items():
            if not self._is_norm(norms[name], told.get(name), tensor):
                return f", {name} has norm {norms[name]:.6g}, and {told.get(name)} was measured"
        if "per_layer_norms" in row:
            self._normed += 1
        if follows and "gradient_norm" in row:
            if odd := self._odd_figure(row, found, cancelled):
                return f" has another {odd} than {self._client.steps_path} says"
            self._proven += 1
        return None

    def _odd_figure(
        self, row: dict[str, object], found: StepStatistics, cancelled: float
    ) -> str | None:
        """Name the figure of a row that is not as measured here."""
        tolerance = NORM_TOLERANCE[self._dtype]
        lossy = self._dtype != "float32"
        for key, value, allowed in (
            ("gradient_norm", found.norm, tolerance * found.norm),
            ("cosine_to_previous", found.cosine_to_previous, 4 * tolerance),
            ("cosine_to_mean", found.cosine_to_mean, 4 * tolerance * cancelled),
        ):
            if lossy and found.norm < _least(_STORED[self._dtype]) * 2**12:
                # So few numbers of that dtype are this small that they say little.
                continue
            told = row.get(key)
            if value is None or not math.isfinite(value):
                # What was too large for its dtype was not so when it was measured.
                if told is not None and not lossy:
                    return key
            elif not isinstance(told, int | float) or not abs(told - value) <= allowed:
                return key
        told = row.get("zero_fraction")
        if not isinstance(told, int | float):
            return "zero_fraction"
        # Rounding makes zeros and takes none away.
        fits = told <= found.zero_fraction if lossy else told == found.zero_fraction
        return None if fits and told >= 0 else "zero_fraction"

    def hold(self) -> None:
        """Copy what is kept of the last step, whose memory is about to be used again."""
        self._statistics.hold()

    def finish(self) -> None:
        """Say what was proven, and what of the rows is left."""
        if self.failed:
            return
        if self._normed:
            self._findings.prove(GRADIENTS, self._normed)
        elif not self._client.run.config.gradient_statistics:
            reason = "gradient-statistics = false: no norms to compare with"
            self._findings.leave(GRADIENTS, reason, at=self._client.place)
        _leave(self._client, self._findings, proven=self._proven)

    def _is_norm(self, norm: float, told: float | None, stored: Tensor) -> bool:
        # One that is not finite is null in a row, and is so once it is stored in too few bits.
        if not math.isfinite(norm):
            return told is None or told > torch.finfo(stored.dtype).max
        if told is None:
            return False
        rounding = math.sqrt(stored.numel()) * _least(stored.dtype)
        return abs(norm - told) <= NORM_TOLERANCE[self._dtype] * max(norm, told) + rounding


def _leave(client: Client, findings: Findings, *, proven: int = 0) -> None:
    if left := client.telemetry["num_steps"] - proven:
        findings.leave(ROWS, STATISTICS, at=client.place, steps=left)
    else:
        findings.settle(ROWS, STATISTICS, at=client.place)


def _least(dtype: torch.dtype) -> float:
    """Give the unit of the last place of the smallest numbers, and of zero."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
