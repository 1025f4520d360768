"""Flower's FedAvgM: momentum of the server."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import AfterValidator, Field

from fedsim.core.algorithm import StrategySettings
from fedsim.core.fields import Rate, finite
from strategies.server_optimizer import Kept, MeanOfWeights, Numbers


class FedAvgMSettings(StrategySettings):
    """SGD of the server."""

    server_learning_rate: Rate = 1.0
    # With Flower's own momentum of 0 it would be plain averaging.
    server_momentum: Annotated[float, Field(ge=0, lt=1), AfterValidator(finite)] = 0.9


class FedAvgM(MeanOfWeights):
    """FedAvgM (Hsu et al. 2019): SGD with momentum over the parameters less their mean."""

    name = "fedavgm"
    Settings = FedAvgMSettings

    @property
    def _kinds(self) -> tuple[str, ...]:
        return ("momentum",) if self.settings.server_momentum else ()

    def renewed(self, kept: Kept, start: Numbers, mean: Numbers) -> dict[str, Numbers]:
        """Renew the momentum; without any, nothing is kept."""
        if not self._kinds:
            return {}
        momentum = start - mean
        if kept:
            momentum = self.settings.server_momentum * kept["momentum"] + momentum
        return {"momentum": np.asarray(momentum)}

    def moved(self, start: Numbers, mean: Numbers, kept: Kept, number: int) -> Numbers:
        """Take a step against the momentum."""
        rate = self.settings.server_learning_rate
        if not self._kinds and rate == 1:
            return mean
        gradient = kept["momentum"] if self._kinds else start - mean
        return np.asarray(start - np.multiply(rate, gradient))
