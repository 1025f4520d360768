"""Faults on purpose: what goes wrong in a run, where, and when.

A fault is named ``KIND@MOMENT:ROUND``. Within `injected` they strike in this process; a command
line with faults, whose workers have them too, is started with

    python -m tests.faults FAULT[,FAULT...] MARKS run [ARGUMENTS]

where MARKS is a folder in which each leaves a file when it strikes, once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from flwr.app import Array, ArrayRecord, Context, Message

from fedsim.flower import messages as wire
from fedsim.flower.client import FedSimClient
from fedsim.flower.client_app import FedSimClientApp
from fedsim.flower.client_app import app as client_app
from fedsim.flower.recorder import place_of
from fedsim.recording.files import TensorWriter
from fedsim.recording.recorder import StepRecorder
from fedsim.recording.writer import RunWriter
from strategies.flower_strategy import FlowerStrategy
from strategies.folding import DeltaFold

KINDS = (
    "kill worker",
    "kill server",
    "raise",
    "NaN",
    "hang",
    "wrong shape",
    "disk full",
    "unwritable directory",
    "corrupt last line",
    "truncated shard",
    "deleted file",
)
MOMENTS = (
    "before training",
    "mid-training",
    "while writing",
    "while aggregating",
    "between rounds",
)
IN_CLIENT = MOMENTS[:3]
FAULTS, MARKS, SERVER = "FEDSIM_TEST_FAULTS", "FEDSIM_TEST_MARKS", "FEDSIM_TEST_SERVER"


class InjectedError(Exception):
    """Raised on purpose."""


@dataclass(frozen=True)
class Fault:
    kind: str
    moment: str
    round: int

    def __str__(self) -> str:
        return f"{self.kind}@{self.moment}:{self.round}"

    @classmethod
    def parse(cls, text: str) -> Fault:
        kind, _, rest = text.partition("@")
        moment, _, number = rest.partition(":")
        return cls(kind, moment, int(number))

    def strikes(self) -> bool:
        """Say yes to the first who asks, of all processes."""
        try:
            os.close(os.open(Path(os.environ[MARKS]) / str(self), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def act(self, root: Path, path: Path | None = None) -> None:
        """Do what needs no value at hand to spoil."""
        if self.kind == "kill worker":
            self._of_worker(signal.SIGKILL)
        elif self.kind == "kill server":
            os.kill(int(os.environ[SERVER]), signal.SIGKILL)
            threading.Event().wait()
        elif self.kind == "raise":
            raise InjectedError("on purpose")
        elif self.kind == "hang":
            if self.moment in ("before training", "mid-training"):
                threading.Event().wait()
            self._of_worker(signal.SIGSTOP)
        elif self.kind == "disk full":
            fill(root.parent)
        elif self.kind == "unwritable directory":
            cover(root / "rounds")
        elif self.kind == "corrupt last line":
            name = "clients.jsonl" if self.moment in IN_CLIENT else "rounds.jsonl"
            with (root / name).open("ab") as file:
                file.write(b'{"round":')
        elif self.kind in ("truncated shard", "deleted file"):
            self._damage(root, path)

    def _of_worker(self, number: signal.Signals) -> None:
        if self.moment in IN_CLIENT:
            os.kill(os.getpid(), number)
        else:
            # Those that take the place of killed ones may not have begun yet.
            while not (workers := living_workers()):
                time.sleep(0.05)
            workers[0].send_signal(number)

    def _damage(self, root: Path, path: Path | None) -> None:
        finished = self.moment in ("before training", "between rounds")
        folder = root / "rounds" / f"{self.round - finished:04d}"
        path = path or min(folder.glob("clients/*/gradients-*.safetensors"))
        if self.kind == "deleted file":
            path.unlink()
        else:
            os.truncate(path, path.stat().st_size // 2)
        if finished:
            # Nobody looks at a finished round again before something else stops the run.
            raise InjectedError(f"after a {self.kind}")


def living_workers() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            is_alive = process.status() != psutil.STATUS_ZOMBIE
            if is_alive and process.name().startswith("ray::ClientApp"):
                found.append(process)
    return found


def fill(folder: Path) -> None:
    with (folder / "ballast").open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 4096)


def cover(folder: Path) -> None:
    """Lay a folder over another that nobody can write to; root may write whatever the mode."""
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=4k", "tmpfs", str(folder)]
    subprocess.run(mount, check=True)


def uncover(folder: Path) -> None:
    subprocess.run(["umount", "-l", str(folder)], check=True)


def spoilt(record: ArrayRecord, fault: Fault) -> ArrayRecord:
    """Give a state with one thing wrong with it."""
    arrays = {name: array.numpy() for name, array in record.items()}
    first, last = next(iter(arrays)), next(reversed(arrays))
    if fault.kind == "NaN":
        arrays[last] = np.full_like(arrays[last], np.inf if fault.moment in IN_CLIENT else np.nan)
    elif fault.moment == "before training":
        arrays = {f"module.{name}": array for name, array in arrays.items()}
    elif fault.moment == "mid-training":
        arrays[first] = arrays[first].astype(np.float64)
    else:
        arrays[last] = arrays[last][1:]
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})


class FaultyApp(FedSimClientApp):
    """The client app, spoiling replies."""

    def __call__(self, message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        config = message.content.config_records.get(wire.CONFIG, {})
        for fault in present():
            by_value = fault.kind == "wrong shape" or str(fault).startswith("NaN@while writing")
            due = by_value and fault.moment in IN_CLIENT and config.get(wire.ROUND) == fault.round
            if due and fault.strikes():
                reply.content[wire.ARRAYS] = spoilt(reply.content[wire.ARRAYS], fault)
        return reply


def present() -> list[Fault]:
    """The faults of this process."""
    return [Fault.parse(text) for text in os.environ.get(FAULTS, "").split(",") if text]


def root_of(folder: Path) -> Path:
    """The run directory above a client's folder."""
    return folder.parents[3]


def hooks(fault: Fault) -> list[tuple[type, str, Callable[..., Any]]]:
    """What takes the place of which method."""
    train, step = FedSimClient.train, StepRecorder.__call__
    append, close = TensorWriter.append, TensorWriter.close
    fold, add_round, configure = DeltaFold.take, RunWriter.add_round, FlowerStrategy.configure_train
    by_value = fault.kind in ("NaN", "wrong shape")
    on_file = fault.kind in ("truncated shard", "deleted file")

    def here(folder: Path) -> bool:
        return f"rounds/{fault.round:04d}/" in folder.as_posix()

    def faulty_train(self: FedSimClient, parameters: Any, config: Any, correction: Any) -> Any:
        if config[wire.ROUND] == fault.round and fault.kind != "wrong shape" and fault.strikes():
            if by_value:
                parameters = [np.full_like(parameters[0], np.nan), *parameters[1:]]
            else:
                place = place_of(self._node, config)
                assert place is not None
                fault.act(place.root)
        return train(self, parameters, config, correction)

    def faulty_step(self: StepRecorder, seen: Any) -> None:
        folder = self.folder
        due = seen.index == 1 and here(folder) and fault.kind != "wrong shape"
        if due and on_file:
            due = any(folder.parent.glob("*/gradients-*.safetensors"))
        if due and fault.strikes():
            if by_value:
                for gradient in seen.gradients.values():
                    gradient.fill_(float("nan"))
            else:
                fault.act(root_of(folder))
        step(self, seen)

    def faulty_append(self: TensorWriter, array: Any) -> None:
        path = self._path
        due = path.name.startswith("gradients-") and here(path) and self.data_bytes > 0
        if due and not by_value and not on_file and fault.strikes():
            fault.act(root_of(path.parent))
        append(self, array)

    def faulty_close(self: TensorWriter) -> Any:
        checksum = close(self)
        path = self._path
        if on_file and path.name.startswith("gradients-") and here(path) and fault.strikes():
            fault.act(root_of(path.parent), path)
        return checksum

    def faulty_fold(self: DeltaFold, reply: Message, reference: dict[str, Any]) -> Any:
        if self._round == fault.round and self._mean.weight and fault.strikes():
            if fault.kind == "NaN":
                name = next(iter(reference))
                self._mean.add({name: np.full_like(reference[name], np.nan)}, 1)
            elif fault.kind == "wrong shape":
                last = next(reversed(reference))
                reference = {**reference, last: reference[last][1:]}
            else:
                fault.act(self._exporter.layout.root)  # type: ignore[union-attr]
        return fold(self, reply, reference)

    def faulty_add_round(self: RunWriter, row: Any) -> None:
        add_round(self, row)
        if row["round"] == fault.round - 1 and not by_value and fault.strikes():
            fault.act(self.layout.root)

    def faulty_configure(self: FlowerStrategy, number: int, arrays: Any, *rest: Any) -> Any:
        if number == fault.round and by_value and fault.strikes():
            arrays = spoilt(arrays, fault)
        return configure(self, number, arrays, *rest)

    return {
        "before training": [(FedSimClient, "train", faulty_train)],
        "mid-training": [(StepRecorder, "__call__", faulty_step)],
        "while writing": [
            (TensorWriter, "append", faulty_append),
            (TensorWriter, "close", faulty_close),
        ],
        "while aggregating": [(DeltaFold, "take", faulty_fold)],
        "between rounds": [
            (RunWriter, "add_round", faulty_add_round),
            (FlowerStrategy, "configure_train", faulty_configure),
        ],
    }[fault.moment]


@contextlib.contextmanager
def injected(*faults: Fault, marks: Path) -> Iterator[None]:
    """Let faults strike in this process, and in those that it starts."""
    os.environ[FAULTS] = ",".join(map(str, faults))
    os.environ[MARKS] = str(marks)
    os.environ.setdefault(SERVER, str(os.getpid()))
    with contextlib.ExitStack() as undo:
        install(faults, undo)
        try:
            yield
        finally:
            for name in (FAULTS, MARKS, SERVER):
                del os.environ[name]


def install(faults: tuple[Fault, ...], undo: contextlib.ExitStack) -> None:
    for fault in faults:
        for owner, name, faulty in hooks(fault):
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, faulty)


def main(arguments: list[str]) -> None:
    """Run the command line with faults."""
    from fedsim import cli
    from fedsim.flower import simulation

    setattr(simulation, "client_app", app)  # noqa: B010
    faults = [Fault.parse(text) for text in arguments[0].split(",")]
    with injected(*faults, marks=Path(arguments[1])):
        cli.main(arguments[2:])


app = FaultyApp()

if __name__ == "__main__":
    # Workers load what they are sent by the name of its module, which here is not its own.
    from tests import faults

    faults.main(sys.argv[1:])
elif FAULTS in os.environ:
    # A worker, which imports this module with the app.
    install(tuple(present()), contextlib.ExitStack())
