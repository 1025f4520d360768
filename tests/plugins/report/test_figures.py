from __future__ import annotations

import pytest

from fedsim.plugins.report.figures import Axis, Figure, Line, Matrix, View, spread


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, []),
        (1, [9]),
        (2, [0, 9]),
        (3, [0, 4, 9]),
        (4, [0, 3, 6, 9]),
        (10, [*range(10)]),
        (11, [*range(10)]),
    ],
)
def test_items_are_taken_evenly_with_both_ends(count: int, expected: list[int]) -> None:
    assert spread(range(10), count) == expected


def test_nothing_is_taken_of_nothing() -> None:
    assert spread([], 3) == []


def test_an_axis_names_its_unit() -> None:
    assert Axis(title="loss", unit="nats").label == "loss (nats)"
    assert Axis(title="round").label == "round"


def figure_of(*marks: Line | Matrix) -> Figure:
    axis = Axis(title="x")
    return Figure(
        key="k", title="t", caption="c", x=axis, y=axis, views=[View(name="", marks=marks)]
    )


def test_decades_count_positive_numbers_alone() -> None:
    line = Line(name="", x=[0, 1, 2, 3], y=[0.01, 100.0, None, -1.0], series=0)
    assert figure_of(line).decades == pytest.approx(4)
    assert figure_of(Line(name="", x=[0], y=[None], series=0)).decades == 0


def test_a_matrix_makes_a_figure_of_a_matrix() -> None:
    assert figure_of(Matrix(rows=["a"], columns=["b"], values=[[1.0]])).is_matrix
    assert not figure_of(Line(name="", x=[], y=[], series=0)).is_matrix
