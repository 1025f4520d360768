"""Proofs of what rows say of gradients, over the gradients that were captured."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fedsim.core.inputs import parse_json, read_text_bytes
from fedsim.core.statistics import GradientStatistics, StepStatistics
from fedsim.core.support import count_nonzero
from fedsim.recording import layout
from fedsim.recording.findings import GRADIENTS, ROWS, STATISTICS, Findings
from fedsim.recording.reader import Client, Run
from fedsim.recording.shards import Shard

NORM_TOLERANCE = {"float32": 1e-5, "float16": 2**-10, "bfloat16": 2**-7}
"""Relative error of a recorded gradient's norm, by ``capture-dtype``."""
_LARGEST = 0.99 * torch.finfo(torch.float32).max
_STORED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Measures:
    """Measures captured gradients as training did, and compares with what the rows say.

    Parameters
    ----------
    run, client : Run, Client
        Of which gradients were captured, of some steps or all.
    findings : Findings
        Told of the first step that is measured otherwise, and by `finish` of what was proven.
    """

    def __init__(self, run: Run, client: Client, findings: Findings) -> None:
        self._run = run
        self._client = client
        self._findings = findings
        self._rows = client.steps
        self._dtype = run.config.capture_dtype
        self._names = client.captured_parameters
        self._whole = client.has_all_parameters
        self._statistics = GradientStatistics()
        self._lengths = 0.0
        self._bytes = 0
        self._normed = 0
        self._proven = 0
        self._failed = False

    def follow(self, shard: Shard) -> None:
        """Measure the steps of a shard; the memory of it may be gone when this returns."""
        for step in shard.steps:
            packed = {name: shard.packed(step, name) for name in self._names}
            self._bytes += sum(tensor.nbytes for tensor in packed.values())
            if not self._failed:
                self._measure(shard, step, packed)
        self._statistics.hold()

    def _measure(self, shard: Shard, step: int, packed: dict[str, Tensor]) -> None:
        row = self._rows[step]
        if odd := next((n for n, t in packed.items() if t.dtype != _STORED[self._dtype]), None):
            self._fail(f"{shard.path}: step {step}, {odd} is not stored as {self._dtype}")
            return
        floats = {name: tensor.float() for name, tensor in packed.items()}
        # Cosines are to all steps before: where one is missing, norms are left.
        follows = self._whole and self._proven == step
        if follows:
            taps = {name: shard.taps(name) for name in self._names}
            nonzero = sum(count_nonzero(tensor) for tensor in floats.values())
            # A sum that cancels to a share of its terms has that many times their relative error.
            length = self._statistics.sum_norm
            cancelled = 1 + (self._lengths / length) ** 2 if length else math.inf
            found = self._statistics.add(floats, taps, self._run.shapes, nonzero=nonzero)
            norms = found.per_layer_norms
            self._lengths += found.norm
        else:
            norms = {n: float(torch.linalg.vector_norm(t)) for n, t in floats.items()}
        told = row.get("per_layer_norms")
        if told is None:
            told, first = self._client.telemetry["per_layer_norms"], step == 0
            if not first:
                return
        where = f"{shard.path}: step {step}"
        for name, stored in packed.items():
            if not self._is_norm(norms[name], told.get(name), stored):
                problem = f"{name} has norm {norms[name]:.6g}, and {told.get(name)} was measured"
                self._fail(f"{where}, {problem}")
                return
        if "per_layer_norms" in row:
            self._normed += 1
        if follows and "gradient_norm" in row:
            if odd := self._odd_figure(row, found, cancelled):
                self._fail(f"{where} has another {odd} than {self._client.steps_path} says")
                return
            self._proven += 1

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

    def _fail(self, problem: str) -> None:
        self._findings.violate(GRADIENTS, problem)
        self._failed = True

    def finish(self) -> None:
        """Say what was proven, and what of the rows is left."""
        client, findings = self._client, self._findings
        telemetry = client.telemetry
        if self._bytes != telemetry["bytes_captured"]:
            row = f"clients.jsonl: client {client.partition} in round {client.round}"
            findings.violate(ROWS, f"{row} has other bytes_captured than {self._bytes}")
        if layout.SHARD_INDEX in telemetry["files"] and not self._is_index():
            path = client.folder / layout.SHARD_INDEX
            findings.violate(ROWS, f"{path} is not the index of the shards beside it")
        if self._failed:
            return
        if self._normed:
            findings.prove(GRADIENTS, self._normed)
        elif not self._run.config.gradient_statistics:
            reason = "gradient-statistics = false: no norms to compare with"
            findings.leave(GRADIENTS, reason, at=client.place)
        leave_statistics(client, findings, proven=self._proven)

    def _is_index(self) -> bool:
        found = parse_json(read_text_bytes(self._client.folder / layout.SHARD_INDEX))
        keys = {key: shard.path.name for key, shard in self._client.shards.items()}
        return bool(
            isinstance(found, dict)
            and found.get("weight_map") == keys
            and found.get("metadata") == {"total_size": self._bytes}
        )

    def _is_norm(self, norm: float, told: float | None, stored: Tensor) -> bool:
        # One that is not finite is null in a row, and is so once it is stored in too few bits.
        if not math.isfinite(norm):
            return told is None or told > torch.finfo(stored.dtype).max
        if told is None:
            return False
        rounding = math.sqrt(stored.numel()) * _least(stored.dtype)
        return abs(norm - told) <= NORM_TOLERANCE[self._dtype] * max(norm, told) + rounding


def prove_norms(run: Run, client: Client, findings: Findings) -> None:
    """Check that gradients have the norms that were measured when they were made."""
    measures = Measures(run, client, findings)
    for shard in dict.fromkeys(client.shards.values()):
        measures.follow(shard)
    measures.finish()


def leave_statistics(client: Client, findings: Findings, *, proven: int = 0) -> None:
    """Name the figures of steps that nothing is there to measure again."""
    if left := client.telemetry["num_steps"] - proven:
        findings.leave(ROWS, STATISTICS, at=client.place, steps=left)
    else:
        findings.settle(ROWS, STATISTICS, at=client.place)


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
            # Training squares in float32, where what is large here may be no number at all.
            if told is None and key in row and not square < _LARGEST:
                continue
            if told is None or not abs(told - value) <= 1e-4 * abs(value) + 1e-30:
                path = client.steps_path
                findings.violate(ROWS, f"{path}: {key} of step {step} is {told}, not {value:.6g}")
                return


def _least(dtype: torch.dtype) -> float:
    """Give the unit of the last place of the smallest numbers, and of zero."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
