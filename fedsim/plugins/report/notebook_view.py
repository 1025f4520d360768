"""Figures for notebooks: plotly's own, with an image for what cannot run its scripts."""

from __future__ import annotations

import base64
import importlib
from typing import Any

import plotly.graph_objects as go

from fedsim.plugins.report.figures import Figure
from fedsim.plugins.report.image_view import image_of
from fedsim.plugins.report.plotly_view import to_plotly

_MIMETYPE = "application/vnd.plotly.v1+json"


class NotebookFigure(go.Figure):  # type: ignore[misc]
    """A plotly figure that brings an image of itself.

    In Jupyter, plotly shows nothing but its JSON, which nbconvert, GitHub and notebooks without
    plotly's extension leave blank. They take the image. It is that of the figure as it was made:
    one that was changed since is shown as plotly shows it.
    """

    # Copies that plotly makes of itself have none.
    _source: Figure | None = None
    _as_made: str = ""

    @classmethod
    def of(cls, figure: Figure) -> NotebookFigure:
        """Make one."""
        made = cls(to_plotly(figure))
        made._source = figure
        made._as_made = made.to_json()
        return made

    @property
    def _has_image(self) -> bool:
        return self._source is not None and self.to_json() == self._as_made

    def _repr_mimebundle_(self, *args: Any, **options: Any) -> dict[str, Any]:
        bundle: dict[str, Any] = super()._repr_mimebundle_(*args, **options)
        if {*bundle} == {_MIMETYPE}:
            if self._has_image and self._source is not None:
                bundle["image/png"] = base64.b64encode(image_of(self._source)).decode()
            else:
                bundle["text/html"] = self.to_html(full_html=False, include_plotlyjs="cdn")
            bundle["text/plain"] = f"<figure {self.layout.title.text}>"
        return bundle

    def _repr_html_(self) -> str | None:
        # What is asked beside the bundle, and would win over the image.
        return self._repr_mimebundle_().get("text/html")

    def _ipython_display_(self) -> None:
        if {*super()._repr_mimebundle_()} == {_MIMETYPE}:
            # IPython then asks for the bundle.
            raise NotImplementedError
        super()._ipython_display_()

    def show(self, *args: Any, **options: Any) -> None:
        """Show the figure, as `plotly.graph_objects.Figure.show` does."""
        if args or options or {*super()._repr_mimebundle_()} != {_MIMETYPE}:
            super().show(*args, **options)
            return
        # Only notebooks come here, which have IPython.
        display = importlib.import_module("IPython.display").display
        display(self._repr_mimebundle_(), raw=True)
