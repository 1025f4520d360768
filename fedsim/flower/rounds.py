"""The round loop: draw, send, fold, evaluate, write the row."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

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
from fedsim.core.task import initial_model
from fedsim.core.training import load_state
from fedsim.flower import messages as wire
from fedsim.flower.grid import ChosenNodes, stream_replies
from fedsim.flower.membership import membership_of
from fedsim.flower.messages import State
from fedsim.flower.replies import NOT_FINITE, UnusableReplyError, accept, loss_of
from fedsim.flower.workers import RETRIES
from fedsim.recording.writer import RunWriter
from strategies.recorded import CorrectingStrategy, StatefulStrategy

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


@dataclass
class RoundOutcome:
    """What became of the clients of a round, in the order of folding.

    Parameters
    ----------
    number : int
        The round; 0 is the untrained model.
    participants : sequence of int
        The clients that were drawn.

    Attributes
    ----------
    failed : list of int
        Those whose reply was not folded.
    last : str
        The cause of the last of them.
    failure : type of RunFailedError
        What ends the run if these failures do: `DivergedError` where nothing else went wrong.
    suspects : dict of int to str
        Clients whose loss stopped to be finite, with the words that tell where.
    """

    number: int
    participants: Sequence[int]
    failed: list[int] = field(default_factory=list)
    last: str = ""
    failure: type[RunFailedError] = DivergedError
    suspects: dict[int, str] = field(default_factory=dict)

    def add(self, client: int, answer: wire.Reply | str) -> None:
        """Take a client's reply, or why it failed."""
        if isinstance(answer, wire.Reply):
            if loss := loss_of(answer.telemetry):
                self.suspects[client] = loss
            return
        self.failed.append(client)
        self.last = answer.splitlines()[-1].strip()
        if NOT_FINITE not in self.last:
            self.failure = RunFailedError

    def without_model(self) -> RunFailedError:
        """Give the error of a round whose strategy made no model."""
        good = len(self.participants) - len(self.failed)
        if good:
            return RunFailedError(
                f"the strategy made no model of what {good} of {len(self.participants)} clients "
                f"returned in round {self.number}"
            )
        return self.failure(
            f"no client of round {self.number} returned a model; the last that failed was client "
            f"{self.failed[-1]}: {self.last}"
        )

    def diverged(self, what: str) -> DivergedError:
        """Give the error of a round that diverged, with the first client that did."""
        client, loss = next(iter(self.suspects.items()), (None, ""))
        who = "" if client is None else f" (client {client}{loss})"
        return DivergedError(
            f"round {self.number} diverged: {what}{who}; the rounds before are kept, and "
            "`--allow-divergence` goes on"
        )


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
        Set to end the run.
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
        self._device = resolve_device(self._config.device)
        # Those in run.json: they decide the last bits of an evaluation.
        self._threads = torch.get_num_threads()
        self._model = initial_model(self._config).to(self._device)

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
            self._close_round(RoundOutcome(0, []), state, time.perf_counter(), 0.0)
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
            outcome = RoundOutcome(number, participants)
            arrays, _ = self._strategy.aggregate_train(number, self._replies(outcome, nodes, state))
            if arrays is None:
                raise outcome.without_model()
            state = wire.state_of(arrays)
            del arrays
            if layer := self._not_finite(state):
                raise outcome.diverged(f"{layer} of the global state is not finite")
            seconds = time.perf_counter() - started
            self._close_round(outcome, state, started, seconds)

    def _replies(
        self, outcome: RoundOutcome, nodes: Mapping[int, int], state: State
    ) -> Iterator[wire.Reply]:
        """Yield what the strategy is to fold, and keep in `outcome` the result of each client."""
        for client, answer in self._answers(outcome, nodes, state):
            outcome.add(client, answer)
            if isinstance(answer, wire.Reply):
                telemetry = answer.telemetry
                yield answer
                # The next reply is decoded before this name is bound again.
                del answer
                # After the strategy has folded and written it: what is told is done.
                self._observer.client_finished({"round": outcome.number, **telemetry})
            else:
                self._fail(outcome, client, answer)

    def _answers(
        self, outcome: RoundOutcome, nodes: Mapping[int, int], state: State
    ) -> Iterator[tuple[int, wire.Reply | str]]:
        """Yield each client with its reply, or with why that cannot be folded."""
        number = outcome.number
        order = fold_order(outcome.participants, self._plan.sizes)
        limit = self._config.client_timeout
        replies = stream_replies(
            self._grid,
            self._messages(number, order, nodes, state),
            window=self._window,
            stop=self._stop,
            # The engine ends late clients itself; this is for when nobody does.
            patience=None if limit is None else 2 * (1 + RETRIES) * limit + _PATIENCE,
        )
        for client in order:
            try:
                yield (
                    client,
                    accept(
                        next(replies),
                        state,
                        partition=client,
                        num_samples=self._plan.sizes[client],
                        most=(self._plan.most_files_of(client), self._plan.most_bytes_of(client)),
                        config=self._config,
                        folder=self._writer.layout.client(number, client),
                    ),
                )
            except UnusableReplyError as error:
                yield client, wire.writable(str(error))

    def _fail(self, outcome: RoundOutcome, client: int, reason: str) -> None:
        if self._stop.is_set():
            # Ctrl-C reaches the workers too: their complaint is not the cause.
            raise RunInterruptedError("interrupted")
        number, last = outcome.number, outcome.last
        self._writer.add_failure(
            {"round": number, "partition": client, "status": "failed", "error": reason}
        )
        if wire.DISK_FULL in last:
            # However many failures are allowed: the next client fares no better.
            raise DiskFullError(
                f"the disk of {self._writer.layout.root} is full: client {client} of round "
                f"{number} has no room for its gradients; the rounds before are kept"
            )
        self._observer.client_failed(number, client, reason)
        if len(outcome.failed) > self._config.max_failures:
            raise outcome.failure(
                f"client {client} failed in round {number} "
                f"(max-failures = {self._config.max_failures}): {last}"
            )

    def _not_finite(self, state: State) -> str | None:
        return None if self._config.allow_divergence else first_not_finite(state)

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
        settings = wire.train_config(
            self._config_json,
            round_number=number,
            partition=partition,
            partition_sha256=self._plan.partition_sha256,
            run=self._run_name,
            run_id=self._writer.run_id,
            data_sha256=self._plan.nodes[partition]["sha256"] if self._plan.nodes else None,
        )
        correction: State | None = None
        if isinstance(self._strategy, CorrectingStrategy):
            correction = self._strategy.correction(partition)
        return wire.train_message(message, settings, correction)

    def _close_round(
        self,
        outcome: RoundOutcome,
        state: State,
        started: float,
        clients_seconds: float,
    ) -> None:
        number = outcome.number
        loss = accuracy = None
        evaluating = time.perf_counter()
        if number % self._config.evaluate_every == 0 or number == self._config.rounds:
            load_state(self._model, state)
            what = (self._plan.task, self._model, self._plan.dataset.test())
            with torch_threads(self._threads):
                found = evaluate(*what, device=self._device)
            loss, accuracy = found.loss, found.accuracy
            if not math.isfinite(loss) and not self._config.allow_divergence:
                layer = first_overflow(*what, self._device)
                where = f": {layer} overflows" if layer else ""
                raise outcome.diverged(f"the global loss is not finite{where}")
            give_freed_memory_back()
        evaluated = time.perf_counter()
        row = {
            "round": number,
            "participants": list(outcome.participants),
            "failed": outcome.failed,
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
