"""The single proofs of a verification: each looks at whole files and tells its findings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.core.aggregation import DeltaMean
from fedsim.core.partition import class_counts, fold_order, partition_sha256
from fedsim.core.rng import Purpose, generator
from fedsim.core.support import unpack
from fedsim.core.task import FederatedData, classes_of, initial_model, labels_of
from fedsim.core.training import (
    Objective,
    Replay,
    schedule,
    state_arrays,
)
from fedsim.recording.findings import (
    AGGREGATE,
    BUFFERS,
    INITIAL,
    PARTICIPANTS,
    PARTITION,
    REPLAY,
    ROWS,
    STEPS,
    Findings,
)
from fedsim.recording.reader import Client, Run
from fedsim.recording.row_proofs import settle_replayed
from fedsim.recording.rows import updates_of
from fedsim.recording.shards import Shard
from fedsim.recording.step_proofs import Measures, prove_objective
from fedsim.recording.strategy_proofs import arrays_of, first_difference

REPLAY_TOLERANCE = 1e-4
"""Relative error of a replay where bit for bit cannot be asked for."""
REPLAY_ROUNDINGS = 2
"""How much farther from the delta a replay of rounded gradients may land than another rounding."""
_TRIES = 8
"""Other roundings of small parameters: a bias of two entries may happen not to notice one."""

_ALONE = 2**16
"""Parameters of at least so many entries are replayed one by one, which keeps them in cache."""


def prove_partition(run: Run, dataset: FederatedData | None, findings: Findings) -> None:
    """Check that every sample belongs to one client, with hash, sizes, class counts as told."""
    manifest, partition = run.entry("partition"), run.partition
    clients = run.config.clients
    if len(partition) != clients:
        findings.violate(
            PARTITION, f"partition.safetensors has other clients than 0 to {clients - 1}"
        )
        return
    ordered = list(partition.values())
    samples = run.entry("dataset")["train_size"]
    wrong = []
    dealt = np.sort(np.concatenate(ordered))
    if run.config.own_data:
        if any(not np.array_equal(indices, np.arange(len(indices))) for indices in ordered):
            wrong.append("partition.safetensors has other positions than those of each node's data")
    elif len(dealt) != samples or not np.array_equal(dealt, np.arange(samples)):
        wrong.append(f"partition.safetensors does not deal each of {samples} samples once")
    if [len(p) for p in ordered] != manifest["sizes"]:
        wrong.append("partition.safetensors has other sizes than run.json")
    if partition_sha256(ordered) != manifest["sha256"]:
        wrong.append("partition.safetensors has another hash than run.json")
    rows = [row for row in run.client_rows if row["status"] == "ok"]
    if dataset is not None:
        counts = class_counts(ordered, labels_of(dataset), classes_of(dataset.spec))
        wrong += [
            f"clients.jsonl: class_distribution of client {row['partition']} in round "
            f"{row['round']} is not that of its samples"
            for row in rows
            if row["class_distribution"] != counts[row["partition"]].tolist()
        ]
    for violation in wrong:
        findings.violate(PARTITION, violation)
    if not wrong:
        findings.prove(PARTITION, clients)


def prove_participants(run: Run, number: int, findings: Findings) -> None:
    """Check that participants of a round are those listed or drawn, and that each has a row."""
    row = run.round(number).row
    drawn = run.config.participants_of(number)
    rows = run.client_rows_of(number)
    status = {r["partition"]: r["status"] for r in rows}
    if row["participants"] != drawn:
        findings.violate(
            PARTICIPANTS,
            f"rounds.jsonl: round {number} has participants {row['participants']}, not {drawn}",
        )
    elif len(rows) != len(status) or set(status) != set(drawn):
        findings.violate(
            PARTICIPANTS, f"clients.jsonl: round {number} has {sorted(status)}, not {drawn}"
        )
    elif sorted(row["failed"]) != sorted(p for p, s in status.items() if s != "ok"):
        findings.violate(PARTICIPANTS, f"rounds.jsonl: round {number} names other failed clients")
    else:
        findings.prove(PARTICIPANTS)


def prove_initial_state(run: Run, findings: Findings) -> None:
    """Check that the state of round 0 is the model that follows from the seed."""
    versions, device = run.made_by(0)
    if versions["torch"] != version("torch"):
        findings.leave(INITIAL, f"it was drawn by torch {versions['torch']}")
        return
    run.check_sizes()
    expected = state_arrays(initial_model(run.config))
    odd = first_difference(arrays_of(run.round(0).state), expected)
    if odd and (why := _other_instructions(device)):
        findings.leave(INITIAL, f"{odd} differs from what is drawn here: {why}")
    elif odd:
        findings.violate(INITIAL, f"{run.layout.state(0)}: {odd} does not follow from the seed")
    else:
        findings.prove(INITIAL)


def prove_aggregate(run: Run, number: int, findings: Findings) -> None:
    """Check that the aggregate is the weighted mean of the deltas, bit for bit."""
    clients = run.round(number).clients
    sizes = [len(indices) for indices in run.partition.values()]
    mean = DeltaMean()
    for partition in fold_order(list(clients), sizes):
        mean.add(arrays_of(clients[partition].delta), sizes[partition])
    if odd := first_difference(arrays_of(run.round(number).aggregate), mean.mean()):
        path = run.layout.aggregate(number)
        findings.violate(AGGREGATE, f"{path}: {odd} is not the weighted mean of the deltas")
    else:
        findings.prove(AGGREGATE)


def prove_steps(run: Run, client: Client, findings: Findings) -> None:
    """Check that batches are those drawn from the seed, and losses and sizes as in telemetry."""
    telemetry, rows = client.telemetry, client.steps
    path = client.steps_path
    settings = run.config.training_of(client.partition)
    indices = run.partition[client.partition]
    draw = generator(run.config.seed, Purpose.BATCHES, client.round, client.partition)
    asked = settings.num_steps(len(indices))
    if run.algorithm is not None and client.proximal_mu != run.algorithm.proximal_mu:
        findings.violate(
            STEPS,
            f"clients.jsonl: client {client.partition} trained with proximal_mu = "
            f"{client.proximal_mu}, not {run.algorithm.proximal_mu}",
        )
        return
    if not len(rows) == telemetry["num_steps"] == asked:
        findings.violate(STEPS, f"{path} has {len(rows)} steps, not {asked}")
        return
    drawn = schedule(len(indices), settings, draw)
    for number, (row, (epoch, positions)) in enumerate(zip(rows, drawn, strict=True)):
        told = (row["step"], row["epoch"], row["batch_size"], row["learning_rate"])
        if told != (number, epoch, len(positions), settings.optimizer.learning_rate):
            findings.violate(STEPS, f"{path}: step {number} is not as the configuration says")
            return
        if not np.array_equal(row["indices"], indices[positions]):
            findings.violate(STEPS, f"{path}: the batch of step {number} is not the one drawn")
            return
    if [row["loss"] for row in rows] != telemetry["loss_history"]:
        findings.violate(STEPS, f"{path} has other losses than clients.jsonl")
    elif [row["batch_size"] for row in rows] != telemetry["batch_sizes"]:
        findings.violate(STEPS, f"{path} has other batch sizes than clients.jsonl")
    elif telemetry["num_samples"] != len(indices):
        findings.violate(STEPS, f"{path}: the client has {len(indices)} samples")
    else:
        findings.prove(STEPS, len(rows))


def prove_replay(run: Run, client: Client, shards: Iterable[Shard], findings: Findings) -> None:
    """Check that the local optimiser over the recorded gradients lands on the delta.

    Parameters
    ----------
    run, client : Run, Client
        The client must be replayable.
    shards : iterable of Shard
        Its shards in order; each is looked at before the next is asked for.
    findings : Findings
        Told what was found.
    """
    start, delta = run.round(client.round - 1).state, client.delta
    path = client.delta_path
    settings = run.config.training_of(client.partition).optimizer
    lossy, why = run.config.capture_dtype != "float32", _why_not_exact(run, client.round)
    courses = []
    objective = None
    if client.proximal_mu or client.correction is not None:
        objective = Objective(start, client.proximal_mu, client.correction)
    for group in _groups(run, client.captured_parameters):
        what = (
            *(start, group, settings, run.config.autocast),
            *(client.proximal_mu, client.correction),
        )
        replay = Replay(*what)
        small = any(math.prod(run.shapes[name]) < _ALONE for name in group)
        tries = (_TRIES if small else 1) if lossy else 0
        others = [Replay(*what) for _ in range(tries)]
        courses.append(_Course(group, replay, others, start, objective))
    measures = Measures(run, client, findings)
    for shard in shards:
        for course in courses:
            course.follow(shard)
        measures.follow(shard)
    measures.finish()
    for course in courses:
        for name in course.group:
            moved = course.replay.parameters[name] - start[name]
            if torch.equal(moved.view(torch.int32), delta[name].contiguous().view(torch.int32)):
                continue
            allowed = REPLAY_TOLERANCE * _norm(delta[name])
            # Each update is rounded to what a float32 beside the parameter can tell.
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

    What was rounded when it was stored leads beside the delta, how far depends on the optimiser and
    on how its steps add up. So they go again with every entry moved by a unit of its last place, up
    or down by chance, which is twice as far as rounding can have moved it.

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


def _least(dtype: torch.dtype) -> float:
    """Give the unit of the last place of the smallest numbers, and of zero."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.double()))


def _why_not_exact(run: Run, number: int) -> str:
    """Say why a replay here need not land on the very bits of a round; empty where it must."""
    versions, device = run.made_by(number)
    if run.config.capture_dtype != "float32":
        return f"gradients are stored as {run.config.capture_dtype}"
    if versions["torch"] != version("torch"):
        return f"the run has torch {versions['torch']}, here is {version('torch')}"
    if device["type"] != "cpu":
        return f"the run trained on {device['type']}"
    return _other_instructions(device)


def _other_instructions(device: Mapping[str, Any]) -> str:
    here = torch.backends.cpu.get_cpu_capability()
    if device["cpu_capability"] != here:
        return f"the run used {device['cpu_capability']} instructions, here are {here}"
    return ""


def _groups(run: Run, names: Sequence[str]) -> list[list[str]]:
    # What a step of float16 autocast does depends on all of its gradients.
    if run.config.autocast == "float16":
        return [list(names)]
    large = [n for n in names if math.prod(run.shapes[n]) >= _ALONE]
    small = [n for n in names if math.prod(run.shapes[n]) < _ALONE]
    return [*([n] for n in large), *([small] if small else [])]
