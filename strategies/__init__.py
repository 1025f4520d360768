"""Aggregation strategies for Flower, one file each; `registry` names them."""

from strategies.delta_fedavg import DeltaFedAvg, RoundExporter

__all__ = ["DeltaFedAvg", "RoundExporter"]
