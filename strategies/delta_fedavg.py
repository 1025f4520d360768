"""Federated averaging of sample-weighted deltas, in float64 and in a fixed order."""

from __future__ import annotations

from fedsim.core.aggregation import apply_delta
from fedsim.core.algorithm import Algorithm, Outcome, Round, StrategySettings


class DeltaFedAvgSettings(StrategySettings):
    """It has none."""


class DeltaMean(Algorithm):
    """FedAvg (McMahan et al. 2017) over ``delta = local - global``.

    The sum is float64 in a fixed order and rounded once, so the result is the same to the bit
    however replies arrive, and they are folded one by one.
    """

    name = "delta-fedavg"
    Settings = DeltaFedAvgSettings
    step = "the aggregate"

    def fold(self, this_round: Round) -> Outcome:
        """Add the mean delta."""
        return Outcome(apply_delta(this_round.before, this_round.mean()))
