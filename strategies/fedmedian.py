"""Flower's FedMedian."""

from __future__ import annotations

from fedsim.core.algorithm import StrategySettings
from strategies.flower_builtin import FlowerBuiltin


class FedMedianSettings(StrategySettings):
    """It has none."""


class FedMedian(FlowerBuiltin):
    """The median of every number (Yin et al. 2018)."""

    name = "fedmedian"
    flower = "FedMedian"
    Settings = FedMedianSettings
