"""The single proofs of a verification: each looks at whole files and tells its findings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.core.aggregation import DeltaMean, apply_delta, state_sha256
from fedsim.core.datasets import Dataset
from fedsim.core.models import build_model
from fedsim.core.partition import class_counts, fold_order, partition_sha256
from fedsim.core.plan import batches_of_round
from fedsim.core.rng import Purpose, generator
from fedsim.core.training import Arrays, Replay, schedule, state_arrays
from fedsim.recording.findings import (
    AGGREGATE,
    GRADIENTS,
    INITIAL,
    PARTICIPANTS,
    PARTITION,
    RECOMPUTED,
    REPLAY,
    STATE,
    STEPS,
    Findings,
)
from fedsim.recording.reader import Client, Run, Shard

REPLAY_TOLERANCE = {"float32": 1e-4, "float16": 2**-9, "bfloat16": 2**-6}
"""Relative error of a replay where bit for bit cannot be asked for, by ``capture-dtype``."""
RECOMPUTED_TOLERANCE = {"float32": 1e-3, "float16": 2**-9, "bfloat16": 2**-7}
"""Relative error of a gradient computed once more, by ``capture-dtype``."""
NORM_TOLERANCE = {"float32": 1e-5, "float16": 2**-10, "bfloat16": 2**-7}
"""Relative error of a recorded gradient's norm, by ``capture-dtype``."""

_ALONE = 2**16
"""Parameters of at least so many entries are replayed one by one, which keeps them in cache."""


def prove_partition(run: Run, dataset: Dataset | None, findings: Findings) -> None:
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
    if len(dealt) != samples or not np.array_equal(dealt, np.arange(samples)):
        wrong.append(f"partition.safetensors does not deal each of {samples} samples once")
    if [len(p) for p in ordered] != manifest["sizes"]:
        wrong.append("partition.safetensors has other sizes than run.json")
    if partition_sha256(ordered) != manifest["sha256"]:
        wrong.append("partition.safetensors has another hash than run.json")
    rows = [row for row in run.client_rows if row["status"] == "ok"]
    if dataset is not None:
        labels = dataset.train_labels.numpy()
        counts = class_counts(ordered, labels, dataset.spec.classes)
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
    if not _same_torch(run):
        findings.leave(INITIAL, f"it was drawn by torch {run.entry('versions')['torch']}")
        return
    run.check_sizes()
    expected = state_arrays(
        build_model(
            run.config.model,
            classes=run.entry("dataset")["classes"],
            norm=run.config.norm,
            seed=run.config.seed,
        )
    )
    if odd := _first_difference(arrays_of(run.round(0).state), expected):
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
    if odd := _first_difference(arrays_of(run.round(number).aggregate), mean.mean()):
        path = run.layout.aggregate(number)
        findings.violate(AGGREGATE, f"{path}: {odd} is not the weighted mean of the deltas")
    else:
        findings.prove(AGGREGATE)


def prove_state(run: Run, number: int, findings: Findings) -> None:
    """Check that the state is the one before plus the aggregate, with the hash of its row."""
    state, path = arrays_of(run.round(number).state), run.layout.state(number)
    if number:
        before = arrays_of(run.round(number - 1).state)
        expected = apply_delta(before, arrays_of(run.round(number).aggregate))
        if odd := _first_difference(state, expected):
            findings.violate(STATE, f"{path}: {odd} is not the state before plus the aggregate")
            return
    if state_sha256(state) != run.round(number).row["state_sha256"]:
        findings.violate(STATE, f"{path} has another hash than its row in rounds.jsonl")
    else:
        findings.prove(STATE)


def prove_steps(run: Run, client: Client, findings: Findings) -> None:
    """Check that batches are those drawn from the seed, and losses and sizes as in telemetry."""
    telemetry, rows = client.telemetry, client.steps
    path = run.layout.steps(client.round, client.partition)
    settings = run.config.training_of(client.partition)
    indices = run.partition[client.partition]
    draw = generator(run.config.seed, Purpose.BATCHES, client.round, client.partition)
    asked = settings.num_steps(len(indices))
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


def prove_norms(run: Run, client: Client, findings: Findings) -> None:
    """Check that gradients have the norms that were measured when they were made."""
    tolerance = NORM_TOLERANCE[run.config.capture_dtype]
    for step in client.captured_steps:
        told = client.steps[step].get("per_layer_norms")
        if told is None:
            findings.leave(GRADIENTS, "gradient-statistics = false: no norms to compare with")
            return
        for name in client.captured_parameters:
            shard = client.shard(step, name)
            norm = float(torch.linalg.vector_norm(shard.packed(step, name).float()))
            # A norm that is not finite is null in a row.
            same = (
                not math.isfinite(norm)
                if told[name] is None
                else abs(norm - told[name]) <= tolerance * max(norm, told[name])
            )
            if not same:
                findings.violate(
                    GRADIENTS,
                    f"{shard.path}: step {step}, {name} has norm {norm:.6g}, and {told[name]} was "
                    "measured",
                )
                return
    findings.prove(GRADIENTS, len(client.captured_steps))


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
    path = run.layout.delta(client.round, client.partition)
    settings = run.config.training_of(client.partition).optimizer
    replays = [
        (Replay(start, group, settings, run.config.autocast), group)
        for group in _groups(run, client.captured_parameters)
    ]
    for shard in shards:
        for replay, group in replays:
            _replay_shard(replay, group, shard)
    why = _why_not_exact(run)
    for replay, group in replays:
        for name in group:
            moved = replay.parameters[name] - start[name]
            if torch.equal(moved.view(torch.int32), delta[name].contiguous().view(torch.int32)):
                continue
            error = _relative_error(moved, delta[name])
            if not why or not error <= REPLAY_TOLERANCE[run.config.capture_dtype]:
                findings.violate(
                    REPLAY, f"{path}: {name} is not where the gradients lead, off by {error:.1e}"
                )
                # Says which step it is, where statistics were measured.
                prove_norms(run, client, findings)
                return
    findings.prove(REPLAY, client.telemetry["num_steps"])
    if why:
        findings.note(REPLAY, f"within {REPLAY_TOLERANCE[run.config.capture_dtype]:.1e}: {why}")
    else:
        findings.note(REPLAY, "bit for bit")


def _replay_shard(replay: Replay, group: Sequence[str], shard: Shard) -> None:
    # Zeros of dead taps are written once for a shard, not at every step.
    kept: dict[str, Tensor] = {}
    for step in shard.steps:
        gradient = {name: shard.gradient(step, name, out=kept.get(name)) for name in group}
        kept.update((n, g) for n, g in gradient.items() if shard.taps(n) is not None)
        replay.step(gradient)


def prove_recomputed(
    run: Run,
    client: Client,
    step: int,
    dataset: Dataset,
    model: torch.nn.Module,
    findings: Findings,
) -> None:
    """Check a gradient against the one of its batch, augmentation and parameters."""
    device = next(model.parameters()).device
    batches = batches_of_round(
        run.config,
        dataset,
        run.partition[client.partition],
        round_number=client.round,
        partition=client.partition,
        device=device,
    )
    batch = next(b for position, b in enumerate(batches) if position == step)
    start = dict(run.round(client.round - 1).state)
    model.load_state_dict(start | client.parameters_at(step))
    model.train()
    model.zero_grad(set_to_none=True)
    with torch.autocast(
        device.type, dtype=torch.bfloat16, enabled=run.config.autocast == "bfloat16"
    ):
        loss = torch.nn.functional.cross_entropy(model(batch.inputs), batch.targets)
    loss.backward()  # type: ignore[no-untyped-call]
    recorded = client.gradient(step)
    made = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
    error = _relative_error(
        torch.cat([made[n].reshape(-1) for n in recorded]),
        torch.cat([g.reshape(-1) for g in recorded.values()]),
    )
    tolerance = RECOMPUTED_TOLERANCE[run.config.capture_dtype]
    if not error <= tolerance:
        findings.violate(
            RECOMPUTED,
            f"{client.folder}: the gradient of step {step} is off by {error:.1e}, more than "
            f"{tolerance:.1e}",
        )
        return
    findings.prove(RECOMPUTED)
    findings.note(RECOMPUTED, f"some within {tolerance:.1e}" if error else "bit for bit")


def recomputable_steps(client: Client) -> list[int]:
    """Give the captured steps with all layers and all steps before them."""
    if not client.has_all_parameters:
        return []
    captured = client.captured_steps
    return [step for position, step in enumerate(captured) if position == step]


def arrays_of(tensors: Mapping[str, Tensor]) -> dict[str, NDArray[np.generic]]:
    """Look at tensors as arrays."""
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _relative_error(found: Tensor, expected: Tensor) -> float:
    size = float(torch.linalg.vector_norm(expected.double()))
    off = float(torch.linalg.vector_norm((found - expected).double()))
    return off / size if size else off


def _first_difference(found: Arrays, expected: Arrays) -> str | None:
    """Name the first array that is not the same to the last bit."""
    if list(found) != list(expected):
        return min(set(found).symmetric_difference(expected), default="the order")
    for name, array in expected.items():
        other = found[name]
        if other.dtype != array.dtype or other.shape != array.shape:
            return name
        bits = np.dtype(f"i{array.dtype.itemsize}")
        if not np.array_equal(np.ravel(other).view(bits), np.ravel(array).view(bits)):
            return name
    return None


def _same_torch(run: Run) -> bool:
    return str(run.entry("versions")["torch"]) == version("torch")


def _why_not_exact(run: Run) -> str:
    """Say why a replay here need not land on the very bits of the run; empty where it must."""
    device = run.entry("device")
    if run.config.capture_dtype != "float32":
        return f"gradients are stored as {run.config.capture_dtype}"
    if not _same_torch(run):
        return f"the run has torch {run.entry('versions')['torch']}, here is {version('torch')}"
    if device["type"] != "cpu":
        return f"the run trained on {device['type']}"
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
