"""Flower's FedYogi: Yogi of the server."""

from __future__ import annotations

import numpy as np

from fedsim.core.fields import Rate
from strategies.fedadam import FedAdamSettings
from strategies.server_optimizer import Moments, Numbers


class FedYogiSettings(FedAdamSettings):
    """Those of Adam, with a smaller step."""

    eta: Rate = 0.01


class FedYogi(Moments):
    """FedYogi (Reddi et al. 2021): the second moment changes by a share of the square at most."""

    name = "fedyogi"
    Settings = FedYogiSettings

    def second(self, v: Numbers, square: Numbers) -> Numbers:
        """Move towards the square, by a share of it."""
        return np.asarray(v - (1.0 - self.settings.beta_2) * square * np.sign(v - square))

    def turns(self, v: Numbers) -> list[Numbers]:
        """Give `v`, up to where it falls, and where it jumps."""
        return [v, np.nextafter(v, np.zeros_like(v))]
