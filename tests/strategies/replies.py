"""Replies of five clients to one small global state, and an exporter that remembers."""

import json

import numpy as np
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedsim.core.config import RunConfig
from fedsim.flower import messages as wire
from strategies.build import build_strategy
from tests.local_grid import LocalGrid


def global_state():
    random_numbers = np.random.default_rng(0)
    return {
        "conv.weight": random_numbers.normal(size=(8, 3, 3, 3)).astype(np.float32),
        "bn.running_var": random_numbers.uniform(0.5, 2, size=8).astype(np.float32),
        "bn.num_batches_tracked": np.array(10, dtype=np.int64),
        "fc.bias": random_numbers.normal(size=4).astype(np.float32),
        "fc.scale": np.array(0.7, dtype=np.float32),
    }


def local_state(partition, *, start=None, round_number=0):
    random_numbers = np.random.default_rng([100 + partition, round_number])
    return {
        name: array + 1 + partition
        if array.dtype == np.int64
        else (array + random_numbers.normal(scale=0.1, size=array.shape)).astype(np.float32)
        for name, array in (start or global_state()).items()
    }


KEEPS = {
    "fedavgm": ("momentum",),
    **dict.fromkeys(("fedadagrad", "fedadam", "fedyogi"), ("m", "v")),
}
"""What the optimizers of the server keep of each parameter."""
SIZES = {0: 70, 1: 400, 2: 25, 3: 400, 4: 131}


def reply(partition, *, state=None, num_examples=None, node=None):
    content = wire.reply_content(
        wire.array_record(state or local_state(partition)),
        SIZES[partition] if num_examples is None else num_examples,
        {"loss": 1.0 + partition, "telemetry": json.dumps({"partition": partition})},
    )
    message = Message(content, dst_node_id=1, message_type="train")
    message.metadata.__dict__["_src_node_id"] = node or 1000 - partition
    return message


def failure(reason="it broke"):
    asked = Message(RecordDict(), dst_node_id=1, message_type="train")
    asked.metadata.__dict__["_message_id"] = "1"
    return Message(Error(code=2, reason=reason), reply_to=asked)


def built(name, exporter=None, parameters=("w",), **settings):
    """Build a strategy of the registry with settings as the configuration names them."""
    table = {"name": name, **{k.replace("_", "-"): v for k, v in settings.items()}}
    config = RunConfig.from_mapping({"strategy": table, "clients-per-round": 5})
    shapes = {name: np.shape(global_state().get(name)) for name in parameters}
    return build_strategy(config, shapes, exporter)


class Exporter:
    def __init__(self):
        self.clients, self.aggregates, self.states, self.kept = [], {}, {}, {}
        self.controls = {}

    def add_client(self, row, delta):
        self.clients.append((row, delta))

    def add_aggregate(self, round_number, aggregate):
        self.aggregates[round_number] = aggregate

    def add_state(self, round_number, state):
        self.states[round_number] = state

    def add_control(self, round_number, partition, arrays):
        self.controls[partition] = arrays

    def control(self, partition):
        return self.controls.get(partition, {})

    def add_strategy_state(self, round_number, arrays):
        self.kept[round_number] = arrays


def started(strategy, *, state=None, round_number=3):
    grid = LocalGrid(ClientApp(), clients=5)
    arrays = wire.array_record(state or global_state())
    list(strategy.configure_train(round_number, arrays, ConfigRecord(), grid))
    return strategy


def bits(arrays):
    return {name: array.numpy().tobytes() for name, array in arrays.items()}
