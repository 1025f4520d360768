"""Recorded gradients in the forms that other programs read; `docs/exports.md` describes them."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.core.errors import InputError
from fedsim.core.plan import batches_of_round
from fedsim.core.task import task_of
from fedsim.core.training import Batch, OptimizerSettings
from fedsim.recording.files import TEMPORARY, temporary, write_json, write_tensors
from fedsim.recording.reader import Client, Round, Run

Progress = Callable[[int, int], None]

NOTEBOOK_METRICS = (
    "num_samples",
    "local_epochs",
    "local_steps",
    "batch_size",
    "learning_rate",
    "loss_history",
    "local_loss",
    "batch_sizes",
    "gradient_norm",
    "per_layer_norms",
    "num_steps",
    "num_steps_captured",
    "class_distribution",
)
"""Telemetry of a client that a notebook export carries, where the run has it."""


def export_breaching(
    run: Run,
    round_number: int,
    partition: int,
    step: int,
    *,
    output: Path,
    steps: int = 1,
    allow_not_replayable: bool = False,
    data_root: str | None = None,
) -> list[str]:
    """Write local steps of one client as the gradient-inversion tool `breaching` takes them.

    One step is exported as its gradient; several as local minus server parameters over them.

    Parameters
    ----------
    run : Run
        The run.
    round_number, partition : int
        Whose steps.
    step : int
        The first of them, from 0.
    output : Path
        A folder that does not exist; it appears whole.
    steps : int
        How many.
    allow_not_replayable : bool
        Export several steps even where `breaching` cannot repeat them from the images, with the
        reasons in ``metadata.json``.
    data_root : str or None
        Folder of the dataset's archives, in place of the run's own.

    Returns
    -------
    list of str
        Why `breaching` cannot repeat the steps; empty where it can.

    Raises
    ------
    InputError
        When the folder exists or cannot be written, the run does not hold what is needed, the
        training batches cannot be rebuilt, or several steps are not replayable.
    """
    _refuse_existing(output)
    client = run.round(round_number).client(partition)
    stop = step + steps
    _check_steps(client, step, steps)
    _check_captured(run, client, stop)
    _check_classifier(run.shapes, run.entry("dataset")["classes"])
    optimizer = run.config.training_of(partition).optimizer
    batch_sizes = client.telemetry["batch_sizes"][step:stop]
    reasons: list[str] = []
    if steps > 1:
        reasons = obstacles(optimizer, batch_sizes)
        reasons += _skipped_updates(run, client, range(step, stop))
    if reasons and not allow_not_replayable:
        raise InputError(
            f"steps = {steps} cannot be used: breaching repeats plain SGD over equal batches, and "
            f"this run has {', '.join(reasons)}; expected 1, or more with --allow-not-replayable"
        )
    batches = rebuild_batches(run, client, stop, data_root=data_root)[step:]
    before = client.parameters_at(step)
    if steps == 1:
        shared = dict(client.gradient(step))
    else:
        shared = {n: p - before[n] for n, p in client.parameters_at(stop).items()}
    metadata = {
        "format": 1,
        "order": list(run.shapes),
        "server_payload": _described_data(run),
        "shared_data": _shared_metadata(batches, optimizer.learning_rate),
        "replayable": not reasons,
        "reasons": reasons,
        "dtype": run.config.capture_dtype,
        "autocast": run.config.autocast,
        "batch_sizes": batch_sizes,
        "losses": client.telemetry["loss_history"][step:stop],
        "model": {"arch": run.config.model, "norm": run.config.norm},
        "source": _described_source(run)
        | {"round": round_number, "client": partition, "step": step, "steps": steps},
    }
    with _new_folder(output) as folder:
        _write(folder / "server_payload.safetensors", before)
        _write(folder / "shared_data.safetensors", shared)
        _write(folder / "ground_truth.safetensors", _ground_truth(batches))
        write_json(folder / "metadata.json", metadata)
    return reasons


def obstacles(optimizer: OptimizerSettings, batch_sizes: Sequence[int]) -> list[str]:
    """Say what keeps several local steps from being repeated by plain SGD over equal batches.

    Parameters
    ----------
    optimizer : OptimizerSettings
        The client's.
    batch_sizes : sequence of int
        Samples of each step. A last one that is smaller is what remains for the last slice.

    Returns
    -------
    list of str
        A phrase for each setting, with its value; empty where there is none.
    """
    found = []
    if optimizer.name != "sgd":
        found.append(f"optimizer = {optimizer.name!r}")
    elif optimizer.momentum:
        found.append(f"momentum = {optimizer.momentum}")
        if optimizer.nesterov:
            found.append("nesterov = true")
    if optimizer.weight_decay:
        found.append(f"weight-decay = {optimizer.weight_decay}")
    *full, last = batch_sizes
    if len({*full}) > 1 or (full and last > full[0]):
        different = ", ".join(str(size) for size in dict.fromkeys(batch_sizes))
        found.append(f"batch sizes of {different} in its steps")
    return found


def rebuild_batches(
    run: Run, client: Client, count: int, *, data_root: str | None = None
) -> list[Batch]:
    """Make the first batches of a client's round again, as it trained on them.

    Parameters
    ----------
    run : Run
        The run.
    client : Client
        Of one of its rounds.
    count : int
        How many, from step 0: later draws depend on earlier ones.
    data_root : str or None
        Folder of the dataset's archives, in place of the run's own.

    Returns
    -------
    list of Batch
        Augmented and normalised on the CPU, in step order.

    Raises
    ------
    InputError
        When the dataset at hand is not the run's, or the batches are not those of
        ``steps.jsonl``.
    """
    config = run.config
    if config.own_data:
        raise InputError(f"{run.path} has no images: its nodes trained on data of their own")
    run.check_sizes()
    # Not to where a run from elsewhere says that its data was.
    task = task_of(config, data_root=data_root, download=data_root is not None)
    dataset = task.data()
    expected, found = run.entry("dataset")["sha256"], dataset.fingerprint
    if found != expected:
        raise InputError(
            f"dataset = {config.dataset!r} on this machine has sha256 {found}; expected that of "
            f"the run, {expected}"
        )
    partition = client.partition
    batches = batches_of_round(
        config,
        task,
        dataset,
        run.partition[partition],
        round_number=client.round,
        partition=partition,
        device=torch.device("cpu"),
    )
    rebuilt = list(itertools.islice(batches, count))
    recorded = [row.get("indices") for row in client.steps[:count]]
    if [batch.indices.tolist() for batch in rebuilt] != recorded:
        raise InputError(
            f"the batches of client {partition} in round {client.round} cannot be rebuilt: numpy "
            f"{np.__version__} draws other samples than steps.jsonl lists, which numpy "
            f"{run.entry('versions')['numpy']} drew"
        )
    return rebuilt


def export_notebook(
    run: Run,
    round_number: int,
    *,
    output: Path,
    clients: Sequence[int] = (),
    progress: Progress | None = None,
) -> tuple[Path, Path]:
    """Write a round as one file of tensors and one of figures, with the names of a notebook.

    Parameters
    ----------
    run : Run
        The run.
    round_number : int
        A training round.
    output : Path
        Beginning of the names: ``<output>_RR_tensors.pt`` and ``<output>_RR_meta.json``.
    clients : sequence of int
        Partitions to export; all that worked in the round by default.
    progress : callable, optional
        Called after each step with the bytes of gradients collected so far and those of all.

    Returns
    -------
    tuple of (Path, Path)
        The two files.

    Raises
    ------
    InputError
        When a file exists or cannot be written, the run does not hold what is needed, or the
        tensors do not fit into memory.
    """
    stem = f"{output}_{round_number:02d}"
    tensors, meta = Path(f"{stem}_tensors.pt"), Path(f"{stem}_meta.json")
    _refuse_existing(tensors)
    _refuse_existing(meta)
    of_round = run.round(round_number)
    chosen = _chosen_clients(of_round, clients)
    lengths = {client: _captured_prefix(run, client) for client in chosen}
    start = run.round(round_number - 1)
    gradient_bytes = sum(length * _step_bytes(run, c) for c, length in lengths.items())
    state_bytes = sum(tensor.nbytes for tensor in start.state.values())
    _check_memory(chosen, gradient_bytes + (2 + len(chosen)) * state_bytes)

    def advance(done: int) -> None:
        if progress is not None:
            progress(done, gradient_bytes)

    payload = {
        "global_model_state": _copied(start.state),
        "raw_gradients": _notebook_gradients(run, lengths, advance),
        "model_updates": {client.partition: _copied(client.delta) for client in chosen},
        "server_aggregate_delta": _copied(of_round.aggregate),
    }
    figures = {
        "round": round_number,
        "participating_clients": [client.partition for client in chosen],
        "client_metrics": {str(client.partition): _notebook_metrics(client) for client in chosen},
        "global_accuracy": start.row["global_accuracy"],
        "global_loss": start.row["global_loss"],
        "global_state_round": start.number,
        "config_snapshot": run.config.to_mapping(),
    }
    with _said_of(output):
        tensors.parent.mkdir(parents=True, exist_ok=True)
        # Nested: neither file appears without the other, even after an error.
        with temporary(tensors) as unfinished:
            # Through a file of ours: torch would write the temporary name into the archive.
            with unfinished.open("wb") as file:
                torch.save(payload, file)
            write_json(meta, figures)
    return tensors, meta


def available_memory() -> int:
    """Count the bytes that a process may take without swapping; all of the memory where unknown."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, amount = line.partition(":")
            if name == "MemAvailable":
                return int(amount.split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# What breaching needs


def _check_steps(client: Client, step: int, steps: int) -> None:
    made = client.telemetry["num_steps"]
    whose = f"client {client.partition} made {made} steps in round {client.round}"
    if not 0 <= step < made:
        raise InputError(f"step = {step} cannot be used; expected 0 to {made - 1}: {whose}")
    if not 1 <= steps <= made - step:
        raise InputError(
            f"steps = {steps} cannot be used from step {step}; expected 1 to {made - step}: {whose}"
        )


def _check_captured(run: Run, client: Client, stop: int) -> None:
    whose = f"client {client.partition} in round {client.round}"
    captured = {*client.captured_steps}
    for step in range(stop):
        if step not in captured:
            needed = "step 0" if stop == 1 else f"steps 0 to {stop - 1}"
            raise InputError(
                f"capture = {run.config.capture!r} did not keep step {step} of {whose}; this "
                f"export needs the gradients of {needed}, for the parameters follow from them"
            )
    if not client.has_all_parameters:
        left = next(name for name in run.shapes if name not in client.captured_parameters)
        raise InputError(
            f"capture-layers = {list(run.config.capture_layers)} did not keep {left} of {whose}; "
            "breaching needs the gradients of all parameters, as '*' keeps them"
        )


def _check_classifier(shapes: Mapping[str, tuple[int, ...]], classes: int) -> None:
    weight, bias = list(shapes)[-2:]
    if shapes[bias] != (classes,) or shapes[weight][:-1] != (classes,):
        raise InputError(
            f"the model ends with {weight} of shape {shapes[weight]} and {bias} of shape "
            f"{shapes[bias]}; breaching needs the classifier's weight, ({classes}, features), and "
            f"then its bias, ({classes},)"
        )


def _skipped_updates(run: Run, client: Client, steps: range) -> list[str]:
    # Mixed precision makes no update where the scaled gradient overflowed; plain SGD would.
    if run.config.autocast != "float16":
        return []
    skipped = [
        str(step)
        for step in steps
        if not all(bool(g.isfinite().all()) for g in client.gradient(step).values())
    ]
    return [f"no update after step {', '.join(skipped)} (autocast = 'float16')"] if skipped else []


def _described_data(run: Run) -> dict[str, Any]:
    data, spec = run.entry("dataset"), task_of(run.config).spec
    shapes = [column.shape for name, column in spec.columns.items() if name != spec.label]
    if len(shapes) != 1 or "mean" not in data:
        raise InputError(f"{run.path} did not train on images; breaching exports are of images")
    return {
        "shape": list(shapes[0]),
        "classes": data["classes"],
        "mean": data["mean"],
        "std": data["std"],
        "modality": "vision",
    }


def _shared_metadata(batches: Sequence[Batch], learning_rate: float) -> dict[str, Any]:
    labels = [batch.tensors["targets"].tolist() for batch in batches]
    several = {
        "lr": learning_rate,
        "steps": len(batches),
        "data_per_step": len(labels[0]),
        "labels": labels,
    }
    return {
        "num_data_points": sum(map(len, labels)),
        "labels": sorted(itertools.chain.from_iterable(labels)),
        "local_hyperparams": several if len(batches) > 1 else None,
    }


def _described_source(run: Run) -> dict[str, Any]:
    return {
        "run": run.path.absolute().name,
        "created": run.entry("created"),
        "dataset": run.config.dataset,
        "dataset_sha256": run.entry("dataset")["sha256"],
        "device": run.entry("device")["type"],
        "versions": run.entry("versions"),
    }


def _ground_truth(batches: Sequence[Batch]) -> dict[str, Tensor]:
    return {
        "images": torch.cat([batch.tensors["inputs"] for batch in batches]),
        "labels": torch.cat([batch.tensors["targets"] for batch in batches]),
        "indices": torch.cat([torch.from_numpy(batch.indices) for batch in batches]),
    }


# What a notebook needs


def _chosen_clients(of_round: Round, partitions: Sequence[int]) -> list[Client]:
    chosen = {of_round.client(p).partition for p in partitions} or {*of_round.clients}
    if not chosen:
        raise InputError(
            f"round = {of_round.number} cannot be used: no client worked in it; expected a "
            "training round"
        )
    return [of_round.client(p) for p in of_round.participants if p in chosen]


def _captured_prefix(run: Run, client: Client) -> int:
    captured = client.captured_steps
    if not captured or captured != list(range(len(captured))):
        kept = {*captured}
        gap = next(s for s in itertools.count() if s not in kept)
        raise InputError(
            f"capture = {run.config.capture!r} did not keep step {gap} of client "
            f"{client.partition} in round {client.round}; grads_per_step_wd needs "
            "the steps from 0 on without a gap, as 'all' and 'first:K' keep them"
        )
    if run.config.autocast == "float16" and not client.has_all_parameters:
        raise InputError(
            f"capture-layers = {list(run.config.capture_layers)} left out parameters; with "
            "autocast = 'float16' grads_per_step_wd needs all of them, for a step whose gradient "
            "overflowed made no update"
        )
    return len(captured)


def _notebook_metrics(client: Client) -> dict[str, Any]:
    return {name: client.telemetry[name] for name in NOTEBOOK_METRICS if name in client.telemetry}


def _step_bytes(run: Run, client: Client) -> int:
    """Count the bytes of one exported step: float32, without and with weight decay."""
    return 2 * 4 * sum(math.prod(run.shapes[name]) for name in client.captured_parameters)


def _check_memory(clients: Sequence[Client], needed: int) -> None:
    available = available_memory()
    if needed > available:
        fewer = "; --client P, given once or more, exports fewer clients at a time"
        raise InputError(
            f"clients = {[client.partition for client in clients]} need {needed / 1e9:.1f} GB of "
            f"memory in one file; expected at most what is available, {available / 1e9:.1f} GB"
            + (fewer if len(clients) > 1 else "")
        )


def _notebook_gradients(
    run: Run, lengths: Mapping[Client, int], advance: Callable[[int], None]
) -> dict[int, dict[str, list[dict[str, Tensor]]]]:
    decay = run.config.weight_decay
    done = 0
    result = {}
    for client, length in lengths.items():
        raw: list[dict[str, Tensor]] = []
        decayed: list[dict[str, Tensor]] = []
        for gradient, parameters in itertools.islice(client.replay(), length):
            raw.append(_copied(gradient))
            decayed.append({n: g.add(parameters[n], alpha=decay) for n, g in raw[-1].items()})
            done += _step_bytes(run, client)
            advance(done)
        result[client.partition] = {"grads_per_step_raw": raw, "grads_per_step_wd": decayed}
    return result


# Files


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # torch.save writes the whole storage of a tensor: here that may be a mapped file.
    return {n: t.clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    write_tensors(path, {name: tensor.numpy() for name, tensor in tensors.items()})


def _refuse_existing(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise InputError(
            f"output = {str(path)!r} exists already; expected a new name, since an "
            "export is never overwritten"
        )


@contextlib.contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """Give a folder beside `path` to fill; rename it to `path` at a clean end."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    with _said_of(path):
        try:
            unfinished.mkdir(parents=True)
            yield unfinished
            unfinished.rename(path)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise


@contextlib.contextmanager
def _said_of(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"output = {str(output)!r} cannot be written: {error.strerror or error}"
        ) from None
