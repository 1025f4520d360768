from __future__ import annotations

import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest

from fedsim.plugins.report import charts
from fedsim.plugins.report.figures import Absent, Band, Bars, Figure, Line, Matrix, Points
from fedsim.plugins.report.study import Study
from fedsim.recording.reader import load_run
from fedsim.recording.runs import remove_gradients


def drawn(key: str, *paths: Path, **options: Any) -> Figure:
    figure = charts.draw(key, studies_of(*paths, **options))
    assert isinstance(figure, Figure), figure
    return figure


def absent(key: str, *paths: Path, **options: Any) -> str:
    figure = charts.draw(key, studies_of(*paths, **options))
    assert isinstance(figure, Absent)
    return figure.reason


def studies_of(*paths: Path, **options: Any) -> list[Study]:
    alone = len(paths) == 1
    return [Study(load_run(path), path.name, alone=alone, **options) for path in paths]


def matrix_of(figure: Figure, view: int = 0) -> Matrix:
    (mark,) = figure.views[view].marks
    assert isinstance(mark, Matrix)
    return mark


@pytest.mark.parametrize(
    ("key", "column"), [("accuracy", "global_accuracy"), ("loss", "global_loss")]
)
def test_curves_are_the_rows(small: Path, key: str, column: str) -> None:
    rows = load_run(small).round_rows
    (line,) = drawn(key, small).views[0].marks
    assert line == Line(name="small", x=[0, 1, 2, 3], y=[row[column] for row in rows], series=0)


def test_curves_of_several_runs_are_in_one_view(small: Path, other: Path) -> None:
    (view,) = drawn("accuracy", small, other).views
    assert [(m.name, m.series, len(m.x)) for m in view.marks if isinstance(m, Line)] == [
        ("small", 0, 4),
        ("other", 1, 3),
    ]


def test_rounds_that_were_not_evaluated_are_left_out(make_run: Any) -> None:
    path = make_run(evaluate_every=2)
    (line,) = drawn("accuracy", path).views[0].marks
    assert isinstance(line, Line)
    evaluated = [r["round"] for r in load_run(path).round_rows if r["global_loss"] is not None]
    assert line.x == evaluated
    assert 1 not in evaluated


def test_a_loss_that_is_not_finite_is_a_gap(small: Path, tmp_path: Path) -> None:
    path = changed(small, tmp_path, "rounds.jsonl", lambda row: row | {"global_loss": None})
    (line,) = drawn("loss", path).views[0].marks
    assert isinstance(line, Line)
    assert line.y == [None] * 4


def changed(run: Path, folder: Path, name: str, change: Any) -> Path:
    path = Path(shutil.copytree(run, folder / "changed"))
    rows = [change(json.loads(line)) for line in (path / name).read_bytes().splitlines()]
    (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_partition_counts_every_sample(small: Path) -> None:
    figure = drawn("partition", small)
    matrix = matrix_of(figure)
    assert matrix.rows == [str(number) for number in range(6)]
    assert matrix.columns == [str(number) for number in range(10)]
    sizes = load_run(small).entry("partition")["sizes"]
    assert [sum(v or 0 for v in row) for row in matrix.values] == sizes
    assert figure.caption == "Training samples of each class at each client."


def test_the_same_partition_is_shown_once(small: Path, other: Path, make_run: Any) -> None:
    figure = drawn("partition", small, other)
    assert len(figure.views) == 1
    assert "Runs with the same partition of the same data are shown once." in figure.caption
    skewed = make_run("skewed", rounds=1, alpha=0.2)
    assert [v.name for v in drawn("partition", small, skewed).views] == ["small", "skewed"]
    made = [
        make_run(name, rounds=1, partition="iid", dataset=name, capture="none")
        for name in ("synthetic:60:3", "synthetic:60:5")
    ]
    # The same positions are other samples in other data.
    assert len({load_run(path).entry("partition")["sha256"] for path in made}) == 1
    assert [len(matrix_of(drawn("partition", *made), v).columns) for v in (0, 1)] == [3, 5]


def test_participation_tells_who_trained_and_who_failed(other: Path) -> None:
    figure = drawn("participation", other)
    assert figure.levels == ("trained", "failed")
    matrix = matrix_of(figure)
    assert matrix.columns == ["1", "2"]
    # Rounds 1 and 2 drew 0 3 2 and 2 3 5.
    assert matrix.values == [[1, None], [None, None], [1, 1], [2, 2], [None, None], [None, 1]]


@pytest.mark.parametrize(
    ("key", "column"), [("client_loss", "local_loss"), ("gradient_norm", "gradient_norm")]
)
def test_clients_are_points_around_their_median(small: Path, key: str, column: str) -> None:
    points, line = drawn(key, small).views[0].marks
    rows = load_run(small).client_rows
    assert isinstance(points, Points)
    assert isinstance(line, Line)
    assert points.y == [row[column] for row in rows]
    assert points.x == [row["round"] for row in rows]
    assert points.labels == [f"client {row['partition']}" for row in rows]
    assert line.x == [1, 2, 3]
    assert line.y == [
        statistics.median(row[column] for row in rows if row["round"] == r) for r in (1, 2, 3)
    ]


def test_very_many_clients_are_a_band(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "_MOST_POINTS", 8)
    band, _ = drawn("client_loss", small).views[0].marks
    assert isinstance(band, Band)
    rows = load_run(small).client_rows
    low, middle, high = sorted(row["local_loss"] for row in rows if row["round"] == 1)
    assert band.low[0] == pytest.approx(low + 0.2 * (middle - low))
    assert band.high[0] == pytest.approx(high - 0.2 * (high - middle))


def test_norms_of_layers_are_medians(small: Path) -> None:
    matrix = matrix_of(drawn("layer_norms", small))
    run = load_run(small)
    assert matrix.rows == list(run.shapes)
    name = matrix.rows[2]
    norms = [row["per_layer_norms"][name] for row in run.client_rows_of(2)]
    assert matrix.values[2][1] == pytest.approx(math.log10(statistics.median(norms)))


def test_drift_has_a_point_for_each_client_of_each_round(small: Path) -> None:
    (study,) = studies_of(small)
    points, _ = drawn("drift", small).views[0].marks
    assert isinstance(points, Points)
    assert points.x == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert points.labels[:3] == ["client 0", "client 2", "client 3"]
    assert points.y == [float(v) for drift in study.drift for v in drift.to_movement]


def test_pairs_are_a_matrix_for_each_round(small: Path, other: Path) -> None:
    (study,) = studies_of(small)
    figure = drawn("drift_pairs", small)
    assert [view.name for view in figure.views] == ["round 1", "round 2", "round 3"]
    matrix = matrix_of(figure, 2)
    assert matrix.rows == matrix.columns == ["0", "2", "4"]
    assert study.drift[2].pairs is not None
    assert matrix.values == study.drift[2].pairs.round(3).tolist()
    assert [view.name for view in drawn("drift_pairs", small, other).views][-2:] == [
        "other, round 1",
        "other, round 2",
    ]


def test_pairs_that_no_page_can_hold_are_told(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.plugins.report.study.MOST_CELLS", 9)
    assert drawn("drift_pairs", small).caption.endswith("1 of 3 rounds are shown.")
    monkeypatch.setattr("fedsim.plugins.report.study.MOST_CELLS", 8)
    assert absent("drift_pairs", small) == "A round has more pairs of clients than a page can hold."


def test_pair_cosines_are_the_quantiles(small: Path) -> None:
    (study,) = studies_of(small)
    band, line = drawn("pair_cosines", small).views[0].marks
    assert isinstance(band, Band)
    assert isinstance(line, Line)
    quantiles = [drift.quantiles for drift in study.drift]
    assert list(zip(band.low, line.y, band.high, strict=True)) == quantiles


def test_conflict_and_noise_name_their_papers(small: Path) -> None:
    (study,) = studies_of(small)
    conflict = drawn("conflict", small)
    (line,) = conflict.views[0].marks
    assert isinstance(line, Line)
    assert line.y == [found.share for found in study.conflict]
    assert "Yu et al." in conflict.caption
    noise = drawn("noise", small)
    points, _ = noise.views[0].marks
    assert isinstance(points, Points)
    assert points.y == [found.scale for found in study.noise if found.scale is not None]
    assert "McCandlish et al." in noise.caption


def test_sketches_and_layers_are_told(other: Path, make_run: Any) -> None:
    deviation = "Inner products are estimated from sketches, each cosine with a standard deviation"
    assert f"{deviation} of about 0.044." in drawn("conflict", other).caption
    some = make_run("some", capture_layers=["13.*"], rounds=1)
    assert "Captured parameters only (13.*)." in drawn("conflict", some).caption


def test_what_was_not_captured_is_told(make_run: Any) -> None:
    none = make_run("none", capture="none", rounds=1)
    assert absent("conflict", none) == "capture = 'none' keeps no first step of a client."
    assert absent("noise", none) == "capture = 'none' keeps no two full batches of a client."
    first = make_run("first", capture="first:1", rounds=1)
    assert absent("noise", first) == "capture = 'first:1' keeps no two full batches of a client."
    last = make_run("last", capture="last:1", rounds=1)
    assert absent("conflict", last) == "capture = 'last:1' keeps no first step of a client."
    removed = make_run("removed", capture="first:1", rounds=1)
    remove_gradients(removed)
    assert absent("conflict", removed) == "Its captured gradients were removed to make room."
    both = drawn("conflict", first, none)
    assert both.caption.endswith(" none: capture = 'none' keeps no first step of a client.")
    assert absent("conflict", last, none) == (
        "last: capture = 'last:1' keeps no first step of a client. "
        "none: capture = 'none' keeps no first step of a client."
    )


def test_a_round_of_one_client_has_no_pairs(make_run: Any) -> None:
    path = make_run(clients_per_round=1, rounds=1)
    assert absent("pair_cosines", path) == "No round has two clients."
    assert absent("conflict", path) == "No round has two clients with a captured first step."
    assert matrix_of(drawn("drift_pairs", path)).values == [[1.0]]


def test_a_budget_for_nothing_leaves_figures_out(small: Path) -> None:
    for key in ("drift", "pair_cosines", "drift_pairs", "delta_norm", "conflict", "noise"):
        reason = absent(key, small, budget=3)
        assert reason == "One round has more bytes than --read-budget allows."


def test_the_time_of_a_round_is_all_there(small: Path) -> None:
    bars = drawn("round_time", small).views[0].marks
    assert [bar.name for bar in bars] == ["clients and aggregation", "evaluation", "rest"]
    totals = [sum(parts) for parts in zip(*(b.y for b in bars if isinstance(b, Bars)), strict=True)]
    assert totals == pytest.approx([r["seconds"]["total"] for r in load_run(small).round_rows])


def test_the_time_of_clients_is_added_up(small: Path) -> None:
    bars = {bar.name: bar for bar in drawn("client_time", small).views[0].marks}
    assert list(bars) == ["load", "train", "capture", "write", "rest"]
    rows = load_run(small).client_rows_of(2)
    train = bars["train"]
    assert isinstance(train, Bars)
    assert train.x == [1, 2, 3]
    assert train.y[1] == pytest.approx(sum(row["seconds"]["train"] for row in rows))


@pytest.mark.parametrize("strategy", ["delta-fedavg", "scaffold"])
def test_bytes_are_those_on_the_disk(small: Path, make_run: Any, strategy: str) -> None:
    path = small if strategy == "delta-fedavg" else make_run(rounds=3, strategy=strategy)
    bars = drawn("bytes", path).views[0].marks
    assert all(isinstance(bar, Bars) for bar in bars)
    for number in range(4):
        folder = path / "rounds" / f"{number:04d}"
        on_disk = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        told = 1e6 * sum(bar.y[number] for bar in bars)  # type: ignore[union-attr, misc]
        assert told == pytest.approx(on_disk)


@pytest.mark.parametrize("key", charts.KEYS)
def test_every_figure_has_titles_and_every_axis_a_name(small: Path, key: str) -> None:
    figure = drawn(key, small)
    assert figure.title
    assert figure.caption.endswith(".")
    assert figure.x.title
    assert figure.y.title
    assert (figure.colour is not None or bool(figure.levels)) == figure.is_matrix


@pytest.mark.parametrize("key", sorted(set(charts.KEYS) - {"partition"}))
def test_a_run_without_a_round_has_no_figures_and_says_so(
    small: Path, tmp_path: Path, key: str
) -> None:
    path = Path(shutil.copytree(small, tmp_path / "begun"))
    (path / "rounds.jsonl").write_bytes(b"")
    assert absent(key, path) in (
        "No round has been evaluated yet.",
        "No round is finished yet.",
        "No client has trained yet.",
    )
