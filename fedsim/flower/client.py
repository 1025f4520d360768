"""The client: a NumPyClient around local training."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import torch
from flwr.client import NumPyClient
from flwr.common import NDArrays, Scalar
from flwr.supercore.differential_privacy import (
    KEY_CLIPPING_NORM,
    KEY_NORM_BIT,
    compute_adaptive_clip_model_update,
)

from fedsim.core.behavior import behavior_of
from fedsim.core.client_evaluation import evaluate_client
from fedsim.core.config import MOST_TOML_BYTES
from fedsim.core.errors import DiskFullError, InputError, shorten
from fedsim.core.evaluation import evaluate
from fedsim.core.plan import batches_of_round
from fedsim.core.schedule import rates_of
from fedsim.core.task import rows_of
from fedsim.core.training import Arrays, load_state, local_train
from fedsim.flower import messages
from fedsim.flower.node import NodeSettings
from fedsim.flower.recorder import ClientRecorder
from fedsim.flower.scratch import stack_when_late
from fedsim.flower.telemetry import telemetry
from fedsim.flower.workplace import Workplace, workplace_of
from fedsim.recording.files import DISK_FULL

_ENVELOPE = 256
"""Bytes of an array in a message beyond its data: the header of ``numpy.save``."""


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
                    f"the message has {found:,} bytes of {shorten(name)}; expected what the "
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
        proximal_mu = float(config.get(messages.PROXIMAL_MU, 0.0))
        recorder = ClientRecorder(
            self._node,
            config,
            workplace,
            round_number=round_number,
            num_steps=settings.num_steps(len(indices)),
        )
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
        with stack_when_late(self.partition, plan.config.client_timeout):
            evaluation = evaluate_client(
                plan.config,
                plan.task,
                workplace.model,
                plan.dataset,
                indices,
                state,
                client=self.partition,
                round_number=round_number,
            )
            with recorder:
                result = local_train(
                    plan.task,
                    workplace.model,
                    state,
                    batches,
                    settings.optimizer,
                    recorder,
                    autocast=plan.config.autocast,
                    proximal_mu=proximal_mu,
                    correction=correction,
                    rates=rates_of(plan.config, self.partition, round_number, len(indices)),
                )
        sent = behavior.update(state, result.state)
        told = telemetry(
            workplace,
            self.partition,
            result,
            recorder,
            proximal_mu=proximal_mu,
            behavior=behavior.explain(),
            evaluation=evaluation,
            seconds=time.perf_counter() - started,
        )
        metrics: dict[str, Scalar] = {
            messages.LOSS: result.mean_loss,
            messages.TELEMETRY: messages.telemetry_json(told),
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

    def _workplace(self, config: Mapping[str, Scalar]) -> Workplace:
        run_config = str(config.get(messages.RUN_CONFIG) or self._run_config)
        if len(run_config) > MOST_TOML_BYTES:
            raise InputError(
                f"the message has a configuration of {len(run_config):,} bytes; expected "
                f"at most {MOST_TOML_BYTES:,}"
            )
        return workplace_of(run_config, self._node.data_root, self._node.data)

    def _check_data(self, workplace: Workplace, config: Mapping[str, Scalar]) -> None:
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
