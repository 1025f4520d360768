"""``run.plot``: the figures of a run for Python programs and notebooks."""

from __future__ import annotations

from functools import cached_property

import plotly.graph_objects as go

from fedsim.core.errors import InputError
from fedsim.plugins.report.charts import KEYS, draw
from fedsim.plugins.report.figures import Absent
from fedsim.plugins.report.notebook_view import NotebookFigure
from fedsim.plugins.report.study import Study
from fedsim.recording.reader import Run


class Plots:
    """The figures of a run, one method for each: ``run.plot.accuracy()``.

    Parameters
    ----------
    run : Run
        What to draw.

    Notes
    -----
    Each method takes nothing, returns a plotly figure (with an image for where plotly's scripts do
    not run, as in pages of nbconvert), and raises `InputError` where the run has nothing to draw.
    `fedsim.plugins.report.charts` says what each shows.
    """

    def __init__(self, run: Run) -> None:
        self._run = run

    @cached_property
    def _study(self) -> Study:
        return Study(self._run, self._run.path.resolve().name)

    def _draw(self, key: str) -> go.Figure:
        figure = draw(key, [self._study])
        if isinstance(figure, Absent):
            raise InputError(f"{self._run.path} has no figure {key!r}: {figure.reason}")
        return NotebookFigure.of(figure)

    def __repr__(self) -> str:
        width = max(map(len, KEYS)) + 2
        lines = [f"figures of the run {self._run.path.name}:"]
        for key in KEYS:
            what, _, needs = (getattr(type(self), key).__doc__ or "").partition("\n\n")
            line = what.removeprefix("Draw ") + (" " + needs.strip() if needs else "")
            lines.append(f"  {key + '()':{width}}  {line}".replace("``", ""))
        return "\n".join(lines)

    def accuracy(self) -> go.Figure:
        """Draw the test accuracy of the global model, by round."""
        return self._draw("accuracy")

    def loss(self) -> go.Figure:
        """Draw the test loss of the global model, by round."""
        return self._draw("loss")

    def partition(self) -> go.Figure:
        """Draw the samples of each class at each client."""
        return self._draw("partition")

    def participation(self) -> go.Figure:
        """Draw who took part in which round, and who failed."""
        return self._draw("participation")

    def client_loss(self) -> go.Figure:
        """Draw the local training loss of each client, by round."""
        return self._draw("client_loss")

    def gradient_norm(self) -> go.Figure:
        """Draw the norm of the first local gradient of each client, by round."""
        return self._draw("gradient_norm")

    def layer_norms(self) -> go.Figure:
        """Draw the norm of the first local gradient of each parameter, by round."""
        return self._draw("layer_norms")

    def drift(self) -> go.Figure:
        """Draw the cosine of each client's delta to the global model's movement, by round."""
        return self._draw("drift")

    def delta_norm(self) -> go.Figure:
        """Draw the norm of each client's delta, by round."""
        return self._draw("delta_norm")

    def pair_cosines(self) -> go.Figure:
        """Draw the cosines of all pairs of clients' deltas, by round."""
        return self._draw("pair_cosines")

    def drift_pairs(self) -> go.Figure:
        """Draw the matrix of cosines of clients' deltas, round by round."""
        return self._draw("drift_pairs")

    def conflict(self) -> go.Figure:
        """Draw the share of pairs of clients with gradients in conflict (Yu et al. 2020).

        It needs the first step of each client, which ``capture = "first:1"`` keeps.
        """
        return self._draw("conflict")

    def noise(self) -> go.Figure:
        """Draw the simple noise scale of each client (McCandlish et al. 2018).

        It needs two full batches of a client, which ``capture = "first:2"`` keeps.
        """
        return self._draw("noise")

    def round_time(self) -> go.Figure:
        """Draw the wall time of each round, by what it went into."""
        return self._draw("round_time")

    def client_time(self) -> go.Figure:
        """Draw the time of all clients of each round, by what it went into."""
        return self._draw("client_time")

    def bytes(self) -> go.Figure:
        """Draw the bytes that each round wrote, by what they are."""
        return self._draw("bytes")
