"""What a run captures, as its configuration says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedsim.captures.gradients import SHARD_BYTES, Gradients
from fedsim.core.capture import Capture
from fedsim.core.config import RunConfig


def chosen(
    capture: str = "all",
    layers: Sequence[str] = ("*",),
    dtype: str = "float32",
    encoding: str = "support",
    *,
    statistics: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> tuple[Capture, ...]:
    config = RunConfig.from_mapping(
        {
            "capture": capture,
            "capture-layers": list(layers),
            "capture-dtype": dtype,
            "capture-encoding": encoding,
            "gradient-statistics": statistics,
        }
    )
    return tuple(
        replace(found, shard_bytes=shard_bytes) if isinstance(found, Gradients) else found
        for found in config.captures
    )


def policy(capture: str = "all", *form: object, **settings: object) -> Capture:
    """Give the capture that ``capture`` names."""
    return chosen(capture, *form, **settings)[-1]  # type: ignore[arg-type]
