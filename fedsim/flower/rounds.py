"""The round loop: draw, send, fold, evaluate, write the row."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from fedsim.core.aggregation import first_not_finite, state_sha256
from fedsim.core.allocator import give_freed_memory_back
from fedsim.core.determinism import torch_threads
from fedsim.core.device import resolve_device
from fedsim.core.errors import (
    DiskFullError,
    DivergedError,
    RunFailedError,
    RunInterruptedError,
)
from fedsim.core.evaluation import evaluate, first_overflow
from fedsim.core.partition import fold_order
from fedsim.core.plan import RunPlan
from fedsim.core.rng import Purpose, global_seed
from fedsim.core.training import load_state
from fedsim.flower import messages as wire
from fedsim.flower.grid import ChosenNodes, stream_replies
from fedsim.flower.membership import membership_of
from fedsim.flower.replies import NOT_FINITE, loss_of, problem_of, problem_of_files, writable
from fedsim.flower.workers import RETRIES
from fedsim.recording.writer import RunWriter
from fedsim.tasks.vision.models import build_model
from strategies.folding import telemetry_of
from strategies.recorded import CorrectingStrategy, StatefulStrategy

State = Mapping[str, NDArray[np.generic]]

_PATIENCE = 60.0
"""Seconds on top of what two late clients take, each as often as it is repeated."""


class RunObserver(Protocol):
    """Someone who watches a run; called from the server's thread, but for warnings."""

    def warned(self, text: str) -> None:
        """Tell what the user should know, and what the run goes on without."""

    def run_started(self, plan: RunPlan, workers: int, path: Path) -> None:
        """Tell that the run directory exists and clients are being started."""

    def round_started(self, round_number: int, participants: Sequence[int]) -> None:
        """Tell who takes part."""

    def client_finished(self, row: Mapping[str, Any]) -> None:
        """Tell one client's telemetry, in folding order."""

    def client_failed(self, round_number: int, partition: int, reason: str) -> None:
        """Tell why one client failed."""

    def round_finished(self, row: Mapping[str, Any]) -> None:
        """Tell the row of a round; round 0 is the untrained model."""

    def run_finished(self, path: Path) -> None:
        """Tell that the last round is written."""


class RoundLoop:
    """The server's part of a run, over any of Flower's grids.

    Parameters
    ----------
    plan : RunPlan
        What to run.
    grid : Grid
        How to reach the clients.
    strategy : Strategy
        Any of Flower's; its sampling sees the participants only.
    writer : RunWriter
        Where rows and states go.
    observer : RunObserver
        Who watches.
    workers : int
        Clients that train at the same time; the window of messages is twice that.
    stop : threading.Event
        Set by whoever wants the run to end.
    stop_after_round : threading.Event, optional
        Set to end it once the round under way is written.
    """

    def __init__(
        self,
        plan: RunPlan,
        *,
        grid: Grid,
        strategy: Strategy,
        writer: RunWriter,
        observer: RunObserver,
        workers: int,
        stop: threading.Event,
        stop_after_round: threading.Event | None = None,
    ) -> None:
        self._plan = plan
        self._config = plan.config
        self._config_json = plan.config.to_json()
        self._run_name = writer.layout.root.resolve().name
        self._grid = grid
        self._strategy = strategy
        self._writer = writer
        self._observer = observer
        self._window = 2 * workers
        self._stop = stop
        self._stop_after_round = stop_after_round or threading.Event()
        self._suspects: dict[int, str] = {}
        self._last = ""
        self._failure: type[RunFailedError] = RunFailedError
        self._device = resolve_device(self._config.device)
        # Those that run.json tells of: they decide the last bits of an evaluation.
        self._threads = torch.get_num_threads()
        self._model = build_model(
            self._config.model,
            classes=plan.dataset.spec.classes,
            norm=self._config.norm,
            seed=self._config.seed,
        ).to(self._device)

    def run(self, *, after: int | None = None) -> None:
        """Run all rounds, or those after one that the run directory holds.

        Parameters
        ----------
        after : int, optional
            The last whole round.

        Raises
        ------
        RunFailedError
            When more clients fail than ``max-failures`` allows, or none is left.
        RunInterruptedError
            Once a stop event is set.
        """
        membership = membership_of(
            self._grid,
            clients=self._config.clients,
            stop=self._stop,
            tell=self._observer.warned,
        )
        membership.wait_for_all(self._config.node_timeout)
        if after is None:
            state: State = self._plan.initial_state
            self._writer.add_state(0, state)
            self._close_round(0, [], [], state, time.perf_counter(), clients_seconds=0.0)
        else:
            state = self._writer.state(after)
            # Round 0 trains nobody: what is kept begins with the next one.
            kept = self._writer.strategy_state(after) if after else {}
            if kept and isinstance(self._strategy, StatefulStrategy):
                self._strategy.load_state_arrays(kept)
        for number in range(1 + (after or 0), self._config.rounds + 1):
            if self._stop_after_round.is_set():
                raise RunInterruptedError(f"stopped after round {number - 1}")
            started = time.perf_counter()
            participants = self._config.participants_of(number)
            self._writer.begin_round(number, len(participants))
            self._observer.round_started(number, participants)
            nodes = membership.nodes_of(
                participants,
                spare=self._config.max_failures,
                patience=self._config.node_timeout,
            )
            failed: list[int] = []
            arrays, _ = self._strategy.aggregate_train(
                number, self._replies(number, participants, nodes, state, failed)
            )
            if arrays is None and len(failed) < len(participants):
                raise RunFailedError(
                    f"the strategy made no model of what {len(participants) - len(failed)} of "
                    f"{len(participants)} clients returned in round {number}"
                )
            if arrays is None:
                raise self._failure(f"no client of round {number} returned a model{self._last}")
            state = wire.state_of(arrays)
            del arrays
            if layer := self._not_finite(state):
                raise self._diverged(number, f"{layer} of the global state is not finite")
            seconds = time.perf_counter() - started
            self._close_round(number, participants, failed, state, started, seconds)

    def _replies(
        self,
        number: int,
        participants: Sequence[int],
        nodes: Mapping[int, int],
        state: State,
        failed: list[int],
    ) -> Iterator[Message]:
        order = fold_order(participants, self._plan.sizes)
        messages = self._messages(number, order, nodes, state)
        limit = self._config.client_timeout
        replies = stream_replies(
            self._grid,
            messages,
            window=self._window,
            stop=self._stop,
            # Whoever runs the clients answers for late ones; this is for when nobody does.
            patience=None if limit is None else 2 * (1 + RETRIES) * limit + _PATIENCE,
        )
        self._suspects = {}
        self._failure = DivergedError
        for partition in order:
            reply = next(replies)
            reason = problem_of(
                reply,
                state,
                partition=partition,
                num_samples=self._plan.sizes[partition],
                config=self._config,
                folder=self._writer.layout.client(number, partition),
            )
            reason = reason or problem_of_files(reply, self._plan, partition)
            if reason is None:
                row = telemetry_of(reply)
                if loss := loss_of(row):
                    self._suspects[partition] = loss
                yield reply
                # After the strategy has folded and written it: what is told is done.
                del reply
                self._observer.client_finished({"round": number, **row})
            else:
                self._fail(number, partition, writable(reason), failed)

    def _fail(self, number: int, partition: int, reason: str, failed: list[int]) -> None:
        if self._stop.is_set():
            # Ctrl-C reaches the workers too: their complaint is not the cause.
            raise RunInterruptedError("interrupted")
        failed.append(partition)
        self._writer.add_failure(
            {"round": number, "partition": partition, "status": "failed", "error": reason}
        )
        last = reason.splitlines()[-1].strip()
        self._last = f"; the last that failed was client {partition}: {last}"
        if NOT_FINITE not in last:
            self._failure = RunFailedError
        if wire.DISK_FULL in last:
            # However many failures are allowed: the next client fares no better.
            raise DiskFullError(
                f"the disk of {self._writer.layout.root} is full: client {partition} of round "
                f"{number} has no room for its gradients; the rounds before are kept"
            )
        self._observer.client_failed(number, partition, reason)
        if len(failed) > self._config.max_failures:
            raise self._failure(
                f"client {partition} failed in round {number} "
                f"(max-failures = {self._config.max_failures}): {last}"
            )

    def _not_finite(self, state: State) -> str | None:
        return None if self._config.allow_divergence else first_not_finite(state)

    def _diverged(self, number: int, what: str) -> DivergedError:
        # The first in the order of folding, which does not depend on who came first.
        who = next((f" (client {p}{loss})" for p, loss in self._suspects.items()), "")
        return DivergedError(
            f"round {number} diverged: {what}{who}; the rounds before are kept, and "
            "`--allow-divergence` goes on"
        )

    def _messages(
        self, number: int, order: Sequence[int], nodes: Mapping[int, int], state: State
    ) -> Sequence[Message]:
        """Let the strategy make the messages; each client's own are added as it is its turn."""
        with global_seed(self._config.seed, Purpose.MESSAGES, number):
            made = list(
                self._strategy.configure_train(
                    number,
                    wire.array_record(state),
                    ConfigRecord(),
                    ChosenNodes(self._grid, [nodes[p] for p in order]),
                )
            )
        by_node = {message.metadata.dst_node_id: message for message in made}
        for partition in order:
            if nodes[partition] not in by_node:
                raise RunFailedError(
                    f"the strategy made no message for client {partition} of round {number}; it "
                    "must make one for each of its participants"
                )
        return _Lazily(order, lambda p: self._addressed(by_node[nodes[p]], number, p))

    def _addressed(self, message: Message, number: int, partition: int) -> Message:
        # All messages of a strategy share one RecordDict; settings of one client need their own.
        arrays = next(iter(message.content.array_records.values()))
        config = ConfigRecord(dict(next(iter(message.content.config_records.values()))))
        config.update(
            wire.train_config(
                self._config_json,
                round_number=number,
                partition=partition,
                partition_sha256=self._plan.partition_sha256,
                run=self._run_name,
                run_id=self._writer.run_id,
                data_sha256=self._plan.nodes[partition]["sha256"] if self._plan.nodes else None,
            )
        )
        content = RecordDict({wire.ARRAYS: arrays, wire.CONFIG: config})
        if isinstance(self._strategy, CorrectingStrategy):
            content[wire.CORRECTION] = wire.array_record(self._strategy.correction(partition))
        return Message(content, message.metadata.dst_node_id, message.metadata.message_type)

    def _close_round(
        self,
        number: int,
        participants: Sequence[int],
        failed: Sequence[int],
        state: State,
        started: float,
        clients_seconds: float,
    ) -> None:
        loss = accuracy = None
        evaluating = time.perf_counter()
        if number % self._config.evaluate_every == 0 or number == self._config.rounds:
            load_state(self._model, state)
            data = self._plan.dataset
            with torch_threads(self._threads):
                outcome = evaluate(
                    self._model, data.test_images, data.test_labels, data.spec, device=self._device
                )
            loss, accuracy = outcome.loss, outcome.accuracy
            if not math.isfinite(loss) and not self._config.allow_divergence:
                layer = first_overflow(self._model, data.test_images, data.spec, self._device)
                where = f": {layer} overflows" if layer else ""
                raise self._diverged(number, f"the global loss is not finite{where}")
            give_freed_memory_back()
        evaluated = time.perf_counter()
        row = {
            "round": number,
            "participants": list(participants),
            "failed": list(failed),
            "global_loss": loss,
            "global_accuracy": accuracy,
            "state_sha256": state_sha256(state),
            "seconds": {
                "clients": clients_seconds,
                "evaluate": evaluated - evaluating,
                "total": time.perf_counter() - started,
            },
        }
        self._writer.add_round(row)
        self._observer.round_finished(row)


class _Lazily(Sequence[Message]):
    """Messages that are made when they are asked for: each may be as large as two models."""

    def __init__(self, partitions: Sequence[int], make: Callable[[int], Message]) -> None:
        self._partitions = partitions
        self._make = make

    def __len__(self) -> int:
        return len(self._partitions)

    def __getitem__(self, position: Any) -> Any:
        return self._make(self._partitions[position])
