from __future__ import annotations

import errno
import gc
import json
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.core.aggregation import delta_of
from fedsim.core.capture import CapturePolicy
from fedsim.core.models import build_model
from fedsim.core.plan import RunPlan
from fedsim.core.rng import Purpose, generator
from fedsim.core.training import (
    LocalResult,
    OptimizerSettings,
    Step,
    TrainingSettings,
    load_batches,
    local_train,
)
from fedsim.recording.files import read_lines
from fedsim.recording.gradients import FirstStepNorms, StepRecorder
from tests.recording.test_files import file_size_limit

STEP_BYTES = 78_184
PARAMETERS = [
    "0.weight",
    "1.weight",
    "1.bias",
    "4.weight",
    "5.weight",
    "5.bias",
    "8.weight",
    "9.weight",
    "9.bias",
    "13.weight",
    "13.bias",
]
PARTITION, ROUND = 1, 3
SGD = OptimizerSettings(name="sgd", learning_rate=0.01, momentum=0.9, weight_decay=5e-4)


def settings_of(batch_size: int, optimizer: OptimizerSettings = SGD) -> TrainingSettings:
    return TrainingSettings(
        batch_size=batch_size,
        local_epochs=1,
        local_steps=None,
        merge_single=True,
        optimizer=optimizer,
    )


def train(
    plan: RunPlan, settings: TrainingSettings, *observers: Callable[[Step], None]
) -> LocalResult:
    """Train partition 1, of 227 samples, from the initial state."""
    batches = load_batches(
        plan.dataset.train_images,
        plan.dataset.train_labels,
        plan.partition[PARTITION],
        plan.dataset.spec,
        settings,
        order=generator(42, Purpose.BATCHES, ROUND, PARTITION),
        augmentation=generator(42, Purpose.AUGMENTATION, ROUND, PARTITION),
        device=torch.device("cpu"),
    )

    def observe(step: Step) -> None:
        for observer in observers:
            observer(step)

    model = build_model("cnn", classes=10, norm="batch", seed=0)
    return local_train(model, plan.initial_state, batches, settings.optimizer, observe)


def recorder_in(
    folder: Path,
    plan: RunPlan,
    *,
    num_steps: int,
    capture: str = "all",
    layers: Sequence[str] = ("*",),
    **settings: int,
) -> StepRecorder:
    policy = CapturePolicy.parse(capture, layers)
    return StepRecorder(folder, policy, num_steps=num_steps, shapes=plan.parameters, **settings)


def record(recorder: StepRecorder, work: Callable[[StepRecorder], object]) -> None:
    with recorder:
        work(recorder)


def taking(steps: Sequence[Step]) -> Callable[[StepRecorder], None]:
    def work(recorder: StepRecorder) -> None:
        for step in steps:
            recorder(step)

    return work


class Cloner:
    """An observer that keeps copies of everything."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def __call__(self, step: Step) -> None:
        gradients = {name: tensor.clone() for name, tensor in step.gradients.items()}
        self.steps.append(replace(step, gradients=gradients, indices=step.indices.copy()))


@pytest.fixture(scope="module")
def eight(plan: RunPlan) -> list[Step]:
    """Copies of eight real steps: seven of 32 samples and one of 3."""
    cloner = Cloner()
    train(plan, settings_of(32), cloner)
    assert [len(step.indices) for step in cloner.steps] == [32] * 7 + [3]
    return cloner.steps


def keys_in_order(path: Path) -> list[str]:
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return sorted(header, key=lambda key: header[key]["data_offsets"])


def shards_of(folder: Path) -> dict[str, list[int]]:
    """Give the steps in each shard, by its name."""
    return {
        path.name: sorted({int(key.partition("/")[0]) for key in keys_in_order(path)})
        for path in sorted(folder.glob("gradients-*"))
    }


def load(folder: Path) -> dict[str, Tensor]:
    return {
        key: tensor
        for path in folder.glob("gradients-*.safetensors")
        for key, tensor in safetensors.torch.load_file(path).items()
    }


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def recorder_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "step-recorder"]


def same_bits(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and left.numpy().tobytes() == right.numpy().tobytes()


def test_every_step_has_a_line_and_its_gradients_as_another_observer_saw_them(
    plan: RunPlan, tmp_path: Path
) -> None:
    settings = replace(settings_of(113), local_epochs=2)
    cloner = Cloner()
    with recorder_in(tmp_path, plan, num_steps=4) as recorder:
        result = train(plan, settings, recorder, cloner)

    # 227 samples are 113 + 113 + 1: the last batch of one joins the one before it.
    draw = np.random.default_rng(np.random.SeedSequence([42, 2, ROUND, PARTITION]))
    orders = [plan.partition[PARTITION][draw.permutation(227)] for _ in range(2)]
    batches = [part for order in orders for part in (order[:113], order[113:])]
    assert list(read_lines(tmp_path / "steps.jsonl")) == [
        {
            "step": step,
            "epoch": epoch,
            "batch_size": size,
            "loss": result.losses[step],
            "learning_rate": 0.01,
            "indices": batches[step].tolist(),
        }
        for step, (epoch, size) in enumerate([(0, 113), (0, 114), (1, 113), (1, 114)])
    ]
    assert names_in(tmp_path) == ["gradients-00000.safetensors", "steps.jsonl"]
    recorded = load(tmp_path)
    assert keys_in_order(tmp_path / "gradients-00000.safetensors") == [
        f"00000{step}/{name}" for step in range(4) for name in PARAMETERS
    ]
    for step in cloner.steps:
        assert any(bool(tensor.count_nonzero()) for tensor in step.gradients.values())
        for name, tensor in step.gradients.items():
            assert recorded[f"{step.index:06d}/{name}"].dtype == torch.float32
            assert same_bits(recorded[f"{step.index:06d}/{name}"], tensor)
    assert (recorder.num_steps_captured, recorder.bytes_captured) == (4, 4 * STEP_BYTES)


def test_a_loss_that_is_not_finite_is_null_in_its_line(plan: RunPlan, tmp_path: Path) -> None:
    step = Step(
        index=0,
        epoch=0,
        indices=np.array([5]),
        loss=torch.tensor(float("nan")),
        learning_rate=0.5,
        gradients={name: torch.zeros(shape) for name, shape in plan.parameters.items()},
    )
    with recorder_in(tmp_path, plan, num_steps=1, capture="none") as recorder:
        recorder(step)
    assert (tmp_path / "steps.jsonl").read_bytes() == (
        b'{"step":0,"epoch":0,"batch_size":1,"loss":null,"learning_rate":0.5,"indices":[5]}\n'
    )


@pytest.mark.parametrize(
    ("capture", "kept"),
    [
        ("none", []),
        ("all", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("first:1", [0]),
        ("first:3", [0, 1, 2]),
        ("first:9", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("every:1", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("every:3", [0, 3, 6]),
        ("every:9", [0]),
    ],
)
@pytest.mark.parametrize(
    ("layers", "names"),
    [
        (["*"], PARAMETERS),
        (["13.*"], ["13.weight", "13.bias"]),
        (["*.bias", "0.weight"], ["0.weight", "1.bias", "5.bias", "9.bias", "13.bias"]),
    ],
)
def test_shards_hold_exactly_the_steps_and_layers_of_the_policy(
    capture: str,
    kept: list[int],
    layers: list[str],
    names: list[str],
    plan: RunPlan,
    eight: list[Step],
    tmp_path: Path,
) -> None:
    with recorder_in(tmp_path, plan, num_steps=8, capture=capture, layers=layers) as recorder:
        for step in eight:
            recorder(step)
    assert [row["step"] for row in read_lines(tmp_path / "steps.jsonl")] == list(range(8))
    recorded = load(tmp_path)
    assert set(recorded) == {f"00000{step}/{name}" for step in kept for name in names}
    for step in kept:
        for name in names:
            assert same_bits(recorded[f"00000{step}/{name}"], eight[step].gradients[name])
    if kept:
        path = tmp_path / "gradients-00000.safetensors"
        assert keys_in_order(path) == [f"00000{step}/{name}" for step in kept for name in names]
    assert recorder.num_steps_captured == len(kept)
    assert recorder.bytes_captured == sum(t.numel() * 4 for t in recorded.values())


@pytest.mark.parametrize(
    ("capture", "shard_bytes", "shards"),
    [
        ("all", 1, [[0], [1], [2], [3], [4], [5], [6], [7]]),
        ("all", 3 * STEP_BYTES - 1, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("all", 3 * STEP_BYTES, [[0, 1, 2], [3, 4, 5], [6, 7]]),
        ("all", 8 * STEP_BYTES, [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("first:4", 3 * STEP_BYTES, [[0, 1, 2], [3]]),
        ("every:3", 2 * STEP_BYTES, [[0, 3], [6]]),
    ],
)
def test_shards_close_at_the_step_that_fills_them(
    capture: str,
    shard_bytes: int,
    shards: list[list[int]],
    plan: RunPlan,
    eight: list[Step],
    tmp_path: Path,
) -> None:
    with recorder_in(
        tmp_path, plan, num_steps=8, capture=capture, shard_bytes=shard_bytes
    ) as recorder:
        for step in eight:
            recorder(step)
    assert shards_of(tmp_path) == {
        f"gradients-{number:05d}.safetensors": steps for number, steps in enumerate(shards)
    }
    recorded = load(tmp_path)
    assert len(recorded) == sum(len(steps) for steps in shards) * len(PARAMETERS)
    for key, tensor in recorded.items():
        step, _, name = key.partition("/")
        assert same_bits(tensor, eight[int(step)].gradients[name])


def test_a_step_is_on_the_disk_and_out_of_memory_when_the_next_was_taken(
    plan: RunPlan, tmp_path: Path
) -> None:
    held: list[list[weakref.ref[Tensor]]] = []
    seen: list[tuple[int, list[str]]] = []

    def look(step: Step) -> None:
        held.append([weakref.ref(tensor) for tensor in step.gradients.values()])
        alive = [sum(ref() is not None for ref in refs) for refs in held]
        # The writer may hold the step it was just given, and no other.
        assert alive == [0] * step.index + [len(PARAMETERS)]
        shards = [n for n in names_in(tmp_path) if n.endswith(".safetensors")]
        seen.append((step.index, [n for n in shards if int(n[10:15]) < step.index]))

    with recorder_in(tmp_path, plan, num_steps=4, shard_bytes=1) as recorder:
        train(plan, settings_of(64), recorder, look)
    assert seen == [
        (step, [f"gradients-{shard:05d}.safetensors" for shard in range(step)]) for step in range(4)
    ]
    gc.collect()
    assert [ref() for refs in held for ref in refs if ref() is not None] == []


def test_a_disk_that_stands_still_makes_training_wait_with_two_steps_in_memory(
    plan: RunPlan, tmp_path: Path
) -> None:
    shard = tmp_path / f"gradients-00000.safetensors.{os.getpid()}.partial"
    entered = [threading.Event() for _ in range(4)]
    left = [threading.Event() for _ in range(4)]
    held: list[weakref.ref[Tensor]] = []
    cloner = Cloner()

    def enter(step: Step) -> None:
        held.extend(weakref.ref(tensor) for tensor in step.gradients.values())
        entered[step.index].set()

    def leave(step: Step) -> None:
        left[step.index].set()

    def work() -> None:
        with recorder_in(tmp_path, plan, num_steps=4) as recorder:
            # A pipe that nobody reads: opening it to write blocks the writer.
            os.mkfifo(shard)
            train(plan, settings_of(64), cloner, enter, recorder, leave)

    content: list[bytes] = []
    worker = threading.Thread(target=work, daemon=True)
    reader = threading.Thread(target=lambda: content.append(shard.read_bytes()), daemon=True)
    worker.start()
    try:
        assert entered[1].wait(60)
        # Training has given step 0 away and stands at step 1 for as long as the writer does.
        assert not left[1].wait(0.2)
        assert left[0].is_set()
        assert not entered[2].is_set()
        assert sum(ref() is not None for ref in held) == 2 * len(PARAMETERS)
    finally:
        reader.start()
        worker.join(60)
        reader.join(60)
    assert not worker.is_alive()
    recorded = safetensors.torch.load(content[0])
    assert len(recorded) == 4 * len(PARAMETERS)
    for step in cloner.steps:
        for name, tensor in step.gradients.items():
            assert same_bits(recorded[f"{step.index:06d}/{name}"], tensor)


@pytest.mark.parametrize("at", [0, 2, 3])
def test_an_exception_in_training_leaves_no_file_and_no_thread(
    at: int, plan: RunPlan, tmp_path: Path
) -> None:
    error = ZeroDivisionError("in training")

    def fail(step: Step) -> None:
        assert len(recorder_threads()) == 1
        if step.index == at:
            raise error

    def work(recorder: StepRecorder) -> None:
        train(plan, settings_of(64), recorder, fail)

    with pytest.raises(ZeroDivisionError) as caught:
        record(recorder_in(tmp_path, plan, num_steps=5), work)
    assert caught.value is error
    assert names_in(tmp_path) == []
    assert recorder_threads() == []


def test_a_training_of_fewer_steps_than_promised_is_an_error(
    plan: RunPlan, eight: list[Step], tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match=r"^2 of 4 steps to capture were made$"):
        record(recorder_in(tmp_path, plan, num_steps=4), taking(eight[:2]))
    assert names_in(tmp_path) == []
    assert recorder_threads() == []


@pytest.mark.parametrize(
    ("shard_bytes", "taken"),
    [
        pytest.param(1, [0], id="in the next step"),
        pytest.param(4 * STEP_BYTES, [0, 1, 2, 3], id="at the end after the last step"),
    ],
)
def test_an_error_of_the_writer_surfaces_in_training(
    shard_bytes: int, taken: list[int], plan: RunPlan, tmp_path: Path
) -> None:
    found: list[int] = []

    def work(recorder: StepRecorder) -> None:
        # The shard of step 0, or the one of all steps, cannot be put in place.
        (tmp_path / "gradients-00000.safetensors").mkdir()
        train(plan, settings_of(64), recorder, lambda step: found.append(step.index))

    with pytest.raises(IsADirectoryError):
        record(recorder_in(tmp_path, plan, num_steps=4, shard_bytes=shard_bytes), work)
    assert found == taken
    assert names_in(tmp_path) == ["gradients-00000.safetensors"]
    assert recorder_threads() == []


def test_a_full_disk_surfaces_as_what_the_system_calls_it(
    plan: RunPlan, eight: list[Step], tmp_path: Path
) -> None:
    shard = tmp_path / f"gradients-00000.safetensors.{os.getpid()}.partial"

    def work(recorder: StepRecorder) -> None:
        shard.symlink_to("/dev/full")
        taking(eight)(recorder)

    with pytest.raises(OSError, match="No space left on device") as caught:
        record(recorder_in(tmp_path, plan, num_steps=8), work)
    assert caught.value.errno == errno.ENOSPC
    assert not (tmp_path / "steps.jsonl").exists()
    assert recorder_threads() == []


def test_a_disk_that_fills_up_stops_training_at_the_next_step_and_nothing_is_left(
    plan: RunPlan, eight: list[Step], tmp_path: Path
) -> None:
    taken: list[int] = []

    def work(recorder: StepRecorder) -> None:
        for step in eight:
            recorder(step)
            taken.append(step.index)

    # Behind the header, step 2 does not fit.
    with pytest.raises(OSError, match="too large"), file_size_limit(3 * STEP_BYTES):
        record(recorder_in(tmp_path, plan, num_steps=8), work)
    assert taken == [0, 1, 2]
    assert names_in(tmp_path) == []


def test_a_disk_that_is_full_at_the_last_line_leaves_no_partial_file(
    plan: RunPlan, eight: list[Step], tmp_path: Path
) -> None:
    with pytest.raises(OSError, match="too large"), file_size_limit(100):
        record(recorder_in(tmp_path, plan, num_steps=8, capture="none"), taking(eight))
    assert names_in(tmp_path) == []


def test_an_error_removes_the_shards_that_are_complete(
    plan: RunPlan, eight: list[Step], tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match="3 of 8 steps"):
        record(recorder_in(tmp_path, plan, num_steps=8, shard_bytes=1), taking(eight[:3]))
    assert names_in(tmp_path) == []


def test_files_of_an_earlier_attempt_are_removed(
    plan: RunPlan, eight: list[Step], tmp_path: Path
) -> None:
    for name in (
        "gradients-00000.safetensors",
        "gradients-00007.safetensors",
        "gradients-00008.safetensors.123.partial",
        "steps.jsonl",
        "steps.jsonl.123.partial",
    ):
        (tmp_path / name).write_bytes(b"of an earlier attempt")
    with recorder_in(tmp_path, plan, num_steps=8, capture="first:1") as recorder:
        assert names_in(tmp_path) == [f"steps.jsonl.{os.getpid()}.partial"]
        for step in eight:
            recorder(step)
    assert names_in(tmp_path) == ["gradients-00000.safetensors", "steps.jsonl"]
    assert shards_of(tmp_path) == {"gradients-00000.safetensors": [0]}


def test_the_folder_of_the_client_is_made(plan: RunPlan, eight: list[Step], tmp_path: Path) -> None:
    folder = tmp_path / "rounds" / "0001" / "clients" / "0003"
    with recorder_in(folder, plan, num_steps=8, capture="none") as recorder:
        for step in eight:
            recorder(step)
    assert names_in(folder) == ["steps.jsonl"]


OPTIMIZERS: dict[str, tuple[OptimizerSettings, Callable[[list[Tensor]], Any]]] = {
    "sgd with momentum and weight decay": (
        SGD,
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True),
    ),
    "sgd with nesterov momentum": (
        OptimizerSettings(name="sgd", learning_rate=0.05, momentum=0.5, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.5, nesterov=True, fused=True),
    ),
    "adam": (
        OptimizerSettings(name="adam", learning_rate=0.002, weight_decay=1e-3),
        lambda p: torch.optim.Adam(p, lr=0.002, weight_decay=1e-3, fused=True),
    ),
}


def replayed(
    start: dict[str, NDArray[np.generic]],
    gradients: dict[str, Tensor],
    steps: Sequence[int],
    make: Callable[[list[Tensor]], Any],
) -> dict[str, NDArray[np.generic]]:
    parameters = {name: torch.from_numpy(start[name].copy()) for name in PARAMETERS}
    optimizer = make(list(parameters.values()))
    for step in steps:
        for name, parameter in parameters.items():
            parameter.grad = gradients[f"{step:06d}/{name}"]
        optimizer.step()
    return {n: np.subtract(p.numpy(), start[n]) for n, p in parameters.items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_replaying_the_optimiser_over_the_shards_lands_on_the_delta_to_the_bit(
    name: str, plan: RunPlan, tmp_path: Path
) -> None:
    settings, make = OPTIMIZERS[name]
    with recorder_in(tmp_path, plan, num_steps=4, shard_bytes=2 * STEP_BYTES) as recorder:
        result = train(plan, settings_of(64, settings), recorder)
    assert [len(steps) for steps in shards_of(tmp_path).values()] == [2, 2]
    delta = delta_of(result.state, plan.initial_state)
    gradients = load(tmp_path)
    start = plan.initial_state
    landed = replayed(start, gradients, [0, 1, 2, 3], make)
    assert {n: a.tobytes() for n, a in landed.items()} == {
        n: delta[n].tobytes() for n in PARAMETERS
    }
    # The proof can fail: the same gradients in another order, or one of them missing.
    for steps in ([1, 0, 2, 3], [0, 1, 2]):
        missed = replayed(start, gradients, steps, make)
        assert any((missed[n] != delta[n]).any() for n in PARAMETERS)


def test_the_first_step_norms_are_euclidean_and_of_the_first_step(eight: list[Step]) -> None:
    norms = FirstStepNorms()
    by_hand = {
        "a": torch.tensor([[3.0, 0.0], [0.0, -4.0]]),
        "b": torch.tensor([1.0, 2.0, -2.0]),
        "c": torch.zeros(3, 3),
        "d": torch.tensor(-7.0),
    }
    norms(replace(eight[0], gradients=by_hand))
    norms(replace(eight[1], gradients={"a": torch.ones(2, 2)}))
    assert norms.per_layer == {"a": 5.0, "b": 3.0, "c": 0.0, "d": 7.0}


def test_the_norms_of_a_real_step_are_those_of_its_gradients(eight: list[Step]) -> None:
    norms = FirstStepNorms()
    for step in eight:
        norms(step)
    expected = {
        name: float(np.sqrt(np.sum(np.square(tensor.double().numpy()))))
        for name, tensor in eight[0].gradients.items()
    }
    assert list(norms.per_layer) == PARAMETERS
    assert norms.per_layer == pytest.approx(expected, rel=1e-6)
