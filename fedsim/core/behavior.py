"""What a client does with its samples and its update: the protocol of honest and other clients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np

from fedsim.core import registry
from fedsim.core.capture import captures_of
from fedsim.core.errors import ConfigError
from fedsim.core.rng import Purpose, generator
from fedsim.core.schedule import rates_of
from fedsim.core.task import Columns
from fedsim.core.training import Arrays

if TYPE_CHECKING:
    from fedsim.core.config import RunConfig

HONEST = "honest"


@dataclass(frozen=True, kw_only=True)
class ClientContext:
    """Which client does something, and when.

    Parameters
    ----------
    seed : int
        The run's.
    client, round : int
        The round and the client.
    """

    seed: int
    client: int
    round: int

    def draw(self) -> np.random.Generator:
        """Make the generator of this client's behavior in this round, the same at each call."""
        return generator(self.seed, Purpose.BEHAVIOR, self.round, self.client)


class Behavior(Protocol):
    """A client that is not honest, or not able.

    What it gives depends on its arguments and settings alone: `verify` asks it again.
    """

    def examples(self, about: ClientContext, honest: Columns) -> Columns:
        """Give what the client trains on in one step.

        Parameters
        ----------
        about : ClientContext
            Who and when.
        honest : mapping of str to Tensor
            The rows that were drawn for the step, before augmentation, on the device that trains.
            They are copies and may be changed.
        """
        ...

    def update(self, about: ClientContext, start: Arrays, honest: Arrays) -> Arrays:
        """Give the local state that the client sends.

        Parameters
        ----------
        about : ClientContext
            Who and when.
        start, honest : dict of str to ndarray
            The global state that it got, and the local state after training; not to be changed.
        """
        ...

    def explain(self, about: ClientContext) -> str | None:
        """Say in a few words what the client does, for its row; None if it is honest."""
        ...


@dataclass(frozen=True)
class ClientInRound:
    """A behavior together with the client and round that it is asked about."""

    behavior: Behavior
    about: ClientContext

    def examples(self, honest: Columns) -> Columns:
        """Give what the client trains on in one step, as `Behavior.examples`."""
        return self.behavior.examples(self.about, honest)

    def update(self, start: Arrays, honest: Arrays) -> Arrays:
        """Give the local state that the client sends, as `Behavior.update`."""
        return self.behavior.update(self.about, start, honest)

    def explain(self) -> str | None:
        """Say what the client does, as `Behavior.explain`."""
        return self.behavior.explain(self.about)


def behavior_of(config: RunConfig, client: int, round_number: int) -> ClientInRound:
    """Make the behavior of a client in a round.

    Raises
    ------
    InputError
        When it cannot be loaded, or does not take its settings.
    """
    name, settings = config.behavior_of(client)
    make = registry.factory(f"behavior.{name}", "behaviors", name)
    try:
        behavior = cast(Behavior, make(**settings))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"behavior.{name}", settings, f"settings that it takes: {error}"
        ) from None
    for method in ("examples", "update", "explain"):
        if not callable(getattr(behavior, method, None)):
            expected = f"a class with the methods examples, update and explain; it has no {method}"
            raise ConfigError("behavior", name, expected)
    return ClientInRound(
        behavior, ClientContext(seed=config.seed, client=client, round=round_number)
    )


def check_clients(config: RunConfig) -> None:
    """Load the code that the user named for clients, to refuse what cannot be used.

    Raises
    ------
    ConfigError
        Naming the key.
    """
    registry.trust(config.code)
    captures_of(config)
    rates_of(config, 0, 1, config.min_samples)(0)
    registry.factory("client-evaluation", "evaluations", config.client_evaluation)
    for table in config.behavior.values():
        behavior_of(config, table.clients[0], 1)
