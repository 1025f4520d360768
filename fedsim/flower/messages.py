"""What travels between server and clients: the one place that encodes and decodes it.

It stands below the strategies, which decode replies also where Flower's own ``start`` runs them.
"""

from __future__ import annotations

import copy
import functools
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import SType
from flwr.common.typing import Scalar
from numpy.typing import NDArray

State = Mapping[str, NDArray[np.generic]]
M = TypeVar("M", bound=Message)

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
"""Key of the factor of a proximal term, by which Flower's own strategies ask for it too."""
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


def array_record(state: State) -> ArrayRecord:
    """Encode a state; names and order are kept."""
    record = ArrayRecord()
    for name, array in state.items():
        record[name] = _encoded(np.asarray(array))
    return record


def _encoded(array: NDArray[np.generic]) -> Array:
    """Do as Flower does: ``numpy.save``. It makes the header each time, and two copies."""
    dtype, shape = array.dtype, array.shape
    data = b"".join((_header(dtype, shape), np.ascontiguousarray(array).data))
    return Array(dtype=dtype.name, shape=shape, stype=SType.NUMPY, data=data)


@functools.lru_cache(maxsize=1024)
def _header(dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
    np.lib.format.write_array_header_1_0(stream, {**described, "shape": shape})
    return stream.getvalue()


def state_of(record: Mapping[str, Array]) -> dict[str, NDArray[np.generic]]:
    """Decode a state into fresh, writable arrays."""
    return {name: view_of(array).copy() for name, array in record.items()}


def view_of(array: Array) -> NDArray[np.generic]:
    """Decode an array of a message without copying it: a read-only view of its bytes.

    Flower serialises with ``numpy.save`` and its own decoding copies twice, which for every
    reply is twice the model.
    """
    if array.stype != SType.NUMPY:
        return array.numpy()
    header, data = array.data[:10], array.data
    if header[:8] != _NPY_1_0:
        return array.numpy()
    start = 10 + int.from_bytes(header[8:], "little")
    shape, fortran, dtype = _described(data[:start])
    flat: NDArray[np.generic] = np.frombuffer(data, dtype=dtype, offset=start)
    return flat.reshape(shape, order="F" if fortran else "C")


_NPY_1_0 = np.lib.format.magic(1, 0)


# A model has few shapes, and every reply the same ones: to parse one takes longer than its bytes.
@functools.lru_cache(maxsize=1024)
def _described(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    stream = io.BytesIO(header[len(_NPY_1_0) :])
    return np.lib.format.read_array_header_1_0(stream)


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


def train_message(
    message: Message, settings: Mapping[str, Any], correction: State | None
) -> Message:
    """Give one client its own of the message that a strategy made for it.

    Parameters
    ----------
    message : Message
        The strategy's; all of its messages may share one content.
    settings : mapping
        From `train_config`, in addition to those of the strategy.
    correction : mapping of str to ndarray or None
        What the client is to add to its gradients.
    """
    arrays = next(iter(message.content.array_records.values()))
    config = ConfigRecord({**next(iter(message.content.config_records.values())), **settings})
    content = RecordDict({ARRAYS: arrays, CONFIG: config})
    if correction is not None:
        content[CORRECTION] = array_record(correction)
    return Message(content, message.metadata.dst_node_id, message.metadata.message_type)


@dataclass(frozen=True)
class Instruction:
    """What a client is asked to do, as far as it can be decoded before its size is checked.

    Parameters
    ----------
    config : dict of str to scalar
        The settings.
    records : dict of str to ArrayRecord
        The arrays, encoded, by the name of their record.
    """

    config: dict[str, Scalar]
    records: dict[str, ArrayRecord]

    @classmethod
    def of(cls, message: Message) -> Self:
        """Decode a message of the Message API.

        Raises
        ------
        KeyError
            When it has no record of settings.
        """
        config = _scalars(message.content.config_records[CONFIG])
        return cls(config, dict(message.content.array_records))

    @classmethod
    def former(cls, message: Message) -> list[Self]:
        """Decode a message of Flower's former API: an instruction for each record of settings."""
        records = dict(message.content.array_records)
        return [cls(_scalars(c), records) for c in message.content.config_records.values()]

    @property
    def state(self) -> dict[str, NDArray[np.generic]]:
        """The global state, fresh and writable."""
        return state_of(self.records[ARRAYS])

    @property
    def correction(self) -> dict[str, NDArray[np.generic]] | None:
        """What to add to the gradients of parameters; None for nothing."""
        return state_of(self.records[CORRECTION]) if CORRECTION in self.records else None


def _scalars(record: ConfigRecord) -> dict[str, Scalar]:
    return {key: value for key, value in record.items() if not isinstance(value, list)}


def with_arrays(message: M, change: Callable[[ArrayRecord], ArrayRecord]) -> M:
    """Copy a message, its arrays replaced by what `change` makes of them."""
    key, arrays = next(iter(message.content.array_records.items()))
    changed = copy.copy(message)
    changed.content = RecordDict({**message.content, key: change(arrays)})
    return changed


def run_of(message: Message) -> tuple[str, str] | None:
    """Give the name and the id of the run that a message asks to record, or None."""
    settings: Any = message.content.config_records.get(CONFIG, {})
    if RUN_ID not in settings:
        return None
    return str(settings[RUN]), str(settings[RUN_ID])


def reply_content(
    arrays: ArrayRecord | None, num_examples: int, metrics: Mapping[str, Any]
) -> RecordDict:
    """Encode a client's answer: numbers into the MetricRecord, telemetry with it."""
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


MOST_TELEMETRY = 8 * 2**20
"""Of a client's telemetry, as text and as a line of ``clients.jsonl``: 300,000 local steps."""


class Reply(Message):
    """A client's answer to a training message, its telemetry decoded once.

    A copy of it with other records keeps the telemetry.

    Parameters
    ----------
    message : Message
        As it came, with content.

    Attributes
    ----------
    telemetry : dict
        What a fedsim client reports of its work; empty for other clients.

    Raises
    ------
    ValueError
        When the telemetry has more than `MOST_TELEMETRY` characters, or is not JSON.
    """

    telemetry: dict[str, Any]

    def __init__(self, message: Message) -> None:
        self.__dict__.update(message.__dict__)
        self.telemetry = _telemetry_of(message.content)

    @classmethod
    def of(cls, message: Message) -> Self:
        """Decode a message that has not been decoded yet."""
        return message if isinstance(message, cls) else cls(message)

    @property
    def state(self) -> dict[str, NDArray[np.generic]]:
        """The local state: read-only views of the bytes that came."""
        (record,) = self.content.array_records.values()
        return {name: view_of(array) for name, array in record.items()}

    @property
    def metrics(self) -> MetricRecord:
        """The client's figures, its number of samples among them."""
        (record,) = self.content.metric_records.values()
        return record


def _telemetry_of(content: RecordDict) -> dict[str, Any]:
    record = content.config_records.get(TELEMETRY)
    if record is None:
        return {}
    text = str(record["json"])
    if len(text) > MOST_TELEMETRY:
        raise ValueError(
            f"telemetry of {len(text):,} characters; expected at most {MOST_TELEMETRY:,}"
        )
    row: dict[str, Any] = json.loads(text)
    return row


def query_content() -> RecordDict:
    """Encode the question which client a node holds, and what data of its own."""
    return RecordDict({CONFIG: ConfigRecord(), METRICS: MetricRecord()})


def answer_content(partition: int, own: tuple[int, str, Sequence[str]] | None = None) -> RecordDict:
    """Encode the answer to it.

    Parameters
    ----------
    partition : int
        The client that the node holds.
    own : tuple of (int, str, sequence of str), optional
        Of the node's own data: the number of samples, the SHA-256, the names of the classes.
    """
    numbers, texts = {PARTITION: partition}, ConfigRecord()
    if own is not None:
        numbers[NUM_EXAMPLES], sha256, classes = own
        texts = ConfigRecord({DATA_SHA256: sha256, CLASSES: [*classes]})
    return RecordDict({METRICS: MetricRecord({**numbers}), CONFIG: texts})


def client_told_by(answer: Message) -> int | None:
    """Decode which client a node holds; None where it does not say."""
    record = answer.content.metric_records.get(METRICS)
    claim = None if record is None else record.get(PARTITION)
    return claim if isinstance(claim, int) else None


def data_told_by(answer: Message) -> tuple[Any, Any, Any] | None:
    """Decode what a node says of its own data, unchecked: samples, SHA-256, classes.

    Returns
    -------
    tuple or None
        None where the node has no data of its own.
    """
    try:
        count = answer.content.metric_records[METRICS][NUM_EXAMPLES]
        about = answer.content.config_records[CONFIG]
        return count, about[DATA_SHA256], about[CLASSES]
    except KeyError:
        return None


def traceback_of(message: Message) -> str:
    """Give the client's own traceback out of the text that Flower sends for a failure."""
    reason = message.error.reason or ""
    # Flower and Ray raise their own exceptions from the client's; a chain has its cause first.
    first = reason.replace("\\n", "\n").partition("\nThe above exception was")[0]
    lines = first.removesuffix("'>").rstrip().splitlines()
    frames = [i for i, line in enumerate(lines) if line.lstrip().startswith("File ")]
    if frames:
        return "\n".join(lines[frames[0] :])
    # Of what was not raised in the client, Flower tells "<class 'name'>:<'text'>".
    return "\n".join(lines).partition(">:<'")[2] or "\n".join(lines) or "no reason given"


def cause_of(message: Message) -> str:
    """Give the sentence that ends the client's traceback."""
    return writable(traceback_of(message)).splitlines()[-1].strip()


_HEAD, _TAIL = 16_384, 16_384
"""Characters that are kept of the beginning and the end of what a client says of its failure."""


def writable(reason: str) -> str:
    """Make a client's words such that they can be written and read back."""
    # A surrogate without its other half is no Unicode, which no reader of JSON takes.
    text = reason.encode(errors="replace").decode()
    if len(text) <= _HEAD + _TAIL:
        return text
    return f"{text[:_HEAD]} ... {text[-_TAIL:]}"
