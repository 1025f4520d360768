"""Running on a Ray cluster that is there already: what it offers, and whether its nodes are fit."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from numpy.typing import NDArray
from ray._private import worker as ray_worker
from ray._private.state import available_resources_per_node
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedsim.core.config import RunConfig
from fedsim.core.device import resolve_device
from fedsim.core.errors import ConfigError, InputError
from fedsim.core.plan import RunPlan
from fedsim.core.task import tensors_of
from fedsim.flower.actor import Duty
from fedsim.flower.simulation import WorkerPool, is_alive, most_participants
from fedsim.plugins.cluster import machines
from fedsim.plugins.cluster.duty import ClusterDuty

_CONNECT, _CHECK = 5.0, 300.0
"""Seconds for the head of a cluster to answer, and for its nodes to be checked."""
_LOOK, _GIVE_UP = 5.0, 30.0
"""Seconds between looks at the head, and without an answer; after 60 Ray ends this process."""


@dataclass(frozen=True)
class Node:
    """A node of a Ray cluster.

    Parameters
    ----------
    id : str
        By which Ray knows it.
    address : str
        Its IP address.
    cpus, gpus : int
        What nobody uses at the moment.
    """

    id: str
    address: str
    cpus: int
    gpus: int


def fit_pool(config: RunConfig) -> WorkerPool:
    """Fit the workers to what the cluster at ``ray-address`` has free.

    Raises
    ------
    ConfigError
        When there is no such cluster, or it has no room for what is asked for.
    """
    with connected(config.ray_address):
        return size_pool(config, present_nodes())


@contextlib.contextmanager
def joined(
    plan: RunPlan, output: Path, pool: WorkerPool, *, verbose: bool
) -> Iterator[tuple[Duty, Callable[[], str | None]]]:
    """Join the cluster at ``ray-address`` and prepare its nodes for a run.

    Yields
    ------
    Duty
        Of the workers.
    callable
        Says what has died that they need; None as long as nothing has.

    Raises
    ------
    InputError
        As `connected` and `prepared`.
    """
    with connected(plan.config.ray_address, verbose=verbose):
        nodes = [n for n in present_nodes() if slots_of(n, cpus=pool.cpus, gpus=pool.gpus)]
        with prepared(plan, output, nodes) as duty:
            yield duty, Connection().broken


def size_pool(config: RunConfig, nodes: Sequence[Node]) -> WorkerPool:
    """Fit the workers to what a Ray cluster has free.

    Parameters
    ----------
    config : RunConfig
        As on one machine, but that a worker has a whole GPU where ``client-gpus`` is unset.
    nodes : sequence of Node
        From `present_nodes`.

    Returns
    -------
    WorkerPool

    Raises
    ------
    ConfigError
        When the cluster has no room for what is asked for.
    """
    trains_on_gpus = resolve_device(config.device).type == "cuda"
    if config.client_gpus == 0 and trains_on_gpus:
        raise ConfigError(
            "client-gpus", 0, "a share above 0, or any with device = 'cpu': training runs on GPUs"
        )
    gpus = config.client_gpus
    if gpus is None:
        gpus = 1.0 if trains_on_gpus else 0.0
    slots = sum(slots_of(node, cpus=config.client_cpus, gpus=gpus) for node in nodes)
    if slots == 0:
        room = f"{config.client_cpus} CPU cores" + (f" and {gpus:g} GPUs" if gpus else "")
        raise ConfigError(
            "ray-address",
            config.ray_address,
            f"a cluster with room for a worker: none of its {len(nodes)} nodes has {room} free",
        )
    if config.workers is not None and config.workers > slots:
        raise ConfigError(
            "workers", config.workers, f"1 to {slots}, for which the cluster has room now"
        )
    workers = config.workers or min(slots, most_participants(config))
    return WorkerPool(workers=workers, cpus=config.client_cpus, gpus=gpus)


@contextlib.contextmanager
def connected(address: str, *, verbose: bool = False) -> Iterator[None]:
    """Be a driver of a cluster for as long as the context lasts.

    Parameters
    ----------
    address : str
        ``ray-address``.
    verbose : bool
        Let Ray log.

    Raises
    ------
    ConfigError
        When there is no such cluster, or this machine is no part of it.
    """
    _knock(address)
    try:
        ray.init(
            address=address,
            log_to_driver=verbose,
            logging_level=logging.INFO if verbose else logging.ERROR,
        )
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            "ray-address", address, f"a Ray cluster that this machine is a node of ({reason})"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    # Ray itself waits for minutes, and then ends the process.
    if ":" in address and (reason := _refusal(address)):
        raise ConfigError(
            "ray-address", address, f"the address of a running cluster's head ({reason})"
        )


def _refusal(address: str) -> str | None:
    """Say why nobody answers at HOST:PORT; None where somebody does."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def present_nodes() -> list[Node]:
    """List the nodes of the cluster that are alive, by address."""
    free = available_resources_per_node()  # type: ignore[no-untyped-call]
    nodes = [
        Node(
            id=node["NodeID"],
            address=node["NodeManagerAddress"],
            cpus=int(free.get(node["NodeID"], {}).get("CPU", 0)),
            gpus=int(free.get(node["NodeID"], {}).get("GPU", 0)),
        )
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    ]
    return sorted(nodes, key=lambda node: (node.address, node.id))


def slots_of(node: Node, *, cpus: int, gpus: float) -> int:
    """Count the workers for which a node has room.

    Parameters
    ----------
    node : Node
        Where.
    cpus : int
        CPU cores of each worker.
    gpus : float
        Share of a GPU, or whole GPUs, of each.
    """
    slots = node.cpus // cpus
    if gpus == 0:
        return slots
    # A fraction lives on one GPU: two workers of 0.6 do not fit on one.
    return min(slots, node.gpus * int(1 / gpus + 1e-9) if gpus <= 1 else int(node.gpus // gpus))


@contextlib.contextmanager
def prepared(plan: RunPlan, output: Path, nodes: Sequence[Node]) -> Iterator[ClusterDuty]:
    """Check that nodes compute what this machine would, and bring them the data.

    Parameters
    ----------
    plan : RunPlan
        What is to be run.
    output : Path
        The run directory.
    nodes : sequence of Node
        Where workers may be placed.

    Yields
    ------
    ClusterDuty
        For the workers. What it refers to is there for as long as the context lasts.

    Raises
    ------
    InputError
        Naming the first node that cannot take part, and why; nothing has been written then.
    """
    config, data = plan.config, plan.dataset
    ours = machines.facts_of(config)
    sha256 = data.fingerprint
    with machines.Mark.beside(output) as mark:
        reports = _on_each(nodes, _report, config.to_json(), mark)
    for node in nodes:
        report = reports[node.id]
        if found := machines.difference(report.facts, ours):
            raise _unfit(config, node, f"has {found}")
        if report.data_sha256 not in (None, sha256):
            raise _unfit(config, node, f"has other data in its cache for {config.dataset}")
    lacking = [node for node in nodes if reports[node.id].data_sha256 is None]
    shipped: dict[str, Any] = {}
    if lacking:
        shipped = {name: ray.put(t.numpy()) for name, t in tensors_of(data).items()}
        stored = _on_each(lacking, _store, config.to_json(), list(shipped), *shipped.values())
        for node in lacking:
            if stored[node.id] != sha256:
                raise _unfit(config, node, "does not keep the data that it was sent")
    yield ClusterDuty(
        run_config=config.to_json(),
        facts=ours,
        data_sha256=sha256,
        data=shipped or None,
        checked=frozenset(node.id for node in nodes),
        sharing=frozenset(node.id for node in nodes if reports[node.id].shares_disk),
        recordings=str(output.resolve().parent),
    )


def _unfit(config: RunConfig, node: Node, what: str) -> ConfigError:
    return ConfigError(
        "ray-address",
        config.ray_address,
        f"a cluster whose nodes compute what this machine does: {node.address} {what}",
    )


@dataclass(frozen=True)
class _Report:
    """What a node says of itself."""

    facts: Mapping[str, str]
    data_sha256: str | None
    shares_disk: bool


def _report(run_config: str, mark: machines.Mark) -> _Report:
    config = RunConfig.from_json(run_config)
    return _Report(machines.facts_of(config), machines.data_sha256(config), mark.is_writable_here())


def _store(run_config: str, names: list[str], *arrays: NDArray[np.generic]) -> str:
    return machines.store_data(
        RunConfig.from_json(run_config), dict(zip(names, arrays, strict=True))
    )


def _on_each(
    nodes: Sequence[Node], function: Callable[..., Any], *arguments: Any
) -> dict[str, Any]:
    """Call a function on each node, at the same time, and give what it returns by node."""
    config = RunConfig.from_json(arguments[0])
    calls = {
        node.id: ray.remote(function)
        .options(
            num_cpus=0,
            # Without a share Ray hides the GPUs of a node.
            num_gpus=0.01 if node.gpus and config.device != "cpu" else 0,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
        )
        .remote(*arguments)
        for node in nodes
    }
    answers = {}
    for node in nodes:
        try:
            answers[node.id] = ray.get(calls[node.id], timeout=_CHECK)
        except GetTimeoutError:
            raise _unfit(config, node, f"does not answer within {_CHECK:.0f} s") from None
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            text = (str(cause).strip().splitlines() or [""])[-1]
            kind = "" if isinstance(cause, InputError) else f"{type(cause).__name__}: "
            raise _unfit(config, node, f"cannot run clients ({kind}{text})") from None
        except RayError as error:
            text = " ".join(str(error).split())[:200]
            raise _unfit(config, node, f"cannot run clients ({text})") from None
    return answers


class Connection:
    """Looks after what a driver cannot do without: its node's raylet, and the cluster's head."""

    def __init__(self) -> None:
        ours: Any = ray_worker._global_node
        self._raylet = _process_with(f"--raylet_socket_name={ours.raylet_socket_name}")
        self._head = ray.get_runtime_context().gcs_address
        self._looked = self._answered = time.monotonic()

    def broken(self) -> str | None:
        """Say what is lost, if anything is."""
        if self._raylet is not None and not is_alive(self._raylet):
            return "Ray's raylet on this machine died, and with it the way to the cluster"
        now = time.monotonic()
        if now - self._looked < _LOOK:
            return None
        self._looked = now
        if _refusal(self._head) is None:
            self._answered = now
        if now - self._answered > _GIVE_UP:
            return f"the head of the Ray cluster at {self._head} no longer answers"
        return None


def _process_with(argument: str) -> psutil.Process | None:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and argument in process.cmdline():
                return process
    return None
