"""The run of `fedsim.simulate`, in a process of its own: what it reports, and the reader of that.

Ray, Flower and torch set signal handlers, environment variables, thread counts, loggers and
generators of the process that they run in, and Flower ends the Ray that it finds there. The
caller's process starts another one, reads its events, one line of JSON each, and passes on what
it prints. All of it happens in the thread that calls: there is nothing to put back.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TextIO

from fedsim.cell import REQUEST, start_cell
from fedsim.core import errors
from fedsim.core.characters import Shown
from fedsim.core.config import RunConfig
from fedsim.core.errors import FedsimError, RunFailedError, RunInterruptedError
from fedsim.core.plan import RunPlan
from fedsim.terminal import Summary, TerminalObserver, summary_of

_CHUNK = 2**16
_LAST = 4096
"""Last bytes of the output that are searched for a reason when the process ended without one."""


def simulate_apart(
    config: RunConfig,
    *,
    tracker: Sequence[str],
    warn: Callable[[str], None],
    terminal: TerminalObserver | None,
    verbose: bool,
) -> Path:
    """Run a configuration in a process of its own and wait for it.

    Parameters
    ----------
    config : RunConfig
        What to run.
    tracker : sequence of str
        Names of trackers.
    warn : callable
        Told in a sentence when a tracker fails.
    terminal : TerminalObserver, optional
        Trackers that are told of the run.
    verbose : bool
        Let Flower and Ray log.

    Returns
    -------
    Path
        The run directory.

    Raises
    ------
    FedsimError
        What the run ended with, of the class that it has there.
    KeyboardInterrupt
        At a second one. The first asks the run to end.
    """
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb", buffering=0) as events:
        try:
            process = start_cell(
                [REQUEST, str(writer)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[writer],
                bufsize=0,
            )
        finally:
            os.close(writer)
        with _ended(process):
            listener = _Listener(process, events, terminal, config, warn)
            request = {"config": config.to_json(), "tracker": list(tracker), "verbose": verbose}
            # Where it died at once, its end says more.
            with contextlib.suppress(BrokenPipeError):
                _pipe(process.stdin).write(json.dumps(request).encode() + b"\n")
            return listener.wait()


def _pipe(stream: Any) -> BinaryIO:
    found: BinaryIO = stream
    return found


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """End a process that is still running when the block is left, also by an error."""
    try:
        yield
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            _pipe(stream).close()


class _Listener:
    """Reads what a run tells and prints until it ends."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        events: BinaryIO,
        terminal: TerminalObserver | None,
        config: RunConfig,
        warn: Callable[[str], None],
    ) -> None:
        self._process = process
        self._terminal = terminal
        self._config = config
        self._warn = warn
        self._line = b""
        self._outcome: Mapping[str, Any] | None = None
        self._has_gone = False
        self._printed = ""
        self._selector = selectors.DefaultSelector()
        self._selector.register(events, selectors.EVENT_READ, self._told)
        for pipe, name in ((process.stdout, "stdout"), (process.stderr, "stderr")):
            decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
            self._selector.register(_pipe(pipe), selectors.EVENT_READ, _Relay(self, decode, name))

    def wait(self) -> Path:
        """Listen to the end, and give the run directory."""
        interrupted = False
        with self._selector:
            while self._outcome is None and not self._has_gone:
                try:
                    self._listen(None)
                except KeyboardInterrupt:
                    if interrupted:
                        raise
                    interrupted = True
                    with contextlib.suppress(OSError):
                        _pipe(self._process.stdin).write(b"!")
            # What else it has printed. What it left behind may hold its output open.
            while self._listen(0):
                pass
        if self._outcome is None:
            raise self._unexpected(interrupted)
        if self._outcome["event"] == "failed":
            raise _error_of(self._outcome)
        return Path(self._outcome["path"])

    def _listen(self, timeout: float | None) -> bool:
        """Read what has come, and say whether anything has."""
        ready = self._selector.select(timeout)
        for key, _ in ready:
            content = os.read(key.fd, _CHUNK)
            if not content:
                self._selector.unregister(key.fileobj)
            key.data(content)
        return bool(ready)

    def _told(self, content: bytes) -> None:
        self._has_gone = not content
        *lines, self._line = (self._line + content).split(b"\n")
        for line in lines:
            event = json.loads(line)
            if event["event"] in ("ended", "failed"):
                self._outcome = event
            elif event["event"] == "tracker":
                self._warn(event["text"])
            elif self._terminal is not None:
                _replay(event, self._terminal, self._config)

    def show(self, text: str, name: str) -> None:
        """Print in the caller's process what the run's printed."""
        self._printed = (self._printed + text)[-_LAST:]
        if self._terminal is not None and self._terminal.pass_on(text):
            return
        stream: TextIO | None = getattr(sys, name)
        # Showing never ends the work.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            Shown(stream).write(text)
            stream.flush()  # type: ignore[union-attr]

    def _unexpected(self, interrupted: bool) -> FedsimError:
        code = self._process.wait()
        if interrupted:
            return RunInterruptedError("interrupted; the finished rounds are kept")
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        last = [line.strip() for line in self._printed.splitlines() if line.strip()][-1:]
        return RunFailedError(f"the run's process was ended {how}{''.join(f': {x}' for x in last)}")


class _Relay:
    """Passes on one stream of the run's process."""

    def __init__(self, listener: _Listener, decode: Callable[..., str], name: str) -> None:
        self._listener = listener
        self._decode = decode
        self._name = name

    def __call__(self, content: bytes) -> None:
        if text := self._decode(content, final=not content):
            self._listener.show(text, self._name)


def _replay(event: Mapping[str, Any], terminal: TerminalObserver, config: RunConfig) -> None:
    match event["event"]:
        case "run_started":
            terminal.begin(Summary(**event["summary"]), config, Path(event["path"]))
        case "warned":
            terminal.warned(event["text"])
        case "round_started":
            terminal.round_started(event["round"], event["participants"])
        case "client_finished":
            terminal.client_finished(event["row"])
        case "client_failed":
            terminal.client_failed(event["round"], event["partition"], event["reason"])
        case "round_finished":
            terminal.round_finished(event["row"])
        case "run_finished":
            terminal.run_finished(Path(event["path"]))


def _error_of(event: Mapping[str, Any]) -> FedsimError:
    kind: type[FedsimError] = getattr(errors, event["kind"])
    # Its own __init__ makes the text from other arguments.
    error = kind.__new__(kind, event["text"])
    vars(error).update(event["attributes"])
    return error


class EventWriter:
    """Reports a run in lines of JSON; a `RunObserver`.

    Parameters
    ----------
    descriptor : int
        Where to write. Once nobody reads, nothing is reported.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def tell(self, event: str, **values: Any) -> None:
        """Write an event."""
        line = memoryview(json.dumps({"event": event, **values}, default=repr).encode() + b"\n")
        with self._lock, contextlib.suppress(OSError):
            while line:
                line = line[os.write(self._descriptor, line) :]

    def tell_failure(self, error: FedsimError) -> None:
        """Write what the run ended with: the nearest class that its reader has, and all it says."""
        kinds = (c.__name__ for c in type(error).__mro__ if c.__module__ == errors.__name__)
        self.tell("failed", kind=next(kinds), text=str(error), attributes=vars(error))

    def warned(self, text: str) -> None:
        """Tell it."""
        self.tell("warned", text=text)

    def run_started(self, plan: RunPlan, workers: int, path: Path) -> None:
        """Tell the summary of the run."""
        summary = asdict(summary_of(plan, workers, path))
        self.tell("run_started", summary=summary, path=str(path))

    def round_started(self, round_number: int, participants: Sequence[int]) -> None:
        """Tell who takes part."""
        self.tell("round_started", round=round_number, participants=list(participants))

    def client_finished(self, row: Mapping[str, Any]) -> None:
        """Tell the row."""
        self.tell("client_finished", row=dict(row))

    def client_failed(self, round_number: int, partition: int, reason: str) -> None:
        """Tell the reason."""
        self.tell("client_failed", round=round_number, partition=partition, reason=reason)

    def round_finished(self, row: Mapping[str, Any]) -> None:
        """Tell the row."""
        self.tell("round_finished", row=dict(row))

    def run_finished(self, path: Path) -> None:
        """Tell where it is."""
        self.tell("run_finished", path=str(path))

    def close(self) -> None:
        """Do nothing: the outcome is still to be told."""


def serve(request: bytes, descriptor: int, stop: threading.Event) -> NoReturn:
    """Run what was asked for, report it, and end this process.

    Parameters
    ----------
    request : bytes
        JSON of the configuration, the trackers and whether Flower and Ray log.
    descriptor : int
        Where to tell.
    stop : threading.Event
        Set when the run is to end early.
    """
    for stream in (sys.stdout, sys.stderr):
        # As the reader decodes it.
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    os.set_inheritable(descriptor, False)
    events = EventWriter(descriptor)
    failure: FedsimError | None = None
    try:
        path = _run(events, stop, **json.loads(request))
    except FedsimError as error:
        failure = error
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        failure = RunFailedError(f"{type(error).__name__}: {error}")
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    # The last: its reader waits for nothing after it.
    if failure is None:
        events.tell("ended", path=str(path))
    else:
        events.tell_failure(failure)
    # Flower leaves threads that never end when its engine fails.
    os._exit(0)


def _run(
    events: EventWriter,
    stop: threading.Event,
    *,
    config: str,
    tracker: Sequence[str],
    verbose: bool,
) -> Path:
    from fedsim.api import run_plan
    from fedsim.flower.server_app import check_output, default_output
    from fedsim.flower.simulation import fit_pool

    checked = RunConfig.from_json(config)
    pool = fit_pool(checked)
    output = Path(checked.output) if checked.output else default_output()
    plan = RunPlan.prepare(checked)
    check_output(output, plan)
    run_plan(
        plan,
        output,
        pool,
        stop=stop,
        observer=events,
        tracker=tracker,
        warn=lambda text: events.tell("tracker", text=text),
        verbose=verbose,
    )
    return output
