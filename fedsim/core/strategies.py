"""The strategies by name: what each can be set to, and where it comes from.

How they aggregate is above this room; what a configuration may say of them is checked here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from fedsim.core.errors import ConfigError
from fedsim.core.fields import Rate, StrictModel, allowed_instead, finite, unknown_key

Decay = Annotated[float, Field(ge=0, lt=1), AfterValidator(finite)]
Share = Annotated[float, Field(ge=0, lt=0.5), AfterValidator(finite)]
NonNegative = Annotated[float, Field(ge=0), AfterValidator(finite)]
Nodes = Annotated[int, Field(ge=0, le=1_000_000)]
Privacy = Literal[
    "server-side-fixed", "server-side-adaptive", "client-side-fixed", "client-side-adaptive"
]


class StrategySettings(StrictModel):
    """What the ``[strategy]`` table may set, whatever the strategy.

    The name alone, ``strategy = "fedadam"``, is short for a table with it.

    Parameters
    ----------
    name : str
        The strategy.
    dp : str, optional
        Differential privacy around it (McMahan et al. 2018; adaptive: Andrew et al. 2021): updates
        are clipped by the server or by the clients, then noise is added to the new parameters.
    noise_multiplier : float, optional
        Of `dp`: standard deviation of the noise in units of ``clipping-norm / participants``.
    clipping_norm : float, optional
        Of `dp`: the largest norm of an update; of an adaptive one, in the first round.
    """

    name: str = Field(description="the strategy")
    dp: Privacy | None = None
    noise_multiplier: NonNegative | None = None
    clipping_norm: Rate | None = None

    paper: ClassVar[str] = ""

    @model_serializer(mode="wrap")
    def _without_blanks(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value is not None}

    @property
    def own(self) -> dict[str, Any]:
        """What the strategy itself is set to: keywords of its class."""
        settings = self.model_dump(exclude=set(StrategySettings.model_fields))
        return {key.replace("-", "_"): value for key, value in settings.items()}


class DeltaFedAvgSettings(StrategySettings):
    """Sample-weighted mean of deltas in float64, folded in a fixed order."""

    paper = "McMahan et al. 2017"


class FedAvgSettings(StrategySettings):
    """Flower's FedAvg, which sums float32 weights."""

    paper = "McMahan et al. 2017"


class FedAvgMSettings(StrategySettings):
    """Flower's FedAvgM: momentum of the server."""

    paper = "Hsu et al. 2019"
    server_learning_rate: Rate = 1.0
    # With Flower's own momentum of 0 it would be plain averaging.
    server_momentum: Decay = 0.9


class FedAdagradSettings(StrategySettings):
    """Flower's FedAdagrad."""

    paper = "Reddi et al. 2021"
    eta: Rate = 0.1
    tau: Rate = 1e-3


class FedAdamSettings(FedAdagradSettings):
    """Flower's FedAdam."""

    beta_1: Decay = 0.9
    beta_2: Decay = 0.99


class FedYogiSettings(FedAdamSettings):
    """Flower's FedYogi."""

    eta: Rate = 0.01


class FedProxSettings(StrategySettings):
    """Flower's FedProx: clients add ``proximal-mu / 2 * |w - w_global|^2`` to their loss."""

    paper = "Li et al. 2020"
    # Flower's own 0 is FedAvg.
    proximal_mu: NonNegative = 0.01


class FedMedianSettings(StrategySettings):
    """Flower's FedMedian: the median of every number."""

    paper = "Yin et al. 2018"


class FedTrimmedAvgSettings(StrategySettings):
    """Flower's FedTrimmedAvg: the mean of every number without its extremes."""

    paper = "Yin et al. 2018"
    beta: Share = 0.2


class KrumSettings(StrategySettings):
    """Flower's Krum: the one model that is nearest to its neighbours."""

    paper = "Blanchard et al. 2017"
    num_malicious_nodes: Nodes = 0

    per_malicious: ClassVar[int] = 2
    """Participants for each malicious one, beside three."""

    def least_participants(self) -> int:
        """Count the participants that its guarantee takes."""
        return self.per_malicious * self.num_malicious_nodes + 3

    def check_participants(self, fewest: int) -> None:
        """Refuse settings that take more participants than the smallest round has.

        Raises
        ------
        ConfigError
            Naming the key, unless not even 0 malicious ones would do.
        """
        most = (fewest - 3) // self.per_malicious
        if 0 <= most < self.num_malicious_nodes:
            raise ConfigError(
                "strategy.num-malicious-nodes",
                self.num_malicious_nodes,
                f"at most {most} where a round has {fewest} participants; {self.name} takes "
                f"{self.per_malicious} for each, and 3 more",
            )


class MultiKrumSettings(KrumSettings):
    """Flower's MultiKrum: the mean of the models that are nearest to their neighbours."""

    num_nodes_to_select: Annotated[int, Field(ge=1, le=1_000_000)] = 2

    def check_participants(self, fewest: int) -> None:
        """Refuse settings whose guarantee or choice takes more participants."""
        super().check_participants(fewest)
        if self.num_nodes_to_select > fewest >= 3:
            raise ConfigError(
                "strategy.num-nodes-to-select",
                self.num_nodes_to_select,
                f"at most {fewest}, the participants of a round",
            )


class BulyanSettings(KrumSettings):
    """Flower's Bulyan: a trimmed mean of what Krum chooses."""

    paper = "El Mhamdi et al. 2018"
    per_malicious = 4


class QFedAvgSettings(StrategySettings):
    """Flower's q-FedAvg: clients with a higher loss weigh more."""

    paper = "Li et al. 2020"
    q: NonNegative = 0.1
    # Unset, that of the run.
    client_learning_rate: Rate | None = None


class FedNovaSettings(StrategySettings):
    """Normalised averaging: each delta is divided by its client's work before the mean."""

    paper = "Wang et al. 2020"


class ScaffoldSettings(StrategySettings):
    """Control variates that take the drift out of local steps."""

    paper = "Karimireddy et al. 2020"
    server_learning_rate: Rate = 1.0


class OwnStrategySettings(StrategySettings):
    """A class of the user's, whose settings only that class knows."""

    model_config = ConfigDict(extra="allow")


STRATEGIES: dict[str, type[StrategySettings]] = {
    "delta-fedavg": DeltaFedAvgSettings,
    "fedavg": FedAvgSettings,
    "fedavgm": FedAvgMSettings,
    "fedadagrad": FedAdagradSettings,
    "fedadam": FedAdamSettings,
    "fedyogi": FedYogiSettings,
    "fedprox": FedProxSettings,
    "fedmedian": FedMedianSettings,
    "fedtrimmedavg": FedTrimmedAvgSettings,
    "krum": KrumSettings,
    "multikrum": MultiKrumSettings,
    "bulyan": BulyanSettings,
    "qfedavg": QFedAvgSettings,
    "fednova": FedNovaSettings,
    "scaffold": ScaffoldSettings,
}
"""By the name that the configuration gives them."""

_CLASS = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def settings_type(name: Any) -> type[StrategySettings]:
    """Give the type of the settings of a strategy.

    Raises
    ------
    ConfigError
        When no strategy has that name.
    """
    if isinstance(name, str) and name in STRATEGIES:
        return STRATEGIES[name]
    if isinstance(name, str) and _CLASS.fullmatch(name):
        return OwnStrategySettings
    names = ", ".join(repr(known) for known in STRATEGIES)
    raise ConfigError("strategy", name, f"one of {names}, or a class as 'package.module:Class'")


def strategy_table(value: Any) -> Any:
    """Read ``strategy`` as the configuration has it: a name, or a table with one."""
    if isinstance(value, StrategySettings):
        return value
    table = dict(value) if isinstance(value, Mapping) else {"name": value}
    if "name" not in table:
        raise ConfigError("strategy", table, "a name, or a table with one, like name = 'fedadam'")
    known = settings_type(table["name"])
    try:
        return known.model_validate(table, by_alias=True, by_name=False)
    except ValidationError as error:
        problem = error.errors()[0]
        key, given = str(problem["loc"][0]), problem["input"]
        if problem["type"] == "extra_forbidden":
            raise unknown_key(f"strategy.{key}", given, known) from None
        annotation = known.model_fields[key.replace("-", "_")].annotation
        allowed = allowed_instead(problem, annotation)
        raise ConfigError(f"strategy.{key}", given, allowed) from None
