"""Flower's FedAdagrad: Adagrad of the server."""

from __future__ import annotations

import numpy as np

from fedsim.core.algorithm import StrategySettings
from fedsim.core.fields import Rate
from strategies.server_optimizer import Moments, Numbers


class FedAdagradSettings(StrategySettings):
    """The step size, and what keeps its divisor from zero."""

    eta: Rate = 0.1
    tau: Rate = 1e-3


class FedAdagrad(Moments):
    """FedAdagrad (Reddi et al. 2021)."""

    name = "fedadagrad"
    Settings = FedAdagradSettings

    def second(self, v: Numbers, square: Numbers) -> Numbers:
        """Add the square."""
        return np.asarray(v + square)
