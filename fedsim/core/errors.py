"""The errors whose text is meant for the person at the terminal."""

from __future__ import annotations

from typing import Any


class FedsimError(Exception):
    """A failure that one sentence explains; the command line prints it without a traceback."""


class InputError(FedsimError):
    """Something the user gave cannot be used; nothing has been written."""


class ConfigError(InputError):
    """A configuration value that is not allowed.

    Parameters
    ----------
    field : str
        The configuration key as the user writes it, for example ``clients-per-round``.
    value : Any
        What was given.
    allowed : str
        What would be accepted, as a phrase.
    """

    def __init__(self, field: str, value: Any, allowed: str) -> None:
        super().__init__(f"{field} = {shorten(value)} cannot be used; expected {allowed}")
        self.field = field
        self.value = value
        self.allowed = allowed


class RunFailedError(FedsimError):
    """A run stopped before its last round; what it finished is kept."""


class DivergedError(RunFailedError):
    """A run stopped because its model, or that of every client that failed, was not finite."""


class DiskFullError(RunFailedError):
    """The disk has no room for the next file of a run."""


class RunInterruptedError(FedsimError):
    """The user asked a run to stop."""


def _as_written(value: Any) -> Any:
    return [_as_written(v) for v in value] if isinstance(value, tuple | list) else value


def shorten(value: Any, limit: int = 80) -> str:
    """Write a value as a person would, or the beginning of it."""
    try:
        text = repr(_as_written(value))
    except (ValueError, RecursionError):
        # Python refuses to write out a number of thousands of digits, or lists in lists in lists.
        text = f"<{type(value).__name__} too large to print>"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
