"""Aggregation strategies for Flower, one file each; `registry` names them."""

from strategies.delta_fedavg import DeltaFedAvg
from strategies.folding import RoundExporter
from strategies.recorded import Recorded

__all__ = ["DeltaFedAvg", "Recorded", "RoundExporter"]
