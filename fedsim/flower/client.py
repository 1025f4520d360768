"""The client: a NumPyClient around local training."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from logging import WARNING
from pathlib import Path

import numpy as np
import torch
from flwr.client import NumPyClient
from flwr.common import NDArrays, Scalar
from flwr.common.logger import log
from flwr.supercore.differential_privacy import (
    KEY_CLIPPING_NORM,
    KEY_NORM_BIT,
    compute_adaptive_clip_model_update,
)
from torch import nn

from fedsim.core.allocator import keep_freed_memory
from fedsim.core.arithmetic import training_arithmetic
from fedsim.core.behavior import behavior_of
from fedsim.core.capture import Capture
from fedsim.core.config import MOST_TOML_BYTES, RunConfig
from fedsim.core.determinism import use_deterministic
from fedsim.core.device import resolve_device
from fedsim.core.errors import DiskFullError, InputError, shorten
from fedsim.core.evaluation import evaluate
from fedsim.core.own_data import OwnData, find_own_data
from fedsim.core.plan import RunPlan, batches_of_round
from fedsim.core.schedule import rates_of
from fedsim.core.startup import leave_compiler_out
from fedsim.core.task import KeepsOwnData, classes_of, initial_model, labels_of, rows_of
from fedsim.core.training import Arrays, Step, load_state, local_train
from fedsim.flower import messages
from fedsim.flower.node import NodeSettings
from fedsim.flower.scratch import stack_when_late
from fedsim.recording.files import DISK_FULL
from fedsim.recording.layout import RunLayout
from fedsim.recording.places import Place, place_of_run
from fedsim.recording.recorder import FirstStepNorms, StepRecorder

_ENVELOPE = 256
"""Bytes of an array in a message beyond its data: the header of ``numpy.save``."""


@dataclass(frozen=True)
class _Workplace:
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
def _workplace(run_config: str, data_root: str | None, data: str | None) -> _Workplace:
    # Where data is on this host is nothing that a server could know, or may choose.
    config = RunConfig.from_json(run_config).model_copy(update={"data_root": data_root})
    keep_freed_memory()
    torch.set_num_threads(config.client_cpus)
    use_deterministic(config.deterministic)
    plan = RunPlan.prepare(config)
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
    return _Workplace(plan=plan, device=device, model=model, own=own)


class FedSimClient(NumPyClient):
    """One client: a partition of the training split, trained on when asked.

    Parameters
    ----------
    node : NodeSettings
        Which partition this client holds, where its data is, where it may record.
    run_config : str
        Configuration as JSON, used where a message carries none.
    """

    def __init__(self, node: NodeSettings, run_config: str) -> None:
        self.partition = node.partition_id
        self._node = node
        self._run_config = run_config

    def check_sizes(self, asked: messages.Instruction) -> None:
        """Refuse arrays of a message that are larger than the model of the run, undecoded.

        Raises
        ------
        InputError
            With the record and both numbers of bytes.
        """
        state = self._workplace(asked.config).plan.initial_state
        # Some of Flower's strategies send what was float32 as float64.
        most = sum(8 * array.size + _ENVELOPE for array in state.values())
        for name, record in asked.records.items():
            if (found := sum(len(array.data) for array in record.values())) > most:
                raise InputError(
                    f"the message brings {found:,} bytes of {shorten(name)}; expected what the "
                    f"model of the run has, at most {most:,} bytes"
                )

    def get_parameters(self, config: dict[str, Scalar]) -> NDArrays:
        """Give the untrained model, ``state_dict`` order."""
        return list(self._workplace(config).plan.initial_state.values())

    def fit(
        self, parameters: NDArrays, config: dict[str, Scalar]
    ) -> tuple[NDArrays, int, dict[str, Scalar]]:
        """Train the given model on this client's samples for a round.

        Parameters
        ----------
        parameters : list of ndarray
            The global state, ``state_dict`` order.
        config : dict
            ``server-round``; ``config`` (the run's configuration as JSON); ``run`` and
            ``run-id``, which run to record, or nothing; ``partition``, whom the server means;
            ``dataset-sha256`` and ``partition-sha256``, what it trains on; ``proximal-mu``, the
            factor of a proximal term; ``clipping_norm``, the largest norm of an update, for
            differential privacy.

        Returns
        -------
        tuple of (list of ndarray, int, dict)
            The local state, the number of this client's samples, and ``loss`` with the
            telemetry as JSON; with a clipping norm also ``norm_bit``, 1 where it was exceeded.

        Raises
        ------
        InputError
            When the message is meant for another partition, or asks for what this node refuses.
        DiskFullError
            When there is no room for what is to be recorded.
        """
        return self.train(parameters, config, None)

    def train(
        self,
        parameters: NDArrays,
        config: dict[str, Scalar],
        correction: Arrays | None,
    ) -> tuple[NDArrays, int, dict[str, Scalar]]:
        """Do what `fit` does, adding `correction` to every gradient of a parameter.

        Parameters
        ----------
        parameters, config : list of ndarray, dict
            As for `fit`.
        correction : dict of str to ndarray or None
            By the name of the parameter.
        """
        try:
            return self._train(parameters, config, correction)
        except OSError as error:
            if error.errno in DISK_FULL:
                # Without a chain: this line is the last one of what the server reads.
                raise DiskFullError(f"{messages.DISK_FULL}: {error}") from None
            raise

    def _train(
        self, parameters: NDArrays, config: dict[str, Scalar], correction: Arrays | None
    ) -> tuple[NDArrays, int, dict[str, Scalar]]:
        addressed = int(config.get(messages.PARTITION, self.partition))
        if addressed != self.partition:
            raise InputError(f"a message for client {addressed} reached client {self.partition}")
        workplace = self._workplace(config)
        plan, round_number = workplace.plan, int(config.get(messages.ROUND, 1))
        self._check_data(workplace, config)
        indices = plan.partition[self.partition]
        settings = plan.config.training_of(self.partition)
        place = self._place(config)
        captures, refusal = self._allowed(plan.config.captures)
        proximal_mu = float(config.get(messages.PROXIMAL_MU, 0.0))
        started = time.perf_counter()
        batches = batches_of_round(
            plan.config,
            plan.task,
            plan.dataset,
            indices,
            round_number=round_number,
            partition=self.partition,
            device=workplace.device,
        )
        state = dict(zip(plan.initial_state, parameters, strict=True))
        behavior = behavior_of(plan.config, self.partition, round_number)
        norms = FirstStepNorms()
        recorder: StepRecorder | None = None
        with contextlib.ExitStack() as stack:
            stack.enter_context(stack_when_late(self.partition, plan.config.client_timeout))
            observers: list[Callable[[Step], None]] = [norms]
            if place is not None:
                recorder = StepRecorder(
                    RunLayout(place.root).client(round_number, self.partition),
                    captures,
                    num_steps=settings.num_steps(len(indices)),
                    shapes=plan.parameters,
                    model=workplace.model,
                )
                observers.append(stack.enter_context(recorder))

            def observe(step: Step) -> None:
                for observer in observers:
                    observer(step)

            result = local_train(
                plan.task,
                workplace.model,
                state,
                batches,
                settings.optimizer,
                observe,
                autocast=plan.config.autocast,
                proximal_mu=proximal_mu,
                correction=correction,
                rates=rates_of(plan.config, self.partition, round_number, len(indices)),
            )
        sent = behavior.update(state, result.state)
        seconds = dict(result.seconds)
        if recorder is not None:
            seconds["capture"] -= recorder.seconds_waited
            seconds["write"] = recorder.seconds_waited + recorder.seconds_closing
        telemetry = {
            "partition": self.partition,
            "status": "ok",
            "num_samples": len(indices),
            "local_epochs": settings.local_epochs,
            "local_steps": settings.local_steps,
            "batch_size": settings.batch_size,
            "learning_rate": settings.optimizer.learning_rate,
            "loss_history": result.losses,
            "local_loss": result.mean_loss,
            "batch_sizes": result.batch_sizes,
            "gradient_norm": math.hypot(*norms.per_layer.values()),
            "per_layer_norms": norms.per_layer,
            "num_steps": len(result.losses),
            "num_steps_captured": recorder.num_steps_captured if recorder else 0,
            "bytes_captured": recorder.bytes_captured if recorder else 0,
            "files": {name: c.to_json() for name, c in recorder.files.items()} if recorder else {},
            "class_distribution": np.bincount(
                labels_of(plan.dataset)[indices], minlength=classes_of(plan.dataset.spec)
            ).tolist(),
            "seconds": {"write": 0.0, **seconds, "total": time.perf_counter() - started},
            "peak_memory": _peak_memory(workplace.device),
        }
        if not plan.config.compile:
            # What the compiler makes differs from machine to machine, and its first call is dear.
            telemetry["arithmetic"] = workplace.arithmetic(settings.batch_size)
        if plan.config.autocast == "float16":
            telemetry["num_updates"] = result.num_updates
        if proximal_mu:
            telemetry["proximal_mu"] = proximal_mu
        if (what := behavior.explain()) is not None:
            telemetry["behavior"] = what
        if messages.RUN_ID in config:
            telemetry |= _about(place, refusal)
        metrics: dict[str, Scalar] = {
            messages.LOSS: telemetry["local_loss"],
            messages.TELEMETRY: messages.telemetry_json(telemetry),
        }
        if KEY_CLIPPING_NORM in config:
            clipping_norm = float(config[KEY_CLIPPING_NORM])
            metrics[KEY_NORM_BIT] = _clip(sent, state, list(plan.parameters), clipping_norm)
        return [sent[name] for name in state], len(indices), metrics

    def evaluate(
        self, parameters: NDArrays, config: dict[str, Scalar]
    ) -> tuple[float, int, dict[str, Scalar]]:
        """Evaluate the given model on this client's own samples, unaugmented."""
        workplace = self._workplace(config)
        plan = workplace.plan
        rows = torch.from_numpy(plan.partition[self.partition])
        load_state(workplace.model, dict(zip(plan.initial_state, parameters, strict=True)))
        outcome = evaluate(
            plan.task,
            workplace.model,
            rows_of(plan.dataset.train(), rows),
            device=workplace.device,
        )
        metrics: dict[str, Scalar] = {n: m for n, m in outcome.means.items() if n != "loss"}
        return outcome.loss, outcome.num_samples, metrics

    def _workplace(self, config: Mapping[str, Scalar]) -> _Workplace:
        run_config = str(config.get(messages.RUN_CONFIG) or self._run_config)
        if len(run_config) > MOST_TOML_BYTES:
            raise InputError(
                f"the message brings a configuration of {len(run_config):,} bytes; expected "
                f"at most {MOST_TOML_BYTES:,}"
            )
        return _workplace(run_config, self._node.data_root, self._node.data)

    def _check_data(self, workplace: _Workplace, config: Mapping[str, Scalar]) -> None:
        """Refuse to train on other samples than those that the server speaks of."""
        plan, own = workplace.plan, workplace.own
        if self.partition >= plan.config.clients:
            raise InputError(
                f"this node holds partition {self.partition}; the run has 0 to "
                f"{plan.config.clients - 1}"
            )
        if own is not None:
            if config.get(messages.DATA_SHA256, own.sha256) != own.sha256:
                raise InputError("the data of this node has changed since the run began")
            return
        told = config.get(messages.PARTITION_SHA256)
        if told is not None and told != plan.partition_sha256:
            raise InputError(
                f"this node deals the samples of {plan.config.dataset} otherwise than the server: "
                f"the versions of numpy differ, which here is {np.__version__}, or the data does"
            )

    def _place(self, config: Mapping[str, Scalar]) -> Place | None:
        """Find where to record the run of a message; None where there is none, or no place."""
        if messages.RUN_ID not in config or self._node.recordings is None:
            return None
        name, run_id = str(config.get(messages.RUN, "")), str(config[messages.RUN_ID])
        return place_of_run(Path(self._node.recordings), name, run_id)

    def _allowed(self, captures: Sequence[Capture]) -> tuple[Sequence[Capture], str | None]:
        """Give what this node captures of what is asked for, and why not all of it."""
        without_files = [capture for capture in captures if not capture.keeps_files]
        if self._node.capture or len(without_files) == len(captures):
            return captures, None
        return without_files, messages.CAPTURE_REFUSED


def _about(place: Place | None, refusal: str | None) -> dict[str, str]:
    """Say in telemetry where the files of a client are, and why there are no gradients."""
    about = {}
    if place is None or not place.is_run:
        about["place"] = "none" if place is None else "node"
    if refusal is not None:
        log(WARNING, "fedsim: %s", refusal)
        about["not_captured"] = refusal
    return about


def _clip(local: Arrays, start: Arrays, names: list[str], clipping_norm: float) -> int:
    """Clip the update of the parameters in place; say 1 if that made it smaller.

    Flower's own mod for it takes buffers for parameters.
    """
    after = [local[name] for name in names]
    before = [start[name] for name in names]
    if all(np.array_equal(*pair) for pair in zip(after, before, strict=True)):
        # Flower divides by the norm.
        return 0
    shrunk = compute_adaptive_clip_model_update(after, before, clipping_norm)
    local.update(zip(names, after, strict=True))
    return int(shrunk)


def _peak_memory(device: torch.device) -> dict[str, int]:
    """Peak bytes of this worker process so far, and of its GPU where it has one."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak
