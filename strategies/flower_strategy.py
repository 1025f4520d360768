"""Any `Algorithm` as a strategy of Flower's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedsim.core.aggregation import apply_delta, local_work
from fedsim.core.algorithm import Algorithm, Setup, StrategySettings, Update
from fedsim.flower import messages as wire
from fedsim.flower.messages import Reply
from fedsim.recording.rows import updates_of
from strategies.delta_fedavg import DeltaMean
from strategies.folding import DeltaFold, RoundExporter, State, Taken, usable_replies


class FlowerStrategy(FedAvg):
    """Runs an algorithm on the trainable parameters; buffers move by the mean delta.

    Replies are folded one by one and freed, so memory does not grow with the number of clients
    unless the algorithm holds on to them; sums are in a fixed order, so the result is the same to
    the bit however replies arrive; integer buffers keep their dtype; and every round is exported.

    Replies carry full weights and ``num-examples``, as for every Flower strategy. A generator
    of replies is folded as it comes, and its maker decides the order; a list, as
    ``Strategy.start`` gives it, is put into the fixed order first: most samples first, ties by
    partition id.

    Parameters
    ----------
    algorithm : Algorithm
        Its shapes name the trainable parameters; without any, all arrays are.
    exporter : RoundExporter, optional
        Receives the artifacts of every round, and keeps what the algorithm keeps of clients.
    rounds : bool
        Whether parameters that the algorithm gives in a wider dtype are rounded here, or by a
        wrapper that adds noise to them before.
    **settings
        Those of Flower's FedAvg.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        exporter: RoundExporter | None = None,
        *,
        rounds: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.algorithm = algorithm
        self.exporter = exporter
        self._rounds = rounds
        self.reference: State = {}
        self.kept: State = dict(algorithm.begin())

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Remember the global state that deltas are taken from, then do as FedAvg does."""
        self.reference = {name: array.numpy() for name, array in arrays.items()}
        if mu := self.algorithm.proximal_mu:
            config[wire.PROXIMAL_MU] = mu
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies and move the global state.

        Returns
        -------
        tuple of (ArrayRecord, MetricRecord) or (None, None)
            The new global state and the sample-weighted mean of the clients' metrics; None
            where no reply had content.

        Raises
        ------
        ValueError
            When a client's arrays differ from the global ones in name, shape or dtype.
        """
        usable = usable_replies(replies)
        first = next(usable, None)
        if first is None:
            return None, None
        this_round = LiveRound(self, server_round, chain([first], usable))
        # Still bound, it would live on while the next one is decoded.
        del first
        outcome = self.algorithm.fold(this_round)
        aggregate = this_round.aggregate
        state = apply_delta(self.reference, aggregate)
        for name, array in outcome.parameters.items():
            state[name] = np.asarray(array, dtype=state[name].dtype if self._rounds else None)
        self.kept = dict(outcome.kept)
        if self.exporter is not None:
            self.exporter.add_aggregate(server_round, aggregate)
            self.exporter.add_state(server_round, state)
            if self.kept:
                self.exporter.add_strategy_state(server_round, self.kept)
        arrays = ArrayRecord({name: Array(np.asarray(a)) for name, a in state.items()})
        return arrays, self.train_metrics_aggr_fn(this_round.metrics, self.weighted_by_key)

    def correction(self, partition: int) -> State | None:
        """Give what a client adds to the gradients of its next round, if anything."""
        if not self.algorithm.corrects:
            return None
        found = self.algorithm.correction(self.kept, self.kept_of_client(partition))
        return None if found is None else dict(found)

    def kept_of_client(self, partition: int) -> State:
        """Give what the algorithm keeps of a client; empty before its first round."""
        if not self.algorithm.keeps_of_client():
            return {}
        if self.exporter is None:
            raise ValueError(f"{self.algorithm.name} needs an exporter: it keeps arrays of clients")
        return self.exporter.control(partition)

    def state_arrays(self) -> State:
        """Give what the algorithm keeps for the next round."""
        return self.kept

    def load_state_arrays(self, arrays: State) -> None:
        """Go on from what `state_arrays` gave; what is kept of clients is with the exporter."""
        if arrays:
            self.kept = dict(arrays)


class DeltaFedAvg(FlowerStrategy):
    """FedAvg (McMahan et al. 2017) over ``delta = local - global``, on its own.

    Equal to Flower's FedAvg up to rounding; what is different, `FlowerStrategy` says.

    Parameters
    ----------
    exporter : RoundExporter, optional
        Receives the artifacts of every round.
    **settings
        Those of Flower's FedAvg.
    """

    def __init__(self, exporter: RoundExporter | None = None, **settings: Any) -> None:
        algorithm = DeltaMean(StrategySettings(name=DeltaMean.name), Setup())
        super().__init__(algorithm, exporter, **settings)


class LiveRound:
    """The replies of a round, as an algorithm folds them.

    Attributes
    ----------
    number : int
        The round.
    kept : dict of str to ndarray
        What was kept after the round before.
    metrics : list of RecordDict
        Those of the replies that were folded.
    """

    def __init__(self, strategy: FlowerStrategy, number: int, replies: Iterator[Reply]) -> None:
        self.number = number
        self.kept = strategy.kept
        self.metrics: list[RecordDict] = []
        self._strategy = strategy
        self._reference = strategy.reference
        self._replies = replies
        self._fold = DeltaFold(
            number,
            weighted_by_key=strategy.weighted_by_key,
            exporter=strategy.exporter,
        )

    @cached_property
    def before(self) -> State:
        """The parameters before the round."""
        return self._bare(self._reference)

    def updates(self) -> Iterator[Update]:
        """Yield the updates that are left, each of which is dropped when the next is asked for."""
        for reply in self._replies:
            taken = self._fold.take(reply, self._reference)
            self.metrics.append(RecordDict({"metrics": reply.metrics}))
            state = reply.state
            sent = {name: state[name] for name in self.before}
            del reply, state
            update = self._update(taken, sent)
            yield update
            update.forget()
            self._fold.export(taken)
            del taken, sent, update

    def mean(self) -> State:
        """Give the mean delta of the parameters."""
        return self._bare(self.aggregate)

    @cached_property
    def aggregate(self) -> State:
        """The mean delta of the whole state."""
        for _ in self.updates():
            pass
        return self._fold.mean()

    def _update(self, taken: Taken, sent: State) -> Update:
        row, strategy = taken.row, self._strategy
        partition = row.get("partition", -1)

        def keep(arrays: Mapping[str, Any]) -> None:
            if strategy.exporter is not None:
                strategy.exporter.add_control(self.number, partition, dict(arrays))

        return Update(
            partition,
            taken.weight,
            self._bare(taken.delta),
            work=lambda: _work(row, strategy.algorithm.setup),
            kept=lambda: strategy.kept_of_client(partition),
            keep=keep,
            sent=sent,
        )

    def _bare(self, state: State) -> State:
        shapes = self._strategy.algorithm.setup.shapes
        return {n: a for n, a in state.items() if n in shapes} if shapes else state


def _work(row: Mapping[str, Any], setup: Setup) -> float:
    return local_work(
        updates_of(row),
        learning_rate=row["learning_rate"],
        momentum=setup.momentum,
        nesterov=setup.nesterov,
    )
