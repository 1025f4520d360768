"""Flower's own strategies with fedsim's rule for buffers, its exports and its checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Protocol, runtime_checkable

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.serverapp.strategy.dp_adaptive_clipping import DifferentialPrivacyAdaptiveBase
from flwr.serverapp.strategy.dp_fixed_clipping import DifferentialPrivacyFixedClippingBase

from fedsim.core.aggregation import apply_delta
from fedsim.core.errors import RunFailedError
from fedsim.core.rng import Purpose, global_seed
from fedsim.flower.messages import Reply, with_arrays
from strategies.folding import DeltaFold, RoundExporter, State, usable_replies
from strategies.privacy import CLIPPING_NORM


@runtime_checkable
class StatefulStrategy(Protocol):
    """A strategy that is a function of the global state and of the arrays it keeps."""

    def state_arrays(self) -> State:
        """Give what is kept for the next round; empty where nothing is."""

    def load_state_arrays(self, arrays: State) -> None:
        """Go on from what `state_arrays` gave after some round."""


@runtime_checkable
class CorrectingStrategy(Protocol):
    """A strategy whose clients may add something of their own to their gradients."""

    def correction(self, partition: int) -> State | None:
        """Give what a client adds in its next round, by the name of the parameter, if anything."""


class Recorded(Strategy):
    """Runs one of Flower's strategies on the trainable parameters, and records it.

    The strategy inside sees a model without buffers, and its arithmetic is untouched. Buffers
    are averaged here, as `DeltaFedAvg` does it: an optimizer's step on BatchNorm's
    ``running_var`` would make it negative, and the loss NaN. Parameters that come out in another
    dtype (FedAdam's are float64) are rounded once to their own, so the global state has the same
    names, order, shapes and dtypes in every round.

    Replies reach the strategy in the fixed order that `usable_replies` tells. Flower's
    strategies take them as a list: memory grows with participants times model.

    Parameters
    ----------
    strategy : Strategy
        Any of Flower's, a wrapper of differential privacy around one, or the user's own. What it
        keeps from round to round is checkpointed where it is a `StatefulStrategy`.
    parameters : collection of str
        Names of the trainable parameters; all other arrays of the state are buffers.
    exporter : RoundExporter, optional
        Receives the artifacts of every round.
    seed : int
        Of the noise: the global generators, which Flower draws from, are seeded for every
        aggregation and put back after it.
    """

    def __init__(
        self,
        strategy: Strategy,
        parameters: Collection[str],
        exporter: RoundExporter | None = None,
        *,
        seed: int = 0,
    ) -> None:
        self.strategy = strategy
        self._inner = _unwrapped(strategy)
        self._seed = seed
        self._trainable = frozenset(parameters)
        self._exporter = exporter
        self._reference: State = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the strategy make its messages, and add the buffers to what it sends."""
        self._reference = {name: array.numpy() for name, array in arrays.items()}

        def whole(sent: ArrayRecord) -> ArrayRecord:
            return ArrayRecord(
                {n: sent[n] if n in self._trainable else a for n, a in arrays.items()}
            )

        made = self.strategy.configure_train(server_round, self._bare(arrays), config, grid)
        # A list: sampling must be over when this returns.
        return [with_arrays(message, whole) for message in made]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Let the strategy move the parameters, and the buffers by their mean delta.

        Returns
        -------
        tuple of (ArrayRecord or None, MetricRecord or None)
            The new global state, None where the strategy made none, and its metrics.

        Raises
        ------
        ValueError
            When a client's arrays differ from the global ones in name, shape or dtype.
        """
        fold = DeltaFold(
            server_round,
            weighted_by_key=getattr(self._inner, "weighted_by_key", "num-examples"),
            exporter=self._exporter,
        )
        bare: list[Reply] = []
        for reply in usable_replies(replies):
            fold.export(fold.take(reply, self._reference))
            bare.append(with_arrays(reply, self._bare))
            # Still bound, its buffers would live on while the next one is decoded.
            del reply
        with global_seed(self._seed, Purpose.NOISE, server_round):
            try:
                moved, metrics = self.strategy.aggregate_train(server_round, bare)
            except ZeroDivisionError:
                if self._inner is self.strategy:
                    raise
                raise RunFailedError(
                    f"round {server_round}: a client's update is zero, which the server's "
                    "differential privacy cannot clip"
                ) from None
        if moved is None:
            return None, metrics
        aggregate = fold.mean()
        state = apply_delta(self._reference, aggregate)
        state |= {
            name: np.asarray(array.numpy(), dtype=self._reference[name].dtype)
            for name, array in moved.items()
        }
        if self._exporter is not None:
            self._exporter.add_aggregate(server_round, aggregate)
            self._exporter.add_state(server_round, state)
            if kept := self.state_arrays():
                self._exporter.add_strategy_state(server_round, kept)
        return ArrayRecord({name: Array(array) for name, array in state.items()}), metrics

    def state_arrays(self) -> State:
        """Give what the strategy keeps, and ``clipping-norm`` where it adapts."""
        inner = self._inner
        arrays = dict(inner.state_arrays()) if isinstance(inner, StatefulStrategy) else {}
        if isinstance(self.strategy, DifferentialPrivacyAdaptiveBase):
            arrays[CLIPPING_NORM] = np.asarray(self.strategy.clipping_norm, np.float64)
        return arrays

    def load_state_arrays(self, arrays: State) -> None:
        """Go on from what `state_arrays` gave, in its order."""
        arrays = dict(arrays)
        if isinstance(self.strategy, DifferentialPrivacyAdaptiveBase):
            self.strategy.clipping_norm = float(arrays.pop(CLIPPING_NORM))
        if isinstance(self._inner, StatefulStrategy):
            self._inner.load_state_arrays(arrays)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Do as the strategy does."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Do as the strategy does."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """Do as the strategy does."""
        self.strategy.summary()

    def _bare(self, arrays: ArrayRecord) -> ArrayRecord:
        return ArrayRecord({n: a for n, a in arrays.items() if n in self._trainable})


def _unwrapped(strategy: Strategy) -> Strategy:
    """Give what is inside of a wrapper of differential privacy."""
    wrappers = (DifferentialPrivacyFixedClippingBase, DifferentialPrivacyAdaptiveBase)
    return strategy.strategy if isinstance(strategy, wrappers) else strategy
