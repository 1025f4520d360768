"""Figures as images for a paper, drawn with matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import BoundaryNorm, Colormap, LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from fedsim.plugins.report.figures import (
    Axis,
    Band,
    Bars,
    Figure,
    Line,
    Matrix,
    Number,
    Points,
    View,
)
from fedsim.plugins.report.palette import DIVERGING, LEVELS, SEQUENTIAL, SERIES, style_of
from fedsim.recording.files import temporary
from fedsim.terminal import printable

_MARKERS = ("o", "s", "D", "P", "^", "X")
_MOST_INSIDE = 6
"""Names of series for which there is room among them."""
_STYLES = ("-", "--", ":", "-.", (0, (8, 3)), (0, (8, 3, 2, 3)))
_INCHES = (5.0, 3.4)
_DPI = 300
_SCREEN_DPI = 110
_MOST_TICKS = 24
_STYLE: Any = {
    # A dollar in the name of a run is a dollar.
    "text.parse_math": False,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def write_images(figure: Figure, folder: Path) -> list[Path]:
    """Write a figure as PNG: one image, or one for each view.

    Parameters
    ----------
    figure : Figure
        What to draw.
    folder : Path
        Where; it exists.

    Returns
    -------
    list of Path
        ``KEY.png``, or ``KEY-01.png`` and so on.
    """
    paths = []
    for number, view in enumerate(figure.views, start=1):
        suffix = f"-{number:02d}" if len(figure.views) > 1 else ""
        path = folder / f"{figure.key}{suffix}.png"
        with temporary(path) as unfinished, unfinished.open("wb") as file:
            _save(figure, view, file, _DPI)
        paths.append(path)
    return paths


def image_of(figure: Figure) -> bytes:
    """Draw the first view of a figure as PNG, for a screen."""
    file = io.BytesIO()
    _save(figure, figure.views[0], file, _SCREEN_DPI)
    return file.getvalue()


def _save(figure: Figure, view: View, file: IO[bytes], dpi: int) -> None:
    with mpl.rc_context(_STYLE):
        _draw(figure, view).savefig(file, dpi=dpi, format="png")


def _draw(figure: Figure, view: View) -> Canvas:
    canvas = Canvas(figsize=_INCHES, layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.add_subplot()
    axes.set_xlabel(figure.x.label)
    axes.set_ylabel(figure.y.label)
    axes.set_title(printable(view.name), fontsize=9)
    tops: dict[float, float] = {}
    for mark in view.marks:
        if isinstance(mark, Matrix):
            _draw_matrix(canvas, axes, figure, mark)
        elif isinstance(mark, Bars):
            _draw_bars(axes, mark, tops)
        else:
            _draw_series(axes, mark)
    if not figure.is_matrix:
        _scale(axes, figure)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(view.marks) > 1:
            _explain(canvas, axes, view.listed)
    return canvas


def _explain(canvas: Canvas, axes: Axes, count: int) -> None:
    if count <= _MOST_INSIDE:
        axes.legend()
    else:
        # Beside the figure, which they would cover.
        canvas.legend(loc="outside right upper", fontsize=6)


def _floats(values: Sequence[Number] | Sequence[Sequence[Number]]) -> NDArray[np.float64]:
    return np.array(values, dtype=np.float64)


def _draw_series(axes: Axes, mark: Line | Points | Band) -> None:
    colour, style = SERIES[mark.series % len(SERIES)], style_of(mark.series)
    label = printable(mark.name) if mark.listed else "_nolegend_"
    if isinstance(mark, Band):
        axes.fill_between(
            _floats(mark.x),
            _floats(mark.low),
            _floats(mark.high),
            color=colour,
            alpha=0.25,
            linewidth=0,
            label=label,
        )
        return
    x, y = _floats(mark.x), _floats(mark.y)
    if isinstance(mark, Points):
        axes.plot(x, y, _MARKERS[style], color=colour, alpha=0.5, ms=3, mew=0, label=label)
    else:
        marker = _MARKERS[style] if len(x) <= _MOST_TICKS else ""
        axes.plot(x, y, marker, color=colour, ls=_STYLES[style], ms=4, label=label)


def _draw_bars(axes: Axes, mark: Bars, tops: dict[float, float]) -> None:
    bottom = [tops.get(x, 0.0) for x in mark.x]
    heights = np.nan_to_num(_floats(mark.y))
    colour = SERIES[mark.series % len(SERIES)]
    axes.bar(_floats(mark.x), heights, bottom=bottom, color=colour, label=printable(mark.name))
    tops.update(zip(mark.x, (bottom + heights).tolist(), strict=True))


def _scale(axes: Axes, figure: Figure) -> None:
    if figure.y.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if figure.decades < 2 else (1,)))
        # Its own labels are formulas.
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if figure.y.limits:
        axes.set_ylim(*figure.y.limits)


def _draw_matrix(canvas: Canvas, axes: Axes, figure: Figure, mark: Matrix) -> None:
    values = np.ma.masked_invalid(_floats(mark.values))
    colour = figure.colour or Axis(title="")
    if figure.levels:
        count = len(figure.levels)
        edges = [0.5 + i for i in range(count + 1)]
        image = axes.imshow(
            values,
            aspect="auto",
            interpolation="nearest",
            cmap=ListedColormap(list(LEVELS[:count])),
            norm=BoundaryNorm(edges, count),
        )
        bar = canvas.colorbar(image, ax=axes, ticks=range(1, count + 1))
        bar.ax.set_yticklabels(figure.levels)
    else:
        low, high = colour.limits or (None, None)
        image = axes.imshow(
            values,
            aspect="auto",
            interpolation="nearest",
            cmap=_map(DIVERGING if colour.limits else SEQUENTIAL),
            vmin=low,
            vmax=high,
        )
        canvas.colorbar(image, ax=axes, label=colour.label)
    _name_ticks(axes, "x", mark.columns)
    _name_ticks(axes, "y", mark.rows)


def _map(colours: tuple[str, ...]) -> Colormap:
    return LinearSegmentedColormap.from_list("", list(colours))


def _name_ticks(axes: Axes, which: str, names: Sequence[str]) -> None:
    labels = [printable(name) for name in names]
    step = -(-len(labels) // _MOST_TICKS)
    positions = range(0, len(labels), step)
    shown = [labels[p] for p in positions]
    # Numbers stand; names of parameters are written small.
    size = 7 if any(len(label) > 6 for label in shown) else 8
    (axes.set_xticks if which == "x" else axes.set_yticks)(positions, shown, fontsize=size)
