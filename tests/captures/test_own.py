"""A capture of the user's own, through a whole run in one process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import pytest
from numpy.typing import NDArray

from fedsim.captures.stacked import StackedArray
from fedsim.core import capture, registry
from fedsim.core.capture import Observer, SeenStep, Sink
from fedsim.core.config import RunConfig
from fedsim.core.errors import InputError
from fedsim.core.plan import RunPlan
from fedsim.recording.findings import SOURCES
from fedsim.recording.reader import load_run
from fedsim.recording.verify import verify
from tests.recording.test_forgeries import in_lines, in_tensors, repair
from tests.recording.test_verify import record, violations_of

PEAKS = f"{Path(__file__).parents[2]}/examples/extend/capture.py:Peaks"
MEANS = f"{__file__}:Means"


class Means(StackedArray):
    """The mean output of the first layer at every other step, by a hook on the model."""

    name: ClassVar[str] = "means"
    found: float = 0.0

    @classmethod
    def of(cls, config: RunConfig) -> Self:
        return cls()

    def kept_steps(self, num_steps: int) -> range:
        return range(0, num_steps, 2)

    def shape(self, parameters: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        return ()

    def record(self, sink: Sink) -> Observer | None:
        assert sink.model is not None
        first = next(iter(sink.model.children()))
        hook = lambda *seen: setattr(self, "found", float(seen[2].mean()))  # noqa: E731
        sink.at_end.callback(first.register_forward_hook(hook).remove)
        return super().record(sink)

    def measure(self, seen: SeenStep, sink: Sink) -> NDArray[np.float32]:
        return np.array(self.found, np.float32)


@pytest.fixture(autouse=True)
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process load both, as a user's command does."""
    monkeypatch.setattr(capture, "_own", {})
    monkeypatch.setattr(registry, "_trusted", {PEAKS, MEANS})


FEW = {"local-steps": 4, "batch-size": 16, "client": {}}


def test_an_example_of_one_file_is_sized_recorded_read_and_proven(
    plan: RunPlan, tmp_path: Path
) -> None:
    root = record(plan, tmp_path / "run", capture=PEAKS, **FEW)
    run = load_run(root)
    clients = run.round(1).clients
    for client in clients.values():
        row = client.telemetry
        assert (row["num_steps_captured"], row["bytes_captured"]) == (4, 4 * 4 * len(run.shapes))
        assert list(row["files"]) == ["peaks.safetensors", "steps.jsonl"]
        assert client.peaks(3).shape == (len(run.shapes),)
        with pytest.raises(InputError, match="has no peaks; there are 4"):
            client.peaks(4)
    found = verify(root, recompute=None)
    assert found.violations == []
    proven = {name: found.checks[name].proven for name in ("gradients", "recomputed")}
    assert proven == dict.fromkeys(proven, 4 * len(clients))
    path = f"rounds/0001/clients/{min(clients):04d}/peaks.safetensors"
    in_tensors(path, "peaks", lambda peak: 100 * peak)(root)
    repair(root)
    assert violations_of(verify(root)).keys() == {"gradients"}


def test_a_hook_on_the_model_is_recorded_and_recomputed(plan: RunPlan, tmp_path: Path) -> None:
    root = record(plan, tmp_path / "run", capture=MEANS, **FEW)
    client = next(iter(load_run(root).round(1).clients.values()))
    assert client.telemetry["num_steps_captured"] == 2
    assert client.means(0) != client.means(1)
    assert verify(root, recompute=None).violations == []
    path = f"{client.folder.relative_to(root).as_posix()}/means.safetensors"
    in_tensors(path, "means", lambda mean: mean + 1e-6)(root)
    repair(root)
    (violation,) = verify(root, recompute=None).violations
    assert violation == f"{client.folder}: means.safetensors differs"


def test_code_that_only_a_run_names_is_not_loaded(plan: RunPlan, tmp_path: Path) -> None:
    root = record(plan, tmp_path / "run", capture=MEANS, **FEW)
    capture._own.clear()
    registry._trusted.clear()
    with pytest.raises(InputError, match=f"{registry.TRUSTED}={MEANS} in the environment"):
        load_run(root).round(1).client(2).means(0)
    assert load_run(root).round(1).row["round"] == 1


def test_without_the_code_all_but_its_own_files_is_proven(plan: RunPlan, tmp_path: Path) -> None:
    root = record(plan, tmp_path / "run", capture=MEANS, **FEW)
    named = verify(root, recompute=None)
    capture._own.clear()
    registry._trusted.clear()
    found = verify(root, recompute=None)
    assert found.violations == []
    proven = {name: check.proven for name, check in named.checks.items()}
    assert {name: check.proven for name, check in found.checks.items()} == proven
    why = (
        f"capture = {MEANS!r} is code that was not named to this process; "
        f"{registry.TRUSTED}={MEANS} in the environment names it"
    )
    assert found.checks["gradients"].reasons == [f"means.safetensors: {why}"]
    assert found.checks["replay"].reasons[-1] == why
    assert f"num_steps_captured, bytes_captured: {why}" in found.checks["rows"].reasons
    assert SOURCES in found.checks["recomputed"].reasons
    # Its bytes are still those that were written, and the rest is still told.
    first = min(load_run(root).round(1).clients)
    path = f"rounds/0001/clients/{first:04d}/steps.jsonl"
    in_lines(path, lambda steps: steps[0].update(loss=steps[0]["loss"] + 1e-3))(root)
    repair(root)
    assert "recomputed" in violations_of(verify(root, recompute=None))
