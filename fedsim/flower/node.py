"""What a host says of itself: its partition, its data, where it may record and whether."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from fedsim.core.errors import ConfigError
from fedsim.core.fields import MOST, Count, StrictModel, allowed_instead, nameable, unknown_key

_STAND_INS = {"recordings": "FEDSIM_RECORDINGS", "capture": "FEDSIM_CAPTURE"}
"""Environment variables of the process, for keys that the configuration is silent on."""


def _absolute(value: str) -> str:
    if not Path(nameable(value)).is_absolute():
        raise ValueError("an absolute path")
    return value


AbsoluteFolder = Annotated[str, AfterValidator(_absolute)]


class NodeSettings(StrictModel):
    """The configuration of a Flower node (``flower-supernode --node-config``).

    Flower's simulation gives every node its ``partition-id`` and ``num-partitions``; the
    program that starts the processes of a simulation sets where they may record by environment
    variables.
    A server has no say in any of it.

    Raises
    ------
    ConfigError
        From `of`: an unknown key, a wrong type or an impossible value.
    """

    partition_id: Annotated[int, Field(ge=0, lt=MOST)] = Field(
        description="the partition that this node holds, from 0"
    )
    num_partitions: Count | None = Field(
        None, description="partitions of the federation; partition-id is below it"
    )
    data_root: AbsoluteFolder | None = Field(
        None, description="where this host keeps the archives of the shared dataset"
    )
    data: AbsoluteFolder | None = Field(None, description="the node's own data")
    recordings: AbsoluteFolder | None = Field(
        None, description="folder under which this node records; without it nothing is written"
    )
    capture: bool = Field(
        False, description="whether gradients of this node may be captured, into recordings"
    )

    @classmethod
    def of(cls, node_config: Mapping[str, Any]) -> Self:
        """Check what a node is configured with, filled up from this process's environment."""
        given = dict(node_config)
        for key, variable in _STAND_INS.items():
            if key not in given and (text := os.environ.get(variable)):
                given[key] = _read(variable, text) if key == "capture" else text
        try:
            return cls.model_validate(given, by_alias=True, by_name=False)
        except ValidationError as error:
            raise _as_config_error(error) from None

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.num_partitions is not None and self.partition_id >= self.num_partitions:
            raise _error("partition-id", self.partition_id, f"0 to {self.num_partitions - 1}")
        if self.capture and self.recordings is None:
            raise _error("capture", True, "false, or true together with recordings")
        return self


def _read(variable: str, text: str) -> bool:
    if text not in ("true", "false"):
        raise ConfigError(variable, text, "true or false")
    return text == "true"


def _error(key: str, value: Any, allowed: str) -> ConfigError:
    return ConfigError(f"node-config {key}", value, allowed)


def _as_config_error(error: ValidationError) -> ConfigError:
    problem = error.errors()[0]
    key = str(problem["loc"][0])
    if problem["type"] == "missing":
        return _error(key, None, "the partition that this node holds, from 0")
    if problem["type"] == "extra_forbidden":
        return _error(key, problem["input"], unknown_key(key, None, NodeSettings).allowed)
    annotation = NodeSettings.model_fields[key.replace("-", "_")].annotation
    return _error(key, problem["input"], allowed_instead(problem, annotation))
