from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedsim import cli, load_run
from fedsim.core.config import RunConfig
from fedsim.core.errors import InputError
from fedsim.core.plan import RunPlan
from fedsim.core.training import OptimizerSettings
from fedsim.flower.client_app import app
from fedsim.flower.server_app import execute
from fedsim.plugins.export import export
from fedsim.plugins.export.export import (
    available_memory,
    export_breaching,
    export_notebook,
    obstacles,
)
from fedsim.tasks.vision.datasets import load_dataset
from fedsim.tasks.vision.models import build_model
from tests.local_grid import LocalGrid
from tests.observers import Memory
from tests.recording.conftest import Recorded

PAGE = Path(__file__).parents[3] / "docs" / "exports.md"
PLAIN = {"momentum": 0.0, "weight-decay": 0.0}
MakeRun = Callable[..., Path]


@pytest.fixture(scope="session")
def make_run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """Run one round of client 0 with a few settings changed; the same settings run once."""
    made: dict[str, Path] = {}

    def make(**changes: Any) -> Path:
        values: dict[str, Any] = {
            "dataset": "digits",
            "model": "cnn",
            "clients": 4,
            "participants": [[0]],
            "rounds": 1,
            "batch-size": 16,
            "local-steps": 4,
            "capture": "all",
            "device": "cpu",
        }
        values |= {key.replace("_", "-"): value for key, value in changes.items()}
        key = json.dumps(values, sort_keys=True)
        if key not in made:
            path = tmp_path_factory.mktemp("export") / "run"
            execute(
                LocalGrid(app, values["clients"], recordings=path.parent),
                RunPlan.prepare(RunConfig.from_mapping(values)),
                path,
                observer=Memory(),
                workers=1,
                stop=threading.Event(),
            )
            made[key] = path
        return made[key]

    return make


@pytest.fixture(scope="session")
def plain(make_run: MakeRun) -> Path:
    return make_run(momentum=0.0, weight_decay=0.0)


@pytest.fixture(scope="session")
def epochs(make_run: MakeRun) -> Path:
    """Whole epochs of plain SGD: client 0 of 263 samples, client 1 of 227."""
    values = {
        "participants": [[0, 1]],
        "local-steps": 9,
        "batch-size": 64,
        # Two batches of 113, and a sample that joins the second.
        "client": {"1": {"batch-size": 113, "local-epochs": 1}},
    }
    return make_run(**{**PLAIN, **values})


def breaching(run: Path, output: Path, step: int = 0, steps: int = 1, **more: Any) -> list[str]:
    client = more.pop("client", 0)
    return export_breaching(load_run(run), 1, client, step, steps=steps, output=output, **more)


def load_export(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {"__name__": "exports"}
    (script,) = code
    exec(compile(script, PAGE, "exec"), names)  # noqa: S102
    loaded: tuple[list[dict[str, Any]], list[dict[str, Any]]] = names["load_export"](folder)
    return loaded


def described(folder: Path) -> dict[str, Any]:
    metadata: dict[str, Any] = json.loads((folder / "metadata.json").read_text())
    return metadata


class Repeated:
    """What breaching computes from candidate images: its two objectives, without its graph."""

    def __init__(self, folder: Path) -> None:
        (self.payload,), (self.shared,) = load_export(folder)
        names = described(folder)["model"]
        self.model = build_model(
            names["arch"], classes=self.payload["metadata"].classes, norm=names["norm"], seed=7
        )
        assert self.payload["buffers"] is None
        assert self.shared["buffers"] is None
        self.model.train()
        with torch.no_grad():
            for own, given in zip(self.model.parameters(), self.payload["parameters"], strict=True):
                own.copy_(given)

    def one_step(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        loss = nn.functional.cross_entropy(self.model(images), labels)
        return list(torch.autograd.grad(loss, list(self.model.parameters())))

    def several_steps(self, images: Tensor) -> list[Tensor]:
        local = self.shared["metadata"]["local_hyperparams"]
        assert len(images) == self.shared["metadata"]["num_data_points"]
        start = [p.detach().clone() for p in self.model.parameters()]
        seen = 0
        for step in range(local["steps"]):
            data = images[seen : seen + local["data_per_step"]]
            seen = (seen + local["data_per_step"]) % len(images)
            gradients = self.one_step(data, local["labels"][step])
            with torch.no_grad():
                for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
                    parameter.sub_(local["lr"] * gradient)
        moved = zip(self.model.parameters(), start, strict=True)
        return [after.detach() - before for after, before in moved]


def largest_error(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(
        float((f - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True) if e.norm()
    )


# --- breaching: one step


def test_one_sample_gives_the_very_gradient(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(norm="group", batch_size=1)
    for step in (0, 3):
        folder = tmp_path / f"step{step}"
        assert breaching(run, folder, step) == []
        truth = load_file(folder / "ground_truth.safetensors")
        assert truth["images"].shape == (1, 3, 32, 32)
        repeated = Repeated(folder)
        found = repeated.one_step(truth["images"], truth["labels"])
        for own, given in zip(found, repeated.shared["gradients"], strict=True):
            assert torch.equal(own, given)


def test_a_batch_in_training_mode_gives_the_very_gradient(
    make_run: MakeRun, tmp_path: Path
) -> None:
    # The optimiser does not matter to one step: here momentum and weight decay are at work.
    run = make_run()
    assert breaching(run, tmp_path / "out", 2) == []
    truth = load_file(tmp_path / "out" / "ground_truth.safetensors")
    repeated = Repeated(tmp_path / "out")
    found = repeated.one_step(truth["images"], truth["labels"])
    for own, given in zip(found, repeated.shared["gradients"], strict=True):
        assert torch.equal(own, given)
    # In evaluation mode no image gives it.
    repeated.model.eval()
    other = repeated.one_step(truth["images"], truth["labels"])
    assert largest_error(other, repeated.shared["gradients"]) > 0.1


def test_the_lists_are_what_breaching_takes(make_run: MakeRun, tmp_path: Path) -> None:
    run = load_run(make_run())
    breaching(run.path, tmp_path / "out", 1)
    (payload,), (shared,) = load_export(tmp_path / "out")
    shapes = list(run.shapes.values())
    assert [tuple(t.shape) for t in payload["parameters"]] == shapes
    assert [tuple(t.shape) for t in shared["gradients"]] == shapes
    assert {t.dtype for t in payload["parameters"] + shared["gradients"]} == {torch.float32}
    # Sorted names are another order.
    assert list(run.shapes) != sorted(run.shapes)
    assert shared["gradients"][-1].shape == (10,)
    assert shared["gradients"][-2].shape[0] == 10
    data = payload["metadata"]
    assert (data.shape, data.classes, data.modality) == ([3, 32, 32], 10, "vision")
    assert (data["mean"], data["std"]) == ([0.3059] * 3, [0.3763] * 3)
    assert data["modality"] == "vision"
    assert hasattr(data, "mean")
    assert not hasattr(data, "task")
    assert shared["metadata"]["num_data_points"] == 16
    assert shared["metadata"]["local_hyperparams"] is None
    labels = shared["metadata"]["labels"]
    assert labels.dtype == torch.int64
    truth = load_file(tmp_path / "out" / "ground_truth.safetensors")
    assert torch.equal(labels, truth["labels"].sort()[0])


def test_the_payload_is_the_state_before_the_step(make_run: MakeRun, tmp_path: Path) -> None:
    run = load_run(make_run())
    breaching(run.path, tmp_path / "first", 0)
    breaching(run.path, tmp_path / "third", 2)
    (first,), _ = load_export(tmp_path / "first")
    (third,), _ = load_export(tmp_path / "third")
    start, later = run.round(0).state, run.round(1).client(0).parameters_at(2)
    for position, name in enumerate(run.shapes):
        assert torch.equal(first["parameters"][position], start[name])
        assert torch.equal(third["parameters"][position], later[name])


def test_ground_truth_is_the_batch_that_was_trained_on(make_run: MakeRun, tmp_path: Path) -> None:
    run = load_run(make_run())
    breaching(run.path, tmp_path / "out", 2)
    truth = load_file(tmp_path / "out" / "ground_truth.safetensors")
    recorded = run.round(1).client(0).steps[2]
    assert truth["indices"].tolist() == recorded["indices"]
    assert truth["images"].dtype == torch.float32
    dataset = load_dataset("digits", data_root=None, seed=42)
    assert torch.equal(truth["labels"], dataset.train_labels[truth["indices"]])
    # However an image is shifted, its inner 24x24 pixels stay in it.
    pixels = (truth["images"] * 0.3763 + 0.3059).mul(255).round()
    assert pixels.min() == 0
    for image, index in zip(pixels, truth["indices"].tolist(), strict=True):
        inner = dataset.train_images[index, :, 4:28, 4:28].float()
        windows = image.unfold(1, 24, 1).unfold(2, 24, 1)
        assert (windows == inner[:, None, None]).all(-1).all(-1).all(0).any()


def test_metadata_says_where_it_comes_from(make_run: MakeRun, tmp_path: Path) -> None:
    run = load_run(make_run())
    breaching(run.path, tmp_path / "out", 1)
    found = described(tmp_path / "out")
    telemetry = run.round(1).client(0).telemetry
    assert found["losses"] == telemetry["loss_history"][1:2]
    assert (found["batch_sizes"], found["dtype"], found["autocast"]) == ([16], "float32", "none")
    assert (found["replayable"], found["reasons"]) == (True, [])
    source = found["source"]
    assert [source[k] for k in ("round", "client", "step", "steps")] == [1, 0, 1, 1]
    assert source["dataset_sha256"] == run.manifest["dataset"]["sha256"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "ground_truth.safetensors",
        "metadata.json",
        "server_payload.safetensors",
        "shared_data.safetensors",
    ]


def test_rounded_gradients_are_flagged(make_run: MakeRun, tmp_path: Path) -> None:
    breaching(make_run(capture_dtype="bfloat16"), tmp_path / "out", 1)
    assert described(tmp_path / "out")["dtype"] == "bfloat16"
    _, (shared,) = load_export(tmp_path / "out")
    assert {t.dtype for t in shared["gradients"]} == {torch.float32}


# --- breaching: several steps


def test_several_steps_are_repeated_by_plain_sgd(plain: Path, tmp_path: Path) -> None:
    assert breaching(plain, tmp_path / "out", 1, 3) == []
    truth = load_file(tmp_path / "out" / "ground_truth.safetensors")
    repeated = Repeated(tmp_path / "out")
    local = repeated.shared["metadata"]["local_hyperparams"]
    assert (local["lr"], local["steps"], local["data_per_step"]) == (0.01, 3, 16)
    assert torch.equal(torch.cat(local["labels"]), truth["labels"])
    assert torch.equal(repeated.shared["metadata"]["labels"], truth["labels"].sort()[0])
    shared = repeated.shared["gradients"]
    assert largest_error(repeated.several_steps(truth["images"]), shared) < 1e-4
    # The order of the images matters.
    flipped = Repeated(tmp_path / "out").several_steps(truth["images"].flip(0))
    assert largest_error(flipped, shared) > 0.1


def test_several_steps_are_local_minus_server(plain: Path, tmp_path: Path) -> None:
    run = load_run(plain)
    breaching(plain, tmp_path / "out", 0, 4)
    _, (shared,) = load_export(tmp_path / "out")
    delta = run.round(1).client(0).delta
    for name, gradient in zip(run.shapes, shared["gradients"], strict=True):
        assert torch.equal(gradient, delta[name])


def test_a_smaller_batch_at_the_end_is_what_remains_for_the_last_slice(
    epochs: Path, tmp_path: Path
) -> None:
    assert breaching(epochs, tmp_path / "out", 0, 5) == []
    assert described(tmp_path / "out")["batch_sizes"] == [64, 64, 64, 64, 7]
    truth = load_file(tmp_path / "out" / "ground_truth.safetensors")
    repeated = Repeated(tmp_path / "out")
    found = repeated.several_steps(truth["images"])
    assert largest_error(found, repeated.shared["gradients"]) < 1e-4


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"weight_decay": 0.0}, ["momentum = 0.9"]),
        ({"momentum": 0.0}, ["weight-decay = 0.0005"]),
        ({"weight_decay": 0.0, "nesterov": True}, ["momentum = 0.9", "nesterov = true"]),
        ({"optimizer": "adam", "weight_decay": 0.0}, ["optimizer = 'adam'"]),
    ],
)
def test_what_is_no_plain_sgd_is_refused_by_name(
    changes: dict[str, Any], named: list[str], make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run(**changes)
    with pytest.raises(InputError) as refusal:
        breaching(run, tmp_path / "out", 0, 2)
    assert f"has {', '.join(named)}; expected " in str(refusal.value)
    assert not (tmp_path / "out").exists()
    reasons = breaching(run, tmp_path / "out", 0, 2, allow_not_replayable=True)
    assert reasons == named
    found = described(tmp_path / "out")
    assert (found["replayable"], found["reasons"]) == (False, named)
    load_export(tmp_path / "out")


@pytest.mark.parametrize(
    ("client", "first", "steps", "sizes"), [(0, 3, 3, "64, 7"), (1, 0, 2, "113, 114")]
)
def test_unequal_batches_are_refused_by_name(
    client: int, first: int, steps: int, sizes: str, epochs: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"batch sizes of {sizes} in its steps"):
        breaching(epochs, tmp_path / "out", first, steps, client=client)
    # Rightly so: the slices are not the batches.
    breaching(epochs, tmp_path / "out", first, steps, client=client, allow_not_replayable=True)
    truth = load_file(tmp_path / "out" / "ground_truth.safetensors")
    repeated = Repeated(tmp_path / "out")
    with pytest.raises(ValueError, match="batch_size"):
        repeated.several_steps(truth["images"])


def test_a_step_without_an_update_is_no_step_of_plain_sgd(plain: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(plain, tmp_path / "overflowed"))
    manifest = json.loads((run / "run.json").read_text())
    manifest["config"]["autocast"] = "float16"
    (run / "run.json").write_text(json.dumps(manifest))
    (shard,) = (run / "rounds/0001/clients/0000").glob("gradients-*.safetensors")
    tensors = load_file(shard)
    tensors["000001/0.weight"][0] = torch.inf
    save_file(tensors, shard)
    with pytest.raises(InputError, match=r"no update after step 1 \(autocast = 'float16'\)"):
        breaching(run, tmp_path / "out", 0, 3)
    assert breaching(run, tmp_path / "out", 2, 2) == []


@pytest.mark.parametrize(
    ("settings", "sizes", "expected"),
    [
        ({}, [8], []),
        ({}, [8, 8, 8], []),
        ({}, [8, 8, 3], []),
        ({}, [8, 3, 8], ["batch sizes of 8, 3 in its steps"]),
        ({}, [8, 9], ["batch sizes of 8, 9 in its steps"]),
        ({"name": "adam", "momentum": 0.9}, [8, 8], ["optimizer = 'adam'"]),
        ({"momentum": 0.5}, [8, 8], ["momentum = 0.5"]),
        ({"weight_decay": 0.1}, [8, 8], ["weight-decay = 0.1"]),
    ],
)
def test_obstacles(settings: dict[str, Any], sizes: list[int], expected: list[str]) -> None:
    optimizer = OptimizerSettings(**{"name": "sgd", "learning_rate": 0.1, **settings})
    assert obstacles(optimizer, sizes) == expected


# --- breaching: refusals


@pytest.mark.parametrize(
    ("step", "steps", "said"),
    [
        (4, 1, "step = 4 cannot be used; expected 0 to 3"),
        (-1, 1, "step = -1 cannot be used; expected 0 to 3"),
        (0, 0, "steps = 0 cannot be used from step 0; expected 1 to 4"),
        (2, 3, "steps = 3 cannot be used from step 2; expected 1 to 2"),
    ],
)
def test_steps_that_were_not_made_are_refused(
    step: int, steps: int, said: str, plain: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        breaching(plain, tmp_path / "out", step, steps)
    assert list(tmp_path.iterdir()) == []


def test_steps_that_were_not_kept_are_refused(make_run: MakeRun, tmp_path: Path) -> None:
    gaps = make_run(capture="every:2", **PLAIN)
    with pytest.raises(InputError, match=r"capture = 'every:2' did not keep step 1 .* 0 to 2"):
        breaching(gaps, tmp_path / "out", 2)
    none = make_run(capture="sketch:8")
    with pytest.raises(InputError, match=r"capture = 'sketch:8' did not keep step 0 .* of step 0,"):
        breaching(none, tmp_path / "out", 0)
    prefix = make_run(capture="first:2", **PLAIN)
    with pytest.raises(InputError, match="capture = 'first:2' did not keep step 2"):
        breaching(prefix, tmp_path / "out", 0, 3)
    assert breaching(prefix, tmp_path / "out", 0, 2) == []


def test_layers_that_were_not_kept_are_refused(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(capture_layers=["13.*"])
    with pytest.raises(InputError, match=r"capture-layers = \['13.\*'\] did not keep 0.weight"):
        breaching(run, tmp_path / "out", 0)


def test_a_model_that_does_not_end_with_its_classifier_is_refused(
    copied: Path, tmp_path: Path
) -> None:
    manifest = json.loads((copied / "run.json").read_text())
    parameters = manifest["model"]["parameters"]
    parameters.append(parameters.pop(-2))
    (copied / "run.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"the model ends with 13.bias .* and 13.weight"):
        breaching(copied, tmp_path / "out", 0)


def test_other_data_is_refused(copied: Path, tmp_path: Path) -> None:
    manifest = json.loads((copied / "run.json").read_text())
    manifest["dataset"]["sha256"] = "00" * 32
    (copied / "run.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=f"dataset = 'digits' on this .* the run, {'00' * 32}"):
        breaching(copied, tmp_path / "out", 0)


def test_batches_that_are_not_the_recorded_ones_are_refused(copied: Path, tmp_path: Path) -> None:
    steps = copied / "rounds/0001/clients/0000/steps.jsonl"
    rows = [json.loads(line) for line in steps.read_text().splitlines()]
    rows[1]["indices"].reverse()
    steps.write_text("".join(json.dumps(row) + "\n" for row in rows))
    breaching(copied, tmp_path / "before", 0)
    with pytest.raises(InputError, match="batches of client 0 in round 1 cannot be rebuilt: numpy"):
        breaching(copied, tmp_path / "out", 2)
    steps.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(InputError, match="cannot be rebuilt"):
        breaching(copied, tmp_path / "out", 2)


def test_an_existing_folder_is_refused_and_left_alone(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="exists already"):
        breaching(plain, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_failed_export_leaves_nothing(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_json", full)
    with pytest.raises(InputError, match="out' cannot be written: No space left on device"):
        breaching(plain, tmp_path / "out")
    with pytest.raises(InputError, match="round' cannot be written: No space left on device"):
        export_notebook(load_run(plain), 1, output=tmp_path / "round")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        breaching(plain, tmp_path / "file" / "out")


# --- notebook


def read_notebook(prefix: Path, number: int = 1) -> tuple[dict[str, Any], dict[str, Any]]:
    tensors = torch.load(f"{prefix}_{number:02d}_tensors.pt", weights_only=True)
    meta = json.loads(Path(f"{prefix}_{number:02d}_meta.json").read_text())
    return tensors, meta


def test_a_consumer_of_the_notebooks_files_is_served(recorded: Recorded, tmp_path: Path) -> None:
    run = load_run(recorded.path)
    seen: list[tuple[int, int]] = []
    paths = export_notebook(
        run, 2, output=tmp_path / "fedavg", progress=lambda done, total: seen.append((done, total))
    )
    names = ["fedavg_02_meta.json", "fedavg_02_tensors.pt"]
    assert sorted(p.name for p in paths) == sorted(p.name for p in tmp_path.iterdir()) == names
    tensors, meta = read_notebook(tmp_path / "fedavg", 2)
    assert meta["round"] == 2
    assert meta["participating_clients"] == run.round(2).participants
    assert list(tensors["raw_gradients"]) == meta["participating_clients"]
    assert list(tensors["model_updates"]) == meta["participating_clients"]
    assert list(meta["client_metrics"]) == [str(p) for p in meta["participating_clients"]]
    steps = 0
    for partition, gradients in tensors["raw_gradients"].items():
        metrics = meta["client_metrics"][str(partition)]
        telemetry = run.round(2).client(partition).telemetry
        assert metrics == {name: telemetry[name] for name in metrics}
        assert len(metrics) == 13
        assert set(gradients) == {"grads_per_step_raw", "grads_per_step_wd"}
        for listed in gradients.values():
            assert len(listed) == metrics["num_steps"] == len(metrics["loss_history"])
            for step in listed:
                assert {n: tuple(t.shape) for n, t in step.items()} == run.shapes
                assert list(step) == list(run.shapes)
                assert {t.dtype for t in step.values()} == {torch.float32}
        steps += metrics["num_steps"]
    assert seen[-1] == (steps * 2 * 78184, steps * 2 * 78184)
    assert len(seen) == steps
    assert meta["config_snapshot"] == run.manifest["config"]


def test_the_state_is_the_one_that_the_round_started_from(
    recorded: Recorded, tmp_path: Path
) -> None:
    run = load_run(recorded.path)
    export_notebook(run, 2, output=tmp_path / "fedavg")
    tensors, meta = read_notebook(tmp_path / "fedavg", 2)
    state = tensors["global_model_state"]
    assert list(state) == list(recorded.plan.initial_state)
    assert meta["global_state_round"] == 1
    row = run.round_rows[1]
    assert (meta["global_accuracy"], meta["global_loss"]) == (
        row["global_accuracy"],
        row["global_loss"],
    )
    for name, tensor in state.items():
        assert torch.equal(tensor, run.round(1).state[name])
        after = tensor + tensors["server_aggregate_delta"][name]
        assert torch.equal(after, run.round(2).state[name])
    client = run.round(2).client(3)
    local = client.parameters_at(client.telemetry["num_steps"])
    for name, parameter in local.items():
        update = tensors["model_updates"][3][name]
        assert torch.allclose(state[name] + update, parameter, rtol=1e-6, atol=1e-7)
        assert torch.equal(update, client.delta[name])


def test_gradients_are_the_recorded_ones_without_and_with_weight_decay(
    recorded: Recorded, tmp_path: Path
) -> None:
    run = load_run(recorded.path)
    export_notebook(run, 1, output=tmp_path / "fedavg", clients=[1])
    tensors, _ = read_notebook(tmp_path / "fedavg")
    client = run.round(1).client(1)
    gradients = tensors["raw_gradients"][1]
    for step in client.captured_steps:
        raw, decayed = (gradients[f"grads_per_step_{kind}"][step] for kind in ("raw", "wd"))
        parameters = client.parameters_at(step)
        for name, gradient in client.gradient(step).items():
            assert torch.equal(raw[name], gradient)
            expected = raw[name] + 5e-4 * parameters[name]
            assert torch.allclose(decayed[name], expected, rtol=1e-6, atol=1e-9)
        assert not torch.equal(decayed["0.weight"], raw["0.weight"])
        by_reader = client.gradient(step, weight_decay=True)
        assert all(torch.equal(decayed[n], t) for n, t in by_reader.items())


def test_some_clients_come_in_the_order_of_the_draw(recorded: Recorded, tmp_path: Path) -> None:
    run = load_run(recorded.path)
    assert run.round(1).participants == [0, 2, 1]
    export_notebook(run, 1, output=tmp_path / "deep" / "fedavg", clients=[1, 0, 1])
    tensors, meta = read_notebook(tmp_path / "deep" / "fedavg")
    assert meta["participating_clients"] == list(tensors["raw_gradients"]) == [0, 1]
    assert list(meta["client_metrics"]) == ["0", "1"]


def test_the_file_holds_no_more_than_its_tensors(recorded: Recorded, tmp_path: Path) -> None:
    run = load_run(recorded.path)
    tensors, _ = export_notebook(run, 1, output=tmp_path / "fedavg", clients=[1])
    payload, _ = read_notebook(tmp_path / "fedavg")
    of_state = sum(t.nbytes for t in payload["global_model_state"].values())
    expected = 2 * 78184 * len(payload["raw_gradients"][1]["grads_per_step_raw"]) + 3 * of_state
    assert expected < tensors.stat().st_size < 1.2 * expected


def test_the_same_export_has_the_same_bytes(plain: Path, tmp_path: Path) -> None:
    first, _ = export_notebook(load_run(plain), 1, output=tmp_path / "a")
    second, _ = export_notebook(load_run(plain), 1, output=tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()


def test_steps_from_the_first_on_are_enough(make_run: MakeRun, tmp_path: Path) -> None:
    prefix = make_run(capture="first:2", **PLAIN)
    export_notebook(load_run(prefix), 1, output=tmp_path / "fedavg")
    tensors, meta = read_notebook(tmp_path / "fedavg")
    assert [len(listed) for listed in tensors["raw_gradients"][0].values()] == [2, 2]
    metrics = meta["client_metrics"]["0"]
    assert (metrics["num_steps"], metrics["num_steps_captured"]) == (4, 2)


def test_captured_layers_alone_are_listed(make_run: MakeRun, tmp_path: Path) -> None:
    export_notebook(load_run(make_run(capture_layers=["13.*"])), 1, output=tmp_path / "fedavg")
    tensors, _ = read_notebook(tmp_path / "fedavg")
    (step, *_) = tensors["raw_gradients"][0]["grads_per_step_wd"]
    assert list(step) == ["13.weight", "13.bias"]
    assert "0.weight" in tensors["model_updates"][0]


@pytest.mark.parametrize(("capture", "step"), [("every:2", 1), ("last:2", 0), ("none", 0)])
def test_gaps_are_refused_by_the_name_of_the_policy(
    capture: str, step: int, make_run: MakeRun, tmp_path: Path
) -> None:
    run = load_run(make_run(capture=capture, **PLAIN))
    with pytest.raises(InputError, match=f"capture = '{capture}' did not keep step {step} of"):
        export_notebook(run, 1, output=tmp_path / "fedavg")
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_into_memory_is_refused_with_both_numbers(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_run(recorded.path)
    monkeypatch.setattr(export, "available_memory", lambda: 2_000_000)
    with pytest.raises(InputError) as refusal:
        export_notebook(run, 1, output=tmp_path / "fedavg")
    assert str(refusal.value) == (
        "clients = [0, 2, 1] need 0.0 GB of memory in one file; expected at most what is "
        "available, 0.0 GB; --client P, given once or more, exports fewer clients at a time"
    )
    export_notebook(run, 1, output=tmp_path / "fedavg", clients=[1])
    monkeypatch.setattr(export, "available_memory", lambda: 1_000)
    with pytest.raises(InputError) as refusal:
        export_notebook(run, 1, output=tmp_path / "other", clients=[1])
    assert "--client" not in str(refusal.value)


def test_available_memory_is_below_all_of_it() -> None:
    assert 0 < available_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_the_untrained_model_is_no_round_to_export(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="round = 0 cannot be used: no client"):
        export_notebook(load_run(plain), 0, output=tmp_path / "fedavg")


@pytest.mark.parametrize("taken", ["fedavg_01_tensors.pt", "fedavg_01_meta.json"])
def test_an_existing_file_is_refused_and_left_alone(
    taken: str, plain: Path, tmp_path: Path
) -> None:
    (tmp_path / taken).write_text("mine")
    with pytest.raises(InputError, match=f"{taken}' exists already"):
        export_notebook(load_run(plain), 1, output=tmp_path / "fedavg")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["mine"]


# --- the command


def call(arguments: list[Any], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli.run([str(argument) for argument in arguments])
    streams = capsys.readouterr()
    return code, streams.out, streams.err


def test_the_command_exports_steps(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whose = ["export", "breaching", plain, "--round", 1, "--client", 0, "--step", 0]
    assert call([*whose, "--output", tmp_path / "one"], capsys) == (
        0,
        f"written: {tmp_path / 'one'}\n",
        "",
    )
    assert call([*whose, "--steps", 2, "--output", tmp_path / "two"], capsys)[0] == 0
    assert described(tmp_path / "two")["shared_data"]["local_hyperparams"]["steps"] == 2
    code, out, err = call([*whose, "--output", tmp_path / "two"], capsys)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "exists already" in err


def test_the_command_exports_what_is_not_replayable_when_told_to(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whose = ["export", "breaching", make_run(), "--round", 1, "--client", 0, "--step", 0]
    whose += ["--steps", 2, "--output", tmp_path / "out"]
    code, _, err = call(whose, capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert "momentum = 0.9, weight-decay = 0.0005; expected 1, or more with" in err
    code, out, _ = call([*whose, "--allow-not-replayable"], capsys)
    assert code == 0
    assert out.splitlines()[1] == "not replayable: momentum = 0.9, weight-decay = 0.0005"


def test_the_command_exports_a_round(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = tmp_path / "fedavg"
    round_one = ["export", "notebook", plain, "--round", 1, "--output", prefix]
    code, out, err = call([*round_one, "--client", 0], capsys)
    assert (code, err) == (0, "")
    assert out == f"written: {prefix}_01_tensors.pt\nwritten: {prefix}_01_meta.json\n"
    read_notebook(prefix)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "missing command; see `fedsim export --help`"),
        (["pickle"], "'pickle'"),
        (["breaching", "RUN"], "--round"),
        (
            ["breaching", "RUN", "--round", "x"],
            "--round = 'x' cannot be used; expected a whole number",
        ),
        (["notebook", "RUN", "--round", "9", "--output", "o"], "round 9 of"),
        (["notebook", "RUN", "--round", "1", "--client", "3", "--output", "o"], "client 3 has no"),
        (["notebook", "RUN", "--round", "1", "--steps", "3", "--output", "o"], "'--steps'"),
        (["notebook", ".", "--round", "1", "--output", "o"], "is not a run directory"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(
    arguments: list[str],
    said: str,
    plain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    known = [str(plain) if argument == "RUN" else argument for argument in arguments]
    code, out, err = call(["export", *known], capsys)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
    assert list(tmp_path.iterdir()) == []
