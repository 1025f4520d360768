from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim import load_run
from fedsim.core.aggregation import state_sha256
from fedsim.core.config import RunConfig
from fedsim.core.errors import InputError
from fedsim.core.partition import partition_sha256
from fedsim.recording.files import append_line, write_json, write_tensors
from fedsim.recording.reader import TensorFile
from fedsim.recording.writer import RunWriter
from tests.recording.conftest import Recorded

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
    assert rounds.to_dict("records") == lines_of(recorded.path / "rounds.jsonl")
    assert clients.to_dict("records") == lines_of(recorded.path / "clients.jsonl")
    assert rounds["round"].tolist() == [0, 1, 2]
    assert clients["round"].tolist() == [1, 1, 1, 2, 2, 2]
    assert clients["partition"].tolist() == FOLDED[1] + FOLDED[2]
    assert clients["num_samples"].tolist() == [615, 263, 227, 615, 333, 227]
    assert clients["num_steps"].tolist() == [10, 5, 4, 10, 6, 4]
    assert clients["bytes_captured"].tolist() == [n * 78_184 for n in (10, 5, 4, 10, 6, 4)]
    assert clients["learning_rate"].tolist() == [0.01, 0.01, 0.02, 0.01, 0.01, 0.02]
    assert clients["num_samples"].dtype == np.int64
    assert clients["local_loss"].dtype == np.float64


def test_a_loss_that_is_not_finite_is_missing_in_the_data_frames(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path / "run", {}, [])
    for number, loss in enumerate([2.5, float("nan"), float("inf")]):
        writer.add_round({"round": number, "global_loss": loss, "global_accuracy": 0.1})
    rounds = load_run(tmp_path / "run").rounds()
    assert rounds["global_loss"].isna().tolist() == [False, True, True]
    assert rounds["global_accuracy"].tolist() == [0.1, 0.1, 0.1]


def test_a_client_that_failed_has_a_row_and_no_work(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path / "run", {}, [])
    writer.add_client({"round": 1, "partition": 4, "status": "ok"}, {"w": np.zeros(1)})
    writer.add_failure({"round": 1, "partition": 2, "status": "failed", "error": "why"})
    writer.add_round({"round": 1, "participants": [2, 4], "failed": [2]})
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
        if not isinstance(value, dict) or path in ("client", "versions", "per_layer_norms"):
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


def make_sparse(path: Path, size: int) -> None:
    """Write a safetensors file with `size` bytes of zeros, which take no place, and a mark."""
    header = {
        "000000/13.weight": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]},
        "000000/13.bias": {"dtype": "F32", "shape": [2], "data_offsets": [size, size + 8]},
    }
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + size)
        file.seek(0, os.SEEK_END)
        file.write(struct.pack("<2f", 1.5, -2.5))


def test_a_shard_of_gigabytes_is_mapped_and_not_read(copied: Path) -> None:
    size = 2 * 2**30
    shard = copied / "rounds" / "0001" / "clients" / "0000" / "gradients-00000.safetensors"
    make_sparse(shard, size)
    before = rss()
    client = load_run(copied).round(1).client(0)
    gradient = client.gradient(0)
    assert list(gradient) == ["13.weight", "13.bias"]
    weight, bias = gradient["13.weight"], gradient["13.bias"]
    assert weight.numel() * weight.element_size() == size
    assert bias.tolist() == [1.5, -2.5]
    assert (weight[0].item(), weight[-1].item()) == (0.0, 0.0)
    assert rss() - before < 50e6
    if sys.platform == "linux":
        assert os.path.realpath(shard) in {m.path for m in psutil.Process().memory_maps()}


def test_opening_a_run_opens_no_tensors(copied: Path) -> None:
    for path in copied.rglob("*.safetensors"):
        path.unlink()
    run = load_run(copied)
    assert numbers(run) == [0, 1, 2]
    assert len(run.telemetry()) == 6
    client = run.round(2).client(3)
    assert client.telemetry["num_steps"] == 6
    assert client.captured_steps == []
    missing = copied / "rounds" / "0002" / "clients" / "0003" / "delta.safetensors"
    with pytest.raises(InputError) as caught:
        _ = client.delta
    assert str(caught.value) == f"{missing} is not there"


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
            "step 5 of client 0 in round 1 was not captured; captured are 0 to 4",
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
    assert str(caught.value) == f"{tmp_path} is no run directory: it has no whole run.json"


def test_a_path_that_is_no_folder_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for path in (tmp_path / "nothing", tmp_path / "file"):
        with pytest.raises(InputError) as caught:
            load_run(str(path))
        assert str(caught.value) == f"{path} is no run directory: it has no whole run.json"


@pytest.mark.parametrize("found", [0, 2, "1", None])
def test_another_format_is_refused(found: Any, tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {"format": found, "status": "finished"})
    with pytest.raises(InputError) as caught:
        load_run(tmp_path)
    assert str(caught.value) == f"{tmp_path} has format {found!r}; this version reads 1"


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
    writer = RunWriter.create(root, {"model": {"parameters": [{"name": "w"}]}}, [])
    writer.add_client({"round": 1, "partition": 0, "status": "ok"}, {"w": np.zeros(1)})
    append_line(root / "rounds.jsonl", {"round": 1, "participants": [0]})
    client = load_run(root).round(1).client(0)
    with pytest.raises(InputError, match=r"step 0 of .* was not captured; captured are none$"):
        client.gradient(0)
    folder = root / "rounds" / "0001" / "clients" / "0000"
    arrays = {f"{s:06d}/w": np.full(1, s, np.float32) for s in (0, 3, 6)}
    write_tensors(folder / "gradients-00000.safetensors", arrays)
    client = load_run(root).round(1).client(0)
    with pytest.raises(InputError, match=r"captured are 0, 3, 6$"):
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
