"""Federated averaging of deltas that are normalised by their clients' work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedsim.core.aggregation import Array, State, Sums, apply_delta
from fedsim.core.algorithm import Algorithm, Outcome, Round, StrategySettings
from fedsim.core.errors import ConfigError

if TYPE_CHECKING:
    from fedsim.core.config import RunConfig


class FedNovaSettings(StrategySettings):
    """It has none."""

    def check_run(self, config: RunConfig) -> None:
        """Refuse optimizers and schedules whose work no formula tells."""
        if config.optimizer != "sgd":
            raise ConfigError("optimizer", config.optimizer, f"'sgd' with {self.name}")
        if (schedule := config.learning_rate_schedule) != "constant":
            raise ConfigError("learning-rate-schedule", schedule, f"'constant' with {self.name}")


class FedNova(Algorithm):
    """FedNova (Wang et al. 2020): equal influence for samples, for any number of local steps.

    In plain averaging a client that makes more local steps pulls the model to its own optimum.
    Here each delta is divided by its client's work, and the mean multiplied by the mean work.
    """

    name = "fednova"
    Settings = FedNovaSettings

    def fold(self, this_round: Round) -> Outcome:
        """Add the normalised mean."""
        mean = NormalisedMean()
        for update in this_round.updates():
            mean.add(update.delta, update.samples, update.work)
        return Outcome(apply_delta(this_round.before, mean.mean()))


class NormalisedMean:
    """The normalised mean of deltas (Wang et al. 2020, eq. 8), in float64.

    With weights ``p`` that sum to 1, deltas ``x`` and local work ``a``, it is
    ``sum(p * a) * sum(p * x / a)``: every client moves the mean in proportion to its samples,
    not to the steps that it made. With equal work it is the sample-weighted mean.
    """

    def __init__(self) -> None:
        self._rates = Sums()
        self._work = 0.0
        self._weight = 0

    def add(self, delta: State, weight: int, work: float) -> None:
        """Fold one client's delta in; `work` is its `local_work`, 0 where it did not move."""
        self._rates.add(delta, weight / work if work else 0.0)
        self._work += weight * work
        self._weight += weight

    def mean(self) -> dict[str, Array]:
        """Give the mean, rounded once to each array's own dtype."""
        return self._rates.divided(self._weight**2 / self._work if self._work else 1.0)
