"""The strategies by the name that the configuration gives them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from fedsim.core.algorithm import Algorithm, Setup, StrategySettings, settings_of
from fedsim.core.errors import ConfigError
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
    module, _, attribute = name.rpartition(":")
    try:
        kind = getattr(_module(module), attribute)
    except Exception as error:
        why = f"a class that can be imported: {type(error).__name__}: {error}"
        raise ConfigError("strategy", name, why) from None
    if not isinstance(kind, type):
        raise ConfigError("strategy", name, "a class")
    return kind


def _module(name: str) -> Any:
    if not name.endswith(".py"):
        if (here := str(Path.cwd())) not in sys.path:
            # As it is for `python -m fedsim`, so for the command.
            sys.path.append(here)
        return importlib.import_module(name)
    path = Path(name).expanduser().resolve()
    known = f"fedsim_users.{path.stem}"
    spec = importlib.util.spec_from_file_location(known, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    # pydantic looks a class's annotations up by the name of its module.
    sys.modules[known] = module
    spec.loader.exec_module(module)
    return module
