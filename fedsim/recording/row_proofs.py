"""Proofs of the numbers of ``run.json``, ``rounds.jsonl`` and ``clients.jsonl``.

What follows from the configuration, the partition or other files is compared. What follows from
nothing is named: a number is in one of the two, which a test goes through field by field.
"""

from __future__ import annotations

import itertools
import math
from importlib.metadata import version
from typing import Any

import numpy as np
from pydantic import BaseModel

from fedsim.core.capture import is_at_hand, not_at_hand
from fedsim.core.client_evaluation import NONE
from fedsim.core.errors import InputError
from fedsim.core.plan import deal_partition
from fedsim.core.task import FederatedData, describe, initial_model, task_of
from fedsim.recording import rows
from fedsim.recording.findings import EVALUATED, PARTITION, ROWS, Findings
from fedsim.recording.layout import format_of
from fedsim.recording.reader import Client, Run

MEASURED = (
    "seconds, peak_memory, created, versions, device, arithmetic, resumed: measured, and nothing "
    "follows from them"
)
TOLD = "id, status, error, diverged: only the server says so"
OF_FAILED = "status, error of clients that failed: only the server says so"
OF_UNFINISHED = "clients.jsonl: rows of a round that did not finish are compared with nothing"
OF_NODES = "place, not_captured: only the client says so"
PROXIMAL = "proximal_mu: only where steps are replayed does anything follow from it"
UPDATES = "num_updates: seen only where all layers and steps were captured"
OPTIMIZER = (
    "config.optimizer, momentum, nesterov, weight-decay: seen only where all steps are replayed"
)
NO_TRACE = (
    "config.workers, client-evaluation, ray-address, client-cpus, client-gpus, client-timeout, "
    "node-timeout, max-failures, allow-divergence, output, mirror, data-root, capture-budget, "
    "deterministic, compile, autocast, device: no file tells by what they were"
)
NO_DIFFERENCE = (
    "config.alpha, min-samples, clients-per-round, rounds, evaluate-every, nesterov, momentum, "
    "batch-size, local-epochs, local-steps, learning-rate, client, capture, capture-layers, "
    "capture-dtype, capture-encoding, strategy: another value that changes nothing of this run, "
    "like one for a client that never took part"
)
NOT_OF_THE_DATA = "dataset.sha256, test split: "
NO_SHARDS = "bytes_captured: the files are not at hand"
NODES_DATA = "partition.nodes: only the nodes know what they hash"


def leave_unknown(file: str, model: type[BaseModel], row: Any, findings: Findings) -> None:
    """Name the keys of a row that this version does not know: a later one may have added them."""
    for key in rows.unknown_keys(model, row):
        findings.leave(ROWS, f"{file}: {key}, which this version does not know")


def prove_manifest(
    run: Run, dataset: FederatedData | None, why_without: str, findings: Findings
) -> None:
    """Check what ``run.json`` says beside the configuration."""
    manifest, config = run.manifest, run.config
    run.check_sizes()
    model = initial_model(config)
    names = {name for name, _ in model.named_parameters()}
    arrays = {n: {"name": n, "shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")}
              for n, t in model.state_dict().items()}  # fmt: skip
    largest = max((config.num_participants(r) for r in range(1, config.rounds + 1)), default=0)
    expected = {
        "seed": config.seed,
        "model.arch": config.arch,
        "model.parameters": [arrays[n] for n, _ in model.named_parameters()],
        "model.buffers": [a for n, a in arrays.items() if n not in names],
    }
    described = describe(task_of(config).spec)
    told = run.entry("dataset").keys()
    for key, value in described.items():
        # Runs of earlier versions do not describe columns; each node may have its own samples.
        if key not in {"columns", "label"} - told and not (
            config.own_data and key.endswith("_size")
        ):
            expected[f"dataset.{key}"] = value
    wrong = []
    for key, value in expected.items():
        found: Any = manifest
        for part in key.split("."):
            found = (found or {}).get(part)
        if found != value:
            wrong.append(f"run.json: {key} is not what its configuration leads to")
    # A run that was begun with fewer clients goes on as it was.
    if manifest["format"] > format_of(largest):
        wrong.append(f"run.json: format {manifest['format']} is for rounds of more clients")
    if run.status == "finished":
        if len(run.round_rows) != config.rounds + 1:
            wrong.append(f"run.json: finished, with {len(run.round_rows) - 1} of {config.rounds} "
                         "rounds")  # fmt: skip
        if "error" in manifest or "diverged" in manifest:
            wrong.append("run.json: finished, with an error")
    wrong += _wrong_code(run, findings)
    wrong += _wrong_rounds(run, findings)
    wrong += _wrong_partition(run, dataset, findings)
    for violation in wrong:
        findings.violate(ROWS, violation)
    if not wrong:
        findings.prove(ROWS)
    leave_unknown("run.json", rows.Manifest, manifest, findings)
    for reason in (MEASURED, TOLD, NO_TRACE, NO_DIFFERENCE):
        findings.leave(ROWS, reason)
    if dataset is None:
        findings.leave(ROWS, NOT_OF_THE_DATA + why_without)
    if run.entry("partition").get("nodes"):
        findings.leave(ROWS, NODES_DATA)


def _wrong_code(run: Run, findings: Findings) -> list[str]:
    """Compare the source of the user's own code with the hash of what made the rounds."""
    known, at_hand = run.config.all_code, run.code_at_hand()
    parts = [run.manifest, *run.manifest.get("resumed", [])]
    told = {name for part in parts for name in part.get("code", {})}
    for name in known:
        for number in (row["round"] for row in run.round_rows):
            recorded, found = run.code_of(number).get(name), at_hand.get(name)
            if recorded is None:
                reason = f"code: run.json has no hash of the source of {name}"
            elif found is None:
                reason = f"code: the source of {name} was not named here, or cannot be read"
            elif found != recorded:
                reason = (
                    f"code: {name} has changed: its source has sha256 {found[:16]}..., and "
                    f"{recorded[:16]}... made these rounds; checks that run it fail where it "
                    "computes differently"
                )
            else:
                continue
            findings.leave(ROWS, reason, at=(number, None))
    return [f"run.json: code has {name}, which its configuration does not" for name in
            sorted(told.difference(known))]  # fmt: skip


def _wrong_rounds(run: Run, findings: Findings) -> list[str]:
    """Look for clients in rounds that had none."""
    wrong = []
    untrained = next((row for row in run.round_rows if row["round"] == 0), None)
    if untrained is not None and (untrained["participants"] or untrained["failed"]):
        wrong.append("rounds.jsonl: round 0 has participants, and nobody trains in it")
    if run.client_rows_of(0):
        wrong.append("clients.jsonl: round 0 has clients, and nobody trains in it")
    for number in sorted({row["round"] for row in run.unfinished_client_rows}):
        # One that was stopped may have been in the midst of the round after its last.
        if run.status == "finished" or number != len(run.round_rows):
            wrong.append(
                f"clients.jsonl: there are clients of round {number}, which is not in rounds.jsonl"
            )
        else:
            findings.leave(ROWS, OF_UNFINISHED, at=(number, None))
    return wrong[:20]


def _wrong_partition(run: Run, dataset: FederatedData | None, findings: Findings) -> list[str]:
    """Deal the samples again."""
    config = run.config
    if config.own_data:
        return []
    if dataset is None:
        findings.leave(PARTITION, "who holds which sample: the labels are not at hand")
        return []
    dealt = deal_partition(config, dataset)
    found = run.partition
    if len(dealt) == len(found) and all(
        np.array_equal(found[number], indices) for number, indices in enumerate(dealt)
    ):
        return []
    made_with = run.made_by(0)[0]["numpy"]
    if made_with != version("numpy"):
        reason = f"who holds which sample: numpy {made_with} dealt them, and {version('numpy')} "
        findings.leave(PARTITION, f"{reason}deals otherwise")
        return []
    return ["partition.safetensors is not what the seed deals"]


def prove_round_row(run: Run, number: int, findings: Findings) -> None:
    """Check what a line of ``rounds.jsonl`` says of evaluation, as far as it follows."""
    row, every = run.round(number).row, run.config.evaluate_every
    leave_unknown("rounds.jsonl", rows.RoundRow, row, findings)
    for of_client in run.client_rows_of(number):
        model = rows.TrainedClientRow if of_client["status"] == "ok" else rows.FailedClientRow
        leave_unknown("clients.jsonl", model, of_client, findings)
    where = f"rounds.jsonl: round {number}"
    accuracy, loss = row["global_accuracy"], row["global_loss"]
    samples = run.entry("dataset")["test_size"]
    is_last = run.status == "finished" and number == len(run.round_rows) - 1
    if (number % every == 0 or is_last) and accuracy is None:
        findings.violate(ROWS, f"{where} was not evaluated, and evaluate-every = {every}")
    elif accuracy is None and loss is not None:
        findings.violate(ROWS, f"{where} has a loss and no accuracy")
    elif accuracy is not None and not _is_share(accuracy, samples):
        findings.violate(
            ROWS, f"{where}: global_accuracy {accuracy} is not a fraction of {samples} samples"
        )
    elif loss is not None and loss < 0:
        findings.violate(ROWS, f"{where}: global_loss {loss} is negative")
    else:
        findings.prove(ROWS)


def _is_share(share: float, of: int) -> bool:
    count = round(share * of)
    return 0 <= count <= of and abs(count / of - share) <= 1e-12


def prove_client_row(run: Run, client: Client, findings: Findings) -> None:
    """Check what a line of ``clients.jsonl`` says that does not take the client's files."""
    row, config = client.telemetry, run.config
    settings = config.training_of(client.partition)
    samples = len(run.partition[client.partition])
    steps = settings.num_steps(samples)
    sizes = itertools.cycle(settings.batches_per_epoch(samples))
    keeps = not row.get("not_captured") and row.get("place") != "none"
    # A node that may not record at all says so by leaving nothing.
    expected: dict[str, Any] = {
        "num_samples": samples,
        "local_epochs": settings.local_epochs,
        "local_steps": settings.local_steps,
        "batch_size": settings.batch_size,
        "learning_rate": settings.optimizer.learning_rate,
        "num_steps": steps,
    }
    if is_at_hand(config.capture):
        policy = config.policy
        kept = len(policy.kept_steps(steps)) if keeps and row["files"] else 0
        if not policy.layers_of(run.shapes):
            kept = 0
        expected["num_steps_captured"] = kept
        if (size := policy.bytes_of(kept, run.shapes)) is not None:
            expected["bytes_captured"] = size
    else:
        findings.leave(ROWS, f"num_steps_captured, bytes_captured: {not_at_hand(config.capture)}",
                       at=client.place)  # fmt: skip
    try:
        expected["behavior"] = client.behavior.explain()
    except InputError as error:
        findings.leave(ROWS, f"behavior: {error}", at=client.place)
    wrong = [key for key, value in expected.items() if row.get(key) != value]
    if ("evaluation" in row) != (config.client_evaluation != NONE):
        wrong.append("evaluation")
    # Not of as many steps as a configuration asks for, which may be any number.
    if any(size != told for size, told in zip(sizes, row["batch_sizes"], strict=False)):
        wrong.append("batch_sizes")
    wrong += _wrong_loss(row) + _wrong_norms(run, client)
    if sum(row["class_distribution"]) != samples:
        wrong.append("class_distribution")
    # With float16 it may be absent: earlier versions counted all steps as updates.
    if "num_updates" in row and config.autocast != "float16":
        wrong.append("num_updates")
    if run.algorithm is not None and client.proximal_mu != run.algorithm.proximal_mu:
        wrong.append("proximal_mu")
    for key in wrong:
        findings.violate(
            ROWS,
            f"clients.jsonl: client {client.partition} in round {client.round} has another {key} "
            "than follows from the run",
        )
    if not wrong:
        findings.prove(ROWS)
    if "place" in row or "not_captured" in row:
        findings.leave(ROWS, OF_NODES, at=client.place)
    findings.leave(ROWS, OPTIMIZER, at=client.place)
    if run.algorithm is None:
        findings.leave(ROWS, PROXIMAL, at=client.place)
    if "evaluation" in row:
        findings.leave(ROWS, EVALUATED, at=client.place)
    if "num_updates" in row:
        findings.leave(ROWS, UPDATES, at=client.place)


def settle_replayed(client: Client, findings: Findings, *, exact: bool) -> None:
    """Say that a client's steps were replayed to the last, and whether in float32."""
    for reason in (OPTIMIZER, PROXIMAL, UPDATES) if exact else (OPTIMIZER, PROXIMAL):
        findings.settle(ROWS, reason, at=client.place)


def _wrong_loss(row: dict[str, Any]) -> list[str]:
    losses = row["loss_history"]
    if any(loss is None for loss in losses):
        return [] if row["local_loss"] is None else ["local_loss"]
    mean = float(np.average(losses, weights=row["batch_sizes"]))
    told = row["local_loss"]
    is_mean = told is not None and abs(told - mean) <= 1e-12 * max(abs(mean), 1e-30)
    return [] if is_mean else ["local_loss"]


def _wrong_norms(run: Run, client: Client) -> list[str]:
    """Compare the norms of the first step with each other."""
    row = client.telemetry
    norms = row["per_layer_norms"]
    if list(norms) != list(run.shapes):
        return ["per_layer_norms"]
    if any(norm is None for norm in norms.values()):
        return []
    whole, told = math.hypot(*norms.values()), row["gradient_norm"]
    if told is None or not abs(told - whole) <= 1e-9 * whole:
        return ["gradient_norm"]
    return []


def _without_cause(run: Run, client: Client) -> str | None:
    """Say which step has a term that the client's objective does not have."""
    allowed = {"proximal", "objective_norm"} if client.proximal_mu else set()
    # A class of the user's that was not named may send corrections as well.
    if run.algorithm is None or run.algorithm.corrects:
        allowed.add("objective_norm")
    for row in client.steps:
        for key in ("proximal", "objective_norm"):
            if key in row and key not in allowed:
                return f"step {row['step']} has {key}, and the objective is the loss alone"
    return None


def prove_step_rows(run: Run, client: Client, findings: Findings) -> None:
    """Check what the lines of ``steps.jsonl`` say beside the steps themselves."""
    for row in client.steps:
        leave_unknown("steps.jsonl", rows.StepRow, row, findings)
    if odd_figure := _without_cause(run, client):
        findings.violate(ROWS, f"{client.steps_path}: {odd_figure}")
    for capture in run.config.captures_at_hand:
        capture.check_steps(client, findings)
