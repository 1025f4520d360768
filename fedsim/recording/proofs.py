"""The single proofs of a verification: each looks at whole files and tells its findings."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from fedsim.core.aggregation import DeltaMean
from fedsim.core.errors import InputError
from fedsim.core.partition import class_counts, fold_order, partition_sha256
from fedsim.core.rng import Purpose, generator
from fedsim.core.task import FederatedData, classes_of, initial_model, labels_of
from fedsim.core.training import (
    schedule,
    state_arrays,
)
from fedsim.recording.findings import (
    AGGREGATE,
    INITIAL,
    PARTICIPANTS,
    PARTITION,
    STEPS,
    Findings,
)
from fedsim.recording.reader import Client, Run
from fedsim.recording.strategy_proofs import arrays_of, first_difference


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
    if odd and (why := other_instructions(device)):
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
    try:
        rates = client.rates
    except InputError as unloaded:
        findings.leave(STEPS, str(unloaded), at=client.place)
        return
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
        if told != (number, epoch, len(positions), rates(number)):
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


def other_instructions(device: Mapping[str, Any]) -> str:
    """Say how the processor here differs from that of a run; empty where it does not."""
    here = torch.backends.cpu.get_cpu_capability()
    if device["cpu_capability"] != here:
        return f"the run used {device['cpu_capability']} instructions, and this machine has {here}"
    return ""
