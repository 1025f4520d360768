"""Both renderers, over the same figures."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
import pytest
from PIL import Image

from fedsim.plugins.report import charts
from fedsim.plugins.report.figures import Axis, Band, Bars, Figure, Line, Mark, Matrix, Points, View
from fedsim.plugins.report.image_view import write_images
from fedsim.plugins.report.notebook_view import NotebookFigure
from fedsim.plugins.report.palette import SERIES
from fedsim.plugins.report.plotly_view import layout, safe, to_plotly, traces
from fedsim.plugins.report.study import Study
from fedsim.recording.reader import load_run

EVIL = "<b>$\\frac</b>\x1b[31m%{x}"


def figure_of(*views: list[Mark], **options: object) -> Figure:
    return Figure(
        **{  # type: ignore[arg-type]
            "key": "made",
            "title": "Made",
            "caption": "Made up.",
            "x": Axis(title="round"),
            "y": Axis(title="loss", unit="nats"),
            "views": [View(name=f"view {n}", marks=m) for n, m in enumerate(views)],
            **options,
        }
    )


LINE = Line(name=EVIL, x=[0, 1, 2], y=[1.23456789, None, 3.0], series=0)
POINTS = Points(name="p", x=[1, 1], y=[1.0, 2.0], labels=[EVIL, "client 1"], series=7)
BAND = Band(name="b", x=[1, 2], low=[0.1, None], high=[0.5, None], series=1)
BARS = [Bars(name="a", x=[1, 2], y=[1.0, 2.0], series=0), Bars(name="b", x=[1], y=[3.0], series=1)]
MATRIX = Matrix(rows=["r", EVIL], columns=["1", "2"], values=[[1.0, None], [2.0, 1.0]])


def test_plotly_gets_numbers_names_and_units() -> None:
    figure = figure_of([LINE])
    (trace,) = traces(figure, figure.views[0])
    assert trace["x"] == [0, 1, 2]
    assert trace["y"] == [1.23457, None, 3]
    assert trace["name"] == "&lt;b&gt;$\\frac&lt;/b&gt;\N{REPLACEMENT CHARACTER}[31m%{x}"
    assert layout(figure)["yaxis"]["title"]["text"] == "loss (nats)"
    assert layout(figure)["xaxis"]["dtick"] == 1


def test_nothing_of_a_run_is_a_template_or_a_tag() -> None:
    figure = figure_of([LINE, POINTS, BAND])
    for trace in traces(figure, figure.views[0]):
        assert "frac" not in trace["hovertemplate"]
        assert "<b" not in json.dumps(trace).replace("<br>", "")
    assert safe("a & b") == "a &amp; b"


def test_the_seventh_run_differs_from_the_first() -> None:
    figure = figure_of([LINE, Line(name="", x=[1], y=[1.0], series=len(SERIES))])
    first, seventh = traces(figure, figure.views[0])
    assert first["marker"]["color"] == seventh["marker"]["color"]
    assert first["marker"]["symbol"] != seventh["marker"]["symbol"]


def test_a_band_lies_between_two_edges() -> None:
    figure = figure_of([BAND])
    low, high = traces(figure, figure.views[0])
    assert (low["y"], high["y"], high["fill"]) == ([0.1, None], [0.5, None], "tonexty")
    assert (low["showlegend"], high["showlegend"]) == (False, True)


def test_levels_have_their_names() -> None:
    figure = figure_of([MATRIX], levels=("trained", "failed"))
    (trace,) = traces(figure, figure.views[0])
    assert (trace["zmin"], trace["zmax"]) == (0.5, 2.5)
    assert trace["text"] == [["trained", ""], ["failed", "trained"]]
    assert trace["colorbar"]["ticktext"] == ["trained", "failed"]


def test_a_colour_with_limits_is_diverging_between_them() -> None:
    figure = figure_of([MATRIX], colour=Axis(title="cosine", limits=(-1, 1)))
    (trace,) = traces(figure, figure.views[0])
    assert (trace["zmin"], trace["zmax"]) == (-1, 1)
    assert trace["colorscale"][2] == [0.5, "#f7f7f7"]


def test_a_notebook_gets_one_view_at_a_time() -> None:
    figure = to_plotly(figure_of([LINE, POINTS], [LINE]))
    assert isinstance(figure, go.Figure)
    assert [trace.visible for trace in figure.data] == [True, True, False]
    (menu,) = figure.layout.updatemenus
    assert [button.args[1] for button in menu.buttons] == [
        (True, True, False),
        (False, False, True),
    ]


@pytest.fixture
def jupyter() -> Iterator[None]:
    before = pio.renderers.default
    pio.renderers.default = "plotly_mimetype"
    yield
    pio.renderers.default = before


@pytest.mark.usefixtures("jupyter")
def test_a_notebook_without_plotlys_scripts_gets_an_image() -> None:
    figure = NotebookFigure.of(figure_of([LINE]))
    with pytest.raises(NotImplementedError):
        # Which makes IPython ask for the bundle.
        figure._ipython_display_()
    bundle = figure._repr_mimebundle_()
    assert [*bundle] == ["application/vnd.plotly.v1+json", "image/png", "text/plain"]
    assert figure._repr_html_() is None
    image = Image.open(io.BytesIO(base64.b64decode(bundle["image/png"])))
    assert image.size == (550, 374)


@pytest.mark.usefixtures("jupyter")
def test_an_image_never_shows_another_figure_than_the_one_that_is_there() -> None:
    changed = NotebookFigure.of(figure_of([LINE])).update_layout(title="mine")
    assert "image/png" not in changed._repr_mimebundle_()
    assert "mine" in (changed._repr_html_() or "")
    copied = go.Figure(changed)
    assert isinstance(NotebookFigure(copied)._repr_html_(), str)


@pytest.mark.parametrize("key", charts.KEYS)
def test_plotly_itself_accepts_every_figure(small: Path, other: Path, key: str) -> None:
    studies = [Study(load_run(p), p.name, alone=False) for p in (small, other)]
    figure = charts.draw(key, studies)
    assert isinstance(figure, Figure)
    made = to_plotly(figure)
    assert made.layout.title.text == figure.title
    assert len(made.data) >= len(figure.views)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize("key", charts.KEYS)
def test_every_figure_makes_images(small: Path, tmp_path: Path, key: str) -> None:
    figure = charts.draw(key, [Study(load_run(small), "small")])
    assert isinstance(figure, Figure)
    paths = write_images(figure, tmp_path)
    assert sorted(tmp_path.iterdir()) == paths
    assert len(paths) == len(figure.views)
    for path in paths:
        image = pixels(path)
        assert image.shape == (1020, 1500, 3)
        assert len(np.unique(image @ np.array([1, 2**8, 2**16]))) > 10


def test_names_of_runs_are_no_formulas(tmp_path: Path) -> None:
    write_images(figure_of([LINE, POINTS, BAND], list(BARS)), tmp_path)
    names = {"levels": ("trained", "failed")}
    write_images(figure_of([MATRIX], key="matrix", **names), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "made-01.png",
        "made-02.png",
        "matrix.png",
    ]


def test_bars_stand_on_one_another(tmp_path: Path) -> None:
    (path,) = write_images(figure_of(list(BARS)), tmp_path)
    image = pixels(path)
    blue, orange = (
        np.argwhere((image == [int(c[i : i + 2], 16) for i in (1, 3, 5)]).all(axis=2))
        for c in SERIES[:2]
    )
    legend = 300
    blue = blue[blue[:, 0] > legend]
    # The left bar: blue below, orange on it.
    left_blue = blue[blue[:, 1] < 800]
    left_orange = orange[(orange[:, 1] < 800)]
    assert left_orange[:, 0].max() < left_blue[:, 0].min() + 2
