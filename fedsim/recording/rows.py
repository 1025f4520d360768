"""What ``run.json`` and the lines of a run must look like before anything relies on them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedsim.core.client_evaluation import LONGEST_NAME, MOST_NUMBERS
from fedsim.core.errors import InputError, shorten
from fedsim.core.inputs import parse_json
from fedsim.recording.files import text_lines
from fedsim.recording.places import RUN_ID

_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Id = Annotated[int, Field(ge=0, le=10**9)]
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}\z")]
_Sentence = Annotated[str, Field(max_length=1000)]
_Name = Annotated[str, Field(max_length=LONGEST_NAME)]
_Arithmetic = Annotated[str, Field(pattern=r"^[0-9a-f]{16}\z")]
_FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*\z", max_length=200)]


class _Row(BaseModel):
    """Keys that are not described are ignored: a later version may have added them."""

    model_config = ConfigDict(strict=True, frozen=True)


class _Array(_Row):
    name: str
    shape: Annotated[list[Annotated[int, Field(ge=0, le=2**40)]], Field(max_length=8)]
    dtype: str


class _Model(_Row):
    arch: str
    parameters: Annotated[list[_Array], Field(min_length=1)]
    buffers: list[_Array]


class _Column(_Row):
    dtype: str
    shape: Annotated[list[Annotated[int, Field(ge=0, le=2**40)]], Field(max_length=8)]
    values: Annotated[int, Field(ge=1, le=10**9)] | None = None


class _Dataset(_Row):
    name: str
    classes: Annotated[int, Field(ge=1, le=10**9)]
    columns: dict[str, _Column] = {}
    label: str | None = None
    mean: list[_Number] = []
    std: list[_Number] = []
    train_size: _Id
    test_size: _Id
    sha256: _Sha256


class _NodeData(_Row):
    sha256: _Sha256
    classes: list[str]


class _Partition(_Row):
    sha256: _Sha256
    sizes: Annotated[list[_Count], Field(min_length=1)]
    nodes: list[_NodeData] = []


class _Versions(_Row):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, str]

    torch: str
    numpy: str


class _Device(_Row):
    type: str
    cpu_capability: str
    worker_threads: Annotated[int, Field(ge=1, le=1024)]
    server_threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    arithmetic: _Arithmetic | None = None


class _Resumed(_Row):
    after: Annotated[int, Field(ge=-1, le=10**9)]
    versions: _Versions
    device: _Device | None = None
    rounds: _Count | None = None
    code: dict[str, _Sha256] = {}


class Manifest(_Row):
    """``run.json``. A missing key is reported when it is needed."""

    id: Annotated[str, Field(pattern=rf"^{RUN_ID}\z")] | None = None
    status: Literal["running", "finished", "failed"] = "running"
    error: str = ""
    diverged: bool = False
    created: str = ""
    config: dict[str, Any] = {}
    versions: _Versions | None = None
    device: _Device | None = None
    model: _Model | None = None
    dataset: _Dataset | None = None
    partition: _Partition | None = None
    code: dict[str, _Sha256] = {}
    resumed: list[_Resumed] = []


class _RoundSeconds(_Row):
    clients: _Number
    evaluate: _Number
    total: _Number


class RoundRow(_Row):
    """A line of ``rounds.jsonl``."""

    round: _Id
    participants: list[_Id]
    failed: list[_Id]
    global_loss: _Number | None
    global_accuracy: _Number | None
    state_sha256: _Sha256
    seconds: _RoundSeconds


class FileChecksum(_Row):
    """Size and hash of a file."""

    bytes: _Count
    xxh3_128: Annotated[str, Field(pattern=r"^[0-9a-f]{32}\z")]


class ChecksumRow(_Row):
    """A line of ``checksums.jsonl`` up to its seal."""

    files: dict[str, FileChecksum]
    elsewhere: list[str] = []
    removed: list[str] = []


class _ClientRow(_Row):
    round: _Id
    partition: _Id


class FailedClientRow(_ClientRow):
    """A line of ``clients.jsonl`` for a client that failed."""

    status: Literal["failed"]
    error: str


class TrainedClientRow(_ClientRow):
    """A line of ``clients.jsonl`` for a client that trained."""

    status: Literal["ok"]
    num_samples: _Count
    local_epochs: _Count
    local_steps: _Count | None
    batch_size: _Count
    learning_rate: _Number
    loss_history: list[_Number | None]
    local_loss: _Number | None
    batch_sizes: list[_Count]
    gradient_norm: _Number | None
    per_layer_norms: dict[str, _Number | None]
    num_steps: _Count
    num_steps_captured: _Count
    bytes_captured: _Count
    files: dict[_FileName, FileChecksum]
    class_distribution: list[_Count]
    seconds: dict[str, _Number]
    peak_memory: dict[str, _Count]
    num_updates: _Count | None = None
    proximal_mu: Annotated[_Number, Field(ge=0)] = 0.0
    behavior: _Sentence | None = None
    evaluation: Annotated[dict[_Name, _Number | None], Field(max_length=MOST_NUMBERS)] | None = None
    place: Literal["run", "node", "none"] = "run"
    not_captured: _Sentence = ""
    shard: _Id | None = None
    arithmetic: _Arithmetic | None = None

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        # Code that makes something for each step relies on it: a forged number alone costs nothing.
        if not self.num_steps == len(self.loss_history) == len(self.batch_sizes):
            raise ValueError("num_steps, loss_history and batch_sizes speak of different steps")
        if self.num_updates is not None and self.num_updates > self.num_steps:
            raise ValueError("num_updates is more than num_steps")
        return self


def updates_of(row: Mapping[str, Any]) -> int:
    """Count the local steps of a client that changed its model."""
    return int(row.get("num_updates", row["num_steps"]))


class StepRow(_Row):
    """A line of ``steps.jsonl``."""

    step: _Count
    epoch: _Count
    batch_size: _Count
    loss: _Number | None
    learning_rate: _Number
    indices: list[_Count]
    proximal: _Number | None = None
    objective_norm: _Number | None = None
    gradient_norm: _Number | None = None
    per_layer_norms: dict[str, _Number | None] = {}


class SharedStepRow(StepRow):
    """A line of ``steps-SSSSS.jsonl``."""

    partition: _Id


_ALSO_KNOWN: dict[type[BaseModel], set[str]] = {
    Manifest: {"format", "seed"},
    StepRow: {"cosine_to_previous", "cosine_to_mean", "zero_fraction", "partition"},
}
"""Keys that other checks read without a model."""
_MOST_UNKNOWN = 8


def check(model: type[BaseModel], value: Any, where: str) -> None:
    """Check that a JSON value is what a model describes.

    Raises
    ------
    InputError
        Beginning with `where`, about the first thing that is not.
    """
    try:
        model.model_validate(value)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "missing":
            raise InputError(f"{where} has no {key}") from None
        given = f"{key} = {shorten(problem['input'])} cannot be used: " if key else ""
        raise InputError(f"{where}: {given}{problem['msg']}") from None


def unknown_keys(model: type[BaseModel], value: Mapping[str, Any]) -> list[str]:
    """Name the first keys of a row that this version does not know, and so compares with nothing.

    Parameters
    ----------
    model : type of BaseModel
        What the row is.
    value : mapping
        The row, for which `check` has found no fault.
    """
    known = model.model_fields.keys() | _ALSO_KNOWN.get(model, set())
    return [shorten(key) for key in sorted(value.keys() - known)[:_MOST_UNKNOWN]]


def check_described(model: type[BaseModel], value: dict[str, Any], where: str) -> None:
    """Check that a JSON object is what a model describes, and holds nothing else.

    Raises
    ------
    InputError
        As `check`, or naming the first key that the model does not describe all of.
    """
    check(model, value, where)
    described = model.model_validate(value).model_dump(exclude_unset=True)
    for key, entry in value.items():
        if key not in described or described[key] != entry:
            raise InputError(f"{where}: {shorten(key)} holds what no client tells")


def read_rows(
    path: Path, model: type[BaseModel] | None, *, absent_is_empty: bool = False
) -> list[dict[str, Any]]:
    """Read the lines of a file of a run.

    Parameters
    ----------
    path : Path
        The file.
    model : type of BaseModel or None
        What each line must be; None for those of ``clients.jsonl``, which tell it by `status`.
    absent_is_empty : bool
        Whether the file may be missing.

    Raises
    ------
    InputError
        When it cannot be read, or a line is not what it must be.
    """
    rows = []
    try:
        for number, line in enumerate(text_lines(path), start=1):
            row = parse_json(line)
            failed = isinstance(row, dict) and row.get("status") == "failed"
            of_client = FailedClientRow if failed else TrainedClientRow
            check(model or of_client, row, f"{path}: line {number}")
            rows.append(row)
    except FileNotFoundError:
        if absent_is_empty:
            return []
        raise InputError(f"{path} is not there") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise InputError(f"{path} holds a line that is not JSON") from None
    return rows
