"""What is recorded of a client's round, as far as its node allows it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from logging import WARNING
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from flwr.common import Scalar
from flwr.common.logger import log

from fedsim.core.training import Step
from fedsim.flower import messages
from fedsim.flower.node import NodeSettings
from fedsim.flower.workplace import Workplace
from fedsim.recording.layout import RunLayout
from fedsim.recording.places import Place, place_of_run
from fedsim.recording.recorder import FirstStepNorms, StepRecorder


class ClientRecorder:
    """An observer of local training that records where there is a place for it, and measures.

    Used as a context manager: a clean end puts the files in place, an error removes them.

    Parameters
    ----------
    node : NodeSettings
        Which client the node holds, where it may record, and whether gradients.
    config : mapping of str to scalar
        The settings of the message: ``run`` and ``run-id`` name the run to record.
    workplace : Workplace
        Of the run.
    round_number, num_steps : int
        The round, and the local steps that will be made.

    Raises
    ------
    InputError
        When the run's name is no name of a folder.
    """

    def __init__(
        self,
        node: NodeSettings,
        config: Mapping[str, Scalar],
        workplace: Workplace,
        *,
        round_number: int,
        num_steps: int,
    ) -> None:
        plan = workplace.plan
        self._is_asked = messages.RUN_ID in config
        self._norms = FirstStepNorms()
        self._place = place_of(node, config)
        self._refusal: str | None = None
        self._steps: StepRecorder | None = None
        captures = plan.config.captures
        without_files = tuple(capture for capture in captures if not capture.keeps_files)
        if not node.capture and len(without_files) < len(captures):
            captures, self._refusal = without_files, messages.CAPTURE_REFUSED
        if self._place is not None:
            self._steps = StepRecorder(
                RunLayout(self._place.root).client(round_number, node.partition_id),
                captures,
                num_steps=num_steps,
                shapes=plan.parameters,
                model=workplace.model,
            )

    def __enter__(self) -> Self:
        """Begin to record."""
        if self._steps is not None:
            self._steps.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Put the files in place, or remove them."""
        if self._steps is not None:
            self._steps.__exit__(kind, error, traceback)

    def __call__(self, step: Step) -> None:
        """Take one step."""
        self._norms(step)
        if self._steps is not None:
            self._steps(step)

    def measured(self) -> dict[str, Any]:
        """Give what telemetry reports of the gradients and the files, once closed."""
        steps, norms = self._steps, self._norms.per_layer
        return {
            "gradient_norm": math.hypot(*norms.values()),
            "per_layer_norms": norms,
            "num_steps_captured": steps.num_steps_captured if steps else 0,
            "bytes_captured": steps.bytes_captured if steps else 0,
            "files": {name: c.to_json() for name, c in steps.files.items()} if steps else {},
        }

    def about(self) -> dict[str, str]:
        """Say where the files are unless in the run directory, and why there are no gradients."""
        if not self._is_asked:
            return {}
        about = {}
        if self._place is None or not self._place.is_run:
            about["place"] = "none" if self._place is None else "node"
        if self._refusal is not None:
            log(WARNING, "fedsim: %s", self._refusal)
            about["not_captured"] = self._refusal
        return about

    def split(self, seconds: Mapping[str, float]) -> dict[str, float]:
        """Tell the time that training waited for the writer apart from that of capturing."""
        if self._steps is None:
            return {"write": 0.0, **seconds}
        waited = self._steps.seconds_waited
        return {
            "write": waited + self._steps.seconds_closing,
            **seconds,
            "capture": seconds["capture"] - waited,
        }


def place_of(node: NodeSettings, config: Mapping[str, Scalar]) -> Place | None:
    """Find where to record; None where nothing is to be recorded, or there is no place."""
    if messages.RUN_ID not in config or node.recordings is None:
        return None
    name, run_id = str(config.get(messages.RUN, "")), str(config[messages.RUN_ID])
    return place_of_run(Path(node.recordings), name, run_id)
