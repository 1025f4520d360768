"""Flower's FedAvg, which sums float32 weights."""

from __future__ import annotations

from fedsim.core.algorithm import StrategySettings
from strategies.server_optimizer import MeanOfWeights


class FedAvgSettings(StrategySettings):
    """It has none."""


class FedAvg(MeanOfWeights):
    """FedAvg (McMahan et al. 2017): parameters become the sample-weighted mean of the clients'."""

    name = "fedavg"
    Settings = FedAvgSettings
