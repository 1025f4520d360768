"""Flower's MultiKrum."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fedsim.core.errors import ConfigError
from strategies.flower_builtin import FlowerBuiltin
from strategies.krum import KrumSettings


class MultiKrumSettings(KrumSettings):
    """How many participants may be malicious, and how many are chosen."""

    num_nodes_to_select: Annotated[int, Field(ge=1, le=1_000_000)] = 2

    def check_participants(self, fewest: int) -> None:
        """Refuse settings whose guarantee or choice takes more participants."""
        super().check_participants(fewest)
        if self.num_nodes_to_select > fewest >= 3:
            raise ConfigError(
                "strategy.num-nodes-to-select",
                self.num_nodes_to_select,
                f"at most {fewest}, the participants of a round",
            )


class MultiKrum(FlowerBuiltin):
    """The mean of the models that are nearest to their neighbours (Blanchard et al. 2017)."""

    name = "multikrum"
    flower = "MultiKrum"
    Settings = MultiKrumSettings
