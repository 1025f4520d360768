"""What travels between server and clients: names of records and keys, and their making."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.constant import SType
from numpy.typing import NDArray

ARRAYS = "arrays"
CORRECTION = "correction"
"""Record of what a client adds to its gradients; only where its strategy asks for it."""
CONFIG = "config"
METRICS = "metrics"
TELEMETRY = "telemetry"

RUN_CONFIG = "config"
"""Key of the whole run configuration as JSON."""
ROUND = "server-round"
PARTITION = "partition"
RUN = "run"
"""Key of what the run directory is called on the server's disk: a name, never a path."""
RUN_ID = "run-id"
"""Key of the run's id, with which a client records the run; without it nothing is recorded."""
DATA_SHA256 = "data-sha256"
"""Key of the hash of a node's own data."""
CLASSES = "classes"
"""Key of the names of the classes of a node's own data."""
PARTITION_SHA256 = "partition-sha256"
"""Key of the hash of the whole partition, by which clients know that they deal it likewise."""
NUM_EXAMPLES = "num-examples"
LOSS = "loss"
PROXIMAL_MU = "proximal-mu"
"""Key of the factor of FedProx's term, by which Flower's strategy asks for it."""
DISK_FULL = "the disk is full"
"""What a client's failure says when there was no room for its gradients."""
CAPTURE_REFUSED = "capture is not allowed by this node (its configuration says capture = false)"
"""What a client says that trained and captured nothing, though the server asked for it."""

_LEGACY_KEYS = (
    "fitins.parameters",
    "evaluateins.parameters",
    "getparametersins.config",
    "getpropertiesins.config",
)


def is_legacy(content: RecordDict) -> bool:
    """Say whether a message comes from a strategy of Flower's former API."""
    return any(key in content for key in _LEGACY_KEYS)


def array_record(state: Mapping[str, NDArray[np.generic]]) -> ArrayRecord:
    """Encode a state; names and order are kept."""
    record = ArrayRecord()
    for name, array in state.items():
        record[name] = _encoded(np.asarray(array))
    return record


def _encoded(array: NDArray[np.generic]) -> Array:
    """Do as Flower does: ``numpy.save``. It makes the header anew each time, and two copies."""
    dtype, shape = array.dtype, array.shape
    data = b"".join((_header(dtype, shape), np.ascontiguousarray(array).data))
    return Array(dtype=dtype.name, shape=shape, stype=SType.NUMPY, data=data)


@functools.lru_cache(maxsize=1024)
def _header(dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
    np.lib.format.write_array_header_1_0(stream, {**described, "shape": shape})
    return stream.getvalue()


def state_of(record: ArrayRecord) -> dict[str, NDArray[np.generic]]:
    """Decode a state into fresh, writable arrays."""
    # With it comes torch, which no query needs.
    from strategies.folding import view_of

    return {name: view_of(array).copy() for name, array in record.items()}


def train_config(
    run_config: str,
    *,
    round_number: int,
    partition: int,
    partition_sha256: str,
    run: str,
    run_id: str,
    data_sha256: str | None = None,
) -> dict[str, str | int]:
    """Give the keys of one client's training message."""
    about_data = {PARTITION_SHA256: partition_sha256}
    if data_sha256 is not None:
        about_data = {DATA_SHA256: data_sha256}
    return {
        **about_data,
        RUN_CONFIG: run_config,
        ROUND: round_number,
        PARTITION: partition,
        RUN: run,
        RUN_ID: run_id,
    }


def reply_content(
    arrays: ArrayRecord | None, num_examples: int, metrics: Mapping[str, Any]
) -> RecordDict:
    """Encode a client's answer: numbers into the MetricRecord, telemetry beside it."""
    numbers = {k: v for k, v in metrics.items() if k != TELEMETRY}
    content = RecordDict({METRICS: MetricRecord({NUM_EXAMPLES: num_examples, **numbers})})
    if arrays is not None:
        content[ARRAYS] = arrays
    if TELEMETRY in metrics:
        content[TELEMETRY] = ConfigRecord({"json": metrics[TELEMETRY]})
    return content


def telemetry_json(row: Mapping[str, Any]) -> str:
    """Encode telemetry for a reply; non-finite floats stay readable for Python."""
    return json.dumps(row)
