"""What a client measures of the global model on its own samples, before it trains.

The model is evaluated as the client got it: a number for each of what an evaluation measures stands
in the client's row as ``evaluation``.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedsim.core import registry
from fedsim.core.behavior import ClientContext
from fedsim.core.errors import InputError, shorten
from fedsim.core.task import Columns, FederatedData, Task, rows_of
from fedsim.core.training import Arrays, load_state

if TYPE_CHECKING:
    from fedsim.core.config import RunConfig

FIELD = "client-evaluation"
NONE = "none"
MOST_NUMBERS = 1000
"""That a client may tell of one evaluation."""
LONGEST_NAME = 200


class ClientEvaluation(Protocol):
    """Measures a model on the samples of one client.

    What it gives depends on its arguments alone: `verify` asks it again.
    """

    def __call__(
        self, about: ClientContext, task: Task, model: nn.Module, examples: Columns
    ) -> Mapping[str, float]:
        """Give numbers by name.

        Parameters
        ----------
        about : ClientContext
            Who and when.
        task : Task
            Makes batches of rows, and has the loss and the metrics.
        model : torch.nn.Module
            The global model as the client got it, in evaluation mode and without gradients.
        examples : mapping of str to Tensor
            The client's training samples, on the CPU.
        """
        ...


def evaluation_of(config: RunConfig) -> ClientEvaluation | None:
    """Give what clients evaluate; None for nothing.

    Raises
    ------
    InputError
        When it cannot be loaded.
    """
    if config.client_evaluation == NONE:
        return None
    found = registry.factory(FIELD, "evaluations", config.client_evaluation)
    return cast(ClientEvaluation, found)


@torch.no_grad()
def evaluate_client(
    config: RunConfig,
    task: Task,
    model: nn.Module,
    data: FederatedData,
    indices: NDArray[np.int64],
    state: Arrays,
    *,
    client: int,
    round_number: int,
) -> dict[str, float | None] | None:
    """Measure what the configuration asks for.

    Parameters
    ----------
    config : RunConfig
        Names the evaluation.
    task, model : Task, torch.nn.Module
        Of the run; a copy of the model is evaluated.
    data : FederatedData
        Of the run.
    indices : ndarray of int64
        The client's training samples.
    state : dict of str to ndarray
        The global state that the client got.
    client, round_number : int
        Which round of which client.

    Returns
    -------
    dict of str to (float or None), or None
        Numbers by name, None for one that is not finite; None where nothing is evaluated.

    Raises
    ------
    InputError
        When the evaluation cannot be loaded, or gives anything else than numbers by name.
    """
    measure = evaluation_of(config)
    if measure is None:
        return None
    # What the user's code does to its copy, training does not see.
    model = copy.deepcopy(model)
    load_state(model, state)
    model.eval()
    about = ClientContext(seed=config.seed, client=client, round=round_number)
    with _settings_kept():
        found = measure(about, task, model, rows_of(data.train(), torch.from_numpy(indices)))
    numbers = _numbers(found)
    if numbers is None:
        raise InputError(
            f"{FIELD} = {config.client_evaluation!r} gave {shorten(found)}; expected at most "
            f"{MOST_NUMBERS:,} numbers by name, of at most {LONGEST_NAME} letters"
        )
    return numbers


def _numbers(found: Any) -> dict[str, float | None] | None:
    """Give numbers by name; None where anything is something else."""
    if not isinstance(found, Mapping) or len(found) > MOST_NUMBERS:
        return None
    numbers = {}
    for name, number in found.items():
        if not (isinstance(name, str) and len(name) <= LONGEST_NAME and name.isprintable()):
            return None
        if isinstance(number, str):
            return None
        try:
            numbers[name] = float(number)
        except (TypeError, ValueError, OverflowError):
            return None
    return {name: n if math.isfinite(n) else None for name, n in numbers.items()}


@contextlib.contextmanager
def _settings_kept() -> Iterator[None]:
    """Put torch's settings of this process, by which training rounds, back as they were."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(is_deterministic, warn_only=warns_only)
