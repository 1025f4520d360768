"""``run.plot``, as Python programs and notebooks have it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

import fedsim
from fedsim.core.errors import InputError
from fedsim.plugins.report.charts import KEYS
from fedsim.plugins.report.plots import Plots


@pytest.fixture(scope="module")
def bare(make_run: Any) -> Path:
    """Two rounds without gradients. Never write into it."""
    path: Path = make_run("bare", capture="none", clients=4, clients_per_round=2, rounds=2)
    return path


def test_figures_are_those_of_plotly(bare: Path) -> None:
    run = fedsim.load_run(bare)
    figure = run.plot.accuracy()
    assert isinstance(figure, go.Figure)
    assert list(figure.data[0].y) == pytest.approx(list(run.rounds()["global_accuracy"]), abs=1e-6)
    assert len(run.plot.drift().data) == 2


def test_there_is_a_method_for_every_figure(bare: Path) -> None:
    methods = [name for name, _ in inspect.getmembers(Plots, inspect.isfunction)]
    assert sorted(name for name in methods if name[0] != "_") == sorted(KEYS)
    plots = fedsim.load_run(bare).plot
    for key in set(KEYS) - {"conflict", "noise"}:
        assert getattr(plots, key)().layout.title.text


def test_plots_tell_what_there_is(bare: Path) -> None:
    lines = repr(fedsim.load_run(bare).plot).splitlines()
    assert lines[0] == "figures of the run bare:"
    assert [line.split("()")[0].strip() for line in lines[1:]] == list(KEYS)
    assert lines[1] == "  accuracy()       the test accuracy of the global model, by round."
    assert lines[1 + KEYS.index("noise")].endswith('which capture = "first:2" keeps.')


def test_a_figure_that_cannot_be_drawn_says_why(bare: Path) -> None:
    with pytest.raises(InputError, match="has no figure 'conflict': capture = 'none' keeps no"):
        fedsim.load_run(bare).plot.conflict()
