"""Figures as plain data: numbers, titles and units, before anything draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

T = TypeVar("T")

Number = float | None
"""None where there is no number, or none that is finite."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What an axis or a colour measures.

    Parameters
    ----------
    title : str
        What is measured.
    unit : str
        Its unit; empty where it is a name.
    log : bool
        Whether equal ratios have equal lengths.
    limits : tuple of float, optional
        Lower and upper end; fitted to the numbers where absent.
    """

    title: str
    unit: str = ""
    log: bool = False
    limits: tuple[float, float] | None = None

    @property
    def label(self) -> str:
        """Title and unit."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


@dataclass(frozen=True, kw_only=True)
class Line:
    """Points that belong together in their order."""

    listed: ClassVar[bool] = True
    """Whether its name stands beside the figure."""

    name: str
    x: Sequence[float]
    y: Sequence[Number]
    series: int
    """Which colour, symbol and dash: one for each run."""


@dataclass(frozen=True, kw_only=True)
class Points:
    """Points each of which stands for itself."""

    name: str
    x: Sequence[float]
    y: Sequence[Number]
    labels: Sequence[str]
    series: int
    listed: bool = True


@dataclass(frozen=True, kw_only=True)
class Band:
    """Where most of many numbers lie."""

    name: str
    x: Sequence[float]
    low: Sequence[Number]
    high: Sequence[Number]
    series: int
    listed: bool = True


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Parts of a whole, stacked in the order that they are given."""

    listed: ClassVar[bool] = True
    name: str
    x: Sequence[float]
    y: Sequence[Number]
    series: int


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A number for each pair of a row and a column.

    Parameters
    ----------
    rows, columns : sequence of str
        What they are called; the first row is at the top.
    values : sequence of sequence of (float or None)
        One sequence for each row.
    """

    listed: ClassVar[bool] = False
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[Number]]


Mark = Line | Points | Band | Bars | Matrix


@dataclass(frozen=True, kw_only=True)
class View:
    """What is shown at one time."""

    name: str
    marks: Sequence[Mark]

    @property
    def listed(self) -> int:
        """How many names stand beside it."""
        return sum(mark.listed for mark in self.marks)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure of one run, or of several in one.

    Parameters
    ----------
    key : str
        Name of the figure in `run.plot` and of its image.
    title, caption : str
        What it shows, in a few words and in sentences.
    x, y : Axis
        The two axes.
    views : sequence of View
        Where there are several, one is shown at a time.
    colour : Axis, optional
        What the colours of a `Matrix` measure.
    levels : sequence of str
        Names of the values 1, 2, ... of a `Matrix` whose values are no measures.
    """

    key: str
    title: str
    caption: str
    x: Axis
    y: Axis
    views: Sequence[View]
    colour: Axis | None = None
    levels: Sequence[str] = ()

    @property
    def is_matrix(self) -> bool:
        """Whether it shows a `Matrix`."""
        return any(isinstance(mark, Matrix) for view in self.views for mark in view.marks)

    @property
    def decades(self) -> float:
        """How many powers of ten lie between the largest and the smallest positive number."""
        marks = [mark for view in self.views for mark in view.marks]
        numbers = [y for m in marks if isinstance(m, Line | Points) for y in m.y]
        positive = [number for number in numbers if number is not None and number > 0]
        return math.log10(max(positive) / min(positive)) if positive else 0.0


@dataclass(frozen=True, kw_only=True)
class Absent:
    """A figure that cannot be drawn, and why."""

    key: str
    title: str
    reason: str


def spread(items: Sequence[T], count: int) -> list[T]:
    """Take `count` of the items, evenly, with the first and the last; all where there are fewer."""
    if count >= len(items):
        return list(items)
    if count < 2:
        return list(items[len(items) - count :])
    return [items[i * (len(items) - 1) // (count - 1)] for i in range(count)]
