"""Flower's wrappers of differential privacy, with an adaptive norm that adapts the right way."""

from __future__ import annotations

from typing import Any

from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy.dp_adaptive_clipping import DifferentialPrivacyAdaptiveBase


class _TowardsTheQuantile(DifferentialPrivacyAdaptiveBase):
    """Moves the clipping norm as Andrew et al. 2021, section 2.1: ``C * exp(-rate * (b - q))``.

    There, ``b`` is the share of updates that are *not* above ``C``. Flower (1.41 and 1.42) puts the
    share of those that were clipped in its place, and its norm runs away from the quantile: to 0
    where all are clipped, and without end where none is.
    """

    def _geometric_update(self, clipped_fraction: float) -> None:
        super()._geometric_update(1.0 - clipped_fraction)


class ServerSideAdaptiveClipping(
    _TowardsTheQuantile, flower.DifferentialPrivacyServerSideAdaptiveClipping
):
    """The server clips."""


class ClientSideAdaptiveClipping(
    _TowardsTheQuantile, flower.DifferentialPrivacyClientSideAdaptiveClipping
):
    """Clients clip, and tell whether that made their update smaller."""


PRIVACY: dict[str, tuple[Any, str]] = {
    "server-side-fixed": (flower.DifferentialPrivacyServerSideFixedClipping, "clipping_norm"),
    "client-side-fixed": (flower.DifferentialPrivacyClientSideFixedClipping, "clipping_norm"),
    "server-side-adaptive": (ServerSideAdaptiveClipping, "initial_clipping_norm"),
    "client-side-adaptive": (ClientSideAdaptiveClipping, "initial_clipping_norm"),
}
"""By the value of ``dp``: the wrapper, and what it calls ``clipping-norm``."""
