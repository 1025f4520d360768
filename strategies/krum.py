"""Flower's Krum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from fedsim.core.algorithm import StrategySettings
from fedsim.core.errors import ConfigError
from strategies.flower_builtin import FlowerBuiltin

if TYPE_CHECKING:
    from fedsim.core.config import RunConfig


class KrumSettings(StrategySettings):
    """How many participants may be malicious."""

    num_malicious_nodes: Annotated[int, Field(ge=0, le=1_000_000)] = 0

    per_malicious: ClassVar[int] = 2
    """Participants for each malicious one, beside three."""

    def check_run(self, config: RunConfig) -> None:
        """Refuse rounds with fewer participants than the guarantee takes."""
        numbers = [config.num_participants(r) for r in range(1, config.rounds + 1)]
        self.check_participants(min(numbers))
        needed = self.per_malicious * self.num_malicious_nodes + 3
        allowed = f"{needed} or more with strategy = {self.name!r}"
        for number, clients in enumerate(config.participants or (), start=1):
            if len(clients) < needed and number <= config.rounds:
                raise ConfigError(f"participants of round {number}", clients, allowed)
        if min(numbers) < needed:
            raise ConfigError("clients-per-round", config.clients_per_round, allowed)

    def check_participants(self, fewest: int) -> None:
        """Refuse settings that take more participants than the smallest round has.

        Raises
        ------
        ConfigError
            Naming the key, unless not even 0 malicious ones would do.
        """
        most = (fewest - 3) // self.per_malicious
        if 0 <= most < self.num_malicious_nodes:
            raise ConfigError(
                "strategy.num-malicious-nodes",
                self.num_malicious_nodes,
                f"at most {most} where a round has {fewest} participants; {self.name} takes "
                f"{self.per_malicious} for each, and 3 more",
            )


class Krum(FlowerBuiltin):
    """The one model that is nearest to its neighbours (Blanchard et al. 2017)."""

    name = "krum"
    flower = "Krum"
    Settings = KrumSettings
