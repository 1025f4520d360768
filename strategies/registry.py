"""The strategies by the name that the configuration gives them."""

from __future__ import annotations

from fedsim.core.algorithm import Algorithm, Setup, StrategySettings, settings_of
from fedsim.core.errors import ConfigError
from fedsim.core.registry import load
from strategies.bulyan import Bulyan
from strategies.delta_fedavg import DeltaMean
from strategies.fedadagrad import FedAdagrad
from strategies.fedadam import FedAdam
from strategies.fedavg import FedAvg
from strategies.fedavgm import FedAvgM
from strategies.fedmedian import FedMedian
from strategies.fednova import FedNova
from strategies.fedprox import FedProx
from strategies.fedtrimmedavg import FedTrimmedAvg
from strategies.fedyogi import FedYogi
from strategies.krum import Krum
from strategies.multikrum import MultiKrum
from strategies.privacy import Private
from strategies.qfedavg import QFedAvg
from strategies.scaffold import Scaffold

STRATEGIES: dict[str, type[Algorithm]] = {
    algorithm.name: algorithm
    for algorithm in (
        *(DeltaMean, FedAvg, FedAvgM, FedAdagrad, FedAdam, FedYogi, FedProx, FedMedian),
        *(FedTrimmedAvg, Krum, MultiKrum, Bulyan, QFedAvg, FedNova, Scaffold),
    )
}
"""The first is the default."""


def make(settings: StrategySettings, setup: Setup) -> Algorithm:
    """Make one of them; `Private` around it where its settings ask for that."""
    return _private(STRATEGIES[settings.name](settings, setup))


def make_users(name: str, settings: StrategySettings, setup: Setup) -> Algorithm | None:
    """Load a class that the user has named; None where it is no `Algorithm`, but Flower's.

    Raises
    ------
    ConfigError
        When it cannot be loaded, or does not take its settings.
    """
    kind = load_class(name)
    if not issubclass(kind, Algorithm):
        return None
    if kind.fold is Algorithm.fold:
        raise ConfigError("strategy", name, "a class that defines fold")
    table = settings.model_dump(by_alias=True)
    return _private(kind(settings_of(kind.Settings, table), setup))


def _private(algorithm: Algorithm) -> Algorithm:
    return Private(algorithm) if algorithm.settings.dp else algorithm


def load_class(name: str) -> type:
    """Import a class that the user has named, as ``module:Class`` or ``FILE.py:Class``.

    Raises
    ------
    ConfigError
        When that fails, or it is no class.
    """
    try:
        kind = load(name)
    except Exception as error:
        why = f"a class that can be imported: {type(error).__name__}: {error}"
        raise ConfigError("strategy", name, why) from None
    if not isinstance(kind, type):
        raise ConfigError("strategy", name, "a class")
    return kind
