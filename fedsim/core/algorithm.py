"""What a strategy is, without Flower: its settings, its arithmetic, what it keeps, and its proof.

Each strategy is one file of the package ``strategies``, above this room; `known_strategies` looks
them up when they are asked for. The same `Algorithm` runs in a round and in ``fedsim verify``.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from fedsim.core.aggregation import Array, State
from fedsim.core.errors import ConfigError
from fedsim.core.fields import Rate, StrictModel, allowed_instead, finite, unknown_key

if TYPE_CHECKING:
    from fedsim.core.config import RunConfig

NonNegative = Annotated[float, Field(ge=0), AfterValidator(finite)]
Privacy = Literal[
    "server-side-fixed", "server-side-adaptive", "client-side-fixed", "client-side-adaptive"
]


class StrategySettings(StrictModel):
    """What the ``[strategy]`` table may set for every strategy.

    The name alone, ``strategy = "NAME"``, is short for a table with it.

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

    @model_serializer(mode="wrap")
    def _without_blanks(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value is not None}

    @property
    def own(self) -> dict[str, Any]:
        """What only this strategy has, as keywords."""
        settings = self.model_dump(exclude=set(StrategySettings.model_fields))
        return {key.replace("-", "_"): value for key, value in settings.items()}

    @property
    def is_users(self) -> bool:
        """Whether the strategy is a class of the user's, named as code."""
        return ":" in self.name

    def check_run(self, config: RunConfig) -> None:
        """Refuse a run that the strategy cannot work in.

        Raises
        ------
        ConfigError
            Naming the key.
        """


class UsersSettings(StrategySettings):
    """Settings of a class of the user's, which only that class knows."""

    model_config = ConfigDict(extra="allow")


class ArraySpec(NamedTuple):
    """Shape and dtype of an array that a strategy keeps."""

    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What an algorithm knows of its run.

    Parameters
    ----------
    shapes : mapping of str to tuple of int
        Of the trainable parameters, all float32.
    clients : int
        How many there are, taking part or not.
    participants : int
        Of the first round.
    learning_rate : float or tuple of float
        Of the clients.
    momentum, nesterov : float, bool
        Of the clients' SGD.
    seed : int
        The run's.
    """

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    clients: int = 1
    participants: int = 1
    learning_rate: float | tuple[float, ...] = 0.01
    momentum: float = 0.0
    nesterov: bool = False
    seed: int = 0

    @classmethod
    def of(cls, config: RunConfig, shapes: Mapping[str, tuple[int, ...]]) -> Setup:
        """Take it from a configuration."""
        return cls(
            shapes=shapes,
            clients=config.clients,
            participants=config.num_participants(1),
            learning_rate=config.learning_rate,
            momentum=config.momentum,
            nesterov=config.nesterov,
            seed=config.seed,
        )


@dataclass(frozen=True)
class Range:
    """All that an array may be: from one to another in each entry.

    Parameters
    ----------
    low, high : ndarray
        Of one shape and dtype.
    """

    low: NDArray[Any]
    high: NDArray[Any]

    @classmethod
    def around(cls, arrays: list[NDArray[Any]]) -> Range:
        """Give the smallest range that holds some arrays of one shape and dtype."""
        low, high = np.minimum.reduce(arrays), np.maximum.reduce(arrays)
        return cls(np.asarray(low), np.asarray(high))

    def holds(self, array: NDArray[Any]) -> bool:
        """Say whether an array is in the range."""
        return bool(((self.low <= array) & (array <= self.high)).all())

    @property
    def is_one(self) -> bool:
        """Whether there is only one such array, but for the signs of zeros."""
        return bool((self.low == self.high).all())


class NotRecordedError(Exception):
    """A proof asks for what a run does not record."""


class Update:
    """What one client returned, while it is being folded.

    Parameters
    ----------
    client : int
        Who.
    samples : int
        Distinct training samples, 1 or more.
    delta : dict of str to ndarray of float32
        Local minus global parameters; without buffers.
    work : callable
        Gives `work`.
    kept : callable
        Gives `kept`.
    keep : callable
        Takes what `keep` is given.
    sent : dict of str to ndarray of float32, optional
        The local parameters, where they are available.
    """

    def __init__(
        self,
        client: int,
        samples: int,
        delta: State,
        *,
        work: Callable[[], float],
        kept: Callable[[], State],
        keep: Callable[[State], None],
        sent: State | None = None,
    ) -> None:
        self.client = client
        self.samples = samples
        self.delta = delta
        self._work = work
        self._kept = kept
        self._keep = keep
        self._sent = sent

    @property
    def sent(self) -> State:
        """The local parameters.

        Raises
        ------
        NotRecordedError
            In a proof: a run records deltas, which tell what was sent up to rounding.
        """
        if self._sent is None:
            raise NotRecordedError("what clients sent is on record as deltas only")
        return self._sent

    @property
    def work(self) -> float:
        """How far the client's SGD moves when every gradient is 1: `local_work`."""
        return self._work()

    @property
    def kept(self) -> State:
        """What `keep` was given for this client last; empty before."""
        return self._kept()

    def keep(self, arrays: State) -> None:
        """Keep arrays of this client, those that `Algorithm.keeps_of_client` names."""
        self._keep(arrays)

    def forget(self) -> None:
        """Drop the arrays, though a caller may still hold on to the update."""
        self.delta, self._sent = {}, None


class Round(Protocol):
    """A round that an algorithm folds, live or from a recording."""

    @property
    def number(self) -> int:
        """From 1."""

    @property
    def before(self) -> State:
        """The parameters before the round; without buffers."""

    @property
    def kept(self) -> State:
        """What the algorithm kept after the round before; `Algorithm.begin` before the first."""

    def updates(self) -> Iterator[Update]:
        """Yield the updates in the fixed order, once; each is dropped when the next is asked for.

        At least one.
        """

    def mean(self) -> State:
        """Give the sample-weighted mean of the deltas of parameters, in float64 rounded once.

        Updates that were not asked for before are folded into it and gone.
        """


class RecordedRound(Round, Protocol):
    """A round of a recording, of which a proof asks more."""

    @property
    def kept_after(self) -> State:
        """What is on record as kept after the round."""

    @property
    def has_diverged(self) -> bool:
        """Whether a delta is not finite in a run that may go on with it."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a round.

    Parameters
    ----------
    parameters : mapping of str to ndarray
        All parameters after the round, by name; of a wider dtype they are rounded once.
    kept : mapping of str to ndarray
        What is kept for the next round, as `Algorithm.keeps` names it.
    """

    parameters: State
    kept: State = field(default_factory=dict)


@dataclass(frozen=True)
class Moves:
    """A parameter must be this after the round: bit for bit, or within a range."""

    name: str
    to: Array | Range


@dataclass(frozen=True)
class Keeps:
    """An array must be kept after the round: bit for bit, or within a range."""

    key: str
    array: Array | Range


@dataclass(frozen=True)
class Unproven:
    """What an algorithm cannot prove of a round, and why.

    Parameters
    ----------
    about : {"parameters", "kept"}
    reason : str
        A sentence without a full stop; empty for the usual one.
    """

    about: Literal["parameters", "kept"]
    reason: str = ""


Claim = Moves | Keeps | Unproven


class Algorithm:
    """A strategy: a function of the parameters, of the updates, and of the arrays that it keeps.

    Subclasses define `fold`, and what else differs from a strategy that keeps nothing.

    Parameters
    ----------
    settings : StrategySettings
        Of the type `Settings`.
    setup : Setup
        The run.
    """

    name: ClassVar[str]
    """What the configuration calls it; a class of the user's needs none."""
    Settings: ClassVar[type[StrategySettings]] = StrategySettings
    step: ClassVar[str] = ""
    """What is added to the parameters, for a sentence of ``verify``."""

    def __init__(self, settings: Any, setup: Setup) -> None:
        self.settings = settings
        self.setup = setup

    # In a round

    def begin(self) -> State:
        """Give what is kept before the first round; not written anywhere."""
        return {}

    def fold(self, this_round: Round) -> Outcome:
        """Move the parameters by the updates of a round."""
        # Of some that ship, Flower's own class does it; one of the user's is refused without it.
        raise NotImplementedError

    @property
    def proximal_mu(self) -> float:
        """Factor of the proximal term that clients minimise with their loss; 0 for none."""
        return 0.0

    def correction(self, kept: State, of_client: State) -> State | None:
        """Give what a client adds to every gradient of its next round.

        Parameters
        ----------
        kept, of_client : mapping of str to ndarray
            What is kept now, of the server and of that client; the latter is empty before its
            first round.

        Returns
        -------
        mapping of str to ndarray of float32, or None
            By the name of the parameter; None for nothing.
        """
        return None

    # What is kept

    def keeps(self) -> dict[str, ArraySpec]:
        """Name the arrays that are kept after every round."""
        return {}

    def keeps_of_client(self) -> dict[str, ArraySpec]:
        """Name the arrays that are kept of a client after each of its rounds."""
        return {}

    def for_parameters(self, *kinds: str) -> dict[str, ArraySpec]:
        """Name ``KIND/PARAMETER`` for each parameter, float32 and of its shape."""
        shapes = self.setup.shapes.items()
        return {f"{kind}/{name}": ArraySpec(shape) for kind in kinds for name, shape in shapes}

    @property
    def corrects(self) -> bool:
        """Whether clients are sent a `correction`."""
        return type(self).correction is not Algorithm.correction

    # In a proof

    def check(self, this_round: RecordedRound) -> Iterator[Claim]:
        """Say what must be on record after a round, by what was before it and by the deltas.

        By default the round is folded again, and all must be equal to the last bit. What no
        claim is made of is named as not proven.
        """
        try:
            outcome = self.fold(this_round)
        except NotRecordedError as error:
            yield Unproven("parameters", f"parameters: {error}")
            yield Unproven("kept", f"what the strategy keeps: {error}")
            return
        for name, start in this_round.before.items():
            yield Moves(name, np.asarray(outcome.parameters[name], dtype=start.dtype))
        for key, array in outcome.kept.items():
            yield Keeps(key, array)


# No import statement: the package is above this room, and may be absent from a program that only
# looks at files.
def _registry() -> Any:
    return importlib.import_module("strategies.registry")


def known_strategies() -> Mapping[str, type[Algorithm]]:
    """Give the strategies by the name that the configuration gives them, the default one first."""
    known: Mapping[str, type[Algorithm]] = _registry().STRATEGIES
    return known


def default_strategy() -> StrategySettings:
    """Give the settings of the default strategy."""
    name, algorithm = next(iter(known_strategies().items()))
    return algorithm.Settings(name=name)


def make_algorithm(settings: StrategySettings, setup: Setup) -> Algorithm | None:
    """Make the algorithm of some settings, with differential privacy where they ask for it.

    Returns
    -------
    Algorithm or None
        None for a class of the user's, which is code that only the user may name.
    """
    if settings.is_users:
        return None
    made: Algorithm = _registry().make(settings, setup)
    return made


def make_users(name: str, settings: StrategySettings, setup: Setup) -> Algorithm | None:
    """Load a class that the user has named, and make the algorithm if it is one.

    Parameters
    ----------
    name : str
        ``module:Class`` or ``FILE.py:Class``, from the user, never from a run.
    settings, setup : StrategySettings, Setup
        As for `make_algorithm`.

    Raises
    ------
    ConfigError
        When it cannot be loaded, or does not take its settings.
    """
    made: Algorithm | None = _registry().make_users(name, settings, setup)
    return made


_CLASS = re.compile(r"([A-Za-z_][\w.]*|[\w ./~+-]+\.py):[A-Za-z_]\w*")


def settings_type(name: Any) -> type[StrategySettings]:
    """Give the type of the settings of a strategy.

    Raises
    ------
    ConfigError
        When no strategy has that name.
    """
    known = known_strategies()
    if isinstance(name, str) and name in known:
        return known[name].Settings
    if isinstance(name, str) and _CLASS.fullmatch(name):
        return UsersSettings
    names = ", ".join(repr(known) for known in known)
    raise ConfigError("strategy", name, f"one of {names}, or a class as 'package.module:Class'")


def strategy_table(value: Any) -> Any:
    """Read ``strategy`` as the configuration has it: a name, or a table with one."""
    if isinstance(value, StrategySettings):
        return value
    table = dict(value) if isinstance(value, Mapping) else {"name": value}
    if "name" not in table:
        example = next(iter(known_strategies()))
        raise ConfigError(
            "strategy", table, f"a name, or a table with one, like name = '{example}'"
        )
    return settings_of(settings_type(table["name"]), table)


def settings_of(known: type[StrategySettings], table: Mapping[str, Any]) -> StrategySettings:
    """Check a ``[strategy]`` table.

    Raises
    ------
    ConfigError
        Naming the key.
    """
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
