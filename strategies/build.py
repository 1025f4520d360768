"""The strategies as Flower takes them, which the round loop runs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAvg, Strategy

from fedsim.core.algorithm import Algorithm, Setup, StrategySettings, make_algorithm, make_users
from fedsim.core.config import RunConfig
from fedsim.core.errors import ConfigError
from strategies.flower_builtin import FlowerBuiltin
from strategies.flower_privacy import PRIVACY
from strategies.flower_strategy import FlowerStrategy
from strategies.folding import RoundExporter
from strategies.privacy import Private
from strategies.recorded import Recorded
from strategies.registry import load_class

Shapes = Mapping[str, tuple[int, ...]]

# The minimums are 1 because the round loop decides who takes part, not the strategy; clients
# evaluate nothing, because the global model is evaluated on the test split after the update.
_COMMON: dict[str, Any] = {
    "fraction_evaluate": 0.0,
    "min_train_nodes": 1,
    "min_available_nodes": 1,
}


def build_strategy(
    config: RunConfig, parameters: Shapes, exporter: RoundExporter | None = None
) -> Strategy:
    """Build the strategy of a run.

    Parameters
    ----------
    config : RunConfig
        With its name and settings.
    parameters : mapping of str to tuple of int
        Shapes of the trainable parameters.
    exporter : RoundExporter, optional
        Receives the artifacts of every round.

    Raises
    ------
    ConfigError
        When the user's own class cannot be imported, or does not take its settings.
    """
    settings = config.strategy
    algorithm = _algorithm(settings, Setup.of(config, parameters))
    if algorithm is not None:
        algorithm.settings.check_run(config)
    inner = algorithm.inner if isinstance(algorithm, Private) else algorithm
    if algorithm is inner and inner is not None and not isinstance(inner, FlowerBuiltin):
        return FlowerStrategy(inner, exporter, **_COMMON)
    strategy: Strategy
    if inner is None:
        strategy = _users(settings)
    elif isinstance(inner, FlowerBuiltin):
        strategy = getattr(flower, inner.flower)(**_COMMON, **inner.keywords())
    else:
        strategy = FlowerStrategy(inner, rounds=False, **_COMMON)
    if settings.dp is not None:
        wrapper, clipping_norm = PRIVACY[settings.dp]
        strategy = wrapper(
            strategy,
            noise_multiplier=settings.noise_multiplier,
            num_sampled_clients=config.num_participants(1),
            **{clipping_norm: settings.clipping_norm},
        )
    return Recorded(strategy, parameters, exporter, seed=config.seed)


def check_strategy(config: RunConfig) -> None:
    """Make a user's own class once, to refuse before a run what cannot be made in it.

    Raises
    ------
    ConfigError
        When it cannot be imported, or does not take its settings.
    """
    if config.strategy.is_users:
        build_strategy(config, {})


def _algorithm(settings: StrategySettings, setup: Setup) -> Algorithm | None:
    if settings.is_users:
        return make_users(settings.name, settings, setup)
    return make_algorithm(settings, setup)


def _users(settings: StrategySettings) -> Strategy:
    kind = load_class(settings.name)
    if not issubclass(kind, Strategy):
        raise ConfigError(
            "strategy",
            settings.name,
            "a subclass of fedsim.core.algorithm.Algorithm or flwr.serverapp.strategy.Strategy",
        )
    try:
        built: Strategy = kind(**_taken(kind, _COMMON), **settings.own)
    except Exception as error:
        why = f"settings that the class takes: {type(error).__name__}: {error}"
        raise ConfigError("strategy", settings.own, why) from None
    return built


def _taken(kind: type[Strategy], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what a class does not take by name, nor hands on to FedAvg."""
    parameters = inspect.signature(kind).parameters
    hands_on = issubclass(kind, FedAvg) and any(
        p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()
    )
    return {k: v for k, v in keywords.items() if hands_on or k in parameters}
