"""One configuration: the same names in TOML, on the command line and in ``run.json``."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    model_validator,
)

from fedsim.core import registry
from fedsim.core.algorithm import (
    StrategySettings,
    default_strategy,
    known_strategies,
    strategy_table,
)
from fedsim.core.behavior import HONEST
from fedsim.core.capture import (
    Capture,
    captures_of,
    check_form,
    forms_help,
    is_own,
    parse_form,
)
from fedsim.core.errors import ConfigError, InputError, shorten
from fedsim.core.fields import (
    MOST,
    Count,
    Counts,
    Folder,
    Rate,
    Rates,
    StrictModel,
    allowed_instead,
    choices_of,
    finite,
    one_of,
    unknown_key,
)
from fedsim.core.inputs import MOST_JSON_BYTES, parse_json, read_text_bytes
from fedsim.core.partition import PartitionScheme
from fedsim.core.rng import Purpose, draw_participants, generator
from fedsim.core.task import keys_of_tasks, task_of
from fedsim.core.training import Autocast, OptimizerSettings, TrainingSettings
from fedsim.core.units import parse_bytes

Device = Literal["auto", "cpu", "cuda", "mps"]


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _rounds_listed(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(tuple(r) if isinstance(r, list) else r for r in value)
    return value


def _globs_listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else _listed(value)


def _table_of_ids(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    # "03" stays text, which is refused: as a number it would silently replace table 3.
    return {int(k) if _is_plain(k) else k: v for k, v in value.items()}


def _is_plain(key: Any) -> bool:
    return isinstance(key, str) and key.isdecimal() and key.isascii() and key == str(int(key))


def _bytes_written(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _parsed_by(parser: Any) -> AfterValidator:
    def check(value: str) -> str:
        parser(value)
        return value

    return AfterValidator(check)


LOCAL = "local"
UNSET = "none"
"""Text that unsets a key which a file or a run sets."""


def _ray_address(value: str) -> str:
    host, _, port = value.rpartition(":")
    if value not in (LOCAL, "auto") and not (
        re.fullmatch(r"[\w.-]+|\[[\da-fA-F:]+\]", host) and _is_port(port)
    ):
        raise ValueError(
            "'local', 'auto' or HOST:PORT of the head of a Ray cluster, like '10.0.0.1:6379'"
        )
    return value


def _without_secret(value: str) -> str:
    # It is written into the run, where no secret may be. A password may have slashes, and fsspec
    # chains URLs by "::".
    links = re.split(r"::(?=[A-Za-z][\w+.-]*(?:://|::))", value)
    if "?" in value or any(":" in link.partition("://")[2].rpartition("@")[0] for link in links):
        raise ValueError(
            "a URL or path without a password or '?': secrets belong in the environment"
        )
    return value


Mirror = Annotated[Folder, AfterValidator(_without_secret)]


def _is_port(text: str) -> bool:
    return _is_plain(text) and 1 <= int(text[:6]) <= 65_535


MOST_TOML_BYTES = 2 * 2**20
"""Of a configuration; Python reads TOML at a megabyte or two a second."""


class ClientSettings(StrictModel):
    """What a ``[client.<partition>]`` table may set for one client."""

    batch_size: Count | None = None
    local_epochs: Count | None = None
    local_steps: Count | None = None
    learning_rate: Rate | None = None


class BehaviorSettings(StrictModel):
    """A ``[behavior.NAME]`` table: whose behavior it is, and the settings that it takes."""

    model_config = ConfigDict(extra="allow")

    clients: Annotated[tuple[int, ...], Field(min_length=1), BeforeValidator(_listed)]

    @property
    def own(self) -> dict[str, Any]:
        """The settings, by the names of their parameters."""
        return {key.replace("-", "_"): value for key, value in (self.model_extra or {}).items()}


class RunConfig(StrictModel):
    """Everything that decides a run.

    Field names with ``-`` for ``_`` are the TOML keys, the command-line flags and the keys of
    ``run.json``. The defaults are those of ``configs/quickstart.toml``. A list in
    ``batch-size``, ``local-epochs``, ``local-steps`` or ``learning-rate`` is drawn from once
    per client; ``[client.<partition>]`` tables set them for single clients.

    Raises
    ------
    ConfigError
        From `from_mapping` and `from_json`: an unknown key, a wrong type or an impossible value.
    """

    dataset: str = Field("digits", description="data of the task")
    data_root: Folder | None = Field(None, description="folder of the data of the task")
    clients: Count = Field(10, description="number of clients, one partition each")
    clients_per_round: Count = Field(4, description="participants drawn for each round")
    rounds: Annotated[int, Field(ge=1, le=100_000)] = Field(5, description="rounds to run")
    partition: Annotated[str, _parsed_by(PartitionScheme.parse)] = Field(
        "dirichlet",
        description="dirichlet, iid, shards[:K] (K shards a client), or nodes (each its own data)",
    )
    alpha: Rate = Field(0.5, description="concentration of the Dirichlet split")
    min_samples: Count = Field(10, description="every client has at least this many samples")
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = Field(
        42, description="every draw of the run follows from it"
    )
    participants: Annotated[tuple[tuple[int, ...], ...] | None, BeforeValidator(_rounds_listed)] = (
        Field(None, description="a list of clients for each round, instead of drawing them")
    )
    model: str = Field("resnet18", description="model of the task")
    norm: str = Field("batch", description="normalisation layers of the model")
    task: str = Field(
        "vision",
        description="what clients learn: vision (images in classes), or your own as module:NAME",
    )
    optimizer: Literal["sgd", "adam"] = Field("sgd", description="local optimizer")
    learning_rate: Annotated[Rates, BeforeValidator(_listed)] = Field(
        0.01, description="local learning rate"
    )
    learning_rate_schedule: str = Field(
        "constant",
        description="rate by round and local step: constant, or your own as module:NAME",
    )
    client_evaluation: str = Field(
        "none",
        description="what clients measure of the global model on their own samples: none, metrics "
        "(those of the task), or your own as module:NAME",
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="SGD momentum")
    nesterov: bool = Field(False, description="Nesterov momentum")
    weight_decay: Annotated[float, Field(ge=0), AfterValidator(finite), Field(le=1e30)] = Field(
        5e-4, description="L2 penalty of the local optimizer"
    )
    batch_size: Annotated[Counts, BeforeValidator(_listed)] = Field(
        32, description="samples in a local step"
    )
    local_epochs: Annotated[Counts, BeforeValidator(_listed)] = Field(
        1, description="passes over a client's samples in a round"
    )
    local_steps: Annotated[Counts | None, BeforeValidator(_listed)] = Field(
        None, description="exact number of local steps in a round, instead of epochs"
    )
    client: Annotated[dict[int, ClientSettings], BeforeValidator(_table_of_ids)] = Field(
        default_factory=dict, description="tables [client.<partition>] for single clients"
    )
    behavior: dict[str, BehaviorSettings] = Field(
        default_factory=dict,
        description="tables [behavior.NAME] with clients = [..] that behave so: honest, or your "
        "own as module:NAME",
    )
    capture: Annotated[str, _parsed_by(check_form)] = Field(
        "first:1",
        description=f"steps whose gradients are kept: {forms_help()}; or a class of your own as "
        "module:NAME",
    )
    capture_layers: Annotated[
        tuple[str, ...], Field(min_length=1), BeforeValidator(_globs_listed)
    ] = Field(("*",), description="globs of parameter names to capture, like 'fc.*'")
    capture_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="stored numbers: float32 (exact), bfloat16 or float16"
    )
    capture_encoding: Literal["support", "dense"] = Field(
        "support",
        description="support (leave out kernel taps that never get a gradient: lossless) or dense",
    )
    capture_budget: Annotated[
        Annotated[str, _parsed_by(parse_bytes)] | None, BeforeValidator(_bytes_written)
    ] = Field(
        None,
        description="most bytes of gradients that a run may keep, like '20 GB' (default: what the "
        "disk has room for)",
    )
    gradient_statistics: bool = Field(
        True, description="measure the gradient of every local step, kept or not"
    )
    strategy: Annotated[SerializeAsAny[StrategySettings], BeforeValidator(strategy_table)] = Field(
        default_factory=default_strategy,
        description="aggregation: {strategies}, or a class as package.module:Class or "
        "FILE.py:Class; or a table [strategy] with its name and settings",
    )
    workers: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None, description="clients that train at the same time (default: what fits the machine)"
    )
    ray_address: Annotated[str, AfterValidator(_ray_address)] = Field(
        LOCAL,
        description="local (this machine), or HOST:PORT of a Ray cluster's head, or auto, to train "
        "on its nodes",
    )
    client_cpus: Count = Field(1, description="CPU cores (and torch threads) of a worker")
    client_gpus: Annotated[float, Field(ge=0), AfterValidator(finite)] | None = Field(
        None, description="share of a GPU for a worker, like 0.5 (default: all, shared equally)"
    )
    autocast: Autocast = Field(
        "none", description="mixed precision of local training: none, bfloat16 or float16"
    )
    deterministic: bool = Field(
        False,
        description="only algorithms that repeat to the bit, on GPUs too; refuses those without",
    )
    compile: bool = Field(False, description="compile the model (torch.compile) in each worker")
    device: Device = Field("auto", description="where training and evaluation run")
    evaluate_every: Count = Field(
        1, description="evaluate after every N rounds (and after the last)"
    )
    max_failures: Annotated[int, Field(ge=0)] = Field(
        0, description="clients of one round that may fail without stopping the run"
    )
    client_timeout: Rate | None = Field(
        None, description="seconds that a client may take in a round (default: no limit)"
    )
    node_timeout: Rate = Field(
        60.0, description="seconds to wait for the Flower nodes that hold the clients"
    )
    allow_divergence: bool = Field(
        False, description="go on when the model is no longer finite, and record that"
    )
    output: Folder | None = Field(
        None, description="run directory (default: a dated one under runs/)"
    )
    mirror: Mirror | None = Field(
        None,
        description="URL or path of a copy that is kept up to date round by round, like "
        "s3://bucket/run",
    )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Check the values of a configuration and fill in the defaults.

        Parameters
        ----------
        values : mapping of str to Any
            Keys as in TOML, values as a TOML or JSON parser gives them.

        Raises
        ------
        ConfigError
            Naming the first field that cannot be used, its value and what is allowed.
        """
        if isinstance(values.get("clients"), Mapping):
            raise ConfigError(
                "clients",
                values["clients"],
                "a number of clients; settings of single clients go into [client.<partition>]",
            )
        try:
            return cls.model_validate(dict(values), by_alias=True, by_name=False)
        except ValidationError as error:
            raise _as_config_error(error) from None

    def to_mapping(self) -> dict[str, Any]:
        """Give the whole configuration as JSON values under the names of the TOML keys."""
        return self.model_dump(mode="json", by_alias=True)

    def to_json(self) -> str:
        """Give the whole configuration as one line of JSON; `from_json` reads it back."""
        return json.dumps(self.to_mapping(), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote."""
        return cls.from_mapping(json.loads(text))

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.participants is None:
            if self.clients_per_round > self.clients:
                raise ConfigError(
                    "clients-per-round",
                    self.clients_per_round,
                    f"1 to the number of clients, {self.clients}",
                )
        else:
            self._check_participants(self.participants)
        for partition in self.client:
            if partition not in range(self.clients):
                raise ConfigError(
                    f"client.{partition}",
                    self.client[partition].model_dump(by_alias=True, exclude_none=True),
                    f"a table for one of the clients 0 to {self.clients - 1}",
                )
        if self.nesterov and (self.momentum == 0 or self.optimizer != "sgd"):
            raise ConfigError(
                "nesterov", True, "true only with optimizer = 'sgd' and a momentum above 0"
            )
        if self.client_gpus and self.client_gpus > 1 and self.client_gpus % 1:
            raise ConfigError(
                "client-gpus", self.client_gpus, "a share up to 1 or a whole number of GPUs"
            )
        if not registry.is_code(self.task):
            task_of(self)
        self._check_behavior()
        self._check_strategy()
        return self

    def _check_behavior(self) -> None:
        named = [
            ("learning-rate-schedule", "schedules", self.learning_rate_schedule),
            ("client-evaluation", "evaluations", self.client_evaluation),
        ]
        named += [(f"behavior.{name}", "behaviors", name) for name in self.behavior]
        for field, room, name in named:
            # Reading a configuration does not run its code.
            if not registry.is_code(name):
                registry.factory(field, room, name)
        of: dict[int, str] = {}
        for name, table in self.behavior.items():
            for client in table.clients:
                field = f"behavior.{name}.clients"
                if client not in range(self.clients):
                    raise ConfigError(field, client, f"clients 0 to {self.clients - 1}")
                if client in of:
                    raise ConfigError(field, client, f"one behavior a client; it has {of[client]}")
                of[client] = name

    def _check_strategy(self) -> None:
        strategy = self.strategy
        numbers = {self.num_participants(r) for r in range(1, self.rounds + 1)}
        for field in ("noise-multiplier", "clipping-norm"):
            value = getattr(strategy, field.replace("-", "_"))
            if (value is None) != (strategy.dp is None):
                raise ConfigError(f"strategy.{field}", value, "a number together with strategy.dp")
        if strategy.dp is not None and len(numbers) > 1:
            raise ConfigError(
                "strategy.dp", strategy.dp, "none where rounds differ in their participants"
            )
        if strategy.dp is not None and strategy.dp.endswith("adaptive"):
            # Part of the privacy is spent on the count of clipped updates.
            most = min(numbers) / 10
            if strategy.noise_multiplier and strategy.noise_multiplier >= most:
                raise ConfigError(
                    "strategy.noise-multiplier",
                    strategy.noise_multiplier,
                    f"a value below {most:g}, a tenth of the participants, where clipping adapts",
                )
        strategy.check_run(self)

    def _check_participants(self, rounds: tuple[tuple[int, ...], ...]) -> None:
        if len(rounds) < self.rounds:
            raise ConfigError(
                "participants", rounds, f"a list of clients for each of the {self.rounds} rounds"
            )
        for number, clients in enumerate(rounds, start=1):
            if not clients or len(set(clients)) != len(clients):
                raise ConfigError(
                    f"participants of round {number}",
                    list(clients),
                    "different clients, one or more",
                )
            if any(c not in range(self.clients) for c in clients):
                raise ConfigError(
                    f"participants of round {number}",
                    list(clients),
                    f"clients 0 to {self.clients - 1}",
                )

    def check_samples(self, available: int, least: int = 1) -> None:
        """Refuse more clients than there are training samples for.

        Parameters
        ----------
        available : int
            Training samples.
        least : int
            Samples without which a client cannot train.

        Raises
        ------
        ConfigError
            Naming the key and how many would do.
        """
        if self.own_data:
            return
        if self.clients * least > available:
            raise ConfigError(
                "clients",
                self.clients,
                f"at most {available // least}: {self.dataset} has {available} training samples",
            )
        if self.clients * self.min_samples > available:
            raise ConfigError(
                "min-samples",
                self.min_samples,
                f"at most {available // self.clients}: {self.dataset} has {available} training "
                f"samples for {self.clients} clients",
            )
        shards = PartitionScheme.parse(self.partition).shards_per_client
        if self.clients * shards > available:
            raise ConfigError(
                "partition",
                self.partition,
                f"at most {available // self.clients} shards a client with {available} samples",
            )

    def behavior_of(self, client: int) -> tuple[str, dict[str, Any]]:
        """Give the name and the settings of a client's behavior."""
        for name, table in self.behavior.items():
            if client in table.clients:
                return name, table.own
        return HONEST, {}

    @property
    def code(self) -> list[str]:
        """The user's own code that clients run, as ``module:NAME``."""
        named = (
            self.task,
            self.learning_rate_schedule,
            self.client_evaluation,
            *self.behavior,
        )
        own = [self.capture] if is_own(self.capture) else []
        return [*(name for name in named if registry.is_code(name)), *own]

    @property
    def all_code(self) -> list[str]:
        """All code of the user's own: what clients run, and the strategy."""
        return [*self.code, *([self.strategy.name] if self.strategy.is_users else [])]

    @property
    def arch(self) -> str:
        """The model, or the user's own task that has one."""
        return self.task if registry.is_code(self.task) else self.model

    @property
    def described_model(self) -> str:
        """The model as a person would say it."""
        return self.arch if registry.is_code(self.task) else f"{self.model}, {self.norm} norm"

    @property
    def own_data(self) -> bool:
        """Whether each node trains on data of its own, and not on a part of the dataset."""
        return self.partition == "nodes"

    @property
    def cluster(self) -> str | None:
        """Address of the Ray cluster to train on; None for this machine."""
        return None if self.ray_address == LOCAL else self.ray_address

    @property
    def budget(self) -> int | None:
        """Most bytes that the run may write; None where the disk alone decides."""
        return None if self.capture_budget is None else parse_bytes(self.capture_budget)

    @property
    def clients_clip(self) -> bool:
        """Whether clients clip what they send: a delta does not follow from their steps alone."""
        return (self.strategy.dp or "").startswith("client-side")

    @property
    def captures(self) -> tuple[Capture, ...]:
        """What is captured, in the order in which captures see a step."""
        return captures_of(self)

    @property
    def captures_at_hand(self) -> tuple[Capture, ...]:
        """The same without a class of the user's own that this process may not load."""
        return captures_of(self, only_at_hand=True)

    @property
    def policy(self) -> Capture:
        """The capture that ``capture`` names."""
        return parse_form(self.capture)[0].of(self)

    def participants_of(self, round_number: int) -> list[int]:
        """Give the partitions of a round (from 1): listed, or drawn from the seed."""
        if self.participants is not None:
            return list(self.participants[round_number - 1])
        return draw_participants(self.seed, round_number, self.clients, self.clients_per_round)

    def num_participants(self, round_number: int) -> int:
        """Count the clients of a round (from 1) without drawing them."""
        if self.participants is not None:
            return len(self.participants[round_number - 1])
        return self.clients_per_round

    def training_of(self, partition: int) -> TrainingSettings:
        """Give the local training settings of one client, lists drawn and tables applied."""
        table = self.client.get(partition, ClientSettings())
        draw = generator(self.seed, Purpose.CLIENT_SETTINGS, partition=partition)
        batch_size = _one_of(self.batch_size, draw)
        local_epochs = _one_of(self.local_epochs, draw)
        local_steps = _one_of(self.local_steps, draw)
        learning_rate = _one_of(self.learning_rate, draw)
        return TrainingSettings(
            batch_size=table.batch_size or batch_size,
            local_epochs=table.local_epochs or local_epochs,
            # A table that asks for epochs means epochs, even where the run sets steps.
            local_steps=table.local_steps or (None if table.local_epochs else local_steps),
            merge_single=task_of(self).merge_single,
            optimizer=OptimizerSettings(
                name=self.optimizer,
                learning_rate=table.learning_rate or learning_rate,
                momentum=self.momentum,
                nesterov=self.nesterov,
                weight_decay=self.weight_decay,
            ),
        )


def _one_of(value: Any, draw: np.random.Generator) -> Any:
    # One draw for each setting, list or not: making one a list leaves the others' draws alone.
    position = draw.random()
    return value[int(position * len(value))] if isinstance(value, tuple) else value


_ALLOWED = {
    "capture-budget": "a number of bytes above 0 with a unit, like '20 GB' or '1.5 GiB'",
    "batch-size": f"a whole number from 1 to {MOST:,}, or a list of them",
    "local-epochs": f"a whole number from 1 to {MOST:,}, or a list of them",
    "local-steps": f"a whole number from 1 to {MOST:,}, or a list of them",
    "learning-rate": "a finite number above 0, or a list of them",
    "participants": "a list of client numbers for each round",
    "client": "tables [client.<partition>] with whole numbers for partitions",
    "behavior": "tables [behavior.NAME] with clients = [..] and the settings that it takes",
}


def _as_config_error(error: ValidationError) -> ConfigError:
    """Turn pydantic's report into one sentence about the first field of it."""
    problems = error.errors()
    key = str(problems[0]["loc"][0])
    # A value that may be one thing or a list has a report for either; the deepest is about what
    # was meant, and of two as deep the last, for pydantic tries lists last.
    of_key = [p for p in problems if p["loc"][0] == key]
    problem = max(reversed(of_key), key=lambda p: len(p["loc"]))
    location, given, kind = problem["loc"], problem["input"], problem["type"]
    in_table = key == "client" and len(location) > 1 and "[key]" not in location
    field = ".".join(str(part) for part in location) if in_table else key
    if kind == "extra_forbidden":
        return unknown_key(field, given, ClientSettings if in_table else RunConfig)
    if key in _ALLOWED and not in_table and kind != "too_short":
        return ConfigError(key, given, _ALLOWED[key])
    is_no_text = kind in ("string_type", "string_unicode")
    if is_no_text and (of_task := keys_of_tasks().get(field)) and of_task.choices:
        return ConfigError(key, given, one_of(of_task.choices))
    annotation: Any = None if in_table else RunConfig.model_fields[key.replace("-", "_")].annotation
    return ConfigError(field, given, allowed_instead(problem, annotation))


def read_config_file(path: Path, given: Collection[str] = ()) -> dict[str, Any]:
    """Read the keys of a TOML file, or of the configuration stored in a ``run.json``.

    Parameters
    ----------
    path : Path
        A ``.toml`` file, or a ``run.json`` (whose ``output`` and ``mirror`` are left out: they
        exist already; and ``ray-address``, which affects no result).
    given : collection of str
        Keys that the user sets in addition to the file.

    Raises
    ------
    InputError
        When the file is missing or cannot be parsed, or a ``run.json`` names a class of a
        strategy that the user does not name.
    """
    try:
        of_run = path.suffix == ".json"
        most = MOST_JSON_BYTES if of_run else MOST_TOML_BYTES
        content = read_text_bytes(path, most=most, follow=not of_run)
        text = content.decode()
    except UnicodeDecodeError:
        raise InputError(f"config = {str(path)!r} cannot be read: it is not UTF-8 text") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"config = {str(path)!r} cannot be read: {reason}") from None
    try:
        if path.suffix == ".json":
            stored: dict[str, Any] = parse_json(content)["config"]
            places = ("output", "mirror", "ray-address")
            values = {k: v for k, v in stored.items() if k not in places and v is not None}
            _check_names_no_code(values, given, path)
            if os.path.lexists(path.with_name("checksums.jsonl")):
                check_outside(path.parent)
            return values
        return _parse_toml(text)
    except ValueError as error:
        hint = ""
        if "[clients." in text:
            hint = "; settings of single clients go into tables named [client.<partition>]"
        raise InputError(f"config = {str(path)!r} cannot be parsed: {error}{hint}") from None
    except (KeyError, TypeError, AttributeError):
        raise InputError(
            f"config = {str(path)!r} is not a configuration; expected a TOML file or the "
            "run.json of a run"
        ) from None


def take_recorded(
    recorded: Mapping[str, Any], given: Mapping[str, Any], run: Path
) -> dict[str, Any]:
    """Take the configuration of a run that may be a stranger's, and what the user gives with it.

    Parameters
    ----------
    recorded : mapping of str to Any
        The configuration that the run was recorded with. Its ``ray-address`` is left out: joining a
        cluster is to trust it.
    given : mapping of str to Any
        What the user sets, which comes before it.
    run : Path
        The run directory.

    Raises
    ------
    InputError
        When the run names a class of a strategy or a mirror that the user does not name, or the
        current folder lies in the run directory.
    """
    check_outside(run)
    _check_names_no_code(recorded, given, run)
    if (mirror := recorded.get("mirror")) and "mirror" not in given:
        raise InputError(
            f"mirror = {shorten(mirror)} of {run} is a destination that a run alone may not "
            f"choose; `--mirror {shlex.quote(mirror)}` goes on copying there, `--mirror {UNSET}` "
            "does not"
        )
    kept = {k: v for k, v in recorded.items() if v is not None and k != "ray-address"}
    return {**kept, **given}


def flags_to_resume(config: RunConfig) -> str:
    """Give what a user must say again to go on with a run, as text for a shell."""
    values = config.to_mapping()
    asked = {
        "strategy": config.strategy.is_users,
        "task": registry.is_code(config.task),
        "learning-rate-schedule": registry.is_code(config.learning_rate_schedule),
        "client-evaluation": registry.is_code(config.client_evaluation),
        "behavior": any(map(registry.is_code, config.behavior)),
        "capture": is_own(config.capture),
        "mirror": config.mirror is not None,
        "ray-address": config.cluster is not None,
    }
    flags = (f" --{key} {shlex.quote(flag_text(values[key]))}" for key in asked if asked[key])
    return "".join(flags)


def check_outside(run: Path) -> None:
    """Refuse a current folder inside of a run directory: Python takes code from where it starts.

    Raises
    ------
    InputError
        Naming the run directory.
    """
    if Path.cwd().is_relative_to(run.resolve()):
        raise InputError(
            f"the current folder lies in the run directory {run.resolve()}, from which no code "
            "may be loaded; run it from another folder"
        )


def _check_names_no_code(values: Mapping[str, Any], given: Collection[str], run: Path) -> None:
    for key in ("task", "learning-rate-schedule", "client-evaluation", "behavior", "capture"):
        is_code = is_own if key == "capture" else registry.is_code
        names = [values[key]] if isinstance(values.get(key), str) else [*values.get(key, ())]
        if key not in given and any(isinstance(n, str) and is_code(n) for n in names):
            raise InputError(
                f"{key} = {shorten(values[key])} of {run} is code, which is never taken from a "
                f"run; `--{key} {shlex.quote(flag_text(values[key]))}` says that your own of that "
                "name is meant"
            )
    strategy = values.get("strategy")
    name = strategy.get("name") if isinstance(strategy, Mapping) else strategy
    if "strategy" in given or not isinstance(name, str) or ":" not in name:
        return
    short = not isinstance(strategy, Mapping) or len(strategy) == 1
    flag = shlex.quote(flag_text(name if short else strategy))
    raise InputError(
        f"strategy = {shorten(name)} of {run} is code, which is never taken from a run; "
        f"`--strategy {flag}` says that you mean your own class of that name"
    )


def _parse_toml(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None


def describe(field: str) -> str:
    """Say what a key of the configuration is, in a phrase."""
    if of_task := keys_of_tasks().get(field.replace("_", "-")):
        return of_task.help
    text = RunConfig.model_fields[field].description or ""
    # The strategies are above this room, and are asked only when their names are.
    return text.format(strategies=", ".join(known_strategies())) if field == "strategy" else text


def choices_for(field: str) -> Sequence[str]:
    """List what a key of the configuration may be; nothing where that is no list."""
    if of_task := keys_of_tasks().get(field.replace("_", "-")):
        return of_task.choices
    return choices_of(RunConfig.model_fields[field].annotation)


def flag_text(value: Any) -> str:
    """Write a value as a flag gives it: `parse_text` reads it back."""
    if value is None:
        return UNSET
    return value if isinstance(value, str) else _toml(value)


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        pairs = (f"{_toml(str(key))} = {_toml(item)}" for key, item in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    # JSON writes texts, numbers and truth values as TOML reads them.
    return json.dumps(value, ensure_ascii=False)


def parse_text(field: str, text: str) -> Any:
    """Read the value of one key from text, as a flag or a flat run-config gives it.

    Text fields keep the text; every other field reads it as a TOML value (``16``, ``0.1``,
    ``true``, ``[16, 32]``) and falls back to the text, which the checks then refuse by name.
    ``none`` unsets a key that is unset by default.

    Raises
    ------
    ConfigError
        When `field` is not a key.
    """
    if field.replace("-", "_") not in RunConfig.model_fields or "_" in field:
        raise unknown_key(field, text, RunConfig)
    known = RunConfig.model_fields[field.replace("-", "_")]
    if text == UNSET and known.default is None:
        return None
    annotation = known.annotation
    if annotation in (str, str | None, Folder | None, Mirror | None) or "\n" in text:
        return text
    # Not TOMLDecodeError alone: Python refuses numbers of thousands of digits.
    with contextlib.suppress(ValueError):
        return _parse_toml(f"value = {text}")["value"]
    # TOML does not read ".5"; people write it.
    with contextlib.suppress(ValueError):
        if math.isfinite(number := float(text)):
            return number
    return text
