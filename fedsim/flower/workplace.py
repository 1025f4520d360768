"""What a worker process makes once for all clients of a run: plan, data and model."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fedsim.core.allocator import keep_freed_memory
from fedsim.core.arithmetic import training_arithmetic
from fedsim.core.config import RunConfig
from fedsim.core.determinism import use_deterministic
from fedsim.core.device import resolve_device
from fedsim.core.errors import InputError
from fedsim.core.own_data import OwnData, find_own_data
from fedsim.core.plan import RunPlan
from fedsim.core.startup import leave_compiler_out
from fedsim.core.task import KeepsOwnData, initial_model
from fedsim.core.training import load_state


@dataclass(frozen=True)
class Workplace:
    """What a worker process keeps between clients of the same run."""

    plan: RunPlan
    device: torch.device
    model: nn.Module
    own: OwnData | None
    _arithmetic: dict[int, str] = dataclasses.field(default_factory=dict)

    def arithmetic(self, batch_size: int) -> str:
        """Hash what this worker's arithmetic makes of a step; changes the state of the model."""
        if batch_size not in self._arithmetic:
            load_state(self.model, self.plan.initial_state)
            self._arithmetic[batch_size] = training_arithmetic(
                self.plan.task,
                self.model,
                batch_size=batch_size,
                autocast=self.plan.config.autocast,
                device=self.device,
            )
        return self._arithmetic[batch_size]


@functools.lru_cache(maxsize=1)
def workplace_of(run_config: str, data_root: str | None, data: str | None) -> Workplace:
    """Prepare this process for a run, unless it is.

    Parameters
    ----------
    run_config : str
        The run's configuration as JSON.
    data_root, data : str or None
        Where this host keeps shared data and its own: no server knows that, or may choose it.

    Raises
    ------
    InputError
        When the configuration or the data cannot be used.
    """
    config = RunConfig.from_json(run_config).model_copy(update={"data_root": data_root})
    keep_freed_memory()
    torch.set_num_threads(config.client_cpus)
    use_deterministic(config.deterministic)
    # Which code is loaded here is no matter of a message.
    plan = RunPlan.prepare(config, trust=False)
    own: OwnData | None = None
    if config.own_data:
        if data is None:
            raise InputError(
                "partition = 'nodes' asks for data of this node's own; its configuration has no "
                "data"
            )
        own = find_own_data(Path(data))
        if not isinstance(plan.dataset, KeepsOwnData):
            raise InputError(f"partition = 'nodes' cannot be used with {config.dataset}")
        mapped = plan.dataset.with_own(own)
        # Of the others' data this node knows nothing, nor does it need to.
        everyone = plan.of_nodes([own.samples] * config.clients, [])
        plan = dataclasses.replace(everyone, dataset=mapped)
    device = resolve_device(config.device)
    model = initial_model(config).to(device)
    if not config.compile:
        leave_compiler_out()
    else:
        # In place: names of parameters stay as they are.
        model.compile()
    return Workplace(plan=plan, device=device, model=model, own=own)
