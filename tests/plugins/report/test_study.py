from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim.core.errors import InputError
from fedsim.core.partition import class_counts
from fedsim.core.plan import RunPlan
from fedsim.plugins.report.study import Study
from fedsim.recording.files import write_tensors
from fedsim.recording.reader import Run, load_run


def study_of(path: Path, **options: Any) -> Study:
    return Study(load_run(path), "run", **options)


def flat(tensors: Any, names: Any) -> np.ndarray:
    return np.concatenate([tensors[name].double().numpy().ravel() for name in names])


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def test_drift_is_that_of_whole_deltas(small: Path) -> None:
    run = load_run(small)
    drifts = Study(run, "run").drift
    assert [drift.round for drift in drifts] == [1, 2, 3]
    for drift in drifts:
        this = run.round(drift.round)
        assert drift.clients == sorted(this.participants)
        deltas = [flat(this.client(p).delta, run.shapes) for p in drift.clients]
        mean = flat(this.aggregate, run.shapes)
        np.testing.assert_allclose(drift.lengths, [np.linalg.norm(d) for d in deltas], rtol=1e-5)
        np.testing.assert_allclose(drift.to_movement, [cosine(d, mean) for d in deltas], atol=1e-5)
        pairs = [[cosine(x, y) for y in deltas] for x in deltas]
        assert drift.pairs is not None
        np.testing.assert_allclose(drift.pairs, pairs, atol=1e-5)
        above = [pairs[0][1], pairs[0][2], pairs[1][2]]
        np.testing.assert_allclose(drift.quantiles, np.quantile(above, [0.1, 0.5, 0.9]), atol=1e-5)


def test_conflict_is_that_of_the_first_gradients(small: Path) -> None:
    run = load_run(small)
    for conflict in Study(run, "run").conflict:
        clients = run.round(conflict.round).clients
        first = [flat(clients[p].gradient(0), run.shapes) for p in sorted(clients)]
        pairs = [cosine(first[i], first[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
        assert conflict.clients == 3
        assert conflict.share == sum(c < 0 for c in pairs) / 3
        assert conflict.quantiles == pytest.approx(np.quantile(pairs, [0.1, 0.5, 0.9]), abs=1e-5)


def test_noise_is_that_of_the_captured_full_batches(small: Path) -> None:
    run = load_run(small)
    found = Study(run, "run").noise
    assert len(found) > 4
    assert any(noise.scale is not None for noise in found)
    for noise in found:
        client = run.round(noise.round).client(noise.partition)
        sizes = client.telemetry["batch_sizes"]
        steps = [s for s in client.captured_steps if sizes[s] == 8]
        assert noise.steps == len(steps) > 1
        gradients = np.stack([flat(client.gradient(s), run.shapes) for s in steps])
        mean = gradients.mean(axis=0)
        variance = ((gradients - mean) ** 2).sum() / (len(steps) - 1)
        signal = mean @ mean - variance / len(steps)
        if signal <= 0:
            assert noise.scale is None
        else:
            assert noise.scale == pytest.approx(8 * variance / signal, rel=1e-3)


def test_sketches_stand_for_gradients(other: Path) -> None:
    study = study_of(other)
    run = load_run(other)
    conflict = study.conflict[0]
    clients = run.round(1).clients
    sketches = [clients[p].sketch(0) for p in sorted(clients)]
    assert conflict.clients == len(sketches) == 2
    assert conflict.quantiles == pytest.approx([cosine(*sketches)] * 3, abs=1e-5)
    assert {noise.round for noise in study.noise} == {1, 2}


def test_drift_is_told_from_where_the_model_went_not_from_the_mean_delta(
    small: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(small, tmp_path / "run"))
    run = load_run(path)
    before, after = (run.round(r).state for r in (0, 1))
    # As a strategy that turns updates round inside its fold leaves it.
    turned = {n: (2 * before[n] - after[n]).numpy() for n in after}
    write_tensors(run.layout.state(1), turned)
    honest, other = (Study(load_run(p), "run").drift[0].to_movement for p in (small, path))
    np.testing.assert_allclose(other, -honest, atol=1e-5)
    assert (honest > 0.1).any()


def test_no_more_is_read_than_the_budget_allows(small: Path) -> None:
    whole = study_of(small)
    state, step = 78_848, 78_184
    assert whole.bytes_to_read == 3 * 4 * state + 3 * 3 * step + sum(
        3 * step for row in whole.ok_rows
    )
    told: list[int] = []
    half = study_of(small, budget=3 * 2 * 4 * state, told=told.append)
    assert half.drift_rounds == [1, 3]
    assert [drift.round for drift in half.drift] == [1, 3]
    assert told == [4 * state] * 2
    assert half.left_out(half.drift_rounds, half.trained_rounds) == (
        " Of run, 2 of 3 rounds were read to keep to 1.9 MB; --read-budget allows more."
    )
    assert whole.left_out(whole.drift_rounds, whole.trained_rounds) == ""
    none = study_of(small, budget=3)
    assert (none.drift_rounds, none.conflict_rounds, none.noise_rounds) == ([], [], [])
    assert none.bytes_to_read == 0


def test_a_small_budget_takes_fewer_steps_before_fewer_rounds(make_run: Any) -> None:
    path = make_run(capture="all", batch_size=8, rounds=2)
    assert study_of(path).noise_steps == 16
    few = study_of(path, budget=3 * 2 * 3 * 5 * 78_184)
    assert few.noise_steps == 4
    assert few.noise_rounds == [1, 2]
    assert max(noise.steps for noise in few.noise) == 4


def test_clients_that_never_trained_are_counted_from_the_data(small: Path) -> None:
    run = load_run(small)
    plan = RunPlan.prepare(run.config)
    trained = {row["partition"] for row in run.client_rows}
    counts, reason = Study(run, "run").class_counts
    expected = class_counts(plan.partition, plan.dataset.train_labels.numpy(), 10)
    assert counts.tolist() == expected.tolist()
    assert reason == ""
    assert len(trained) < 6


def test_clients_of_whom_nothing_is_known_are_blank(small: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(small, tmp_path / "run"))
    change_lines(path / "clients.jsonl", class_distribution=[0] * 10)
    counts, reason = study_of(path).class_counts
    trained = {row["partition"] for row in load_run(path).client_rows}
    assert np.isnan(counts).all(axis=1).tolist() == [p not in trained for p in range(6)]
    missing = 6 - len(trained)
    assert reason == (
        f"{missing} clients have not trained yet and are blank: the data at hand is not that of "
        "the run."
    )


def change_lines(path: Path, **values: Any) -> None:
    rows = [json.loads(line) | values for line in path.read_bytes().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("name", "values", "sentence"),
    [
        ("clients.jsonl", {"partition": 6}, "names client 6; expected 0 to 5"),
        ("rounds.jsonl", {"participants": [10**9]}, "names client 1000000000; expected"),
        ("clients.jsonl", {"class_distribution": [1]}, "has 1 numbers; expected 10"),
    ],
)
def test_rows_that_speak_of_what_is_not_there_are_refused(
    small: Path, tmp_path: Path, name: str, values: dict[str, Any], sentence: str
) -> None:
    path = Path(shutil.copytree(small, tmp_path / "run"))
    change_lines(path / name, **values)
    with pytest.raises(InputError, match=sentence):
        study_of(path)


def test_a_number_of_classes_alone_takes_no_memory(small: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(small, tmp_path / "run"))
    manifest = json.loads((path / "run.json").read_bytes())
    manifest["dataset"]["classes"] = 10**9
    (path / "run.json").write_text(json.dumps(manifest))
    assert study_of(path).class_counts[0].shape == (6, 10)


def test_few_matrices_are_kept_of_large_rounds(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsim.plugins.report.study.MOST_CELLS", 18)
    study = study_of(small)
    assert study.matrix_rounds == [1, 3]
    assert [drift.pairs is not None for drift in study.drift] == [True, False, True]
    assert isinstance(study.run, Run)
