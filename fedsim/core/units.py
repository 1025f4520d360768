"""Numbers as people write them in texts."""

from __future__ import annotations

import re
from decimal import Decimal

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12} | {
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def parse_count(text: str) -> int | None:
    """Read a whole number of at most 18 ASCII digits; None where `text` is not one."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def parse_bytes(text: str) -> int:
    """Read a number of bytes with a unit, like ``20 GB`` (decimal) or ``1.5 GiB`` (binary).

    Raises
    ------
    ValueError
        With the allowed form, when `text` does not have it.
    """
    found = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*([a-zA-Z]*)\s*", text)
    count = int(Decimal(found[1]) * _UNITS.get(found[2].lower(), 0)) if found else 0
    if not count:
        raise ValueError("a number of bytes above 0 with a unit, like '20 GB' or '1.5 GiB'")
    return count


def format_bytes(count: int) -> str:
    """Write a number of bytes in decimal units."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        # Not 1000: what rounds up to it takes the next unit.
        if size < 999.95:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
