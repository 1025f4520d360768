"""Learning rates by round and local step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from fedsim.core import registry

if TYPE_CHECKING:
    from fedsim.core.config import RunConfig

Schedule = Callable[[int, int], float]
"""Round (from 1) and local step of that round (from 0) to the rate of the step's update."""
Rates = Callable[[int], float]
"""The same within one round: local step to rate."""


@dataclass(frozen=True, kw_only=True)
class RateContext:
    """What a schedule may depend on; it draws nothing, so that replays find the same rates.

    Parameters
    ----------
    learning_rate : float
        The client's own, as configured.
    client : int
        Which client.
    rounds : int
        Rounds of the run.
    steps : int
        Local steps that the client makes in a round.
    """

    learning_rate: float
    client: int
    rounds: int
    steps: int


def rates_of(config: RunConfig, client: int, round_number: int, num_samples: int) -> Rates:
    """Give the rates of a client's local steps in a round.

    Parameters
    ----------
    config : RunConfig
        Names the schedule.
    client, round_number : int
        The round and the client.
    num_samples : int
        Training samples of the client.

    Raises
    ------
    InputError
        When the schedule cannot be loaded.
    """
    settings = config.training_of(client)
    about = RateContext(
        learning_rate=settings.optimizer.learning_rate,
        client=client,
        rounds=config.rounds,
        steps=settings.num_steps(num_samples),
    )
    make = registry.factory("learning-rate-schedule", "schedules", config.learning_rate_schedule)
    schedule = cast(Schedule, make(about))
    return lambda step: schedule(round_number, step)
