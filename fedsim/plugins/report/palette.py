"""Colours of figures, on the page and in images."""

from __future__ import annotations

SERIES = ("#3b83c0", "#d0620f", "#10916b", "#b8609a", "#8a7d14", "#7a6fd0")
"""Told apart with any colour vision, and at a contrast of 3 on white and on the page's black."""

SEQUENTIAL = ("#00224e", "#404c6b", "#7c7b78", "#bcae6c", "#fee838")
"""Cividis (Nunez et al. 2018): even steps for any colour vision, and in print without colour."""

DIVERGING = ("#b35806", "#f1a340", "#f7f7f7", "#67a9cf", "#2166ac")
"""From -1 over 0 to 1."""

LEVELS = ("#3b83c0", "#d0620f")
"""Of values that are names."""


def style_of(series: int) -> int:
    """Say which symbol and dashes a series has, so that no two of 36 look the same."""
    return (series + series // len(SERIES)) % len(SERIES)
