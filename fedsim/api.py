"""What Python programs and notebooks call: make a run, open one, draw it."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.core import registry
from fedsim.core.config import RunConfig, flags_to_resume, read_config_file
from fedsim.core.errors import RunInterruptedError
from fedsim.core.plugins import provider
from fedsim.core.rng import nothing_drawn
from fedsim.recording.reader import Run as RecordedRun

if TYPE_CHECKING:
    from fedsim.core.plan import RunPlan
    from fedsim.flower.rounds import RunObserver
    from fedsim.flower.simulation import WorkerPool
    from fedsim.recording.recovery import Recovery


class Run(RecordedRun):
    """A run directory that can be read and drawn.

    Parameters
    ----------
    path : path-like
        The run directory.

    Raises
    ------
    InputError
        When it is not a run directory of a format this version reads.
    """

    @cached_property
    def plot(self) -> Any:
        """The figures of the run, as far as it is now: ``run.plot.accuracy()``."""
        return provider("plots", "run.plot")(self)


def load_run(path: str | Path, strategy: str | None = None) -> Run:
    """Open a run directory as `fedsim.recording.reader.load_run` does, with figures beside it."""
    return Run(path, strategy)


def simulate(
    config: RunConfig | Mapping[str, Any] | str | Path,
    *,
    progress: bool = True,
    verbose: bool = False,
    tracker: Sequence[str] = (),
) -> Run:
    """Run a simulation on this machine and record it, as ``fedsim run`` does.

    It runs in a process of its own, which ends when the caller's does: nothing of the caller's
    process is changed, and a Ray that it has started goes on. Classes that the configuration
    names are imported there, by the caller's `sys.path`. An interrupt ends the run after the
    finished rounds; a second one at once.

    Parameters
    ----------
    config : RunConfig, mapping or path-like
        The configuration, its keys as in TOML (``{"clients-per-round": 4}``), or a TOML file or
        the ``run.json`` of an earlier run.
    progress : bool
        Print what ``fedsim run`` prints.
    verbose : bool
        Let Flower and Ray log.
    tracker : sequence of str
        Trackers that the run is reported to: ``"tensorboard"``, ``"mlflow"``, ``"wandb"``,
        ``"trackio"``. One that fails is dropped with a `RuntimeWarning`.

    Returns
    -------
    Run
        The finished run.

    Raises
    ------
    InputError
        When the configuration or a tracker cannot be used; nothing has been written then.
    RunFailedError
        When the run stopped early. Its finished rounds are kept.
    RunInterruptedError
        After an interrupt. The finished rounds are kept.
    """
    with nothing_drawn():
        # rich draws a number when it is imported.
        from fedsim.apart import simulate_apart
        from fedsim.terminal import TerminalObserver

    checked = _as_config(config)
    with contextlib.ExitStack() as stack:
        terminal = None
        if progress:
            terminal = stack.enter_context(contextlib.closing(TerminalObserver(is_ours=False)))
            terminal.preparing(checked.dataset)
        path = simulate_apart(
            checked, tracker=tracker, warn=_warn, terminal=terminal, verbose=verbose
        )
    # What the caller named for the run is there to read it, too.
    registry.trust(checked.code)
    return Run(path)


def run_plan(
    plan: RunPlan,
    output: Path,
    pool: WorkerPool,
    *,
    stop: threading.Event,
    observer: RunObserver,
    tracker: Sequence[str] = (),
    warn: Callable[[str], None],
    verbose: bool = False,
    recovery: Recovery | None = None,
    stop_after_round: threading.Event | None = None,
) -> None:
    """Run a plan and tell trackers of it.

    Parameters
    ----------
    plan, output, pool, stop, verbose, recovery, stop_after_round
        As of `fedsim.flower.simulation.simulate`.
    observer : RunObserver
        Who shows the run.
    tracker : sequence of str
        Names of trackers.
    warn : callable
        Told in a sentence when a tracker fails.

    Raises
    ------
    InputError
        When a tracker cannot be used; nothing has been written then.
    RunFailedError
        When the run stopped early.
    RunInterruptedError
        After an interrupt, with the command that goes on.
    """
    from fedsim.flower.simulation import simulate
    from fedsim.tracking import TrackingObserver, make_tracker, observers

    trackers = [TrackingObserver(name, make_tracker(name), warn) for name in tracker]
    with contextlib.ExitStack() as stack:
        for tracking in trackers:
            stack.callback(tracking.close)
        try:
            simulate(
                plan,
                output,
                pool,
                observer=observers(observer, *trackers),
                stop=stop,
                verbose=verbose,
                recovery=recovery,
                stop_after_round=stop_after_round,
            )
        except RunInterruptedError as error:
            raise RunInterruptedError(f"{error}; {how_to_go_on(plan.config, output)}") from None


def how_to_go_on(config: RunConfig, output: Path) -> str:
    """Say what is left of a run that was ended early, and the command that goes on with it."""
    if not output.exists():
        return "nothing has been written"
    return (
        f"the finished rounds are kept in {output}, and "
        f"`fedsim resume {output}{flags_to_resume(config)}` continues"
    )


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=1)


def _as_config(config: RunConfig | Mapping[str, Any] | str | Path) -> RunConfig:
    if isinstance(config, RunConfig):
        return config
    if isinstance(config, Mapping):
        return RunConfig.from_mapping(config)
    return RunConfig.from_mapping(read_config_file(Path(config)))
