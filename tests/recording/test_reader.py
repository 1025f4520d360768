from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim import load_run
from fedsim.captures.gradients import Gradients, Shard
from fedsim.captures.sketch import Sketcher
from fedsim.core.aggregation import state_sha256
from fedsim.core.config import RunConfig
from fedsim.core.errors import InputError
from fedsim.core.partition import partition_sha256
from fedsim.core.rng import Purpose, generator
from fedsim.core.training import Step, load_batches, local_train
from fedsim.recording.files import append_line, json_line, read_lines, write_json, write_tensors
from fedsim.recording.layout import RunLayout
from fedsim.recording.reader import Client
from fedsim.recording.recorder import StepRecorder
from fedsim.recording.tensor_files import TensorFile
from fedsim.recording.writer import RunWriter
from fedsim.tasks.vision.models import build_model
from tests.recording.conftest import Recorded
from tests.recording.rows import client_row, round_row

FORMAT = Path(__file__).parents[2] / "docs" / "format.md"
PARTICIPANTS = {1: [0, 2, 1], 2: [2, 1, 3]}
FOLDED = {1: [2, 0, 1], 2: [2, 3, 1]}
STEPS = {0: 5, 1: 4, 2: 10, 3: 6}


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rss() -> int:
    return psutil.Process().memory_info().rss


def numbers(run: Any) -> list[int]:
    return [row["round"] for row in run.round_rows]


# --- what a run holds


def test_a_run_knows_its_rounds_and_their_clients(recorded: Recorded) -> None:
    run = load_run(recorded.path)
    assert run.status == "finished"
    assert numbers(run) == [0, 1, 2]
    assert run.round(0).participants == []
    assert run.round(0).clients == {}
    for number in (1, 2):
        assert run.round(number).participants == PARTICIPANTS[number]
        assert list(run.round(number).clients) == FOLDED[number]
        for partition in FOLDED[number]:
            client = run.round(number).client(partition)
            assert client.partition == partition
            assert client.telemetry["num_steps"] == STEPS[partition]
            assert client.captured_steps == list(range(STEPS[partition]))
            assert [row["step"] for row in client.steps] == list(range(STEPS[partition]))


def test_states_and_deltas_have_the_names_shapes_and_dtypes_of_the_manifest(
    recorded: Recorded,
) -> None:
    run = load_run(recorded.path)
    described = run.manifest["model"]["parameters"] + run.manifest["model"]["buffers"]
    expected = {d["name"]: (tuple(d["shape"]), f"torch.{d['dtype']}") for d in described}
    assert len(expected) == 20
    assert expected["1.num_batches_tracked"] == ((), "torch.int64")
    for tensors in (
        run.round(0).state,
        run.round(2).state,
        run.round(2).aggregate,
        run.round(2).client(3).delta,
    ):
        assert {n: (tuple(t.shape), str(t.dtype)) for n, t in tensors.items()} == expected


def test_the_initial_state_is_the_plans(recorded: Recorded) -> None:
    state = load_run(recorded.path).round(0).state
    for name, array in recorded.plan.initial_state.items():
        assert state[name].numpy().tobytes() == array.tobytes()


def test_a_gradient_has_the_order_of_the_models_parameters(recorded: Recorded) -> None:
    client = load_run(recorded.path).round(1).client(0)
    gradient = client.gradient(4)
    assert list(gradient) == list(recorded.plan.parameters)
    # The file's own order of keys is another one: sorted, 13 comes before 4.
    assert list(gradient) != sorted(gradient)
    assert [tuple(t.shape) for t in gradient.values()] == list(recorded.plan.parameters.values())
    assert {t.dtype for t in gradient.values()} == {torch.float32}
    assert gradient.step == 4


def test_partitions_are_the_plans_as_int64(recorded: Recorded) -> None:
    partition = load_run(recorded.path).partition
    assert list(partition) == [0, 1, 2, 3]
    for number, indices in partition.items():
        assert indices.dtype == np.int64
        assert indices.tolist() == recorded.plan.partition[number].tolist()


def test_partitions_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    RunWriter.create(tmp_path / "run", {}, [np.array([i]) for i in range(12)])
    partition = load_run(tmp_path / "run").partition
    assert [(n, i.tolist()) for n, i in partition.items()] == [(n, [n]) for n in range(12)]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {
            "dataset": "synthetic:500:5",
            "clients": 5,
            "rounds": 2,
            "participants": [[4, 0], [1]],
            "learning-rate": [0.1, 1e-7],
            "batch-size": [16, 32],
            "local-steps": 3,
            "client": {"3": {"batch-size": 8}, "0": {"learning-rate": 0.25, "local-epochs": 2}},
            "capture": "every:3",
            "capture-layers": ["fc.*", "layer4*"],
            "client-gpus": 0.5,
            "output": "runs/a b",
        },
    ],
)
def test_a_configuration_comes_back_as_it_was(values: dict[str, Any], tmp_path: Path) -> None:
    config = RunConfig.from_mapping(values)
    RunWriter.create(tmp_path / "run", {"config": config.to_mapping()}, [])
    assert load_run(tmp_path / "run").config == config


def test_the_configuration_of_a_recorded_run_is_its_plans(recorded: Recorded) -> None:
    assert load_run(recorded.path).config == recorded.plan.config


def test_the_data_frames_hold_every_row_with_its_values(recorded: Recorded) -> None:
    run = load_run(recorded.path)
    rounds, clients = run.rounds(), run.telemetry()
    for frame, name in ((rounds, "rounds"), (clients, "clients")):
        lines = lines_of(recorded.path / f"{name}.jsonl")
        scalars = {k for k, value in lines[0].items() if not isinstance(value, dict | list)}
        assert scalars == {*frame.columns} & {*lines[0]}
        for key in scalars:
            assert frame[key].tolist() == [line[key] for line in lines]
        for part, numbers in frame.filter(regex="^seconds_").items():
            key = str(part).removeprefix("seconds_")
            assert numbers.tolist() == [line["seconds"][key] for line in lines]
    assert rounds["round"].tolist() == [0, 1, 2]
    assert clients["round"].tolist() == [1, 1, 1, 2, 2, 2]
    assert clients["partition"].tolist() == FOLDED[1] + FOLDED[2]
    assert clients["num_samples"].tolist() == [615, 263, 227, 615, 333, 227]
    assert clients["num_steps"].tolist() == [10, 5, 4, 10, 6, 4]
    assert clients["bytes_captured"].tolist() == [n * 78_184 for n in (10, 5, 4, 10, 6, 4)]
    assert clients["learning_rate"].tolist() == [0.01, 0.01, 0.02, 0.01, 0.01, 0.02]
    assert clients["num_samples"].dtype == np.int64
    assert clients["local_loss"].dtype == np.float64


def test_the_data_frames_are_tidy(recorded: Recorded) -> None:
    run = load_run(recorded.path)
    rows = [row for row in run.client_rows if row["status"] == "ok"]
    frames = [run.rounds(), run.telemetry(), run.steps(), run.layer_norms(), run.class_counts()]
    for frame in frames:
        cells = {type(cell) for column in frame for cell in frame[column].tolist()}
        assert cells <= {int, float, str, bool, type(None)}
    assert {"seconds_train", "peak_memory_process", "num_samples"} <= {*frames[1].columns}
    assert run.rounds()["num_participants"].tolist() == [0, 3, 3]
    assert run.rounds()["num_failed"].tolist() == [0, 0, 0]
    steps = run.steps().groupby(["round", "partition"], sort=False)["loss"].apply(list)
    assert steps.to_dict() == {(r["round"], r["partition"]): r["loss_history"] for r in rows}
    norms = run.layer_norms().set_index(["round", "partition", "parameter"])["gradient_norm"]
    assert norms[2, rows[-1]["partition"], "0.weight"] == rows[-1]["per_layer_norms"]["0.weight"]
    counts = run.class_counts().pivot(index="partition", columns="class", values="num_samples")
    for row in rows:
        assert counts.loc[row["partition"]].tolist() == row["class_distribution"]


def test_a_loss_that_is_not_finite_is_missing_in_the_data_frames(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path / "run", {}, [])
    for number, loss in enumerate([2.5, float("nan"), float("inf")]):
        writer.add_round(round_row(number, global_loss=loss))
    rounds = load_run(tmp_path / "run").rounds()
    assert rounds["global_loss"].isna().tolist() == [False, True, True]
    assert rounds["global_accuracy"].tolist() == [0.1, 0.1, 0.1]


def test_a_client_that_failed_has_a_row_and_no_work(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path / "run", {}, [])
    writer.add_client(client_row(1, 4), {"w": np.zeros(1)})
    writer.add_failure({"round": 1, "partition": 2, "status": "failed", "error": "why"})
    writer.add_round(round_row(1, [2, 4], failed=[2]))
    run = load_run(tmp_path / "run")
    assert list(run.round(1).clients) == [4]
    assert run.telemetry()["status"].tolist() == ["ok", "failed"]
    assert run.round(1).participants == [2, 4]
    with pytest.raises(InputError) as caught:
        run.round(1).client(2)
    assert str(caught.value) == "client 2 has no work in round 1; clients of the round are [4]"


# --- what the format promises of it, computed without fedsim


def test_the_delta_follows_from_the_gradients_to_the_bit(recorded: Recorded) -> None:
    run = load_run(recorded.path)
    for number, partition in [(1, 2), (2, 1), (2, 3)]:
        client, before = run.round(number).client(partition), run.round(number - 1).state
        parameters = {name: before[name].clone() for name in client.gradient(0)}
        optimizer = torch.optim.SGD(
            list(parameters.values()),
            lr=client.telemetry["learning_rate"],
            momentum=0.9,
            weight_decay=5e-4,
            fused=True,
        )
        for step in client.captured_steps:
            for name, gradient in client.gradient(step).items():
                parameters[name].grad = gradient
            optimizer.step()
        for name, parameter in parameters.items():
            assert torch.equal(parameter - before[name], client.delta[name])
        steps = client.delta["1.num_batches_tracked"]
        assert steps.item() == STEPS[partition]


def test_the_state_follows_from_the_deltas_to_the_bit(recorded: Recorded) -> None:
    run = load_run(recorded.path)
    sizes = run.manifest["partition"]["sizes"]
    assert sizes == [263, 227, 615, 333]
    for number in (1, 2):
        row = run.round(number)
        order = sorted(row.participants, key=lambda p: (-sizes[p], p))
        assert order == FOLDED[number]
        for name, aggregate in row.aggregate.items():
            total: Any = 0
            for partition in order:
                client = row.client(partition)
                assert client.telemetry["num_samples"] == sizes[partition]
                weighted = sizes[partition] * client.delta[name].numpy().astype(np.float64)
                total = total + weighted
            mean = total / sum(sizes[p] for p in order)
            if not aggregate.is_floating_point():
                mean = np.rint(mean)
            mean = np.asarray(mean).astype(aggregate.numpy().dtype)
            assert mean.tobytes() == aggregate.numpy().tobytes()
            after = run.round(number - 1).state[name] + aggregate
            assert torch.equal(after, row.state[name])


def test_the_hashes_are_those_of_the_written_rule(recorded: Recorded) -> None:
    run = load_run(recorded.path)
    for number in (0, 1, 2):
        digest = hashlib.sha256()
        for name, tensor in sorted(run.round(number).state.items()):
            dtype = {torch.float32: "float32", torch.int64: "int64"}[tensor.dtype]
            digest.update(name.encode() + b"\0" + dtype.encode() + b"\0")
            digest.update(",".join(map(str, tensor.shape)).encode() + b"\0")
            digest.update(tensor.numpy().astype(tensor.numpy().dtype.newbyteorder("<")).tobytes())
        assert run.round(number).row["state_sha256"] == digest.hexdigest()
    digest = hashlib.sha256()
    for partition, indices in run.partition.items():
        digest.update(struct.pack("<qq", partition, len(indices)))
        digest.update(struct.pack(f"<{len(indices)}q", *indices.tolist()))
    assert run.manifest["partition"]["sha256"] == digest.hexdigest()


def test_telemetry_follows_from_the_other_files(recorded: Recorded) -> None:
    run = load_run(recorded.path)
    labels = recorded.plan.dataset.train_labels.numpy()
    for number, partition in itertools.product((1, 2), (1, 2)):
        client = run.round(number).client(partition)
        row, first = client.telemetry, client.gradient(0)
        sizes = [step["batch_size"] for step in client.steps]
        losses = [step["loss"] for step in client.steps]
        assert row["loss_history"] == losses
        assert row["batch_sizes"] == sizes
        assert sizes == [len(step["indices"]) for step in client.steps]
        assert row["local_loss"] == pytest.approx(np.dot(losses, sizes) / sum(sizes), rel=1e-12)
        norms = {n: float(np.linalg.norm(g.double().numpy())) for n, g in first.items()}
        assert row["per_layer_norms"] == pytest.approx(norms, rel=1e-6)
        total = sum(norm**2 for norm in norms.values()) ** 0.5
        assert row["gradient_norm"] == pytest.approx(total, rel=1e-6)
        counts = [int((labels[run.partition[partition]] == c).sum()) for c in range(10)]
        assert row["class_distribution"] == counts
        assert row["num_steps_captured"] == row["num_steps"] == len(client.steps)
        folder = recorded.path / f"rounds/{number:04d}/clients/{partition:04d}"
        stored = sum(
            t.numel() * 4
            for path in folder.glob("gradients-*.safetensors")
            for t in TensorFile(path).values()
        )
        assert row["bytes_captured"] == stored


# --- gradients of a client, layers of many steps, and parameters by replay


def train_again(recorded: Recorded, number: int, partition: int) -> list[dict[str, Tensor]]:
    """Train a client once more; give its parameters before each step and at the end."""
    run, plan = load_run(recorded.path), recorded.plan
    settings = plan.config.training_of(partition)
    batches = load_batches(
        plan.task,
        plan.dataset.train(),
        plan.partition[partition],
        settings,
        order=generator(42, Purpose.BATCHES, number, partition),
        augmentation=generator(42, Purpose.AUGMENTATION, number, partition),
        device=torch.device("cpu"),
    )
    model = build_model("cnn", classes=10, norm="batch", seed=0)
    seen: list[dict[str, Tensor]] = []

    def look(step: Step | None) -> None:
        seen.append({n: p.detach().clone() for n, p in model.named_parameters()})

    start = {n: t.numpy() for n, t in run.round(number - 1).state.items()}
    local_train(plan.task, model, start, batches, settings.optimizer, look)
    look(None)
    return seen


def equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return list(left) == list(right) and all(torch.equal(left[n], right[n]) for n in right)


@pytest.mark.parametrize(("number", "partition"), [(1, 0), (2, 1)])
def test_parameters_by_replay_are_those_of_the_training_to_the_bit(
    number: int, partition: int, recorded: Recorded
) -> None:
    client = load_run(recorded.path).round(number).client(partition)
    seen = train_again(recorded, number, partition)
    assert len(seen) == STEPS[partition] + 1
    assert client.is_replayable
    for step, parameters in enumerate(seen):
        assert equal(client.parameters_at(step), parameters)
    # A pass over all steps goes through the same ones.
    passed = 0
    for gradient, parameters in client.replay():
        assert gradient.step == passed
        assert equal(gradient, client.gradient(passed))
        assert equal(parameters, seen[passed])
        passed += 1
    assert passed == STEPS[partition]


def test_asking_for_parameters_changes_no_state(recorded: Recorded) -> None:
    client = load_run(recorded.path).round(1).client(0)
    first = client.parameters_at(2)
    for tensor in first.values():
        tensor.zero_()
    assert equal(client.parameters_at(2), train_again(recorded, 1, 0)[2])


def test_weight_decay_is_added_with_the_parameters_before_the_step(recorded: Recorded) -> None:
    client = load_run(recorded.path).round(2).client(1)
    seen = train_again(recorded, 2, 1)
    assert recorded.plan.config.weight_decay == 5e-4
    for step in (0, 3):
        plain = client.gradient(step)
        decayed = client.gradient(step, weight_decay=True)
        assert list(decayed) == list(plain)
        for name, tensor in decayed.items():
            assert torch.equal(tensor, plain[name].add(seen[step][name], alpha=5e-4))
            exact = plain[name].double() + 5e-4 * seen[step][name].double()
            torch.testing.assert_close(tensor.double(), exact, rtol=1e-6, atol=1e-9)
        assert not torch.equal(decayed["13.weight"], plain["13.weight"])


def test_a_layer_is_the_gradients_of_one_parameter_over_its_steps(recorded: Recorded) -> None:
    client = load_run(recorded.path).round(1).client(0)
    for name, shape in recorded.plan.parameters.items():
        stacked = client.layer(name)
        assert (stacked.dtype, tuple(stacked.shape)) == (torch.float32, (5, *shape))
        for step in range(5):
            assert torch.equal(stacked[step], client.gradient(step)[name])
    whole = client.layer("13.bias")
    for steps in (slice(1, 3), slice(-1, None), slice(None, None, 2), slice(9, 12), slice(3, -9)):
        assert torch.equal(client.layer("13.bias", steps), whole[steps])


def test_a_gradient_comes_as_arrays_too(recorded: Recorded) -> None:
    gradient = load_run(recorded.path).round(1).client(0).gradient(2)
    arrays = gradient.numpy()  # type: ignore[attr-defined]
    assert list(arrays) == list(gradient)
    for name, array in arrays.items():
        assert array.dtype == np.float32
        assert array.tobytes() == gradient[name].numpy().tobytes()


SHAPES = {"stem": (4, 2, 3, 3), "scale": (4,), "head": (3, 4)}


def gradients_of(seed: int, live: Sequence[int] = range(9)) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    gradients = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    gradients["stem"].flatten(2)[:, :, [tap for tap in range(9) if tap not in live]] = 0
    return gradients


def run_of(
    root: Path,
    gradients: Sequence[Mapping[str, Tensor]],
    *,
    shard_bytes: int = 10**6,
    **values: Any,
) -> Client:
    """Write a run of one client that got these gradients, and give the client."""
    config = RunConfig.from_mapping({n.replace("_", "-"): v for n, v in values.items()})
    parameters = [{"name": n, "shape": list(s), "dtype": "float32"} for n, s in SHAPES.items()]
    model = {"arch": "cnn", "parameters": parameters, "buffers": []}
    manifest = {"config": config.to_mapping(), "model": model}
    writer = RunWriter.create(root, manifest, [np.arange(len(gradients))] * 7)
    state = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
    writer.add_state(0, state)
    writer.add_round(round_row(0))
    captures = [
        replace(found, shard_bytes=shard_bytes) if isinstance(found, Gradients) else found
        for found in config.captures
    ]
    with StepRecorder(
        RunLayout(root).client(1, 6), captures, num_steps=len(gradients), shapes=SHAPES
    ) as recorder:
        for number, gradient in enumerate(gradients):
            recorder(
                Step(
                    index=number,
                    epoch=0,
                    indices=np.array([number]),
                    loss=torch.tensor(1.0),
                    learning_rate=0.01,
                    gradients=gradient,
                )
            )
    files = {name: checksum.to_json() for name, checksum in recorder.files.items()}
    writer.add_client(client_row(1, 6, len(gradients), files=files), state)
    writer.add_state(1, state)
    writer.add_round(round_row(1, [6]))
    return load_run(root).round(1).client(6)


FORMS = pytest.mark.parametrize(
    "form",
    [
        {},
        {"capture_encoding": "dense"},
        {"capture_dtype": "bfloat16"},
        {"capture_dtype": "float16", "capture_encoding": "dense"},
        {"shard_bytes": 1},
    ],
)
GROWING = [(4,), (4,), (0, 4), (4,), (4, 8)]


@FORMS
def test_shards_of_any_form_read_alike(form: dict[str, Any], tmp_path: Path) -> None:
    gradients = [gradients_of(n, live) for n, live in enumerate(GROWING)]
    client = run_of(tmp_path / "run", gradients, capture="all", **form)
    dtype = getattr(torch, form.get("capture_dtype", "float32"))
    stored = [{n: t.to(dtype).float() for n, t in gradient.items()} for gradient in gradients]
    assert client.captured_steps == [0, 1, 2, 3, 4]
    assert client.captured_parameters == list(SHAPES)
    for step, expected in enumerate(stored):
        assert equal(client.gradient(step), expected)
    for name in SHAPES:
        assert torch.equal(client.layer(name), torch.stack([g[name] for g in stored]))
    # SGD with momentum and decay, by hand and in float64.
    values = {name: np.ones(shape) for name, shape in SHAPES.items()}
    speeds = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for step, gradient in enumerate(stored):
        for name, tensor in client.parameters_at(step).items():
            np.testing.assert_allclose(tensor.numpy(), values[name], rtol=0, atol=1e-6)
        for name in SHAPES:
            pulled = gradient[name].double().numpy() + 5e-4 * values[name]
            speeds[name] = 0.9 * speeds[name] + pulled
            values[name] = values[name] - 0.01 * speeds[name]
    for name, tensor in client.parameters_at(5).items():
        np.testing.assert_allclose(tensor.numpy(), values[name], rtol=0, atol=1e-6)


def test_layers_that_were_not_kept_are_in_no_reading(tmp_path: Path) -> None:
    gradients = [gradients_of(n, (4,)) for n in range(3)]
    client = run_of(tmp_path / "run", gradients, capture="all", capture_layers=["head", "scale"])
    # In the model's order, not in that of the globs.
    assert client.captured_parameters == list(client.gradient(0)) == ["scale", "head"]
    assert list(client.parameters_at(3)) == ["scale", "head"]
    assert (client.is_replayable, client.has_all_parameters) == (True, False)
    assert "stem" not in client.gradient(1)


@pytest.mark.parametrize(
    ("values", "replayable"),
    [
        ({"capture": "all"}, True),
        ({"capture": "first:2"}, False),
        ({"capture": "last:3"}, True),
        ({"capture": "all", "capture_layers": ["head"]}, True),
        ({"capture": "all", "autocast": "float16"}, True),
        ({"capture": "all", "autocast": "bfloat16", "capture_layers": ["head"]}, True),
        # A step that overflowed elsewhere made no update, which the head alone does not tell.
        ({"capture": "all", "autocast": "float16", "capture_layers": ["head"]}, False),
        ({"capture": "none"}, False),
        ({"capture": "sketch:5"}, False),
    ],
)
def test_a_client_is_replayable_when_all_that_it_takes_was_kept(
    values: dict[str, Any], replayable: bool, tmp_path: Path
) -> None:
    gradients = [gradients_of(n) for n in range(3)]
    assert run_of(tmp_path / "run", gradients, **values).is_replayable == replayable


def test_a_float16_step_that_overflowed_is_no_update_of_a_replay(tmp_path: Path) -> None:
    gradients = [gradients_of(n) for n in range(3)]
    gradients[1]["head"][0, 0] = float("inf")
    client = run_of(tmp_path / "run", gradients, capture="all", autocast="float16")
    before, skipped, after = (client.parameters_at(step) for step in (1, 2, 3))
    assert equal(before, skipped)
    assert not equal(after, skipped)
    assert all(bool(tensor.isfinite().all()) for tensor in after.values())
    assert client.gradient(1)["head"][0, 0].item() == float("inf")


@pytest.mark.parametrize("autocast", ["none", "float16"])
def test_a_sketch_is_read_by_its_step(autocast: str, tmp_path: Path) -> None:
    gradients = [gradients_of(n, live) for n, live in enumerate(GROWING)]
    client = run_of(tmp_path / "run", gradients, capture="sketch:11", autocast=autocast)
    own = Sketcher(42, 11, {name: n for n, name in enumerate(SHAPES)})
    for step, gradient in enumerate(gradients):
        found = client.sketch(step)
        assert (found.dtype, found.shape) == (np.float32, (11,))
        assert np.array_equal(found, own.sketch(gradient, dict.fromkeys(SHAPES)))
    assert client.captured_steps == client.captured_parameters == []


def test_what_was_not_kept_is_named_with_what_was(tmp_path: Path) -> None:
    gradients = [gradients_of(n, (4,)) for n in range(4)]
    some = run_of(tmp_path / "some", gradients, capture="last:2", capture_layers=["head"])
    none = run_of(tmp_path / "none", gradients, capture="none")
    sketch = run_of(tmp_path / "sketch", gradients, capture="sketch:3")
    of = "of client 6 in round 1"
    left_out = "was not captured: capture = 'last:2' keeps steps 2 to 3"
    keeps_none = "capture = 'none' keeps no gradients"
    asked: list[tuple[Callable[[], Any], str]] = [
        (lambda: some.gradient(1), f"step 1 {of} {left_out}"),
        (lambda: some.gradient(-1), f"step -1 {of} was not made; it made 0 to 3"),
        (lambda: some.gradient(4), f"step 4 {of} was not made; it made 0 to 3"),
        (
            lambda: some.gradient(2, weight_decay=True),
            f"step 0 {of} {left_out}",
        ),
        (lambda: some.parameters_at(1), f"step 0 {of} {left_out}"),
        (lambda: next(some.replay()), f"step 0 {of} {left_out}"),
        (lambda: some.parameters_at(5), f"step 5 {of} was not made; expected 0 to 4"),
        (lambda: some.parameters_at(-1), f"step -1 {of} was not made; expected 0 to 4"),
        (
            lambda: some.layer("stem"),
            f"stem {of} was not captured: capture-layers = ['head'] keeps head",
        ),
        (lambda: none.layer("stem"), f"stem {of} was not captured: {keeps_none}"),
        (lambda: none.parameters_at(0), f"step 0 {of} was not captured: {keeps_none}"),
        (lambda: next(none.replay()), f"step 0 {of} was not captured: {keeps_none}"),
        (lambda: some.sketch(0), f"step 0 {of} has no sketch; there are 0"),
        (lambda: sketch.sketch(4), f"step 4 {of} has no sketch; there are 4"),
        (lambda: sketch.sketch(-1), f"step -1 {of} has no sketch; there are 4"),
        (
            lambda: sketch.gradient(0),
            f"step 0 {of} was not captured: capture = 'sketch:3' keeps no gradients",
        ),
        (lambda: some.shard(3, "stem"), f"{some.folder} holds no gradient 000003/stem"),
    ]
    for ask, sentence in asked:
        with pytest.raises(InputError) as caught:
            ask()
        assert str(caught.value) == sentence
    assert equal(some.parameters_at(0), {"head": torch.ones(3, 4)})
    assert some.shard(3, "head").keys == ["000002/head", "000003/head"]


def test_a_shard_has_no_more_gradients_than_a_header_should_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsim.captures.gradients.MOST_KEYS", 7)
    client = run_of(tmp_path / "run", [gradients_of(n) for n in range(5)], capture="all")
    steps = {shard.path.name: shard.steps for shard in client.shards.values()}
    assert sorted(steps.values()) == [[0, 1], [2, 3], [4]]


# --- shards that were not written by a recorder


def shard_of(path: Path, **arrays: NDArray[Any]) -> Shard:
    write_tensors(path, {name.replace("_", "/"): array for name, array in arrays.items()})
    return Shard(path, SHAPES)


@pytest.mark.parametrize(
    ("name", "taps"),
    [
        ("stem", np.array([9])),
        ("stem", np.array([-1])),
        ("stem", np.array([4, 4])),
        ("stem", np.array([5, 4])),
        ("stem", np.array([[4]])),
        ("stem", np.array(4)),
        ("stem", np.array([4], np.int32)),
        ("stem", np.array([4.0])),
        ("stem", np.array([True])),
        ("scale", np.array([0])),
        ("scale", np.zeros(0, np.int64)),
        ("head", np.array([0])),
    ],
)
def test_taps_that_fit_no_kernel_of_the_parameter_are_refused(
    name: str, taps: NDArray[Any], tmp_path: Path
) -> None:
    path = tmp_path / "gradients-00000.safetensors"
    entries = {f"support_{name}": taps, f"000000_{name}": np.zeros((1, 4, 2), np.float32)}
    shard = shard_of(path, **entries)
    kernel = "(3, 3)" if name == "stem" else "()"
    for ask in (shard.taps, lambda name: shard.gradient(0, name)):
        with pytest.raises(InputError) as caught:
            ask(name)
        assert str(caught.value) == (
            f"{path}: support/{name} does not fit a kernel of shape {kernel}"
        )


@pytest.mark.parametrize(
    ("name", "taps", "shape", "expected"),
    [
        ("stem", None, (4, 2, 9), (4, 2, 3, 3)),
        ("stem", None, (1, 4, 2), (4, 2, 3, 3)),
        ("stem", [4], (4, 2, 3, 3), (1, 4, 2)),
        ("stem", [4], (2, 4, 2), (1, 4, 2)),
        ("stem", [4, 5], (2, 2, 4), (2, 4, 2)),
        ("scale", None, (5,), (4,)),
        ("scale", None, (), (4,)),
        ("head", None, (4, 3), (3, 4)),
    ],
)
def test_a_gradient_of_another_shape_is_refused(
    name: str,
    taps: list[int] | None,
    shape: tuple[int, ...],
    expected: tuple[int, ...],
    tmp_path: Path,
) -> None:
    path = tmp_path / "gradients-00000.safetensors"
    support = {} if taps is None else {f"support_{name}": np.array(taps)}
    shard = shard_of(path, **support, **{f"000000_{name}": np.zeros(shape, np.float32)})
    with pytest.raises(InputError) as caught:
        shard.gradient(0, name)
    assert str(caught.value) == f"{path}: 000000/{name} has shape {shape}, not {expected}"


def test_a_layer_of_some_steps_reads_nothing_else(tmp_path: Path) -> None:
    """Whatever is wrong with other parameters and other steps is not looked at."""
    gradients = [gradients_of(n, (4,)) for n in range(4)]
    client = run_of(tmp_path / "run", gradients, capture="all")
    path = client.folder / "gradients-00000.safetensors"
    arrays = {key: tensor.numpy() for key, tensor in TensorFile(path).items()}
    for broken in ("000001/head", "000002/scale", "support/stem"):
        arrays[broken] = np.zeros((2, 2, 2), np.float32)
    write_tensors(path, arrays)
    client = load_run(tmp_path / "run").round(1).client(6)
    for steps in (slice(0, 1), slice(2, 4), slice(None, None, 2)):
        expected = torch.stack([g["head"] for g in gradients[steps]])
        assert torch.equal(client.layer("head", steps), expected)
    assert torch.equal(client.gradient(0)["scale"], gradients[0]["scale"])
    for ask, key in (
        (lambda: client.layer("head"), "000001/head"),
        (lambda: client.layer("scale", slice(2, 3)), "000002/scale"),
        (lambda: client.gradient(3)["stem"], "support/stem"),
    ):
        with pytest.raises(InputError, match=key):
            ask()


# --- the page on the format


def example_reader() -> Callable[[Path], Any]:
    (code,) = re.findall(r"```python\n(.*?)```", FORMAT.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {"__name__": "format"}
    exec(compile(code, FORMAT, "exec"), names)  # noqa: S102
    reader: Callable[[Path], Any] = names["read_run"]
    return reader


def test_the_reader_of_the_format_page_reads_what_ours_reads(recorded: Recorded) -> None:
    def same(left: NDArray[np.generic], right: Tensor) -> bool:
        array = right.numpy()
        return (left.dtype, left.shape, left.tobytes()) == (
            array.dtype,
            array.shape,
            array.tobytes(),
        )

    run = load_run(recorded.path)
    manifest, partition, rounds = example_reader()(recorded.path)
    assert manifest == run.manifest
    assert {int(k): v.tolist() for k, v in partition.items()} == {
        k: v.tolist() for k, v in run.partition.items()
    }
    assert list(rounds) == [0, 1, 2]
    for number, found in rounds.items():
        ours = run.round(number)
        assert set(found["state"]) == set(ours.state)
        assert all(same(found["state"][n], t) for n, t in ours.state.items())
        assert list(found["clients"]) == list(ours.clients)
        for number_of_client, client in found["clients"].items():
            ours_of = ours.client(number_of_client)
            assert client["steps"] == ours_of.steps
            assert client["loss_history"] == ours_of.telemetry["loss_history"]
            assert all(same(client["delta"][n], t) for n, t in ours_of.delta.items())
            assert sorted(client["gradients"]) == ours_of.captured_steps
            for step, gradients in client["gradients"].items():
                assert set(gradients) == set(ours_of.gradient(step))
                assert all(same(gradients[n], t) for n, t in ours_of.gradient(step).items())


@FORMS
def test_the_reader_of_the_format_page_reads_shards_of_any_form(
    form: dict[str, Any], tmp_path: Path
) -> None:
    live = [(), *GROWING, tuple(range(9)), (3,)]
    client = run_of(
        tmp_path / "run", [gradients_of(n, t) for n, t in enumerate(live)], capture="all", **form
    )
    _, _, rounds = example_reader()(tmp_path / "run")
    found = rounds[1]["clients"][6]["gradients"]
    assert sorted(found) == client.captured_steps == list(range(len(live)))
    for step, gradients in found.items():
        ours = client.gradient(step)
        assert set(gradients) == set(ours)
        for name, array in gradients.items():
            assert (array.dtype, array.shape) == (np.float32, SHAPES[name])
            assert np.ascontiguousarray(array).tobytes() == ours[name].numpy().tobytes()


def test_the_reader_of_the_format_page_ignores_what_a_kill_left(recorded: Recorded) -> None:
    _, _, rounds = example_reader()(recorded.killed)
    assert {n: list(r["clients"]) for n, r in rounds.items()} == {0: [], 1: FOLDED[1]}


def test_the_examples_of_the_format_page_are_true() -> None:
    page = " ".join(FORMAT.read_text(encoding="utf-8").split())
    state = {"w": np.array([1, -2], np.float32), "n": np.array(3)}
    partition = [np.array([1, 4]), np.array([0, 2, 3])]
    raw = b"n\0int64\0\0" + struct.pack("<q", 3) + b"w\0float32\x002\0" + struct.pack("<2f", 1, -2)
    assert len(raw) == 37
    assert state_sha256(state) == hashlib.sha256(raw).hexdigest()
    numbers = struct.pack("<9q", 0, 2, 1, 4, 1, 3, 0, 2, 3)
    assert partition_sha256(partition) == hashlib.sha256(numbers).hexdigest()
    for digest in (state_sha256(state), partition_sha256(partition)):
        assert f"sha256 {digest}" in page
    for text in (raw.hex(" "), numbers.hex(" ", 8)):
        assert text in page

    def draw(*entropy: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))

    drawn = draw(42, 1, 1, 0).choice(20, size=5, replace=False)
    assert f"choice(20, size=5, replace=False) {' '.join(map(str, drawn))}" in page
    order = draw(42, 2, 1, 7).permutation(10)
    assert f"permutation(10) {' '.join(map(str, order))}" in page
    augmentation = draw(42, 3, 1, 7)
    rows, columns = augmentation.integers(0, 9, size=(2, 4))
    mirrored = augmentation.random(4) < 0.5
    assert f"{' '.join(map(str, rows))} / {' '.join(map(str, columns))}" in page
    assert f"random(4) < 0.5 {' '.join(str(bool(m)).lower() for m in mirrored)}" in page


def test_the_format_page_describes_every_key_that_a_run_holds(recorded: Recorded) -> None:
    page = FORMAT.read_text(encoding="utf-8")

    def keys(value: Any, path: str = "") -> set[str]:
        named_by_others = ("client", "versions", "per_layer_norms", "files", "dataset.columns")
        if not isinstance(value, dict) or path in named_by_others:
            return {path} - {""}
        found = set()
        for key, item in value.items():
            found |= keys(item, key if path in ("", "config") else f"{path}.{key}")
        return found

    run = load_run(recorded.path)
    held = keys(run.manifest)
    for row in [*run.round_rows, *run.client_rows, *run.round(1).client(0).steps]:
        held |= keys(row)
    assert len(held) > 60
    assert {key for key in held if f"`{key}`" not in page} == set()
    assert {key for key in run.manifest["versions"] if f"`{key}`" not in page} == set()


# --- laziness


ROW = 512


def make_sparse(path: Path, size: int, *, step: int = 0) -> None:
    """Write a shard with `size` bytes of zeros, which take no place, and a mark."""
    header = {
        f"{step:06d}/13.weight": {
            "dtype": "F32",
            "shape": [size // 4 // ROW, ROW],
            "data_offsets": [0, size],
        },
        f"{step:06d}/13.bias": {"dtype": "F32", "shape": [2], "data_offsets": [size, size + 8]},
    }
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + size)
        file.seek(0, os.SEEK_END)
        file.write(struct.pack("<2f", 1.5, -2.5 - step))


def change_shapes(root: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    manifest = json.loads((root / "run.json").read_text())
    for parameter in manifest["model"]["parameters"]:
        parameter["shape"] = list(shapes.get(parameter["name"], parameter["shape"]))
    (root / "run.json").write_text(json.dumps(manifest))


def test_a_shard_of_gigabytes_is_mapped_and_not_read(copied: Path) -> None:
    size = 2 * 2**30
    shard = copied / "rounds" / "0001" / "clients" / "0000" / "gradients-00000.safetensors"
    make_sparse(shard, size)
    change_shapes(copied, {"13.weight": (size // 4 // ROW, ROW), "13.bias": (2,)})
    before = rss()
    client = load_run(copied).round(1).client(0)
    gradient = client.gradient(0)
    assert list(gradient) == ["13.weight", "13.bias"]
    weight, bias = gradient["13.weight"], gradient["13.bias"]
    assert weight.numel() * weight.element_size() == size
    assert bias.tolist() == [1.5, -2.5]
    assert (weight[0, 0].item(), weight[-1, -1].item()) == (0.0, 0.0)
    assert client.layer("13.bias").tolist() == [[1.5, -2.5]]
    assert rss() - before < 50e6
    if sys.platform == "linux":
        assert os.path.realpath(shard) in {m.path for m in psutil.Process().memory_maps()}


def list_shards(root: Path, number: int, partition: int) -> None:
    """Let the client's row list the shards that are in its folder, as any files."""
    rows = list(read_lines(root / "clients.jsonl"))
    (row,) = [r for r in rows if (r["round"], r["partition"]) == (number, partition)]
    folder = RunLayout(root).client(number, partition)
    row["files"] |= {
        path.name: {"bytes": 1, "xxh3_128": "0" * 32} for path in folder.glob("gradients-*")
    }
    (root / "clients.jsonl").write_bytes(b"".join(map(json_line, rows)))


def test_a_client_of_a_hundred_gigabytes_takes_little_memory(copied: Path) -> None:
    size, shards = 2 * 2**30, 50
    folder = copied / "rounds" / "0001" / "clients" / "0000"
    for step in range(shards):
        make_sparse(folder / f"gradients-{step:05d}.safetensors", size, step=step)
    list_shards(copied, 1, 0)
    change_shapes(copied, {"13.weight": (size // 4 // ROW, ROW), "13.bias": (2,)})
    assert sum(path.stat().st_size for path in folder.glob("gradients-*")) > 100e9
    before = rss()
    client = load_run(copied).round(1).client(0)
    assert client.captured_steps == list(range(shards))
    assert client.captured_parameters == ["13.weight", "13.bias"]
    assert client.layer("13.bias")[:, 1].tolist() == [-2.5 - step for step in range(shards)]
    assert client.layer("13.bias", slice(-2, None)).tolist() == [[1.5, -50.5], [1.5, -51.5]]
    assert rss() - before < 50e6


def test_opening_a_run_opens_no_tensors(copied: Path) -> None:
    for path in copied.rglob("*.safetensors"):
        path.unlink()
    run = load_run(copied)
    assert numbers(run) == [0, 1, 2]
    assert len(run.telemetry()) == 6
    client = run.round(2).client(3)
    assert client.telemetry["num_steps"] == 6
    folder = copied / "rounds" / "0002" / "clients" / "0003"
    for name, ask in (
        ("gradients-00000.safetensors", lambda: client.captured_steps),
        ("delta.safetensors", lambda: client.delta),
    ):
        with pytest.raises(InputError) as caught:
            ask()
        assert str(caught.value) == f"{folder / name} is not there"


def test_writing_into_a_tensor_does_not_change_the_file(copied: Path) -> None:
    path = copied / "rounds" / "0001" / "global.safetensors"
    before = path.read_bytes()
    state = load_run(copied).round(1).state
    tensor = state["13.weight"]
    tensor.add_(1)
    assert path.read_bytes() == before
    assert not torch.equal(tensor, load_run(copied).round(1).state["13.weight"])


# --- what cannot be used


def test_unknown_rounds_clients_and_steps_are_named_with_what_there_is(recorded: Recorded) -> None:
    run = load_run(recorded.path)
    for ask, sentence in [
        (
            lambda: run.round(3),
            f"round 3 of {recorded.path} is not finished; finished are 0 to 2",
        ),
        (
            lambda: run.round(1).client(3),
            "client 3 has no work in round 1; clients of the round are [0, 1, 2]",
        ),
        (
            lambda: run.round(0).client(0),
            "client 0 has no work in round 0; clients of the round are []",
        ),
        (
            lambda: run.round(1).client(0).gradient(5),
            "step 5 of client 0 in round 1 was not made; it made 0 to 4",
        ),
        (
            lambda: run.round(0).aggregate,
            f"{recorded.path / 'rounds' / '0000' / 'aggregate.safetensors'} is not there",
        ),
    ]:
        with pytest.raises(InputError) as caught:
            ask()
        assert str(caught.value) == sentence


def test_an_unknown_tensor_is_a_key_error(recorded: Recorded) -> None:
    run = load_run(recorded.path)
    for tensors in (run.round(0).state, run.round(1).client(0).gradient(0)):
        assert "fc.weight" not in tensors
        with pytest.raises(KeyError):
            tensors["fc.weight"]


def test_a_torn_last_line_is_no_round(copied: Path) -> None:
    path = copied / "rounds.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    run = load_run(copied)
    assert numbers(run) == [0, 1]
    # The clients of round 2 are all there, and belong to no round.
    assert run.telemetry()["round"].tolist() == [1, 1, 1]
    with pytest.raises(InputError, match=r"round 2 of .* is not finished; finished are 0 to 1"):
        run.round(2)


def test_what_a_kill_in_mid_round_left_is_ignored(recorded: Recorded, tmp_path: Path) -> None:
    root = Path(shutil.copytree(recorded.killed, tmp_path / "killed"))
    # Two of three clients of round 2 are folded; a row and files were being written.
    with (root / "clients.jsonl").open("ab") as file:
        file.write(b'{"round":1,"partition":3,"status":"o')
    for name in ("rounds/0002/global", "rounds/0001/clients/0000/gradients-00001"):
        (root / f"{name}.safetensors.77.partial").write_bytes(b"half")
    (root / "run.json.77.partial").write_bytes(b"{")
    run = load_run(root)
    assert run.status == "running"
    assert numbers(run) == [0, 1]
    assert list(run.round(1).clients) == FOLDED[1]
    assert run.telemetry()["round"].tolist() == [1, 1, 1]
    assert run.round(1).client(0).captured_steps == [0, 1, 2, 3, 4]
    assert run.round(1).row["state_sha256"] == load_run(recorded.path).round(1).row["state_sha256"]


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b'{"format"', b"[1]", b"1", b"null", b"{}", b"\xff\xfe{}"]
)
def test_a_folder_without_a_whole_manifest_is_no_run(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_run(tmp_path)
    assert str(caught.value) == f"{tmp_path} is not a run directory: it has no whole run.json"


def test_a_path_that_is_no_folder_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for path in (tmp_path / "nothing", tmp_path / "file"):
        with pytest.raises(InputError) as caught:
            load_run(str(path))
        assert str(caught.value) == f"{path} is not a run directory: it has no whole run.json"


@pytest.mark.parametrize("found", [0, 3, "1", None])
def test_another_format_is_refused(found: Any, tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {"format": found, "status": "finished"})
    with pytest.raises(InputError) as caught:
        load_run(tmp_path)
    assert str(caught.value) == f"{tmp_path} has format {found!r}; this version reads 1 and 2"


@pytest.mark.parametrize("bad", [b"{\n", b"\n", b"\xff\xfe\n", b'{"round":0}{"round":1}\n'])
@pytest.mark.parametrize("name", ["rounds.jsonl", "clients.jsonl"])
def test_a_line_that_is_not_json_is_an_input_error(name: str, bad: bytes, copied: Path) -> None:
    path = copied / name
    path.write_bytes(bad + path.read_bytes())
    run = load_run(copied)
    with pytest.raises(InputError) as caught:
        run.telemetry()
    assert str(caught.value) == f"{path} holds a line that is not JSON"


def test_a_step_line_that_is_not_json_is_an_input_error(copied: Path) -> None:
    path = copied / "rounds" / "0001" / "clients" / "0000" / "steps.jsonl"
    path.write_bytes(b"{\n")
    with pytest.raises(InputError) as caught:
        _ = load_run(copied).round(1).client(0).steps
    assert str(caught.value) == f"{path} holds a line that is not JSON"


@pytest.mark.parametrize("row", [b"3\n", b"{}\n"])
def test_a_row_that_is_no_row_is_an_input_error(row: bytes, copied: Path) -> None:
    (copied / "rounds.jsonl").write_bytes(row)
    with pytest.raises(InputError):
        load_run(copied).round(1)


def test_a_run_killed_before_its_rows_has_no_rounds(copied: Path) -> None:
    (copied / "rounds.jsonl").unlink()
    (copied / "clients.jsonl").unlink()
    assert load_run(copied).round_rows == []
    assert load_run(copied).client_rows == []


def test_a_manifest_without_an_entry_is_an_input_error(copied: Path) -> None:
    (copied / "run.json").write_text('{"format": 1}')
    for entry in ("status", "config", "parameters"):
        with pytest.raises(InputError, match=r"run\.json has no (status|config|model)"):
            getattr(load_run(copied), entry)


def test_steps_that_are_missing_are_an_input_error(copied: Path) -> None:
    path = copied / "rounds" / "0001" / "clients" / "0000" / "steps.jsonl"
    path.unlink()
    with pytest.raises(InputError) as caught:
        _ = load_run(copied).round(1).client(0).steps
    assert str(caught.value) == f"{path} is not there"


def read_state(run: Path) -> Any:
    return load_run(run).round(1).state


def read_gradient(run: Path) -> Any:
    return load_run(run).round(1).client(0).gradient(0)


def read_partition(run: Path) -> Any:
    return load_run(run).partition


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("rounds/0001/global.safetensors", read_state),
        ("rounds/0001/clients/0000/gradients-00000.safetensors", read_gradient),
        ("partition.safetensors", read_partition),
    ],
)
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda raw: raw[:-1], id="one byte short"),
        pytest.param(lambda raw: raw[:100], id="cut in the header"),
        pytest.param(lambda raw: raw[:3], id="cut in the length"),
        pytest.param(lambda raw: b"", id="empty"),
        pytest.param(lambda raw: raw + b"x", id="one byte more"),
        pytest.param(lambda raw: b"\xff" * len(raw), id="noise"),
    ],
)
def test_a_damaged_tensor_file_is_an_input_error(
    name: str,
    read: Callable[[Path], Any],
    damage: Callable[[bytes], bytes],
    copied: Path,
) -> None:
    path = copied / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError) as caught:
        read(copied)
    assert str(caught.value).startswith(f"{path} is not a whole safetensors file: ")


def test_captured_steps_with_gaps_are_listed_one_by_one(tmp_path: Path) -> None:
    root = tmp_path / "run"
    parameters = [{"name": "w", "shape": [1], "dtype": "float32"}]
    model = {"arch": "cnn", "parameters": parameters, "buffers": []}
    config = RunConfig.from_mapping({"capture": "every:3"}).to_mapping()
    writer = RunWriter.create(root, {"model": model, "config": config}, [])
    writer.add_client(client_row(1, 0, 7), {"w": np.zeros(1)})
    rows = root / "rounds.jsonl"
    append_line(rows, json_line(round_row(1, [0])), at=rows.stat().st_size)
    client = load_run(root).round(1).client(0)
    with pytest.raises(InputError, match=r"was not captured: the client kept none$"):
        client.gradient(0)
    folder = root / "rounds" / "0001" / "clients" / "0000"
    arrays = {f"{s:06d}/w": np.full(1, s, np.float32) for s in (0, 3, 6)}
    write_tensors(folder / "gradients-00000.safetensors", arrays)
    list_shards(root, 1, 0)
    client = load_run(root).round(1).client(0)
    with pytest.raises(InputError, match=r"captured: capture = 'every:3' keeps steps 0, 3, 6$"):
        client.gradient(1)
    assert client.gradient(6)["w"].tolist() == [6.0]


def test_what_is_opened_tells_what_it_is(recorded: Recorded) -> None:
    run = load_run(recorded.path)
    client = run.round(1).client(2)
    assert repr(run) == "<run run: finished, 3 rounds with round 0>"
    assert repr(run.round(1)) == "<round 1 of run>"
    assert repr(client) == "<client 2 in round 1>"
    assert repr(client.gradient(3)) == "<gradient of step 3: 11 parameters>"
    assert repr(client.delta) == "<delta.safetensors: 20 tensors>"


def test_the_data_frames_of_a_run_without_rounds_are_empty(tmp_path: Path) -> None:
    RunWriter.create(tmp_path / "run", {}, [])
    run = load_run(tmp_path / "run")
    assert isinstance(run.rounds(), pd.DataFrame)
    assert (len(run.rounds()), len(run.telemetry())) == (0, 0)
    with pytest.raises(InputError, match=r"finished are none$"):
        run.round(0)


@pytest.mark.parametrize(
    "changes", [{}, {"capture-dtype": "bfloat16"}, {"capture-dtype": "float16"}]
)
def test_a_shard_in_memory_holds_what_the_file_holds(tmp_path: Path, changes: Any) -> None:
    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    code = {"bfloat16": "BF16", "float16": "F16"}.get(changes.get("capture-dtype", ""), "F32")
    draw = torch.Generator().manual_seed(5)
    tensors = {
        "support/kernel": torch.tensor([1, 4]),
        "000007/kernel": torch.randn((2, 3, 2), generator=draw).to(names[code]),
        "000007/bias": torch.randn((3,), generator=draw).to(names[code]),
        "000009/kernel": torch.randn((2, 3, 2), generator=draw).to(names[code]),
        "000009/bias": torch.randn((3,), generator=draw).to(names[code]),
    }
    path = tmp_path / "gradients-00000.safetensors"
    safetensors.torch.save_file(tensors, path)
    shapes = {"kernel": (3, 2, 3, 3), "bias": (3,)}
    on_disk, in_memory = (
        Shard(path, shapes),
        Shard(path, shapes, memoryview(bytearray(path.read_bytes()))),
    )
    assert sorted(on_disk.keys) == sorted(in_memory.keys)
    assert on_disk.steps == in_memory.steps == [7, 9]
    for step in (7, 9):
        for name in shapes:
            assert torch.equal(on_disk.gradient(step, name), in_memory.gradient(step, name))


def test_any_flipped_bit_of_a_header_in_memory_is_refused_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "gradients-00000.safetensors"
    safetensors.torch.save_file({"000000/bias": torch.ones(3)}, path)
    content = path.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    for bit in range(8 * length):
        broken = bytearray(content)
        broken[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(InputError):
            for tensor in Shard(path, {"bias": (3,)}, memoryview(broken)).file.values():
                assert tensor.nbytes <= 12
