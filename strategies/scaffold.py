"""Federated averaging with control variates against the drift of the clients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fedsim.core.aggregation import Array, State, Sums, apply_delta
from fedsim.core.algorithm import Algorithm, ArraySpec, Outcome, Round, StrategySettings
from fedsim.core.errors import ConfigError
from fedsim.core.fields import Rate

if TYPE_CHECKING:
    from fedsim.core.config import RunConfig


class ScaffoldSettings(StrategySettings):
    """The rate that the mean delta is multiplied by."""

    server_learning_rate: Rate = 1.0

    def check_run(self, config: RunConfig) -> None:
        """Refuse what no formula tells the work of, and noise, which a control would keep."""
        if config.optimizer != "sgd":
            raise ConfigError("optimizer", config.optimizer, f"'sgd' with {self.name}")
        if (schedule := config.learning_rate_schedule) != "constant":
            raise ConfigError("learning-rate-schedule", schedule, f"'constant' with {self.name}")
        if self.dp is not None:
            raise ConfigError("strategy.dp", self.dp, f"none with {self.name}")


class Scaffold(Algorithm):
    """SCAFFOLD (Karimireddy et al. 2020, alg. 1, option II).

    A client adds ``c - c_i`` to every gradient: the mean direction of all clients less its own.
    After a round ``c_i`` is renewed by what the client did, ``c_i - c - delta / work``, which
    follows from its delta: only the correction travels beside the model. The parameters move by
    the plain mean of the deltas, all participants alike, times the server's rate.
    """

    name = "scaffold"
    Settings = ScaffoldSettings

    def begin(self) -> State:
        """Give the server's control variate before the first round: zero."""
        return {key: np.zeros(spec.shape, spec.dtype) for key, spec in self.keeps().items()}

    def keeps(self) -> dict[str, ArraySpec]:
        """Name the server's control variate, ``c``."""
        return self.for_parameters("control")

    def keeps_of_client(self) -> dict[str, ArraySpec]:
        """Name a client's, ``c_i``."""
        return {name: ArraySpec(shape) for name, shape in self.setup.shapes.items()}

    def correction(self, kept: State, of_client: State) -> State:
        """Give ``c - c_i``."""
        return _difference(_control(kept), of_client)

    def fold(self, this_round: Round) -> Outcome:
        """Move the parameters, and renew the control variates of participants and server."""
        control = _control(this_round.kept)
        deltas, changes, participants = Sums(), Sums(), 0
        for update in this_round.updates():
            own = update.kept
            renewed = renewed_control(control, own, update.delta, update.work)
            deltas.add(update.delta, 1.0)
            changes.add(_difference(renewed, own), 1.0)
            participants += 1
            update.keep(renewed)
        moved = deltas.divided(participants / self.settings.server_learning_rate)
        # Of all clients, taking part or not.
        changed = changes.divided(self.setup.clients)
        with np.errstate(all="ignore"):
            kept = {f"control/{n}": np.asarray(np.add(a, changed[n])) for n, a in control.items()}
        return Outcome(apply_delta(this_round.before, moved), kept)


def _control(kept: State) -> dict[str, Array]:
    return {key.removeprefix("control/"): array for key, array in kept.items()}


@np.errstate(all="ignore")
def renewed_control(control: State, own: State, delta: State, work: float) -> dict[str, Array]:
    """Give a client's control variate after a round: ``c_i - c - delta / work``, in float32.

    One that made no update has seen no gradient to go by, and keeps its own.
    """
    if not work:
        return {n: np.asarray(own[n] if own else np.zeros_like(a)) for n, a in delta.items()}
    divisor = np.float32(work)
    return {
        n: np.asarray(np.subtract(difference, np.divide(delta[n], divisor)))
        for n, difference in _difference(own, control).items()
    }


@np.errstate(all="ignore")
def _difference(one: State, other: State) -> dict[str, Array]:
    """Subtract a control variate from another; an empty one is zero."""
    names = one or other
    return {n: np.asarray(np.subtract(_or_zero(one, n), _or_zero(other, n))) for n in names}


def _or_zero(control: State, name: str) -> Array | np.float32:
    return control[name] if control else np.float32(0)
