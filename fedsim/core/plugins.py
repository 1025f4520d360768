"""Plugins: features found by their entry points; no other code knows which are installed.

An entry point of the group ``fedsim.plugins`` names a module. Its ``PROVIDES`` maps what it brings
to where that is, as ``package.module`` or ``package.module:object``, imported when it is needed:

============  ===========================================================================
``commands``  list of click commands of ``fedsim``
``plots``     called with a run, gives its figures: ``run.plot``
``mirror``    keeps the copy at the key ``mirror``: `fedsim.flower.server_app.Mirror`
``cluster``   places workers at the key ``ray-address``: `fedsim.flower.simulation.Cluster`
============  ===========================================================================
"""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Iterator
from importlib.metadata import EntryPoint, distributions
from typing import Any

from fedsim.core.errors import InputError

GROUP = "fedsim.plugins"


def provided(feature: str) -> Iterator[Any]:
    """Give what each plugin that is installed provides of a feature, by the plugins' names.

    Raises
    ------
    InputError
        Naming the plugin that cannot be loaded.
    """
    for point in _points():
        try:
            place = point.load().PROVIDES.get(feature)
            if place is not None:
                yield pkgutil.resolve_name(place)
        except Exception as error:
            # Its folder was removed.
            if isinstance(error, ModuleNotFoundError) and error.name == point.module:
                continue
            raise lacked_by(point.module, error) or InputError(
                f"the plugin {point.name} cannot be loaded ({type(error).__name__}: {error}); "
                "repair or uninstall it"
            ) from error


def _points() -> list[EntryPoint]:
    # `entry_points` looks at one distribution of each name: what an older installation left in the
    # working folder would hide the plugins.
    found = {
        (point.name, point.value): point
        for distribution in distributions()
        for point in distribution.entry_points
        if point.group == GROUP
    }
    return [found[key] for key in sorted(found)]


def lacked_by(module: str, error: Exception) -> InputError | None:
    """Tell which extra brings what a plugin of fedsim's own could not import.

    Parameters
    ----------
    module : str
        A module of the plugin.
    error : Exception
        What was raised; None is given where that is anything else.
    """
    plugin = re.match(r"fedsim\.plugins\.(\w+)", module)
    package = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0]
    if plugin is None or not package or package == "fedsim":
        return None
    return InputError(
        f"the plugin {plugin[1]} needs {package}, which is not installed; the extra "
        f"{plugin[1]!r} brings it (in a clone: `pip install --editable '.[{plugin[1]}]'`)"
    )


def provider(feature: str, wanted: str) -> Any:
    """Give what the first plugin provides of a feature.

    Parameters
    ----------
    feature : str
        A key of ``PROVIDES``.
    wanted : str
        What the user asked for, for the error.

    Raises
    ------
    InputError
        When no plugin that is installed provides it, or one cannot be loaded.
    """
    for found in provided(feature):
        return found
    raise InputError(
        f"{wanted} needs a plugin that provides {feature!r}, and none is installed; installing "
        "fedsim again brings its own (in a clone: `pip install --no-deps --editable .`)"
    )
