"""Strategies whose arithmetic is Flower's class, which no proof follows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from fedsim.core.algorithm import Algorithm, Claim, RecordedRound, Unproven


class FlowerBuiltin(Algorithm):
    """One of Flower's own strategies, by the name of its class."""

    flower: ClassVar[str]
    """In ``flwr.serverapp.strategy``."""

    def keywords(self) -> dict[str, Any]:
        """Give the settings as keywords of that class."""
        return dict(self.settings.own)

    def check(self, this_round: RecordedRound) -> Iterator[Claim]:
        """Leave the parameters open."""
        yield Unproven("parameters")
