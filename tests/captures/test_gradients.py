from __future__ import annotations

import errno
import gc
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fedsim.captures.gradients import Gradients, Shard
from fedsim.captures.sketch import Sketcher
from fedsim.core.aggregation import delta_of
from fedsim.core.config import RunConfig
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
from fedsim.recording import recorder as recording
from fedsim.recording.files import Checksum, read_lines
from fedsim.recording.recorder import FirstStepNorms, StepRecorder
from fedsim.tasks.vision.models import build_model
from tests.captures.chosen import chosen
from tests.patience import PATIENCE
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
        plan.task,
        plan.dataset.train(),
        plan.partition[PARTITION],
        settings,
        order=generator(42, Purpose.BATCHES, ROUND, PARTITION),
        augmentation=generator(42, Purpose.AUGMENTATION, ROUND, PARTITION),
        device=torch.device("cpu"),
    )

    def observe(step: Step) -> None:
        for observer in observers:
            observer(step)

    model = build_model("cnn", classes=10, norm="batch", seed=0)
    return local_train(plan.task, model, plan.initial_state, batches, settings.optimizer, observe)


def recorder_in(
    folder: Path,
    plan: RunPlan,
    *,
    num_steps: int,
    capture: str = "all",
    layers: Sequence[str] = ("*",),
    **settings: Any,
) -> StepRecorder:
    captures = chosen(capture, layers, **settings)
    return StepRecorder(folder, captures, num_steps=num_steps, shapes=plan.parameters)


def record(recorder: StepRecorder, work: Callable[[StepRecorder], object]) -> None:
    with recorder:
        work(recorder)


def taking(steps: Sequence[Step]) -> Callable[[StepRecorder], None]:
    def work(recorder: StepRecorder) -> None:
        for step in steps:
            recorder(step)

    return work


OF_TRAINING = ["step", "epoch", "batch_size", "loss", "learning_rate", "indices"]
OF_GRADIENTS = [
    "gradient_norm",
    "per_layer_norms",
    "cosine_to_previous",
    "cosine_to_mean",
    "zero_fraction",
]


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
    rows = list(read_lines(tmp_path / "steps.jsonl"))
    assert [{name: row[name] for name in OF_TRAINING} for row in rows] == [
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


def step_of(index: int, gradients: Mapping[str, Tensor], loss: float = 1.0) -> Step:
    return Step(
        index=index,
        epoch=0,
        indices=np.array([5]),
        loss=torch.tensor(loss),
        learning_rate=0.5,
        gradients=gradients,
    )


def test_a_loss_that_is_not_finite_is_null_in_its_line(plan: RunPlan, tmp_path: Path) -> None:
    zeros = {name: torch.zeros(shape) for name, shape in plan.parameters.items()}
    with recorder_in(tmp_path, plan, num_steps=1, capture="none", statistics=False) as recorder:
        recorder(step_of(0, zeros, float("nan")))
    assert (tmp_path / "steps.jsonl").read_bytes() == (
        b'{"step":0,"epoch":0,"batch_size":1,"loss":null,"learning_rate":0.5,"indices":[5]}\n'
    )


@pytest.fixture
def by_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have steps of the small model handed over like those of large ones."""
    monkeypatch.setattr(recording, "AT_ONCE_BYTES", 0)


@pytest.fixture(params=[0, recording.AT_ONCE_BYTES], ids=["by a thread", "at once"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have steps of the small model written in either way."""
    monkeypatch.setattr(recording, "AT_ONCE_BYTES", request.param)


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
        ("last:1", [7]),
        ("last:3", [5, 6, 7]),
        ("last:9", [0, 1, 2, 3, 4, 5, 6, 7]),
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
        ("last:3", 2 * STEP_BYTES, [[5, 6], [7]]),
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


def memory_of(step: Step) -> list[StorageWeakRef]:
    """Refer to the memory of a step's gradients, whichever tensors share it."""
    return [StorageWeakRef(tensor.untyped_storage()) for tensor in step.gradients.values()]


def count_alive(refs: Sequence[StorageWeakRef]) -> int:
    return sum(not ref.expired() for ref in refs)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    "form", [{}, {"encoding": "dense"}, {"dtype": "bfloat16"}, {"capture": "sketch:9"}]
)
@pytest.mark.parametrize("statistics", [True, False])
def test_a_step_is_on_the_disk_and_out_of_memory_when_the_next_was_taken(
    statistics: bool, form: dict[str, Any], plan: RunPlan, tmp_path: Path
) -> None:
    held: list[list[StorageWeakRef]] = []
    seen: list[tuple[int, list[str]]] = []

    def look(step: Step) -> None:
        held.append(memory_of(step))
        alive = [count_alive(refs) for refs in held]
        # The writer may hold the step it was just given and no other; what measures the steps
        # holds the one before that too, until it comes to this one.
        previous = alive[:-1] if not statistics else alive[:-2]
        assert previous == [0] * len(previous)
        assert max(alive) == alive[-1] == len(PARAMETERS)
        shards = [n for n in names_in(tmp_path) if n.endswith(".safetensors")]
        seen.append((step.index, [n for n in shards if int(n[10:15]) < step.index]))

    recorder = recorder_in(
        tmp_path, plan, num_steps=4, shard_bytes=1, statistics=statistics, **form
    )
    with recorder:
        train(plan, settings_of(64), recorder, look)
    shards = [f"gradients-{shard:05d}.safetensors" for shard in range(4)]
    assert seen == [(step, [] if "capture" in form else shards[:step]) for step in range(4)]
    del recorder
    gc.collect()
    assert sum(count_alive(refs) for refs in held) == 0


@pytest.mark.usefixtures("by_a_thread")
def test_a_disk_that_stands_still_makes_training_wait_with_two_steps_in_memory(
    plan: RunPlan, tmp_path: Path
) -> None:
    shard = tmp_path / f"gradients-00000.safetensors.{os.getpid()}.partial"
    entered = [threading.Event() for _ in range(4)]
    left = [threading.Event() for _ in range(4)]
    held: list[StorageWeakRef] = []
    cloner = Cloner()

    def enter(step: Step) -> None:
        held.extend(memory_of(step))
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
        assert entered[1].wait(PATIENCE)
        # Training has given step 0 away and stands at step 1 for as long as the writer does.
        assert not left[1].wait(0.2)
        assert left[0].is_set()
        assert not entered[2].is_set()
        assert count_alive(held) == len(held) == 2 * len(PARAMETERS)
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


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("at", [0, 2, 3])
def test_an_exception_in_training_leaves_no_file_and_no_thread(
    at: int, plan: RunPlan, tmp_path: Path
) -> None:
    error = ZeroDivisionError("in training")

    def fail(step: Step) -> None:
        assert len(recorder_threads()) == (recording.AT_ONCE_BYTES == 0)
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


@pytest.mark.usefixtures("by_a_thread")
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


def test_an_error_of_a_step_that_is_written_at_once_ends_that_step(
    plan: RunPlan, eight: list[Step], tmp_path: Path
) -> None:
    taken: list[int] = []

    def work(recorder: StepRecorder) -> None:
        for step in eight:
            recorder(step)
            assert recorder_threads() == []
            taken.append(step.index)

    with pytest.raises(OSError, match="too large"), file_size_limit(3 * STEP_BYTES):
        record(recorder_in(tmp_path, plan, num_steps=8), work)
    assert taken == [0, 1]
    assert names_in(tmp_path) == []


@pytest.mark.usefixtures("way")
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


@pytest.mark.usefixtures("by_a_thread")
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


# --- supports


SHAPES = {"kernel": (2, 3, 3, 3), "thin": (4, 2, 1, 5), "weight": (5, 7), "bias": (5,)}
BESIDE = 5 * 7 + 5
Live = tuple[int, ...]


def gradients_of(seed: int, kernel: Live, thin: Live = (2,)) -> dict[str, Tensor]:
    """Draw gradients that are zero but for some taps of the two kernels."""
    draw = torch.Generator().manual_seed(seed)
    gradients = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    for name, live, taps in (("kernel", kernel, 9), ("thin", thin, 5)):
        dead = [tap for tap in range(taps) if tap not in live]
        gradients[name].flatten(2)[:, :, dead] = 0
    return gradients


def record_gradients(
    folder: Path, gradients: Sequence[Mapping[str, Tensor]], capture: str = "all", **settings: Any
) -> StepRecorder:
    captures = chosen(capture, **settings)
    recorder = StepRecorder(folder, captures, num_steps=len(gradients), shapes=SHAPES)
    record(recorder, taking([step_of(n, gradient) for n, gradient in enumerate(gradients)]))
    return recorder


def kept_in(
    folder: Path, shapes: Mapping[str, tuple[int, ...]] = SHAPES
) -> list[dict[str, Tensor]]:
    """Decode each shard."""
    found = []
    for path in sorted(folder.glob("gradients-*.safetensors")):
        shard = Shard(path, shapes)
        parts = [(key, *key.split("/", 1)) for key in shard.keys]
        found.append({key: shard.gradient(int(step), name) for key, step, name in parts})
    return found


def taps_in(folder: Path) -> list[dict[str, list[int]]]:
    """Read the support of each shard with the safetensors library alone."""
    return [
        {k.removeprefix("support/"): t.tolist() for k, t in tensors.items() if "support/" in k}
        for path in sorted(folder.glob("gradients-*.safetensors"))
        for tensors in [safetensors.torch.load_file(path)]
    ]


def assert_decoded(
    shards: Sequence[Mapping[str, Tensor]],
    gradients: Sequence[Mapping[str, Tensor]],
    steps: Sequence[Sequence[int]],
) -> None:
    """Each shard holds these steps, bit for bit."""
    assert len(shards) == len(steps)
    for shard, inside in zip(shards, steps, strict=True):
        assert list(shard) == [f"{step:06d}/{name}" for step in inside for name in SHAPES]
        for key, tensor in shard.items():
            step, _, name = key.partition("/")
            assert tensor.dtype == torch.float32
            assert same_bits(tensor, gradients[int(step)][name]), key


STATISTICS = pytest.mark.parametrize("statistics", [True, False], ids=["measured", "not measured"])


@STATISTICS
def test_dead_taps_are_found_and_left_out(statistics: bool, tmp_path: Path) -> None:
    gradients = [gradients_of(seed, (4,)) for seed in range(3)]
    recorder = record_gradients(tmp_path, gradients, statistics=statistics)
    path = tmp_path / "gradients-00000.safetensors"
    assert keys_in_order(path) == ["support/kernel", "support/thin"] + [
        f"00000{step}/{name}" for step in range(3) for name in SHAPES
    ]
    stored = safetensors.torch.load_file(path)
    assert stored["support/kernel"].dtype == torch.int64
    assert taps_in(tmp_path) == [{"kernel": [4], "thin": [2]}]
    assert tuple(stored["000001/kernel"].shape) == (1, 2, 3)
    assert tuple(stored["000001/thin"].shape) == (1, 4, 2)
    assert stored["000001/kernel"][0].tolist() == gradients[1]["kernel"][:, :, 1, 1].tolist()
    assert recorder.bytes_captured == 3 * 4 * (6 + 8 + BESIDE)
    assert_decoded(kept_in(tmp_path), gradients, [[0, 1, 2]])


@STATISTICS
def test_a_gradient_that_leaves_its_support_opens_a_shard_with_the_joined_taps(
    statistics: bool, tmp_path: Path
) -> None:
    kernels: list[Live] = [(4,), (4,), (0, 4), (4,), (8,), (4,)]
    gradients = [gradients_of(n, kernel) for n, kernel in enumerate(kernels)]
    recorder = record_gradients(tmp_path, gradients, statistics=statistics)
    assert_decoded(kept_in(tmp_path), gradients, [[0, 1], [2, 3], [4, 5]])
    assert taps_in(tmp_path) == [
        {"kernel": [4], "thin": [2]},
        {"kernel": [0, 4], "thin": [2]},
        {"kernel": [0, 4, 8], "thin": [2]},
    ]
    assert recorder.bytes_captured == 4 * 2 * ((1 + 2 + 3) * 6 + 3 * (8 + BESIDE))
    assert recorder.num_steps_captured == 6
    # Closed early, a file has no room for what never came.
    for path in tmp_path.glob("gradients-*"):
        keys = keys_in_order(path)
        assert len(keys) == 2 + 2 * len(SHAPES)
        size = int.from_bytes(path.read_bytes()[:8], "little")
        data = sum(t.nbytes for t in safetensors.torch.load_file(path).values())
        assert path.stat().st_size == 8 + size + data
    assert {row["step"] for row in read_lines(tmp_path / "steps.jsonl")} == set(range(6))


@STATISTICS
@pytest.mark.parametrize("pattern", [-0.0, float("nan"), float("inf"), 1e-45])
def test_one_entry_that_is_not_plus_zero_is_enough_to_leave(
    pattern: float, statistics: bool, tmp_path: Path
) -> None:
    gradients = [gradients_of(seed, (4,)) for seed in range(3)]
    gradients[1]["kernel"][1, 2, 0, 2] = pattern
    record_gradients(tmp_path, gradients, statistics=statistics)
    assert_decoded(kept_in(tmp_path), gradients, [[0], [1, 2]])
    assert [taps["kernel"] for taps in taps_in(tmp_path)] == [[4], [2, 4]]


@STATISTICS
def test_a_kernel_may_begin_with_no_gradient_and_end_with_all_of_it(
    statistics: bool, tmp_path: Path
) -> None:
    kernels: list[Live] = [(), (), (1,), tuple(range(9)), (3,)]
    gradients = [gradients_of(n, kernel) for n, kernel in enumerate(kernels)]
    record_gradients(tmp_path, gradients, statistics=statistics)
    assert_decoded(kept_in(tmp_path), gradients, [[0, 1], [2], [3, 4]])
    assert taps_in(tmp_path) == [
        {"kernel": [], "thin": [2]},
        {"kernel": [1], "thin": [2]},
        {"thin": [2]},
    ]


def test_leaving_the_support_at_the_end_of_a_shard_closes_none_early(tmp_path: Path) -> None:
    kernels: list[Live] = [(4,), (4,), (0, 4), (0, 4), (0, 4)]
    gradients = [gradients_of(n, kernel) for n, kernel in enumerate(kernels)]
    room = 2 * 4 * (2 * 6 + 8 + BESIDE)
    record_gradients(tmp_path, gradients, shard_bytes=room)
    assert_decoded(kept_in(tmp_path), gradients, [[0, 1], [2, 3], [4]])


@STATISTICS
@pytest.mark.parametrize(
    ("capture", "steps"),
    [("last:3", [[3], [4, 5]]), ("every:2", [[0, 2], [4]]), ("every:4", [[0], [4]])],
)
def test_steps_that_are_not_kept_close_no_shard(
    capture: str, steps: list[list[int]], statistics: bool, tmp_path: Path
) -> None:
    kernels: list[Live] = [(4,), (4,), (4,), (4,), (0, 4), (4,)]
    gradients = [gradients_of(n, kernel) for n, kernel in enumerate(kernels)]
    record_gradients(tmp_path, gradients, capture, statistics=statistics)
    assert_decoded(kept_in(tmp_path), gradients, steps)


def test_what_a_layer_that_is_not_kept_does_closes_no_shard(tmp_path: Path) -> None:
    gradients = [gradients_of(n, (4,), thin) for n, thin in enumerate([(0,), (1,), (2,)])]
    recorder = record_gradients(tmp_path, gradients, layers=["kernel", "bias"])
    (shard,) = kept_in(tmp_path)
    assert list(shard) == [f"00000{n}/{name}" for n in range(3) for name in ("kernel", "bias")]
    assert all(same_bits(t, gradients[int(k[5])][k[7:]]) for k, t in shard.items())
    assert taps_in(tmp_path) == [{"kernel": [4]}]
    assert recorder.bytes_captured == 3 * 4 * (6 + 5)


@STATISTICS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_support_and_a_dense_shard_decode_to_the_same_bits(
    dtype: str, statistics: bool, tmp_path: Path
) -> None:
    kernels: list[Live] = [(4,), (4,), (0, 4)]
    gradients = [gradients_of(n, kernel) for n, kernel in enumerate(kernels)]
    found: dict[str, dict[str, Tensor]] = {}
    for encoding in ("support", "dense"):
        folder = tmp_path / encoding
        recorder = record_gradients(
            folder, gradients, dtype=dtype, encoding=encoding, statistics=statistics
        )
        found[encoding] = {k: t for shard in kept_in(folder) for k, t in shard.items()}
    assert list(found["support"]) == list(found["dense"])
    assert all(same_bits(t, found["dense"][k]) for k, t in found["support"].items())
    # The dense shard needs no help to be read.
    assert len(list((tmp_path / "dense").glob("gradients-*"))) == 1
    stored = safetensors.torch.load_file(tmp_path / "dense" / "gradients-00000.safetensors")
    assert {k: tuple(t.shape) for k, t in stored.items()} == {
        f"00000{step}/{name}": shape for step in range(3) for name, shape in SHAPES.items()
    }
    numbers = 54 + 40 + BESIDE
    assert recorder.bytes_captured == 3 * numbers * (4 if dtype == "float32" else 2)


@pytest.fixture(scope="module")
def deep() -> tuple[RunPlan, list[Step]]:
    """A plan of ResNet18, most of whose last stage is dead, and two real steps of it."""
    values = {"model": "resnet18", "batch-size": 4, "local-steps": 2, "capture": "all"}
    plan = RunPlan.prepare(RunConfig.from_mapping(values))
    settings = plan.config.training_of(0)
    batches = load_batches(
        plan.task,
        plan.dataset.train(),
        plan.partition[0],
        settings,
        order=generator(42, Purpose.BATCHES, 1, 0),
        augmentation=generator(42, Purpose.AUGMENTATION, 1, 0),
        device=torch.device("cpu"),
    )
    cloner = Cloner()
    model = build_model("resnet18", classes=10, norm="batch", seed=0)
    local_train(plan.task, model, plan.initial_state, batches, settings.optimizer, cloner)
    return plan, cloner.steps


@pytest.mark.parametrize(
    "form", [{}, {"encoding": "dense"}, {"dtype": "bfloat16"}, {"dtype": "float16"}]
)
def test_real_steps_of_resnet18_take_the_bytes_of_the_plan_and_decode_exactly(
    form: dict[str, Any], deep: tuple[RunPlan, list[Step]], tmp_path: Path
) -> None:
    plan, steps = deep
    with recorder_in(tmp_path, plan, num_steps=2, **form) as recorder:
        for step in steps:
            recorder(step)
    policy = chosen(**form)[-1]
    assert isinstance(policy, Gradients)
    assert recorder.bytes_captured == 2 * policy.step_bytes(plan)
    (shard,) = kept_in(tmp_path, plan.parameters)
    assert len(shard) == 2 * len(plan.parameters)
    dtype = getattr(torch, policy.dtype)
    for key, tensor in shard.items():
        step, _, name = key.partition("/")
        assert same_bits(tensor, steps[int(step)].gradients[name].to(dtype).float()), key


# --- dtypes


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_smaller_dtypes_hold_the_rounded_numbers(dtype: str, tmp_path: Path) -> None:
    gradients = [gradients_of(seed, (4,)) for seed in range(2)]
    special = [float("nan"), float("inf"), 1e6, -0.0, 1e-9]
    gradients[1]["bias"] = torch.tensor(special)
    recorder = record_gradients(tmp_path, gradients, dtype=dtype, encoding="dense")
    stored = safetensors.torch.load_file(tmp_path / "gradients-00000.safetensors")
    wanted = getattr(torch, dtype)
    for key, tensor in stored.items():
        exact = gradients[int(key[5])][key[7:]].to(wanted)
        assert tensor.dtype == wanted
        assert tensor.view(torch.int16).tolist() == exact.view(torch.int16).tolist(), key
    assert recorder.bytes_captured == 2 * 2 * (54 + 40 + BESIDE)
    # Decoded they are float32 again.
    (shard,) = kept_in(tmp_path)
    assert {t.dtype for t in shard.values()} == {torch.float32}
    assert same_bits(shard["000000/weight"], gradients[0]["weight"].to(wanted).float())


# --- sketches


def sketcher_of(size: int) -> Sketcher:
    return Sketcher(42, size, {name: position for position, name in enumerate(SHAPES)})


@STATISTICS
@pytest.mark.parametrize("form", [{}, {"encoding": "dense", "dtype": "float16"}])
def test_a_sketch_of_every_step_takes_the_place_of_gradients_whatever_their_form(
    form: dict[str, Any], statistics: bool, tmp_path: Path
) -> None:
    kernels: list[Live] = [(), (4,), (0, 4), tuple(range(9))]
    gradients = [gradients_of(n, kernel) for n, kernel in enumerate(kernels)]
    recorder = record_gradients(tmp_path, gradients, "sketch:16", statistics=statistics, **form)
    assert names_in(tmp_path) == ["sketch.safetensors", "steps.jsonl"]
    stored = safetensors.torch.load_file(tmp_path / "sketch.safetensors")
    assert list(stored) == ["sketch"]
    assert (stored["sketch"].dtype, tuple(stored["sketch"].shape)) == (torch.float32, (4, 16))
    own = sketcher_of(16)
    for row, gradient in zip(stored["sketch"].numpy(), gradients, strict=True):
        assert np.array_equal(row, own.sketch(gradient, dict.fromkeys(SHAPES)))
    assert (recorder.num_steps_captured, recorder.bytes_captured) == (4, 4 * 4 * 16)
    # Whether measured or not, each line says how long each layer's part was.
    for row, gradient in zip(read_lines(tmp_path / "steps.jsonl"), gradients, strict=True):
        norms = {n: float(np.linalg.norm(g.double().numpy())) for n, g in gradient.items()}
        assert row["per_layer_norms"] == pytest.approx(norms, rel=1e-6)
        assert list(row) == OF_TRAINING + (OF_GRADIENTS if statistics else ["per_layer_norms"])


@STATISTICS
def test_a_sketch_is_of_the_chosen_layers(statistics: bool, tmp_path: Path) -> None:
    gradients = [gradients_of(n, (4,)) for n in range(2)]
    chosen = ["kernel", "bias"]
    settings: dict[str, Any] = {"layers": chosen, "statistics": statistics}
    record_gradients(tmp_path, gradients, "sketch:8", **settings)
    stored = safetensors.torch.load_file(tmp_path / "sketch.safetensors")["sketch"].numpy()
    own = sketcher_of(8)
    for row, gradient in zip(stored, gradients, strict=True):
        some = {name: gradient[name] for name in chosen}
        assert np.array_equal(row, own.sketch(some, dict.fromkeys(chosen)))
    for line in read_lines(tmp_path / "steps.jsonl"):
        assert list(line["per_layer_norms"]) == (list(SHAPES) if statistics else chosen)


def test_a_disk_that_is_full_at_the_sketch_leaves_nothing(tmp_path: Path) -> None:
    gradients = [gradients_of(n, (4,)) for n in range(3)]
    with pytest.raises(OSError, match="too large"), file_size_limit(2000):
        record_gradients(tmp_path, gradients, "sketch:1000", statistics=False)
    assert names_in(tmp_path) == []
    assert recorder_threads() == []


# --- statistics


def cosine(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    return float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))


@pytest.mark.parametrize("encoding", ["support", "dense"])
@pytest.mark.parametrize("capture", ["none", "all", "first:1", "last:2", "every:3"])
def test_every_step_is_measured_whether_it_is_kept_or_not(
    capture: str, encoding: str, tmp_path: Path
) -> None:
    kernels: list[Live] = [(4,), (4,), (0, 4), (4,), tuple(range(9)), (4,)]
    gradients = [gradients_of(n, kernel) for n, kernel in enumerate(kernels)]
    record_gradients(tmp_path, gradients, capture, encoding=encoding, layers=["bias", "kernel"])
    vectors = [
        np.concatenate([gradient[n].double().numpy().reshape(-1) for n in SHAPES])
        for gradient in gradients
    ]
    rows = list(read_lines(tmp_path / "steps.jsonl"))
    assert [list(row) for row in rows] == [OF_TRAINING + OF_GRADIENTS] * 6
    for step, (row, vector) in enumerate(zip(rows, vectors, strict=True)):
        assert row["gradient_norm"] == pytest.approx(np.linalg.norm(vector), rel=1e-6)
        norms = {n: float(np.linalg.norm(g.double())) for n, g in gradients[step].items()}
        assert row["per_layer_norms"] == pytest.approx(norms, rel=1e-6)
        assert row["zero_fraction"] == pytest.approx(np.mean(vector == 0), abs=1e-12)
        if step == 0:
            assert (row["cosine_to_previous"], row["cosine_to_mean"]) == (None, None)
            continue
        mean = np.mean(vectors[:step], axis=0)
        assert row["cosine_to_previous"] == pytest.approx(
            cosine(vector, vectors[step - 1]), abs=1e-6
        )
        assert row["cosine_to_mean"] == pytest.approx(cosine(vector, mean), abs=1e-6)


@pytest.mark.parametrize("capture", ["none", "all", "first:1"])
def test_without_statistics_a_line_says_nothing_of_gradients(capture: str, tmp_path: Path) -> None:
    gradients = [gradients_of(n, (4,)) for n in range(3)]
    record_gradients(tmp_path, gradients, capture, statistics=False)
    assert [list(row) for row in read_lines(tmp_path / "steps.jsonl")] == [OF_TRAINING] * 3


def test_measuring_changes_nothing_that_is_kept(
    plan: RunPlan, eight: list[Step], tmp_path: Path
) -> None:
    for name, statistics in (("with", True), ("without", False)):
        record(
            recorder_in(tmp_path / name, plan, num_steps=8, statistics=statistics), taking(eight)
        )
    shards = [
        (tmp_path / n / "gradients-00000.safetensors").read_bytes() for n in ("with", "without")
    ]
    assert shards[0] == shards[1]


def test_a_gradient_that_is_not_finite_is_null_in_its_line(tmp_path: Path) -> None:
    gradients = [gradients_of(n, (4,)) for n in range(3)]
    gradients[1]["weight"][0, 0] = float("inf")
    record_gradients(tmp_path, gradients)
    rows = list(read_lines(tmp_path / "steps.jsonl"))
    assert [row["gradient_norm"] is None for row in rows] == [False, True, False]
    assert rows[1]["per_layer_norms"]["weight"] is None
    assert rows[1]["per_layer_norms"]["bias"] > 0
    assert_decoded(kept_in(tmp_path), gradients, [[0, 1, 2]])


def test_a_zero_gradient_has_a_norm_of_zero_and_no_cosines(plan: RunPlan, tmp_path: Path) -> None:
    zeros = {name: torch.zeros(shape) for name, shape in plan.parameters.items()}
    record(recorder_in(tmp_path, plan, num_steps=2), taking([step_of(n, zeros) for n in (0, 1)]))
    for row in read_lines(tmp_path / "steps.jsonl"):
        assert {name: row[name] for name in OF_GRADIENTS} == {
            "gradient_norm": 0.0,
            "per_layer_norms": dict.fromkeys(PARAMETERS, 0.0),
            "cosine_to_previous": None,
            "cosine_to_mean": None,
            "zero_fraction": 1.0,
        }
    (shard,) = kept_in(tmp_path, plan.parameters)
    assert all(same_bits(t, zeros[key[7:]]) for key, t in shard.items())


# --- the index and the checksums


INDEX = "gradients.safetensors.index.json"


@pytest.mark.parametrize(
    ("shard_bytes", "kernels", "shards"),
    [
        (10**6, [(4,)] * 4, [[0, 1, 2, 3]]),
        (1, [(4,)] * 4, [[0], [1], [2], [3]]),
        (10**6, [(4,), (4,), (0, 4), (4,)], [[0, 1], [2, 3]]),
    ],
    ids=["one shard", "a shard for each step", "a shard closed early"],
)
def test_two_shards_or_more_have_an_index_of_their_keys(
    shard_bytes: int, kernels: list[Live], shards: list[list[int]], tmp_path: Path
) -> None:
    gradients = [gradients_of(n, kernel) for n, kernel in enumerate(kernels)]
    recorder = record_gradients(tmp_path, gradients, shard_bytes=shard_bytes)
    assert (tmp_path / INDEX).exists() == (len(shards) > 1)
    if len(shards) > 1:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"] == {"total_size": recorder.bytes_captured}
        assert list(index["weight_map"].items()) == [
            (f"{step:06d}/{name}", f"gradients-{number:05d}.safetensors")
            for number, steps in enumerate(shards)
            for step in steps
            for name in SHAPES
        ]
        for key, name in index["weight_map"].items():
            assert key in safetensors.torch.load_file(tmp_path / name)
    assert_decoded(kept_in(tmp_path), gradients, shards)


@pytest.mark.parametrize(
    ("capture", "settings", "names"),
    [
        ("none", {}, []),
        ("all", {}, ["gradients-00000.safetensors", "gradients-00001.safetensors", INDEX]),
        ("all", {"encoding": "dense"}, ["gradients-00000.safetensors"]),
        (
            "last:2",
            {"dtype": "bfloat16", "shard_bytes": 1},
            ["gradients-00000.safetensors", "gradients-00001.safetensors", INDEX],
        ),
        ("sketch:10", {}, ["sketch.safetensors"]),
    ],
)
def test_the_recorder_knows_the_checksums_of_its_files(
    capture: str, settings: dict[str, Any], names: list[str], tmp_path: Path
) -> None:
    kernels: list[Live] = [(4,), (4,), (0, 4), (4,)]
    gradients = [gradients_of(n, kernel) for n, kernel in enumerate(kernels)]
    recorder = record_gradients(tmp_path, gradients, capture, **settings)
    assert names_in(tmp_path) == sorted([*names, "steps.jsonl"])
    assert recorder.files == {n: Checksum.of_file(tmp_path / n) for n in names_in(tmp_path)}


# --- what fails after a shard was closed early


def test_an_error_after_a_shard_was_closed_early_leaves_nothing(tmp_path: Path) -> None:
    gradients = [gradients_of(n, kernel) for n, kernel in enumerate([(4,), (0, 4), (8,)])]
    recorder = StepRecorder(tmp_path, chosen(), num_steps=4, shapes=SHAPES)
    with pytest.raises(RuntimeError, match="3 of 4 steps to capture were made"):
        record(recorder, taking([step_of(n, g) for n, g in enumerate(gradients)]))
    assert names_in(tmp_path) == []


@STATISTICS
def test_a_disk_that_fills_up_at_the_second_shard_leaves_nothing(
    statistics: bool, tmp_path: Path
) -> None:
    kernels: list[Live] = [(4,), tuple(range(9)), (4,), (4,)]
    gradients = [gradients_of(n, kernel, tuple(range(5))) for n, kernel in enumerate(kernels)]
    record_gradients(tmp_path / "free", gradients, statistics=statistics)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "free").glob("gradients-*"))]
    assert sizes[0] < sizes[1]
    folder = tmp_path / "full"
    with pytest.raises(OSError, match="too large"), file_size_limit(sizes[0]):
        record_gradients(folder, gradients, statistics=statistics)
    assert names_in(folder) == []
    assert recorder_threads() == []


def test_a_disk_that_is_full_at_the_index_leaves_nothing(tmp_path: Path) -> None:
    gradients = [gradients_of(n, (4,)) for n in range(8)]
    settings: dict[str, Any] = {"layers": ["bias"], "shard_bytes": 1, "statistics": False}
    record_gradients(tmp_path, gradients, **settings)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    largest = max(size for name, size in sizes.items() if name.startswith("gradients-"))
    assert largest < sizes[INDEX]
    with pytest.raises(OSError, match="too large"), file_size_limit(largest):
        record_gradients(tmp_path, gradients, **settings)
    assert names_in(tmp_path) == []
