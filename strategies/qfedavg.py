"""Flower's q-FedAvg."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedsim.core.algorithm import NonNegative, StrategySettings
from fedsim.core.errors import ConfigError
from fedsim.core.fields import Rate
from strategies.flower_builtin import FlowerBuiltin

if TYPE_CHECKING:
    from fedsim.core.config import RunConfig


class QFedAvgSettings(StrategySettings):
    """How much more, and the clients' rate."""

    q: NonNegative = 0.1
    # Unset, that of the run.
    client_learning_rate: Rate | None = None

    def check_run(self, config: RunConfig) -> None:
        """Refuse a run whose clients have no one rate to take."""
        varies = (
            isinstance(config.learning_rate, tuple)
            or any(table.learning_rate is not None for table in config.client.values())
            or config.learning_rate_schedule != "constant"
        )
        if self.client_learning_rate is None and varies:
            raise ConfigError(
                "strategy.client-learning-rate", None, "a number where clients have different ones"
            )


class QFedAvg(FlowerBuiltin):
    """Clients with a higher loss weigh more (Li et al. 2020)."""

    name = "qfedavg"
    flower = "QFedAvg"
    Settings = QFedAvgSettings

    def keywords(self) -> dict[str, Any]:
        """Tell Flower's class by which name clients report their loss."""
        rate = self.settings.client_learning_rate or self.setup.learning_rate
        return {**self.settings.own, "train_loss_key": "loss", "client_learning_rate": rate}
