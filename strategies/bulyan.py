"""Flower's Bulyan."""

from __future__ import annotations

from strategies.flower_builtin import FlowerBuiltin
from strategies.krum import KrumSettings


class BulyanSettings(KrumSettings):
    """How many participants may be malicious."""

    per_malicious = 4


class Bulyan(FlowerBuiltin):
    """A trimmed mean of what Krum chooses (El Mhamdi et al. 2018)."""

    name = "bulyan"
    flower = "Bulyan"
    Settings = BulyanSettings
