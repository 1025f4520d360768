"""The strategies by the name that the configuration gives them."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAvg, Strategy

from fedsim.core.config import RunConfig
from fedsim.core.errors import ConfigError
from fedsim.core.strategies import QFedAvgSettings, StrategySettings
from strategies.delta_fedavg import DeltaFedAvg
from strategies.fednova import FedNova
from strategies.folding import RoundExporter
from strategies.privacy import PRIVACY
from strategies.recorded import Recorded
from strategies.scaffold import Scaffold

Shapes = Mapping[str, tuple[int, ...]]

# The minimums are 1 because the round loop decides who takes part, not the strategy; clients
# evaluate nothing, because the global model is evaluated on the test split after the update.
_COMMON: dict[str, Any] = {
    "fraction_evaluate": 0.0,
    "min_train_nodes": 1,
    "min_available_nodes": 1,
}
FLOWERS: dict[str, type[FedAvg]] = {
    "fedavg": flower.FedAvg,
    "fedavgm": flower.FedAvgM,
    "fedadagrad": flower.FedAdagrad,
    "fedadam": flower.FedAdam,
    "fedyogi": flower.FedYogi,
    "fedprox": flower.FedProx,
    "fedmedian": flower.FedMedian,
    "fedtrimmedavg": flower.FedTrimmedAvg,
    "krum": flower.Krum,
    "multikrum": flower.MultiKrum,
    "bulyan": flower.Bulyan,
    "qfedavg": flower.QFedAvg,
}
"""Flower's own, which `Recorded` records."""


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
    ours = settings.name in ("delta-fedavg", "fednova", "scaffold")
    if ours and settings.dp is None:
        return _ours(config, parameters, exporter)
    strategy = _ours(config, parameters, None) if ours else _theirs(config)
    if settings.dp is not None:
        wrapper, clipping_norm = PRIVACY[settings.dp]
        strategy = wrapper(
            strategy,
            noise_multiplier=settings.noise_multiplier,
            num_sampled_clients=config.num_participants(1),
            **{clipping_norm: settings.clipping_norm},
        )
    return Recorded(strategy, parameters, exporter, seed=config.seed)


def check_strategy(settings: StrategySettings) -> None:
    """Make a user's own class once, to refuse before a run what cannot be made in it.

    Raises
    ------
    ConfigError
        When it cannot be imported, or does not take its settings.
    """
    if ":" in settings.name:
        _users(settings)


def _ours(config: RunConfig, parameters: Shapes, exporter: RoundExporter | None) -> Strategy:
    if config.strategy.name == "delta-fedavg":
        return DeltaFedAvg(exporter, **_COMMON)
    momentum, nesterov = config.momentum, config.nesterov
    if config.strategy.name == "fednova":
        return FedNova(
            parameters, momentum=momentum, nesterov=nesterov, exporter=exporter, **_COMMON
        )
    if exporter is None:
        raise ValueError("scaffold needs an exporter to keep what it has of each client")
    return Scaffold(
        parameters,
        exporter,
        clients=config.clients,
        momentum=momentum,
        nesterov=nesterov,
        **config.strategy.own,
        **_COMMON,
    )


def _theirs(config: RunConfig) -> Strategy:
    settings = config.strategy
    if ":" in settings.name:
        return _users(settings)
    keywords = settings.own
    if isinstance(settings, QFedAvgSettings):
        # Our clients report their loss by this name.
        keywords["train_loss_key"] = "loss"
        keywords["client_learning_rate"] = settings.client_learning_rate or config.learning_rate
    return FLOWERS[settings.name](**_COMMON, **keywords)


def _users(settings: StrategySettings) -> Strategy:
    module, _, name = settings.name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        # As it is for `python -m fedsim`, so for the command.
        sys.path.append(here)
    try:
        kind = getattr(importlib.import_module(module), name)
    except Exception as error:
        why = f"a class that can be imported: {type(error).__name__}: {error}"
        raise ConfigError("strategy", settings.name, why) from None
    if not (isinstance(kind, type) and issubclass(kind, Strategy)):
        raise ConfigError(
            "strategy", settings.name, "a subclass of flwr.serverapp.strategy.Strategy"
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
