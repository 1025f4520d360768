"""A grid of configurations: every combination of the values of some keys."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedsim.core.config import RunConfig, parse_text
from fedsim.core.errors import ConfigError, InputError, shorten
from fedsim.core.fields import unknown_key

MOST_CELLS = 1000
_MOST_OF_VALUE, _MOST_OF_NAME = 60, 200
_KEYS = [name.replace("_", "-") for name in RunConfig.model_fields]
_FIRST = ("strategy", "seed")
"""Axes that come first in the name of a cell; the others follow in the order of the keys."""


@dataclass(frozen=True)
class Axis:
    """A configuration key and the values that it takes.

    Parameters
    ----------
    key : str
        A key of `RunConfig` as the user writes it.
    values : tuple
        As a TOML parser gives them, in the order of asking.
    """

    key: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Cell:
    """One configuration of a grid.

    Parameters
    ----------
    name : str
        Like ``alpha=0.1,seed=2``: a file name that follows from the values alone.
    values : mapping of str to Any
        The value of each axis, in the order of the axes.
    config : RunConfig
        The whole configuration, without an output.
    """

    name: str
    values: Mapping[str, Any]
    config: RunConfig


def parse_axis(key: str, text: str) -> Axis:
    """Read the values of one key, separated by commas, each as a flag would have it.

    Raises
    ------
    InputError
        When `key` cannot be an axis, or a value is empty.
    """
    if key not in _KEYS:
        raise unknown_key(key, text, RunConfig)
    if key == "output":
        raise ConfigError(key, text, "a key that affects the results of a run")
    parts = _split(text)
    if not all(parts):
        raise ConfigError(key, text, "values separated by commas, like 1,2,3")
    return Axis(key, tuple(parse_text(key, part) for part in parts))


def _split(text: str) -> list[str]:
    """Split at the commas that are in no list, table or quoted text."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        if character == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def make_cells(base: Mapping[str, Any], axes: Sequence[Axis]) -> list[Cell]:
    """Make and check every configuration of a grid.

    Parameters
    ----------
    base : mapping of str to Any
        Keys and values that all cells share, as a TOML parser gives them.
    axes : sequence of Axis
        In any order; each key once.

    Returns
    -------
    list of Cell
        The seed changes fastest, the strategy slowest.

    Raises
    ------
    InputError
        Naming the first cell whose configuration cannot be used, and why.
    """
    if not axes:
        raise InputError(
            "nothing to compare; expected one or more of --strategies, --seeds and --vary"
        )
    keys = [axis.key for axis in axes]
    for key in keys:
        if keys.count(key) > 1:
            raise InputError(f"{key} is varied twice; name it once")
    ordered = sorted(axes, key=lambda axis: _position(axis.key))
    count = 1
    for axis in ordered:
        count *= len(axis.values)
    if count > MOST_CELLS:
        raise InputError(f"the grid has {count:,} cells; expected up to {MOST_CELLS:,}")
    slowest_first = sorted(ordered, key=lambda axis: axis.key == "seed")
    cells = []
    for combination in itertools.product(*(axis.values for axis in slowest_first)):
        chosen = dict(zip((axis.key for axis in slowest_first), combination, strict=True))
        cells.append(_cell(base, {axis.key: chosen[axis.key] for axis in ordered}))
    names = [cell.name for cell in cells]
    for cell in cells:
        if names.count(cell.name) > 1:
            raise InputError(f"the grid has {cell.name} twice; expected distinct values")
    return cells


def _position(key: str) -> int:
    return _FIRST.index(key) - len(_FIRST) if key in _FIRST else _KEYS.index(key)


def _cell(base: Mapping[str, Any], chosen: Mapping[str, Any]) -> Cell:
    try:
        config = RunConfig.from_mapping({**base, **chosen})
    except ConfigError as error:
        where = ",".join(f"{key}={shorten(value, 40)}" for key, value in chosen.items())
        raise InputError(f"cell {where}: {error}") from None
    # 1 and 1.0 are the same value of a key that is no whole number.
    checked = config.to_mapping()
    values = {k: v if isinstance(v, str) else checked[k] for k, v in chosen.items()}
    return Cell(cell_name(values), values, config)


def cell_name(values: Mapping[str, Any]) -> str:
    """Write the values of a cell as a file name; different values give different names."""
    name = ",".join(f"{key}={written(value)}" for key, value in values.items())
    if len(name) <= _MOST_OF_NAME:
        return name
    return f"{name[: _MOST_OF_NAME - 9]}~{_digest(name)}"


def written(value: Any) -> str:
    """Write one value with characters that every file system and shell takes."""
    if isinstance(value, list) and all(isinstance(v, int | float) for v in value):
        return "+".join(written(v) for v in value)
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    # Of a strategy's table the name says most.
    head = str(value["name"]) if isinstance(value, dict) and "name" in value else text
    plain = re.sub(r"[^A-Za-z0-9._:+-]", "_", head)
    if plain == text and len(text) <= _MOST_OF_VALUE:
        return text
    return f"{plain[: _MOST_OF_VALUE - 9]}~{_digest(text)}"


def shown(value: Any) -> str:
    """Write one value for people, whole: a strategy's table as ``name(eta=0.01)``."""
    if isinstance(value, dict) and "name" in value:
        settings = (f"{key}={json.dumps(v)}" for key, v in value.items() if key != "name")
        return f"{value['name']}({','.join(settings)})"
    if isinstance(value, list) and all(isinstance(v, int | float) for v in value):
        return written(value)
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
