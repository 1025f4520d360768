"""A client that trains on its own samples and sends what it learned."""

from __future__ import annotations

from fedsim.core.behavior import ClientContext
from fedsim.core.task import Columns
from fedsim.core.training import Arrays


class Honest:
    """A `Behavior` that changes nothing."""

    def examples(self, about: ClientContext, honest: Columns) -> Columns:
        """Give the samples as they are."""
        return honest

    def update(self, about: ClientContext, start: Arrays, honest: Arrays) -> Arrays:
        """Give the local state as it is."""
        return honest

    def explain(self, about: ClientContext) -> str | None:
        """Say nothing: an honest client needs no explanation."""
        return None


make = Honest
