"""Flower's FedProx: clients stay near the global model."""

from __future__ import annotations

from fedsim.core.algorithm import NonNegative, StrategySettings
from strategies.server_optimizer import MeanOfWeights


class FedProxSettings(StrategySettings):
    """The factor of the proximal term."""

    # Flower's own 0 is plain averaging.
    proximal_mu: NonNegative = 0.01


class FedProx(MeanOfWeights):
    """FedProx (Li et al. 2020): clients add ``proximal-mu / 2 * |w - w_global|^2`` to the loss."""

    name = "fedprox"
    Settings = FedProxSettings

    @property
    def proximal_mu(self) -> float:
        """Factor of the term."""
        return float(self.settings.proximal_mu)
