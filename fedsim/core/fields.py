"""Kinds of values that a configuration is made of, and what is said of wrong ones."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from fedsim.core.errors import ConfigError, shorten


def finite(value: float) -> float:
    """Refuse infinities and NaN."""
    if not math.isfinite(value):
        raise ValueError("a finite number")
    return value


def nameable(value: str) -> str:
    """Refuse what cannot be the name of a file."""
    # Bytes that are not UTF-8 come as surrogates, which no terminal and no other program can print.
    if "\0" in value or value.encode(errors="ignore").decode() != value:
        raise ValueError("a path in UTF-8 without a zero byte")
    return value


# More would not fit where steps are counted: no run comes near it.
MOST = 1_000_000_000
Count = Annotated[int, Field(ge=1, le=MOST)]
Folder = Annotated[str, AfterValidator(nameable)]
Rate = Annotated[float, Field(gt=0), AfterValidator(finite)]
Counts = Annotated[Count | Annotated[tuple[Count, ...], Field(min_length=1)], Field()]
Rates = Annotated[Rate | Annotated[tuple[Rate, ...], Field(min_length=1)], Field()]


class StrictModel(BaseModel):
    """Keys with ``-`` for ``_``, each of its exact type, and no others."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        alias_generator=lambda name: name.replace("_", "-"),
        validate_by_name=True,
        validate_by_alias=True,
    )


_TYPES = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a text",
    "string_unicode": "a text in Unicode",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
}
_BOUNDS = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}
_BARE = re.compile(r"[\w.-]{1,40}")


def unknown_key(field: str, value: Any, known: type[StrictModel]) -> ConfigError:
    """Make the error for a key that does not exist, with the nearest ones that do."""
    keys = [name.replace("_", "-") for name in known.model_fields]
    near = difflib.get_close_matches(field.rsplit(".", 1)[-1], keys, n=1)
    hint = f"a known key, perhaps {near[0]}" if near else "one of " + ", ".join(keys)
    return ConfigError(field if _BARE.fullmatch(field) else shorten(field), value, hint)


def allowed_instead(problem: Mapping[str, Any], annotation: Any) -> str:
    """Say what is allowed where pydantic reports a problem.

    Parameters
    ----------
    problem : mapping
        One of ``ValidationError.errors()``.
    annotation : Any
        Of the field.
    """
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "too_short":
        return "a list of one or more"
    # Text that is not valid Unicode matches no choice.
    if kind in ("literal_error", "string_unicode") and (choices := choices_of(annotation)):
        return one_of(choices)
    if kind == "value_error":
        return str(context["error"])
    bounds = [f"{name} {context[bound]}" for bound, name in _BOUNDS.items() if bound in context]
    if bounds:
        return f"a value {' and '.join(bounds)}"
    return _TYPES.get(kind) or str(problem["msg"])


def one_of(choices: Sequence[str]) -> str:
    """List what is allowed."""
    return "one of " + ", ".join(map(repr, choices))


def choices_of(annotation: Any) -> list[str]:
    """List the texts of a literal type; none of a type that takes more than those."""
    if isinstance(annotation, str):
        return [annotation]
    return [choice for part in get_args(annotation) for choice in choices_of(part)]
