"""Tasks, schedules and behaviors of fedsim, and code of the user's own, found by name."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import pkgutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from fedsim.core.errors import ConfigError, InputError, shorten

TASKS = ("vision",)
"""The packages of ``fedsim.tasks``; the first reads the data of nodes that have their own."""
TRUSTED = "FEDSIM_CODE"
"""Environment variable: names of the user's code that this process may load, with commas."""
EXPECTED = "FEDSIM_CODE_SHA256"
"""Environment variable of workers: the hashes of that code as JSON, by name."""

_trusted: set[str] = set()
_tasks: dict[Callable[..., Any], Any] = {}
_sources: dict[str, str | None] = {}


def task_module(task: str, part: str) -> ModuleType:
    """Import one module of a task: ``task``, or ``own_data``, which does without torch."""
    return importlib.import_module(f"fedsim.tasks.{task}.{part}")


def is_code(name: str) -> bool:
    """Say whether a name is that of the user's own code: ``module:NAME`` or ``FILE.py:NAME``."""
    return ":" in name


def trust(names: Iterable[str]) -> None:
    """Let this process load code that the user named; a run or a server never does that."""
    _trusted.update(name for name in names if is_code(name))


def may_load(name: str) -> bool:
    """Say whether the user named this code to this process."""
    return name in _trusted or name in os.environ.get(TRUSTED, "").split(",")


def users_task(name: str) -> Any:
    """Make a task of the user's, once in each process.

    Raises
    ------
    ConfigError
        When it cannot be imported or made.
    InputError
        When it is code that the user did not name to this process.
    """
    make = _users("task", name)
    if make not in _tasks:
        try:
            _tasks[make] = make()
        except Exception as error:
            why = f"a callable that returns a task: {type(error).__name__}: {error}"
            raise ConfigError("task", name, why) from None
    return _tasks[make]


def factory(field: str, room: str, name: str) -> Callable[..., Any]:
    """Find what makes a schedule or a behavior, or what evaluates.

    Parameters
    ----------
    field : str
        The configuration key that names it.
    room : str
        The package of fedsim with one in each file, whose ``make`` is given.
    name : str
        Of a file there, with ``-`` for ``_``; or of the user's own callable.

    Raises
    ------
    ConfigError
        When there is none of that name.
    InputError
        When it is code that the user did not name to this process.
    """
    if is_code(name):
        return _users(field, name)
    return _built_in(field, room, name)


@functools.cache
def _built_in(field: str, room: str, name: str) -> Callable[..., Any]:
    package = importlib.import_module(f"fedsim.{room}")
    known = [m.name.replace("_", "-") for m in pkgutil.iter_modules(package.__path__)]
    if name not in known:
        names = ", ".join(map(repr, sorted(known)))
        raise ConfigError(field, name, f"one of {names}, or your own as module:NAME")
    module = importlib.import_module(f"{package.__name__}.{name.replace('-', '_')}")
    made: Callable[..., Any] = module.make
    return made


def _users(field: str, name: str) -> Callable[..., Any]:
    if not may_load(name):
        raise InputError(
            f"{field} = {shorten(name)} is code, which is loaded only where the user names it; "
            f"{TRUSTED}={name} in the environment says that you mean your own code of that name"
        )
    try:
        found = load(name)
    except InputError:
        raise
    except Exception as error:
        why = f"a callable that can be imported: {type(error).__name__}: {error}"
        raise ConfigError(field, name, why) from None
    if not callable(found):
        raise ConfigError(field, name, f"a callable, not a {type(found).__name__}")
    made: Callable[..., Any] = found
    return made


def load(name: str) -> Any:
    """Import code that the user has named: ``module:NAME`` or ``FILE.py:NAME``.

    It does not ask whether the user did. The source is hashed as it is loaded, for `sources`.
    """
    place, _, attribute = name.rpartition(":")
    module = _module(place)
    found = getattr(module, attribute)
    if name not in _sources:
        made = _sources[name] = _source_sha256(found, module)
        expected = json.loads(os.environ.get(EXPECTED, "{}")).get(name, made)
        if made != expected:
            raise InputError(
                f"{name} has changed since the run began: its source has sha256 "
                f"{shorten(made)}, and the server loaded {expected}"
            )
    return found


def sources(names: Iterable[str]) -> dict[str, str]:
    """Give the sha256 of the source file of code that the user has named; loads what is not yet.

    The file is the one that the name names, as it was when this process loaded it; where it takes
    the name from another file, the hash is of both. Code without a file that can be read is left
    out.
    """
    found = {}
    for name in names:
        load(name)
        if (sha256 := _sources[name]) is not None:
            found[name] = sha256
    return found


def _source_sha256(found: Any, module: ModuleType) -> str | None:
    digest, files = hashlib.sha256(), dict.fromkeys([getattr(module, "__file__", None)])
    with contextlib.suppress(TypeError):
        # A decorator's file is not where the code is. A partial has none: the module made it.
        files[inspect.getsourcefile(inspect.unwrap(found))] = None
    try:
        for file in filter(None, files):
            digest.update(Path(file).read_bytes())
    except OSError:
        return None
    return digest.hexdigest() if any(files) else None


def _module(place: str) -> ModuleType:
    if not place.endswith(".py"):
        if (here := str(Path.cwd())) not in sys.path:
            # As it is for `python -m fedsim`, so for the command.
            sys.path.append(here)
        return importlib.import_module(place)
    path = Path(place).expanduser().resolve()
    # Two files may have the same name, and pydantic and inspect look modules up by theirs.
    name = f"fedsim_user_{path.stem}_{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"
    if (known := sys.modules.get(name)) is not None:
        return known
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{place} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
