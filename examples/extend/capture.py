"""A capture in a file of its own: `python examples/extend/capture.py`.

It keeps the largest entry of each parameter's gradient, at every step. On the command line:
`fedsim run --capture examples/extend/capture.py:Peaks`. Its size follows from its shape.
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

import fedsim
from fedsim.captures.stacked import StackedArray
from fedsim.core.capture import SeenStep, Sink
from fedsim.core.config import RunConfig
from fedsim.recording.evidence import Evidence


class Peaks(StackedArray):
    """The largest absolute entry of each parameter's gradient, in ``model.parameters()`` order."""

    name: ClassVar[str] = "peaks"

    @classmethod
    def of(cls, config: RunConfig) -> "Peaks":
        """Take no setting."""
        return cls()

    def shape(self, parameters: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Give one number for each parameter; the size of a step follows."""
        return (len(parameters),)

    def measure(self, seen: SeenStep, sink: Sink) -> np.ndarray:
        """Observe a step."""
        return np.array([float(g.abs().max()) for g in seen.gradients.values()], np.float32)

    def prove(self, evidence: Evidence) -> None:
        """No entry is larger than the norm, and the norm is not larger than all entries alike."""
        client, sizes = evidence.client, [np.prod(s) for s in evidence.client.run.shapes.values()]
        for row in client.steps:
            norms = np.array([*row["per_layer_norms"].values()])
            peaks = client.peaks(row["step"]).astype(np.float64)
            if not np.all((peaks <= norms * 1.00001) & (norms <= peaks * np.sqrt(sizes) * 1.00001)):
                problem = f"{evidence.folder}: peaks of step {row['step']} do not fit the norms"
                evidence.findings.violate("gradients", problem)
                return
        evidence.findings.prove("gradients", len(client.steps))


CONFIG = {"dataset": "digits", "model": "cnn", "rounds": 1, "capture": f"{__file__}:Peaks"}

if __name__ == "__main__":
    run = fedsim.simulate(CONFIG)
    for client in run.round(1).clients.values():
        print(client.partition, client.peaks(0))
