"""Strategies as users write them, to be named in a configuration."""

import random

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAvg

from fedsim.core.algorithm import Algorithm, ArraySpec, Outcome


class Counting(FedAvg):
    """Keeps an array, and relies on it being there once it kept one."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.total = np.zeros((), np.float64)

    def aggregate_train(self, server_round, replies):
        self.total = self.total + server_round
        return super().aggregate_train(server_round, replies)

    def state_arrays(self):
        return {"total": self.total}

    def load_state_arrays(self, arrays):
        self.total = arrays["total"]


class Drawing(FedAvg):
    """Draws from both global generators, before and after the round."""

    def configure_train(self, server_round, arrays, config, grid):
        self.drawn = random.random() + np.random.random()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        drawn = np.float32(self.drawn + random.random() + np.random.random())
        moved = {name: Array(array.numpy() + drawn * 1e-3) for name, array in arrays.items()}
        return ArrayRecord(moved), metrics


class Sampling(FedAvg):
    """Leaves out some of whom it is shown."""

    def __init__(self, **settings):
        super().__init__(fraction_train=0.4, **settings)


class Refusing(FedAvg):
    """Takes no reply for a model."""

    def aggregate_train(self, server_round, replies):
        list(replies)
        return None, None


class Steering(Algorithm):
    """Clients add what they sent last to their gradients; one array is never claimed."""

    def keeps(self):
        return {"rounds": ArraySpec((1,)), **self.for_parameters("last")}

    def keeps_of_client(self):
        return {name: ArraySpec(shape) for name, shape in self.setup.shapes.items()}

    def correction(self, kept, of_client):
        zero = {n: np.zeros(shape, np.float32) for n, shape in self.setup.shapes.items()}
        return {n: of_client.get(n, zero[n]) * np.float32(0.1) for n in zero}

    def fold(self, this_round):
        last = {}
        for update in this_round.updates():
            last = {n: np.array(a) for n, a in update.delta.items()}
            update.keep(last)
        moved = {n: a + this_round.mean()[n] for n, a in this_round.before.items()}
        kept = {f"last/{n}": a for n, a in last.items()}
        return Outcome(moved, {"rounds": np.full(1, this_round.number, np.float32), **kept})

    def check(self, this_round):
        for claim in super().check(this_round):
            if getattr(claim, "key", "") != "rounds":
                yield claim
