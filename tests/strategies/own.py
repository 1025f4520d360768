"""Strategies as users write them, to be named in a configuration."""

import random

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAvg


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
