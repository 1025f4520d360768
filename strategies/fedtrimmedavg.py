"""Flower's FedTrimmedAvg."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from fedsim.core.algorithm import StrategySettings
from fedsim.core.fields import finite
from strategies.flower_builtin import FlowerBuiltin


class FedTrimmedAvgSettings(StrategySettings):
    """The share that is cut off at either end."""

    beta: Annotated[float, Field(ge=0, lt=0.5), AfterValidator(finite)] = 0.2


class FedTrimmedAvg(FlowerBuiltin):
    """The mean of every number without its extremes (Yin et al. 2018)."""

    name = "fedtrimmedavg"
    flower = "FedTrimmedAvg"
    Settings = FedTrimmedAvgSettings
