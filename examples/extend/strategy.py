"""A strategy of your own in one file: settings, arithmetic, what it keeps, and its proof.

    fedsim run --strategy '{name = "examples/extend/strategy.py:HeavyBall", decay = 0.5}' \
        --dataset digits --model cnn --clients 4 --clients-per-round 3 --output RUN
    fedsim verify RUN --strategy examples/extend/strategy.py:HeavyBall

Code is loaded because you name it, never because a run does: without ``--strategy``, `verify`
names what it cannot prove.
"""

from typing import Annotated

import numpy as np
from pydantic import Field

from fedsim.core.algorithm import Algorithm, Keeps, Moves, Outcome, StrategySettings


class HeavyBall(Algorithm):
    """Polyak 1964 over the mean delta: each round keeps a share of the way of the one before."""

    class Settings(StrategySettings):
        """The share."""

        decay: Annotated[float, Field(ge=0, lt=1)] = 0.9

    def keeps(self):
        """Name ``velocity/PARAMETER`` for each parameter."""
        return self.for_parameters("velocity")

    def fold(self, this_round):
        """Add the new velocity to the parameters."""
        velocity = self.velocity(this_round)
        moved = {n: np.add(a, velocity[f"velocity/{n}"]) for n, a in this_round.before.items()}
        return Outcome(moved, velocity)

    def check(self, this_round):
        """Prove the velocity by the one before, and the parameters by the velocity on record."""
        for key, array in self.velocity(this_round).items():
            yield Keeps(key, array)
        for name, start in this_round.before.items():
            yield Moves(name, np.add(start, this_round.kept_after[f"velocity/{name}"]))

    def velocity(self, this_round):
        """Give ``decay * velocity + mean delta``, float32."""
        decay = np.float32(self.settings.decay)
        mean, before = this_round.mean(), this_round.kept
        keys = {name: f"velocity/{name}" for name in mean}
        return {k: decay * before[k] + mean[n] if k in before else mean[n] for n, k in keys.items()}
