"""Computing parts of a recorded run again: evaluations, and local steps from their data."""

from __future__ import annotations

import bisect
import itertools
import math
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.core.aggregation import delta_of
from fedsim.core.arithmetic import evaluation_arithmetic, training_arithmetic
from fedsim.core.capture import is_at_hand
from fedsim.core.client_evaluation import evaluate_client
from fedsim.core.determinism import deterministic_block, torch_threads
from fedsim.core.device import resolve_device
from fedsim.core.errors import ConfigError, InputError
from fedsim.core.evaluation import evaluate
from fedsim.core.plan import batches_of_round
from fedsim.core.task import FederatedData, initial_model, task_of
from fedsim.core.training import (
    Arrays,
    Batch,
    LocalResult,
    Step,
    load_state,
    local_train,
    precision_of,
)
from fedsim.recording.files import read_lines
from fedsim.recording.findings import (
    BUFFERS,
    EVALUATED,
    EVALUATION,
    LOSSES,
    RECOMPUTED,
    REPLAY,
    ROWS,
    SCORES,
    SOURCES,
    STATISTICS,
    Findings,
)
from fedsim.recording.layout import STEPS
from fedsim.recording.reader import Client, Run
from fedsim.recording.recorder import FirstStepNorms, StepRecorder
from fedsim.recording.row_proofs import settle_replayed

TOLERANCE = {"float32": 1e-3, "float16": 2**-9, "bfloat16": 2**-7}
"""Relative error of what other arithmetic computes again, by ``capture-dtype``."""
LOSS_TOLERANCE = 1e-3
"""Relative error of a loss that other arithmetic computes again."""
ACCURACY_TOLERANCE = 2e-3
"""Share of the test samples, plus two samples, that other arithmetic may put into another class."""
FORGED = 0.01
"""Share of forged steps for which the chance of catching the forger is told."""


def draw(total: int, count: int, seed: int) -> list[int]:
    """Draw `count` different numbers from 0 to `total` - 1, in ascending order."""
    if count >= total:
        return list(range(total))
    chance = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
    return sorted(int(n) for n in chance.choice(total, size=count, replace=False, shuffle=False))


def fresh_seed() -> int:
    """Make a seed from the operating system's randomness, which no forger can foresee."""
    return secrets.randbits(32)


def chance_of_catching(total: int, drawn: int, forged: int) -> float:
    """Say how likely at least one of `forged` of `total` steps is among those that are drawn.

    Returns
    -------
    float
        ``1 - C(total - forged, drawn) / C(total, drawn)``.
    """
    honest = total - forged
    if drawn > honest:
        return 1.0
    logs = (
        math.lgamma(honest + 1)
        - math.lgamma(honest - drawn + 1)
        - math.lgamma(total + 1)
        + math.lgamma(total - drawn + 1)
    )
    return -math.expm1(logs)


@dataclass(frozen=True)
class Candidate:
    """A client of a round that may be recomputed.

    Parameters
    ----------
    client : Client
        Who.
    recorded : int
        Steps, from the first, before which the parameters follow from recorded gradients, and
        whose own gradients are recorded.
    same : bool
        Whether this machine's arithmetic is that of the client.
    exact : bool
        Whether recorded gradients are those of the training to the bit.
    whole : frozenset of str
        The files of its own that are there and whole, ``steps.jsonl`` among them where its steps
        are told in a shared file that is.
    """

    client: Client
    recorded: int
    same: bool
    exact: bool
    whole: frozenset[str]

    @property
    def count(self) -> int:
        """Steps that can be recomputed."""
        return int(self.client.telemetry["num_steps"]) if self.same else self.recorded


class Recomputation:
    """Computes parts of a run again, and reports where they are not as recorded.

    Parameters
    ----------
    run : Run
        The run.
    dataset : FederatedData
        The data of the run.
    findings : Findings
        Told what was found.
    """

    def __init__(self, run: Run, dataset: FederatedData, findings: Findings) -> None:
        self._run = run
        self._config = run.config
        self._task = task_of(run.config)
        self._dataset = dataset
        self._findings = findings
        try:
            self._device = resolve_device(self._config.device)
        except ConfigError:
            # Without the device of the run, any other computes the same up to rounding.
            self._device = torch.device("cpu")
        self._model = self._new_model()
        self._training: dict[tuple[int, int], str] = {}
        self._evaluating: dict[int, str] = {}

    # Evaluation

    def evaluate(self, number: int) -> None:
        """Check the loss and the accuracy of a round's state against the test split.

        Its state must be whole.
        """
        row = self._run.round(number).row
        _, device = self._run.made_by(number)
        threads = device.get("server_threads") or torch.get_num_threads()
        with torch_threads(threads), deterministic_block(self._config.deterministic):
            same = device.get("arithmetic") == self._evaluation_arithmetic(threads)
            load_state(self._model, _arrays(self._run.round(number).state))
            found = evaluate(self._task, self._model, self._dataset.test(), device=self._device)
        same = same and not self._may_vary(device)
        told_loss, told_accuracy = row["global_loss"], row["global_accuracy"]
        slack = 0.0 if same else ACCURACY_TOLERANCE + 2 / found.num_samples
        for what, told, made, allowed in (
            # A loss that is not finite is null in a row.
            ("global_loss", told_loss, _finite(found.loss), 0 if same else LOSS_TOLERANCE),
            ("global_accuracy", told_accuracy, found.accuracy, slack),
        ):
            if not _is_close(told, made, allowed, relative=what == "global_loss"):
                within = "" if same else f", off by more than {allowed:.1e}"
                self._findings.violate(
                    EVALUATION,
                    f"rounds.jsonl: {what} of round {number} is {told}; evaluated again it is "
                    f"{made}{within}",
                )
                return
        self._findings.prove(EVALUATION)
        self._findings.settle(ROWS, SCORES, at=(number, None))
        if same:
            self._findings.note(EVALUATION, "bit for bit")
        else:
            self._findings.note(EVALUATION, f"some within {LOSS_TOLERANCE:.1e}: other arithmetic")

    def _evaluation_arithmetic(self, threads: int) -> str:
        if threads not in self._evaluating:
            model = self._new_model()
            self._evaluating[threads] = evaluation_arithmetic(
                self._task, model, device=self._device
            )
        return self._evaluating[threads]

    # Steps

    def candidate(self, client: Client, whole: frozenset[str]) -> Candidate:
        """Say which steps of a client can be recomputed, and how well.

        Parameters
        ----------
        client : Client
            Its start and the partition must be whole.
        whole : frozenset of str
            As for `Candidate`.
        """
        same = self._is_same(client)
        recorded = 0
        complete = STEPS in whole and whole.issuperset(client.telemetry["files"])
        if complete and self._config.autocast != "float16" and client.shards:
            captured = client.captured_steps if client.has_all_parameters else []
            recorded = sum(step == position for position, step in enumerate(captured))
        exact = self._config.capture_dtype == "float32"
        if not exact:
            # Rounded gradients do not lead to the exact parameters of any step but the first.
            recorded = min(recorded, 1)
        return Candidate(client, recorded, same, exact, whole)

    def why_not(self, client: Client) -> str:
        """Say why no step of a client can be recomputed."""
        if self._config.autocast == "float16":
            what = "autocast = 'float16' scales by what came before"
        else:
            what = "no step was captured with all layers and all steps before it"
        if self._config.compile:
            return f"{what}, and compile = true rounds in another way on each machine"
        if "arithmetic" not in client.telemetry:
            return f"{what}, and the run does not say which arithmetic made it"
        if self._may_vary(self._run.made_by(client.round)[1]):
            return f"{what}, and deterministic = false does not repeat to the bit on a GPU"
        return f"{what}, and training again needs the arithmetic that made the run"

    def recompute(self, candidates: Sequence[Candidate], count: int | None, seed: int) -> None:
        """Recompute `count` steps of all that can be, or all, drawn with a seed.

        Parameters
        ----------
        candidates : sequence of Candidate
            Each with at least one step.
        count : int or None
            How many; None for all.
        seed : int
            Of the draw.
        """
        ends = list(itertools.accumulate(c.count for c in candidates))
        total = ends[-1]
        drawn = draw(total, total if count is None else count, seed)
        chosen: dict[int, list[int]] = {}
        for number in drawn:
            position = bisect.bisect_right(ends, number)
            first = ends[position] - candidates[position].count
            chosen.setdefault(position, []).append(number - first)
        for position, steps in chosen.items():
            client = candidates[position].client
            with self._findings.guarded(RECOMPUTED, f"{client.folder}"):
                self._recompute(candidates[position], steps)
        if len(drawn) < total:
            chance = chance_of_catching(total, len(drawn), max(1, round(FORGED * total)))
            self._findings.note(RECOMPUTED, f"drawn from {total:,} with --recompute-seed {seed}")
            odds = f"forging {FORGED:.0%} of them is caught with probability {chance:.2g}"
            self._findings.note(RECOMPUTED, odds)

    def _recompute(self, candidate: Candidate, steps: Sequence[int]) -> None:
        client = candidate.client
        try:
            _ = client.rates, client.behavior
        except InputError as unloaded:
            self._findings.leave(RECOMPUTED, str(unloaded), at=client.place)
            return
        whole = len(steps) == client.telemetry["num_steps"]
        recorded = steps[-1] < candidate.recorded and (candidate.exact or not candidate.same)
        _, device = self._run.made_by(client.round)
        # They decide the last bits of a convolution.
        threads = torch_threads(device["worker_threads"])
        with threads, deterministic_block(self._config.deterministic):
            if candidate.same:
                self._evaluate_client(client)
            if candidate.same and (whole or not recorded):
                if not whole:
                    self._findings.note(
                        RECOMPUTED, "clients that were trained again count with all of their steps"
                    )
                self._train_again(client, candidate.whole)
            else:
                self._follow(client, steps, same=candidate.same, whole=whole)

    def _evaluate_client(self, client: Client) -> None:
        """Measure again what a client measured of the model that it got."""
        if "evaluation" not in client.telemetry:
            return
        try:
            found = evaluate_client(
                self._config,
                self._task,
                self._model,
                self._dataset,
                self._run.partition[client.partition],
                _arrays(self._run.round(client.round - 1).state),
                client=client.partition,
                round_number=client.round,
            )
        except InputError as unloaded:
            self._findings.leave(ROWS, f"evaluation: {unloaded}", at=client.place)
        else:
            if found != client.telemetry["evaluation"]:
                where = f"clients.jsonl: evaluation of client {client.partition} in round "
                self._findings.violate(
                    RECOMPUTED,
                    f"{where}{client.round} is not what it measures when evaluated again",
                )
        self._findings.settle(ROWS, EVALUATED, at=client.place)

    def _train_again(self, client: Client, whole: frozenset[str]) -> None:
        """Train a client's round as it was trained, and compare all that it left, to the bit."""
        config, start = self._config, _arrays(self._run.round(client.round - 1).state)
        norms, wrong = FirstStepNorms(), _Differences(client, whole)
        retraced = [(c, c.retrace(client, whole)) for c in config.captures_at_hand]
        compared = [retrace for _, retrace in retraced if retrace is not None]
        recorded = [c for c, retrace in retraced if retrace is None]
        if client.telemetry.get("not_captured"):
            recorded = [capture for capture in recorded if not capture.keeps_files]
        correction = client.correction
        with tempfile.TemporaryDirectory(prefix="fedsim-verify-") as folder:
            recorder = StepRecorder(
                Path(folder) / "client",
                recorded,
                num_steps=client.telemetry["num_steps"],
                shapes=self._run.shapes,
                model=self._model,
            )

            def observe(step: Step) -> None:
                norms(step)
                for retrace in compared:
                    retrace(step)
                recorder(step)

            with recorder:
                result = local_train(
                    self._task,
                    self._model,
                    start,
                    iter(self._batches(client)),
                    config.training_of(client.partition).optimizer,
                    observe,
                    autocast=config.autocast,
                    proximal_mu=client.proximal_mu,
                    correction=None if correction is None else _arrays(correction),
                    rates=client.rates,
                )
            rows = list(read_lines(Path(folder) / "client" / "steps.jsonl"))
        for retrace in compared:
            wrong.note(retrace.difference)
        wrong.compare_rows(rows)
        wrong.compare_telemetry(result, norms)
        wrong.compare_files(recorder)
        sent = client.behavior.update(start, result.state)
        wrong.compare_delta(sent, start, self._run.shapes, clipped=config.clients_clip)
        if wrong.first is not None:
            self._findings.violate(RECOMPUTED, f"{client.folder}: {wrong.first}")
            return
        self._findings.prove(RECOMPUTED, len(rows))
        self._findings.note(RECOMPUTED, "bit for bit")
        if config.clients_clip:
            self._findings.leave(
                RECOMPUTED,
                "deltas of parameters: clients clip them after their last step",
                at=client.place,
            )
        self._findings.settle(ROWS, LOSSES, at=client.place)
        if whole.issuperset(client.telemetry["files"]) and is_at_hand(config.capture):
            # Of shards some of which were removed, none is compared.
            self._findings.settle(RECOMPUTED, SOURCES, at=client.place)
        self._findings.settle(REPLAY, BUFFERS, at=client.place)
        self._findings.settle(ROWS, STATISTICS, at=client.place)
        if not config.clients_clip:
            settle_replayed(client, self._findings, exact=True)

    def _follow(self, client: Client, steps: Sequence[int], *, same: bool, whole: bool) -> None:
        """Compute single steps from the parameters to which the recorded gradients lead."""
        start, wanted = dict(self._run.round(client.round - 1).state), set(steps)
        self._model.load_state_dict(start)
        dtype, close = self._config.capture_dtype, True
        # Not one further: the gradient of the next step need not be there.
        replay = itertools.islice(client.replay(), steps[-1] + 1)
        for step, ((recorded, before), batch) in enumerate(
            zip(replay, self._batches(client), strict=False)
        ):
            if step not in wanted:
                continue
            with torch.no_grad():
                for name, parameter in self._model.named_parameters():
                    parameter.copy_(before[name])
            loss, made = self._gradient_of(batch)
            told = client.steps[step]["loss"]
            allowed = 0.0 if same else LOSS_TOLERANCE
            if not _is_close(told, _finite(loss), allowed, relative=True):
                self._wrong(
                    client, f"the loss of step {step} is {told}; computed again it is {loss}"
                )
                return
            off = _distance(made, recorded, getattr(torch, dtype), same=same)
            size = math.sqrt(sum(float(g.double().square().sum()) for g in recorded.values()))
            unit = 0.0 if dtype == "float32" else _least(getattr(torch, dtype))
            slack = TOLERANCE[dtype] * size
            slack += unit * math.sqrt(sum(g.numel() for g in recorded.values()))
            if off and not (math.isfinite(off) and off <= (0.0 if same else slack)):
                limit = "not equal to the bit" if same else f"more than {TOLERANCE[dtype]:.1e}"
                off_by = f"off by {off / (size or 1):.1e}, {limit}"
                self._wrong(client, f"the gradient of step {step} is {off_by}")
                return
            close = close and off == 0
            self._findings.prove(RECOMPUTED)
            self._findings.settle(ROWS, LOSSES, at=client.place, step=step)
            self._findings.settle(RECOMPUTED, SOURCES, at=client.place, step=step)
        honest = client.behavior.explain() is None
        if whole and honest and not self._buffers_are_close(client, start):
            return
        self._findings.note(
            RECOMPUTED, "bit for bit" if close else f"some within {TOLERANCE[dtype]:.1e}"
        )
        if not same:
            self._findings.note(RECOMPUTED, self._why_not_same(client))

    def _wrong(self, client: Client, what: str) -> None:
        self._findings.violate(RECOMPUTED, f"{client.folder}: {what}")

    def _buffers_are_close(self, client: Client, start: Mapping[str, Tensor]) -> bool:
        for name, buffer in self._model.named_buffers():
            moved, told = buffer.detach().cpu() - start[name], client.delta[name]
            if not (moved.isfinite().all() or told.isfinite().all()):
                # Both diverged, and of that no more can be asked of other arithmetic.
                continue
            off = float((moved.double() - told.double()).norm())
            allowed = LOSS_TOLERANCE * float(start[name].double().norm() + told.double().norm())
            if not off <= (allowed if told.is_floating_point() else 0):
                self._wrong(client, f"the delta of {name} is off by {off:.1e}")
                return False
        self._findings.settle(REPLAY, BUFFERS, at=client.place)
        return True

    def _gradient_of(self, batch: Batch) -> tuple[float, dict[str, Tensor]]:
        model = self._model
        model.train()
        model.zero_grad(set_to_none=True)
        with precision_of(self._config.autocast, self._device):
            loss = self._task.loss(model, batch.tensors)
        loss.backward()  # type: ignore[no-untyped-call]
        made = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
        return float(loss.detach()), made

    def _batches(self, client: Client) -> Any:
        return batches_of_round(
            self._config,
            self._task,
            self._dataset,
            self._run.partition[client.partition],
            round_number=client.round,
            partition=client.partition,
            device=self._device,
        )

    def _is_same(self, client: Client) -> bool:
        told = client.telemetry.get("arithmetic")
        _, device = self._run.made_by(client.round)
        if told is None or self._config.compile or self._may_vary(device):
            return False
        threads = device["worker_threads"]
        size = self._config.training_of(client.partition).batch_size
        if (size, threads) not in self._training:
            with torch_threads(threads), deterministic_block(self._config.deterministic):
                self._training[size, threads] = training_arithmetic(
                    self._task,
                    self._new_model(),
                    batch_size=size,
                    autocast=self._config.autocast,
                    device=self._device,
                )
        return bool(told == self._training[size, threads])

    def _why_not_same(self, client: Client) -> str:
        if self._config.compile:
            return "compile = true rounds in another way on each machine"
        if self._may_vary(self._run.made_by(client.round)[1]):
            return "deterministic = false does not repeat to the bit on a GPU"
        if "arithmetic" not in client.telemetry:
            return "the run does not say which arithmetic made it"
        return "the run was made with other arithmetic than this machine has"

    def _may_vary(self, device: Mapping[str, Any]) -> bool:
        return device["type"] != "cpu" and not self._config.deterministic

    def _new_model(self) -> nn.Module:
        return initial_model(self._config).to(self._device)


class _Differences:
    """The first thing in which a client that was trained again differs from its record."""

    def __init__(self, client: Client, whole: frozenset[str]) -> None:
        self._client = client
        self._whole = whole
        self.first: str | None = None

    def note(self, what: str | None) -> None:
        """Take a difference, where there is one."""
        self.first = self.first or what

    def compare_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Compare the rows of all steps."""
        if STEPS not in self._whole:
            return
        # A capture that is not at hand may have added to them.
        complete = is_at_hand(self._client.run.config.capture)
        for made, told in zip(rows, self._client.steps, strict=True):
            for key in sorted(made.keys() | (told.keys() if complete else set())):
                if made.get(key) != told.get(key):
                    self.note(f"steps.jsonl: {key} of step {told['step']} differs")
                    return

    def compare_telemetry(self, result: LocalResult, norms: FirstStepNorms) -> None:
        """Compare what the client's row says of its training."""
        made: dict[str, Any] = {
            "loss_history": [_finite(loss) for loss in result.losses],
            "local_loss": _finite(result.mean_loss),
            "batch_sizes": result.batch_sizes,
            "gradient_norm": _finite(math.hypot(*norms.per_layer.values())),
            "per_layer_norms": {name: _finite(norm) for name, norm in norms.per_layer.items()},
        }
        if "num_updates" in self._client.telemetry:
            made["num_updates"] = result.num_updates
        for key, value in made.items():
            if self._client.telemetry[key] != value:
                self.note(f"clients.jsonl: {key} differs")
                return

    def compare_files(self, recorder: StepRecorder) -> None:
        """Compare the files that captures recorded again."""
        for name, made in recorder.files.items():
            told = self._client.telemetry["files"].get(name)
            if name != STEPS and name in self._whole and told != made.to_json():
                self.note(f"{name} differs")

    def compare_delta(
        self, state: Arrays, start: Arrays, shapes: Mapping[str, Any], *, clipped: bool
    ) -> None:
        """Compare the delta, buffers included."""
        for name, moved in delta_of(state, start).items():
            if clipped and name in shapes:
                continue
            if not torch.equal(_bits(torch.from_numpy(moved)), _bits(self._client.delta[name])):
                self.note(f"the delta of {name} is not where training again leads")
                return


def _bits(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    return tensor.view(torch.int32) if tensor.dtype == torch.float32 else tensor


def _arrays(tensors: Mapping[str, Tensor]) -> Arrays:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _is_close(told: float | None, made: float | None, allowed: float, *, relative: bool) -> bool:
    if told is None or made is None or allowed == 0:
        return told == made
    return abs(told - made) <= allowed * (max(abs(told), abs(made)) if relative else 1)


def _distance(
    made: Mapping[str, Tensor], recorded: Mapping[str, Tensor], dtype: torch.dtype, *, same: bool
) -> float:
    """Measure how far a gradient made here is from the recorded one; infinite if one diverged."""
    if not (_is_finite(recorded) and _is_finite({n: made[n].to(dtype) for n in recorded})):
        if same:
            pairs = ((made[name], gradient) for name, gradient in recorded.items())
            alike = all(torch.allclose(m, g, rtol=0, atol=0, equal_nan=True) for m, g in pairs)
        else:
            # Which entries overflow first is a matter of rounding: that both do is not.
            alike = not (_is_finite(recorded) or _is_finite({n: made[n].to(dtype) for n in made}))
        return 0.0 if alike else math.inf
    squares = (float((made[n].double() - g.double()).square().sum()) for n, g in recorded.items())
    return math.sqrt(sum(squares))


def _is_finite(tensors: Mapping[str, Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def _least(dtype: torch.dtype) -> float:
    """Give the unit of the last place of the smallest numbers, and of zero."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
