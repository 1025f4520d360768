"""The client: a NumPyClient around local training, served to both of Flower's APIs."""

from __future__ import annotations

import contextlib
import functools
import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.client import Client, NumPyClient
from flwr.client.message_handler.message_handler import handle_legacy_message_from_msgtype
from flwr.clientapp import ClientApp
from flwr.common import NDArrays, Scalar
from flwr.supercore.differential_privacy import (
    KEY_CLIPPING_NORM,
    KEY_NORM_BIT,
    compute_adaptive_clip_model_update,
)
from torch import nn

from fedsim.core.allocator import keep_freed_memory
from fedsim.core.config import RunConfig
from fedsim.core.determinism import use_deterministic
from fedsim.core.errors import DiskFullError
from fedsim.core.evaluation import evaluate
from fedsim.core.models import build_model, resolve_device
from fedsim.core.plan import RunPlan, batches_of_round
from fedsim.core.sketch import Sketcher
from fedsim.core.training import Arrays, Step, load_state, local_train
from fedsim.flower import messages
from fedsim.flower.run_config import config_from_run_config
from fedsim.flower.scratch import stack_when_late
from fedsim.recording.files import DISK_FULL
from fedsim.recording.gradients import FirstStepNorms, StepRecorder
from fedsim.recording.layout import RunLayout


@dataclass(frozen=True)
class _Workplace:
    """What a worker process keeps between clients of the same run."""

    plan: RunPlan
    device: torch.device
    model: nn.Module
    sketcher: Sketcher | None


@functools.lru_cache(maxsize=1)
def _workplace(run_config: str) -> _Workplace:
    config = RunConfig.from_json(run_config)
    keep_freed_memory()
    torch.set_num_threads(config.client_cpus)
    use_deterministic(config.deterministic)
    plan = RunPlan.prepare(config)
    device = resolve_device(config.device)
    model = build_model(
        config.model, classes=plan.dataset.spec.classes, norm=config.norm, seed=config.seed
    ).to(device)
    if config.compile:
        # In place: names of parameters stay as they are.
        model.compile()
    sketcher = None
    if config.policy.steps == "sketch":
        positions = {name: position for position, name in enumerate(plan.parameters)}
        sketcher = Sketcher(config.seed, config.policy.count, positions)
    return _Workplace(plan=plan, device=device, model=model, sketcher=sketcher)


class FedSimClient(NumPyClient):
    """One client: a partition of the training split, trained on when asked.

    Parameters
    ----------
    partition : int
        The partition that this client holds.
    run_config : str
        Configuration as JSON, used where a message carries none.
    """

    def __init__(self, partition: int, run_config: str) -> None:
        self.partition = partition
        self._run_config = run_config

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
            ``server-round``; ``config`` (the run's configuration as JSON); ``run-folder``,
            where gradients are recorded, or empty; ``partition``, whom the server means;
            ``proximal-mu``, the factor of FedProx's term; ``clipping_norm``, the largest norm
            of an update, for differential privacy.

        Returns
        -------
        tuple of (list of ndarray, int, dict)
            The local state, the number of this client's samples, and ``loss`` with the
            telemetry as JSON; with a clipping norm also ``norm_bit``, 1 where it was exceeded.

        Raises
        ------
        ValueError
            When the message is meant for another partition.
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
            Of SCAFFOLD.
        """
        addressed = int(config.get(messages.PARTITION, self.partition))
        if addressed != self.partition:
            raise ValueError(f"a message for client {addressed} reached client {self.partition}")
        workplace = self._workplace(config)
        plan, round_number = workplace.plan, int(config.get(messages.ROUND, 1))
        indices = plan.partition[self.partition]
        settings = plan.config.training_of(self.partition)
        folder = str(config.get(messages.RUN_FOLDER, ""))
        proximal_mu = float(config.get(messages.PROXIMAL_MU, 0.0))
        started = time.perf_counter()
        batches = batches_of_round(
            plan.config,
            plan.dataset,
            indices,
            round_number=round_number,
            partition=self.partition,
            device=workplace.device,
        )
        state = dict(zip(plan.initial_state, parameters, strict=True))
        norms = FirstStepNorms()
        recorder: StepRecorder | None = None
        with contextlib.ExitStack() as stack:
            stack.enter_context(stack_when_late(self.partition, plan.config.client_timeout))
            observers: list[Callable[[Step], None]] = [norms]
            if folder:
                recorder = StepRecorder(
                    RunLayout(Path(folder)).client(round_number, self.partition),
                    plan.config.policy,
                    num_steps=settings.num_steps(len(indices)),
                    shapes=plan.parameters,
                    statistics=plan.config.gradient_statistics,
                    sketcher=workplace.sketcher,
                )
                observers.append(stack.enter_context(recorder))

            def observe(step: Step) -> None:
                for observer in observers:
                    observer(step)

            result = local_train(
                workplace.model,
                state,
                batches,
                settings.optimizer,
                observe,
                autocast=plan.config.autocast,
                proximal_mu=proximal_mu,
                correction=correction,
            )
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
            "local_loss": _weighted_mean(result.losses, result.batch_sizes),
            "batch_sizes": result.batch_sizes,
            "gradient_norm": math.hypot(*norms.per_layer.values()),
            "per_layer_norms": norms.per_layer,
            "num_steps": len(result.losses),
            "num_steps_captured": recorder.num_steps_captured if recorder else 0,
            "bytes_captured": recorder.bytes_captured if recorder else 0,
            "files": {name: c.to_json() for name, c in recorder.files.items()} if recorder else {},
            "class_distribution": np.bincount(
                plan.dataset.train_labels.numpy()[indices], minlength=plan.dataset.spec.classes
            ).tolist(),
            "seconds": {"write": 0.0, **seconds, "total": time.perf_counter() - started},
            "peak_memory": _peak_memory(workplace.device),
        }
        if proximal_mu:
            telemetry["proximal_mu"] = proximal_mu
        metrics: dict[str, Scalar] = {
            "loss": telemetry["local_loss"],
            messages.TELEMETRY: messages.telemetry_json(telemetry),
        }
        if KEY_CLIPPING_NORM in config:
            clipping_norm = float(config[KEY_CLIPPING_NORM])
            metrics[KEY_NORM_BIT] = _clip(result.state, state, list(plan.parameters), clipping_norm)
        return list(result.state.values()), len(indices), metrics

    def evaluate(
        self, parameters: NDArrays, config: dict[str, Scalar]
    ) -> tuple[float, int, dict[str, Scalar]]:
        """Evaluate the given model on this client's own samples, unaugmented."""
        workplace = self._workplace(config)
        plan = workplace.plan
        rows = torch.from_numpy(plan.partition[self.partition])
        load_state(workplace.model, dict(zip(plan.initial_state, parameters, strict=True)))
        outcome = evaluate(
            workplace.model,
            plan.dataset.train_images[rows],
            plan.dataset.train_labels[rows],
            plan.dataset.spec,
            device=workplace.device,
        )
        return outcome.loss, outcome.num_samples, {"accuracy": outcome.accuracy}

    def _workplace(self, config: dict[str, Scalar]) -> _Workplace:
        return _workplace(str(config.get(messages.RUN_CONFIG) or self._run_config))


def _clip(local: Arrays, start: Arrays, names: list[str], clipping_norm: float) -> int:
    """Clip the update of the parameters in place; say 1 if that made it smaller.

    Flower's own mod for it takes buffers for parameters.
    """
    after = [local[name] for name in names]
    before = [start[name] for name in names]
    shrunk = compute_adaptive_clip_model_update(after, before, clipping_norm)
    local.update(zip(names, after, strict=True))
    return int(shrunk)


def _weighted_mean(values: list[float], weights: list[int]) -> float:
    return float(np.average(values, weights=weights))


def _peak_memory(device: torch.device) -> dict[str, int]:
    """Peak bytes of this worker process so far, and of its GPU where it has one."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak


class FedSimClientApp(ClientApp):
    """A ClientApp that answers both the Message API and the former client API."""

    def __call__(self, message: Message, context: Context) -> Message:
        """Route a message by the records it carries."""
        if message.has_content() and messages.is_legacy(message.content):
            return handle_legacy_message_from_msgtype(_former_client, message, context)
        return super().__call__(message, context)


app = FedSimClientApp()


def _client_of(context: Context) -> FedSimClient:
    run_config = config_from_run_config(context.run_config).to_json()
    return FedSimClient(int(context.node_config["partition-id"]), run_config)


def _former_client(context: Context) -> Client:
    return _client_of(context).to_client()


def _scalars(record: ConfigRecord) -> dict[str, Scalar]:
    return {key: value for key, value in record.items() if not isinstance(value, list)}


@app.query()
def query(message: Message, context: Context) -> Message:
    """Say which partition this node holds."""
    partition = int(context.node_config["partition-id"])
    content = RecordDict({messages.METRICS: MetricRecord({messages.PARTITION: partition})})
    return Message(content, reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Decode a training message, delegate to `FedSimClient.fit`, encode the reply."""
    record = message.content.array_records[messages.ARRAYS]
    config = _scalars(message.content.config_records[messages.CONFIG])
    added = message.content.array_records.get(messages.CORRECTION)
    correction = None if added is None else messages.state_of(added)
    try:
        arrays, num_examples, metrics = _client_of(context).train(
            list(messages.state_of(record).values()), config, correction
        )
    except OSError as error:
        if error.errno in DISK_FULL:
            # Without a chain: this line is the last one of what the server reads.
            raise DiskFullError(f"{messages.DISK_FULL}: {error}") from None
        raise
    local = messages.array_record(dict(zip(record, arrays, strict=True)))
    return Message(messages.reply_content(local, num_examples, metrics), reply_to=message)


@app.evaluate()
def evaluate_message(message: Message, context: Context) -> Message:
    """Decode an evaluation message, delegate to `FedSimClient.evaluate`, encode the reply."""
    record = message.content.array_records[messages.ARRAYS]
    config = _scalars(message.content.config_records[messages.CONFIG])
    loss, num_examples, metrics = _client_of(context).evaluate(
        list(messages.state_of(record).values()), config
    )
    content = messages.reply_content(None, num_examples, {"loss": loss, **metrics})
    return Message(content, reply_to=message)
