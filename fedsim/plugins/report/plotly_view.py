"""Figures for plotly: on the page as JSON, in a notebook as its own object."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedsim.plugins.report.figures import (
    Axis,
    Band,
    Bars,
    Figure,
    Mark,
    Matrix,
    Number,
    Points,
    View,
)
from fedsim.plugins.report.palette import DIVERGING, LEVELS, SEQUENTIAL, SERIES, style_of
from fedsim.terminal import printable

if TYPE_CHECKING:
    import plotly.graph_objects as go

_SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "x")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_MOST_MARKERS = 60


def safe(text: str) -> str:
    """Escape what plotly would take for its tags; a run may be a stranger's."""
    return html.escape(printable(text), quote=False)


def traces(figure: Figure, view: View) -> list[dict[str, Any]]:
    """Give what a view shows as plotly's JSON."""
    return [trace for mark in view.marks for trace in _traces_of(figure, mark)]


def _traces_of(figure: Figure, mark: Mark) -> list[dict[str, Any]]:
    if isinstance(mark, Matrix):
        return [_heatmap(figure, mark)]
    if isinstance(mark, Band):
        return _band(mark)
    colour, unit = SERIES[mark.series % len(SERIES)], figure.y.unit
    trace: dict[str, Any] = {
        "name": safe(mark.name),
        "x": _short(mark.x),
        "y": _short(mark.y),
        "hovertemplate": f"round %{{x}}: %{{y:.5~g}} {unit}<extra>%{{fullData.name}}</extra>",
    }
    if isinstance(mark, Bars):
        return [trace | {"type": "bar", "marker": {"color": colour}}]
    style = style_of(mark.series)
    symbol = _SYMBOLS[style]
    trace |= {"type": "scatter", "legendgroup": str(mark.series)}
    if isinstance(mark, Points):
        return [
            trace
            | {
                "mode": "markers",
                "marker": {"color": colour, "symbol": symbol, "size": 6, "opacity": 0.5},
                "text": [safe(label) for label in mark.labels],
                "hovertemplate": "%{text}<br>" + trace["hovertemplate"],
                "showlegend": mark.listed,
            }
        ]
    return [
        trace
        | {
            "mode": "lines+markers" if len(mark.x) <= _MOST_MARKERS else "lines",
            "marker": {"color": colour, "symbol": symbol, "size": 7},
            "line": {"color": colour, "width": 2, "dash": _DASHES[style]},
        }
    ]


def _band(mark: Band) -> list[dict[str, Any]]:
    colour = SERIES[mark.series % len(SERIES)]
    edge = {
        "type": "scatter",
        "mode": "lines",
        "x": _short(mark.x),
        "line": {"width": 0, "color": colour},
        "legendgroup": str(mark.series),
        "name": safe(mark.name),
        "hovertemplate": "round %{x}: %{y:.5~g}<extra>%{fullData.name}</extra>",
    }
    fill = {"fill": "tonexty", "fillcolor": _with_alpha(colour, 0.25)}
    return [
        edge | {"y": _short(mark.low), "showlegend": False},
        edge | {"y": _short(mark.high), "showlegend": mark.listed} | fill,
    ]


def _with_alpha(colour: str, alpha: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def _heatmap(figure: Figure, mark: Matrix) -> dict[str, Any]:
    trace: dict[str, Any] = {
        "type": "heatmap",
        "x": [safe(name) for name in mark.columns],
        "y": [safe(name) for name in mark.rows],
        "z": [_short(row) for row in mark.values],
        "hoverongaps": False,
        "xgap": 1 if len(mark.columns) <= 40 else 0,
        "ygap": 1 if len(mark.rows) <= 40 else 0,
    }
    where = f"{figure.y.title} %{{y}}<br>{figure.x.title} %{{x}}"
    if figure.levels:
        count = len(figure.levels)
        stops = [(i + d) / count for i in range(count) for d in (0, 1)]
        colours = [LEVELS[i] for i in range(count) for _ in (0, 1)]
        ticks = {"tickvals": list(range(1, count + 1)), "ticktext": list(figure.levels)}
        return trace | {
            "zmin": 0.5,
            "zmax": count + 0.5,
            "colorscale": [list(stop) for stop in zip(stops, colours, strict=True)],
            "colorbar": ticks,
            "text": [
                ["" if v is None else figure.levels[int(v) - 1] for v in r] for r in mark.values
            ],
            "hovertemplate": f"{where}<br>%{{text}}<extra></extra>",
        }
    colour = figure.colour or Axis(title="")
    scale = DIVERGING if colour.limits else SEQUENTIAL
    low, high = colour.limits or (None, None)
    return trace | {
        "zmin": low,
        "zmax": high,
        "zauto": colour.limits is None,
        "colorscale": [[i / (len(scale) - 1), c] for i, c in enumerate(scale)],
        "colorbar": {"title": {"text": colour.label, "side": "right"}},
        "hovertemplate": f"{where}<br>{colour.label} %{{z:.4~g}}<extra></extra>",
    }


def _short(values: Sequence[Number]) -> list[Number]:
    # Six digits are more than a screen shows, and less than half of the bytes.
    return [None if v is None else _as_int(float(f"{v:.6g}")) for v in values]


def _as_int(value: float) -> float:
    return int(value) if value.is_integer() and abs(value) < 1e15 else value


def layout(figure: Figure) -> dict[str, Any]:
    """Give axes and their titles as plotly's JSON, without colours."""
    marks = [mark for view in figure.views for mark in view.marks]
    has_legend = not figure.is_matrix and len(marks) > 1
    settings: dict[str, Any] = {
        "xaxis": _axis(figure.x),
        "yaxis": _axis(figure.y),
        "showlegend": has_legend,
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "traceorder": "normal"},
        "margin": {"l": 60, "r": 10, "t": 60 if has_legend else 40, "b": 50},
        "hovermode": "closest",
    }
    # Beside the names of parameters, not on them.
    settings["yaxis"]["title"]["standoff"] = 8
    if figure.y.log:
        settings["yaxis"]["dtick"] = "D2" if figure.decades < 2 else 1
    if any(isinstance(mark, Bars) for mark in marks):
        settings["barmode"] = "stack"
    if figure.is_matrix:
        # Names that are numbers are names all the same.
        settings["xaxis"] |= {"type": "category", "showgrid": False}
        settings["yaxis"] |= {"type": "category", "autorange": "reversed", "showgrid": False}
    elif figure.x.title == "round":
        rounds = [x for mark in marks if not isinstance(mark, Matrix) for x in mark.x]
        if max(rounds, default=0) - min(rounds, default=0) < 10:
            settings["xaxis"]["dtick"] = 1
    return settings


def _axis(axis: Axis) -> dict[str, Any]:
    settings: dict[str, Any] = {"title": {"text": axis.label}, "automargin": True}
    if axis.log:
        settings |= {"type": "log", "tickformat": "~g"}
    if axis.limits:
        low, high = axis.limits
        settings["range"] = [math.log10(low), math.log10(high)] if axis.log else [low, high]
    return settings


def to_plotly(figure: Figure) -> go.Figure:
    """Make an interactive figure for a notebook; several views become a menu."""
    import plotly.graph_objects as go

    data: list[dict[str, Any]] = []
    menu = []
    shown = [traces(figure, view) for view in figure.views]
    count = sum(map(len, shown))
    for number, (view, parts) in enumerate(zip(figure.views, shown, strict=True)):
        start = len(data)
        data += [part | {"visible": number == 0} for part in parts]
        visible = [start <= position < start + len(parts) for position in range(count)]
        menu.append({"label": safe(view.name), "method": "restyle", "args": ["visible", visible]})
    settings = layout(figure) | {"title": {"text": figure.title}, "template": "plotly_white"}
    settings["margin"] |= {"t": 80}
    if len(menu) > 1:
        settings["updatemenus"] = [{"buttons": menu, "x": 1, "y": 1, "yanchor": "bottom"}]
    return go.Figure(data=data, layout=settings)
