import csv
import io
import json
import math

import pytest
from rich.console import Console

from fedsim.plugins.compare.cells import Axis, make_cells
from fedsim.plugins.compare.tables import (
    CellFigures,
    GridProgress,
    cell_rows,
    figures_of,
    figures_of_rows,
    group_rows,
    print_comparison,
    to_csv,
)
from fedsim.recording.reader import load_run


def row(number, accuracy, *, loss=1.0, participants=(1, 2, 3), failed=(), seconds=2.0):
    return {
        "round": number,
        "participants": list(participants) if number else [],
        "failed": list(failed),
        "global_loss": None if accuracy is None else loss,
        "global_accuracy": accuracy,
        "seconds": {"total": seconds},
    }


ROWS = [
    row(0, 0.1, loss=2.0, seconds=0.5),
    row(1, 0.5, failed=[2]),
    row(2, None, participants=[4, 5]),
    row(3, 0.75),
    row(4, 0.6, loss=0.25),
]


def test_the_figures_of_a_run_are_those_of_its_rows():
    assert figures_of_rows(ROWS, up_bytes=100, down_bytes=150, rounds=4, target=0.5) == CellFigures(
        status="finished",
        rounds_done=4,
        final_accuracy=0.6,
        final_loss=0.25,
        best_accuracy=0.75,
        best_round=3,
        rounds_to_target=1,
        # 3, 2, 3 and 3 were asked, and one of them failed.
        up_bytes=1000,
        down_bytes=1650,
        seconds=8.5,
    )


def test_scaffold_sends_a_correction_beside_the_model(make_run):
    def sent(strategy):
        run = load_run(make_run(rounds=2, capture="none", strategy=strategy))
        figures = figures_of(run, rounds=2, target=None)
        return figures.down_bytes, figures.up_bytes, run

    (plain, up, run), (down, same, _) = sent("delta-fedavg"), sent("scaffold")
    parameters = 4 * sum(math.prod(shape) for shape in run.shapes.values())
    assert plain == up == same == 6 * sum(t.nbytes for t in run.round(0).state.values())
    assert down == plain + 6 * parameters


@pytest.mark.parametrize(("target", "rounds"), [(0.1, 0), (0.51, 3), (0.76, None), (None, None)])
def test_rounds_to_a_target_are_those_of_the_first_that_reaches_it(target, rounds):
    figures = figures_of_rows(ROWS, up_bytes=1, down_bytes=1, rounds=4, target=target)
    assert figures.rounds_to_target == rounds


def test_a_run_that_is_not_whole_has_no_final_figures():
    figures = figures_of_rows(
        ROWS[:4], up_bytes=1, down_bytes=1, rounds=4, error="the disk is full"
    )
    assert (figures.status, figures.error, figures.rounds_done) == ("failed", "the disk is full", 3)
    assert (figures.final_accuracy, figures.final_loss) == (None, None)
    assert figures.best_accuracy == 0.75
    assert figures_of_rows(ROWS[:4], up_bytes=1, down_bytes=1, rounds=4).status == "unfinished"
    assert figures_of_rows([], up_bytes=1, down_bytes=1, rounds=4) == CellFigures(
        status="unfinished"
    )


def test_a_run_diverged_by_its_word_or_by_a_last_loss_that_is_none():
    said = figures_of_rows(
        ROWS[:2], up_bytes=1, down_bytes=1, rounds=4, error="round 2", diverged=True
    )
    assert (said.status, said.error, said.final_accuracy) == ("diverged", "round 2", None)
    shown = figures_of_rows([*ROWS[:4], row(4, 0.1, loss=None)], up_bytes=1, down_bytes=1, rounds=4)
    assert (shown.status, shown.final_accuracy, shown.final_loss) == ("diverged", 0.1, None)


def test_what_happened_before_a_run_was_finished_after_all_is_no_error():
    figures = figures_of_rows(ROWS, up_bytes=1, down_bytes=1, rounds=4, error="Ray died at the end")
    assert (figures.status, figures.error) == ("finished", "")


CELLS = make_cells(
    {}, [Axis("strategy", ("delta-fedavg", "fedavgm", "fedadam")), Axis("seed", (1, 2, 3))]
)


def finished(accuracy, to_target, seconds):
    return CellFigures(
        status="finished",
        rounds_done=5,
        final_accuracy=accuracy,
        final_loss=1.0,
        best_accuracy=accuracy + 0.125,
        best_round=4,
        rounds_to_target=to_target,
        up_bytes=1_000_000,
        down_bytes=3_000_000,
        seconds=seconds,
    )


FIGURES = dict(
    zip(
        [cell.name for cell in CELLS],
        [
            finished(0.25, 3, 10.0),
            finished(0.5, 4, 20.0),
            finished(0.75, 8, 60.0),
            finished(0.5, 2, 7.0),
            CellFigures(
                status="diverged", error="round 1 diverged", rounds_done=1, best_accuracy=0.9
            ),
            CellFigures(status="failed", error="the disk is full"),
            *[CellFigures(status="diverged", error="round 2 diverged")] * 3,
        ],
        strict=True,
    )
)


def test_means_and_sample_deviations_are_over_the_finished_seeds():
    plain, momentum, adam = group_rows(CELLS, FIGURES, target=0.5)
    assert plain == {
        "strategy": "delta-fedavg",
        "cells": 3,
        "finished": 3,
        "diverged": 0,
        "failed": 0,
        "unfinished": 0,
        "final_accuracy_mean": 0.5,
        "final_accuracy_std": 0.25,
        "best_accuracy_mean": 0.625,
        "best_accuracy_std": 0.25,
        "final_loss_mean": 1.0,
        "final_loss_std": 0.0,
        "up_bytes_mean": 1e6,
        "up_bytes_std": 0.0,
        "down_bytes_mean": 3e6,
        "down_bytes_std": 0.0,
        "seconds_mean": 30.0,
        "seconds_std": pytest.approx(math.sqrt(700), rel=1e-15),
        "reached_target": 3,
        "rounds_to_target_mean": 5.0,
        "rounds_to_target_std": pytest.approx(math.sqrt(7), rel=1e-15),
    }
    assert {k: momentum[k] for k in ("cells", "finished", "diverged", "failed")} == {
        "cells": 3,
        "finished": 1,
        "diverged": 1,
        "failed": 1,
    }
    # Of a single one there is no deviation, and the diverged run's best round is no result.
    assert (momentum["best_accuracy_mean"], momentum["best_accuracy_std"]) == (0.625, None)
    assert adam["diverged"] == 3
    assert {v for k, v in adam.items() if k.endswith(("_mean", "_std"))} == {None}


def test_rounds_to_a_target_that_some_seeds_never_reach_are_those_of_the_others():
    figures = {**FIGURES, CELLS[0].name: finished(0.25, None, 10.0)}
    row = group_rows(CELLS, figures, target=0.5)[0]
    assert (row["finished"], row["reached_target"], row["rounds_to_target_mean"]) == (3, 2, 6.0)


def test_without_a_target_nobody_counts_rounds_to_it():
    rows = [*cell_rows(CELLS, FIGURES, target=None), *group_rows(CELLS, FIGURES, target=None)]
    assert [key for row in rows for key in row if "target" in key] == []


def test_groups_are_those_of_all_values_but_the_seed_in_the_order_of_the_grid():
    cells = make_cells({}, [Axis("alpha", (10, 0.1)), Axis("seed", (2, 1))])
    figures = {cell.name: CellFigures(status="unfinished") for cell in cells}
    rows = group_rows(cells, figures, target=None)
    assert [(row["alpha"], row["cells"], row["unfinished"]) for row in rows] == [
        (10.0, 2, 2),
        (0.1, 2, 2),
    ]
    (row,) = group_rows(
        make_cells({}, [Axis("seed", (2, 1))]),
        {name: CellFigures(status="unfinished") for name in ("seed=1", "seed=2")},
        target=None,
    )
    assert next(iter(row)) == "cells"


def test_csv_and_json_hold_no_nan_and_the_same_figures():
    rows = group_rows(CELLS, FIGURES, target=0.5)
    text = to_csv(rows)
    assert "nan" not in text.lower()
    json.dumps(rows, allow_nan=False)
    read = list(csv.DictReader(io.StringIO(text)))
    assert [r["strategy"] for r in read] == ["delta-fedavg", "fedavgm", "fedadam"]
    assert float(read[0]["seconds_std"]) == rows[0]["seconds_std"]
    assert (read[1]["final_accuracy_std"], read[2]["final_accuracy_mean"]) == ("", "")


def test_values_are_in_csv_as_in_names_and_no_figure_hides_them():
    axes = [Axis("rounds", (7,)), Axis("batch-size", ([16, 32],)), Axis("nesterov", (True,))]
    cells = make_cells({}, axes)
    figures = {cells[0].name: CellFigures(status="unfinished")}
    read = next(csv.DictReader(io.StringIO(to_csv(cell_rows(cells, figures, target=None)))))
    assert (read["rounds"], read["batch-size"], read["nesterov"]) == ("7", "16+32", "true")
    assert read["cell"] == "rounds=7,nesterov=true,batch-size=16+32"


def printed(function, *arguments, **options):
    out = io.StringIO()
    function(Console(file=out, width=140, highlight=False), *arguments, **options)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_the_table_on_the_terminal():
    figures = {**FIGURES, CELLS[0].name: finished(0.25, None, 10.0)}
    head, plain, momentum, adam, note = printed(
        print_comparison, group_rows(CELLS, figures, target=0.5), target=0.5
    )
    assert head.split("  ")[0] == "strategy"
    assert [part.strip() for part in head.split("  ") if part] == [
        "strategy",
        "finished",
        "diverged",
        "failed",
        "final accuracy",
        "best accuracy",
        "rounds to 0.5",
        "up",
        "down",
        "time",
    ]
    assert " ".join(plain.split()) == (
        "delta-fedavg 3 of 3 0.5000 ± 0.2500 0.6250 ± 0.2500 6.0 ± 2.8 (2 of 3) "
        "1.0 MB 3.0 MB 30.0 s"
    )
    assert " ".join(momentum.split()) == "fedavgm 1 of 3 1 1 0.5000 0.6250 2.0 1.0 MB 3.0 MB 7.0 s"
    assert adam.split() == ["fedadam", "0", "of", "3", "3"]
    assert note == "mean ± standard deviation over the finished seeds"


def test_progress_tells_cells_rounds_and_what_went_wrong(tmp_path):
    def story(console):
        progress = GridProgress(console)
        progress.grid_started(3, 2, 12, 5, tmp_path)
        progress.cell_started("seed=1", 4, 1)
        progress.round_finished({**ROWS[3], "round": 2})
        progress.cell_finished(CellFigures(status="failed", error="the disk\x1b is full"))
        progress.cell_started("seed=2", 4, 0)
        progress.close()

    assert printed(story) == [
        f"3 cells, 1 of them done before, 7 rounds to run into {tmp_path}",
        "cell 1/2  seed=1, continuing after round 1",
        "  round 2/4  loss 1.0000  accuracy 0.7500  clients 1 2 3  2.0 s",
        "  failed: the disk\N{REPLACEMENT CHARACTER} is full",
        "cell 2/2  seed=2",
    ]
