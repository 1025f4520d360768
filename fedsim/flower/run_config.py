"""Flower's flat run-config as a `RunConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsim.core.config import UNSET, RunConfig, parse_text, read_config_file, take_recorded
from fedsim.core.errors import ConfigError


def config_from_run_config(
    run_config: Mapping[str, Any], recorded: Mapping[str, Any] | None = None
) -> RunConfig:
    """Build the configuration from what ``flwr run --run-config`` gives.

    Parameters
    ----------
    run_config : mapping
        Flat scalars. ``config`` names a TOML file by its absolute path; an empty string leaves
        a key to that file or to the default; other strings are read as flags are. ``resume``,
        the absolute path of a run directory to continue, is no key of a run.
    recorded : mapping, optional
        The configuration of that run, in place of the defaults.

    Raises
    ------
    InputError
        As `RunConfig.from_mapping`, `read_config_file` and `take_recorded`.
    """
    check_paths(run_config)
    given = {
        key: parse_text(key, value) if isinstance(value, str) else value
        for key, value in run_config.items()
        if key not in ("config", "resume") and value != ""
    }
    if file := run_config.get("config"):
        given = {**read_config_file(Path(str(file)), given), **given}
    if recorded is not None:
        given = take_recorded(recorded, given, Path(str(run_config["resume"])))
    return RunConfig.from_mapping(given)


def check_paths(run_config: Mapping[str, Any]) -> None:
    """Refuse paths that mean another place where Flower runs the app.

    Raises
    ------
    ConfigError
        Naming the key.
    """
    for key in ("config", "output", "data-root", "resume"):
        given = run_config.get(key)
        if given and given != UNSET and not Path(str(given)).is_absolute():
            raise ConfigError(key, given, "an absolute path: Flower runs a copy of the app")
    mirror = str(run_config.get("mirror") or "")
    if mirror not in ("", UNSET) and "://" not in mirror and not Path(mirror).is_absolute():
        raise ConfigError(
            "mirror", mirror, "a URL or an absolute path: Flower runs a copy of the app"
        )
