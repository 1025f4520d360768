"""Flower's FedAdam: Adam of the server."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, Field

from fedsim.core.algorithm import StrategySettings
from fedsim.core.fields import Rate, finite
from strategies.server_optimizer import Moments, Numbers

Decay = Annotated[float, Field(ge=0, lt=1), AfterValidator(finite)]


class FedAdamSettings(StrategySettings):
    """The step size, what keeps its divisor from zero, and the decay of both moments."""

    eta: Rate = 0.1
    tau: Rate = 1e-3
    beta_1: Decay = 0.9
    beta_2: Decay = 0.99


class FedAdam(Moments):
    """FedAdam (Reddi et al. 2021), with the bias correction that Flower gives it."""

    name = "fedadam"
    Settings = FedAdamSettings

    def second(self, v: Numbers, square: Numbers) -> Numbers:
        """Take the moving average of squares."""
        beta_2 = self.settings.beta_2
        return np.asarray(beta_2 * v + (1 - beta_2) * square)

    def rate(self, number: int) -> Any:
        """Correct the bias of moments that begin at zero."""
        settings = self.settings
        return (
            settings.eta
            * np.sqrt(1 - np.power(settings.beta_2, number + 1.0))
            / (1 - np.power(settings.beta_1, number + 1.0))
        )
