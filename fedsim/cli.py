"""The ``fedsim`` command, but for the commands of plugins.

Nothing is imported that brings torch before a command needs it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from fedsim import __version__
from fedsim.command import (
    BAD_INPUT,
    FAILURE,
    SUCCESS,
    Command,
    CountOrAll,
    Group,
    Whole,
    check_trackers,
    config_file,
    data_root,
    keys_of,
    refusal,
    run_argument,
    say,
    say_first,
    tell,
    tracked,
    verbose,
)
from fedsim.core.characters import show_nearest
from fedsim.core.errors import FedsimError, InputError, RunInterruptedError
from fedsim.core.plugins import provided
from fedsim.interrupts import INTERRUPTED, remember_warning, stop_on_signals

if TYPE_CHECKING:
    from fedsim.core.plan import RunPlan
    from fedsim.flower.simulation import WorkerPool
    from fedsim.recording.recovery import Recovery
    from fedsim.recording.runs import FoundRun

_RUNS = Path("runs")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and end the process with its exit code.

    0 success, 1 a failure during a run, 2 bad input, 130 interrupted.
    """
    remember_warning()
    _prepare_streams()
    code = run(sys.argv[1:] if arguments is None else arguments)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        pass
    except OSError as error:
        if code == SUCCESS:
            say(f"standard output cannot be written: {error.strerror}")
            code = FAILURE
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    # Flower leaves threads that never end when its engine fails: so end the process here.
    os._exit(code)


def _prepare_streams() -> None:
    """Make standard output and errors take all that is printed.

    A process that was started without them gets a place for them: otherwise the next file that is
    opened gets their number, and what others print.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.set_inheritable(nothing, True)
            setattr(sys, name, os.fdopen(nothing, "w"))
        show_nearest(getattr(sys, name))


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code."""
    try:
        with fedsim.make_context("fedsim", [*arguments]) as context:
            return int(fedsim.invoke(context) or SUCCESS)
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except click.UsageError as error:
        say(str(refusal(error)))
        return BAD_INPUT
    except RunInterruptedError as error:
        say(str(error))
        return INTERRUPTED
    except InputError as error:
        say(str(error))
        return BAD_INPUT
    except FedsimError as error:
        say(str(error))
        return FAILURE
    except (KeyboardInterrupt, click.Abort):
        say("interrupted")
        return INTERRUPTED


class _Fedsim(Group):
    """The command itself, with the commands of plugins after its own."""

    @cached_property
    def _of_plugins(self) -> dict[str, click.Command]:
        found = [command for commands in provided("commands") for command in commands]
        return {command.name: command for command in found}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self.commands, *self._of_plugins]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return self.commands.get(name) or self._of_plugins.get(name)


fedsim = _Fedsim("fedsim", help="Federated averaging that you can replay.")
click.version_option(__version__, message="fedsim %(version)s")(fedsim)


def _prepared(
    file: Path | None,
    texts: Mapping[str, str | None],
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[RunPlan, WorkerPool, Path]:
    from fedsim.core.config import RunConfig, read_config_file

    flags = keys_of(texts)
    values = read_config_file(file, flags) if file else {}
    config = RunConfig.from_mapping({**values, **flags})

    from fedsim.core.plan import RunPlan
    from fedsim.flower.server_app import default_output
    from fedsim.flower.simulation import fit_pool
    from fedsim.terminal import preparing_line

    pool = fit_pool(config)
    output = Path(config.output) if config.output else default_output()
    tell(preparing_line(config.dataset))
    return RunPlan.prepare(config), pool, output


@fedsim.command(
    "run", cls=Command, keys=True, waits=True, short_help="run a simulation and record it"
)
@config_file
@verbose
@tracked
def _run(config: Path | None, verbose: bool, tracker: Sequence[str], **keys: str | None) -> None:
    """Run a simulation and record it.

    Flags override the file; lists and tables are written as in TOML, like --batch-size
    '[16, 32]', and `none` unsets a key.
    """
    check_trackers(tracker)
    # Data may be downloaded, and loading takes seconds: say what the user is waiting for.
    plan, pool, output = _prepared(config, keys, tell)

    from fedsim.flower.server_app import check_output

    check_output(output, plan)
    _simulate(plan, pool, output, tracker, verbose)


@fedsim.command(
    "plan",
    cls=Command,
    keys=True,
    short_help="say what a run would do and write, and whether there is room",
)
@config_file
def _plan(config: Path | None, **keys: str | None) -> None:
    """Say what a run would do, without starting it.

    It tells how many bytes a run would write in a step, a round and in all. It takes what `fedsim
    run` takes; exit code 2 where that would refuse.
    """
    plan, pool, output = _prepared(config, keys)

    from fedsim.core.behavior import check_clients
    from fedsim.core.units import format_bytes
    from fedsim.flower.server_app import check_output, free_bytes
    from fedsim.terminal import make_console, print_summary

    console = make_console()
    check_clients(plan.config)
    print_summary(console, plan, pool.workers, output)
    check_output(output, plan)
    free = format_bytes(free_bytes(output))
    console.print(f"fits: {free} are free on the disk of {output}", markup=False, soft_wrap=True)


@fedsim.command(
    "resume",
    cls=Command,
    keys=True,
    # What is not given is as it was recorded.
    show_defaults=False,
    waits=True,
    short_help="continue a run after its last whole round",
)
@run_argument
@click.option(
    "--allow-changed-code",
    is_flag=True,
    help="go on although the source of your own code has changed; run.json tells from which round",
)
@verbose
@tracked
def _resume(
    run: Path,
    allow_changed_code: bool,
    verbose: bool,
    tracker: Sequence[str],
    **keys: str | None,
) -> None:
    """Continue a run after its last whole round, with the configuration that it was recorded with.

    --rounds may be raised, and keys that change no bit of a round (workers, ray-address, data-root,
    max-failures, capture-budget, mirror) may change; any other change is refused. What a run may
    not decide by itself is given again: keys that name your own code, like --strategy, --mirror
    (`none`: stop copying), and --ray-address (otherwise: this machine).
    """
    from fedsim.core.config import RunConfig, take_recorded
    from fedsim.core.plan import RunPlan
    from fedsim.flower.scratch import sweep
    from fedsim.flower.server_app import check_resume
    from fedsim.flower.simulation import fit_pool
    from fedsim.recording.reader import load_run
    from fedsim.recording.recovery import check_continuable
    from fedsim.terminal import make_console, preparing_line, printable

    check_trackers(tracker)
    # Also where nothing is left to do.
    sweep()
    recorded = load_run(run)
    check_continuable(recorded)
    values = take_recorded(recorded.config.to_mapping(), keys_of(keys), recorded.path)
    config = RunConfig.from_mapping(values)
    tell(preparing_line(config.dataset))
    # Nothing is downloaded to where a run from elsewhere says that its data was.
    plan = RunPlan.prepare(config, download=keys["data_root"] is not None)
    recovery = check_resume(recorded, plan, allow_changed_code=allow_changed_code)
    # The cluster comes last: mistakes here are reported before anything is asked of it.
    pool = fit_pool(config)
    if recovery.damage:
        make_console(lasting=True).print(
            printable(f"continuing after round {recovery.round}: {'; '.join(recovery.damage)}"),
            markup=False,
            soft_wrap=True,
        )
    _simulate(plan, pool, run, tracker, verbose, recovery)


def _simulate(
    plan: RunPlan,
    pool: WorkerPool,
    output: Path,
    tracker: Sequence[str],
    verbose: bool,
    recovery: Recovery | None = None,
) -> None:
    from fedsim.api import how_to_go_on, run_plan
    from fedsim.terminal import TerminalObserver

    workers = "1 worker" if pool.workers == 1 else f"{pool.workers} workers"
    where = f"Ray and {workers}" if plan.config.cluster is None else "the workers"
    tell(f"starting   {where}")
    stop, stop_after_round = threading.Event(), threading.Event()
    stop_on_signals(stop, stop_after_round, lambda: how_to_go_on(plan.config, output))
    with contextlib.closing(TerminalObserver()) as terminal:
        run_plan(
            plan,
            output,
            pool,
            stop=stop,
            observer=terminal,
            tracker=tracker,
            warn=say,
            verbose=verbose,
            recovery=recovery,
            stop_after_round=stop_after_round,
        )


@fedsim.command("inspect", cls=Command, short_help="print what a run directory holds")
@run_argument
def _inspect(run: Path) -> None:
    """Print what a run directory holds."""
    from fedsim.recording.reader import load_run
    from fedsim.terminal import make_console, print_run

    print_run(make_console(), load_run(run))


class _Runs(Command):
    """The command whose --remove takes one run or several."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        repeated, removes = [], False
        for argument in args:
            removes = argument == "--remove" or (removes and not argument.startswith("-"))
            repeated += ["--remove", argument] if removes else [argument]
        several = [a for i, a in enumerate(repeated) if repeated[i - 1 : i + 1] != ["--remove"] * 2]
        return super().parse_args(ctx, several)


@fedsim.command(
    "runs",
    cls=_Runs,
    short_help="list runs with what they take, and remove them or their gradients",
)
@click.argument("folder", type=Path, default=_RUNS, help="default: runs")
@click.option(
    "--remove", type=Path, multiple=True, metavar="RUN...", help="remove these runs, one or several"
)
@click.option(
    "--keep-gradients-of",
    type=Whole(0),
    metavar="N",
    help="remove the captured gradients of all runs in the folder but the N newest. Deltas, "
    "states and rows stay: the runs can be read, verified and continued, and `fedsim verify` "
    "says that gradients were removed. `fedsim collect` brings them back from a copy",
)
@click.option("--yes", is_flag=True, help="do not ask before something is removed")
def _runs(folder: Path, remove: Sequence[Path], keep_gradients_of: int | None, yes: bool) -> None:
    """List the runs in a folder and in the folders right below it, as a comparison has them.

    It tells state, rounds, strategy, when they were begun (UTC), bytes in all and of gradients.
    Nothing is ever removed of a run that is being written, of a folder that is no run, or of a run
    that holds files of yours; links are not followed, and copies elsewhere (`mirror`, nodes) stay.
    Removing asks first, or takes --yes.
    """
    if remove and keep_gradients_of is not None:
        raise InputError("--remove and --keep-gradients-of are both given; expected only one")

    from fedsim.recording import runs
    from fedsim.terminal import make_console, print_runs

    if remove:
        chosen = [runs.find_run(path) for path in {p.absolute(): p for p in remove}.values()]
        # All of them, before one is removed.
        for run in chosen:
            runs.check_removable(run.path)
        _remove(chosen, gradients=False, yes=yes)
        return
    # Where nothing was recorded yet there is no folder of that name.
    none_yet = folder == _RUNS and not folder.exists()
    found = [] if none_yet else runs.find_runs(folder)
    if keep_gradients_of is None:
        print_runs(make_console(), found)
        return
    chosen = []
    for run in runs.outdated(found, keep_gradients_of):
        try:
            runs.check_removable(run.path)
            chosen.append(run)
        except InputError as error:
            say(f"{error}; its gradients stay")
    _remove(chosen, gradients=True, yes=yes)


def _remove(chosen: Sequence[FoundRun], *, gradients: bool, yes: bool) -> None:
    from fedsim.core.units import format_bytes
    from fedsim.recording.runs import remove_gradients, remove_run
    from fedsim.terminal import make_console, print_runs, printable

    console = make_console()
    print_runs(console, chosen)
    what = "the gradients of " if gradients else ""
    count = "this run" if len(chosen) == 1 else f"these {len(chosen):,} runs"
    if not chosen or not _agreed(f"remove {what}{count} for good?", yes):
        console.print("nothing was removed")
        return
    for run in chosen:
        size = remove_gradients(run.path) if gradients else remove_run(run.path)
        line = f"removed: {what}{run.path}, {format_bytes(size)}"
        console.print(printable(line), markup=False, soft_wrap=True)


def _agreed(question: str, yes: bool) -> bool:
    if yes:
        return True
    if not sys.stdin.isatty():
        raise InputError(
            "removing asks first, and there is no terminal to ask at; --yes removes without asking"
        )
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


@fedsim.command("verify", cls=Command, short_help="prove that a run directory holds what happened")
@run_argument
@click.option(
    "--round", type=Whole(), multiple=True, metavar="R", help="this round only (repeatable)"
)
@click.option(
    "--client", type=Whole(), multiple=True, metavar="P", help="this client only (repeatable)"
)
@click.option(
    "--evaluate",
    type=CountOrAll(),
    default="all",
    metavar="N",
    help="evaluate N states again, drawn at random, or all (default: all)",
)
@click.option(
    "--recompute",
    type=CountOrAll(),
    default="0",
    metavar="N",
    help="compute N local steps again from the data, drawn at random, or all (default: 0)",
)
@click.option(
    "--recompute-seed",
    type=Whole(0),
    metavar="SEED",
    help="repeat the draw of an earlier --recompute or --evaluate, which prints its seed",
)
@click.option(
    "--recompute-optional",
    is_flag=True,
    help="exit with 0 also where --recompute could compute no step again",
)
@data_root
@click.option(
    "--strategy",
    metavar="CLASS",
    help="your own strategy, which made the run, as module:Class or FILE.py:Class",
)
@click.option("--jobs", type=Whole(1), metavar="N", help="threads (default: all cores)")
def _verify(
    run: Path,
    round: Sequence[int],  # noqa: A002
    client: Sequence[int],
    evaluate: int,
    recompute: int,
    recompute_seed: int | None,
    recompute_optional: bool,
    data_root: str | None,
    strategy: str | None,
    jobs: int | None,
) -> int:
    """Check a run directory against itself.

    Checked are files, partition, participants, batches, deltas, states, the recorded gradients by
    replay, and losses and accuracies by evaluating each state again. It says what could not be
    proven and why. Exit code 1 where something is wrong.
    """
    import time

    from fedsim.recording.verify import verify
    from fedsim.terminal import ByteProgress, make_console, print_findings

    console = make_console()
    started = time.perf_counter()
    with ByteProgress(console, f"verifying {run}") as progress:
        findings = verify(
            run,
            rounds=round or None,
            clients=client or None,
            evaluate=None if evaluate < 0 else evaluate,
            recompute=None if recompute < 0 else recompute,
            seed=recompute_seed,
            data_root=data_root,
            strategy=strategy,
            jobs=jobs,
            progress=progress,
            tell=progress.tell,
        )
    print_findings(console, findings, time.perf_counter() - started)
    if findings.violations:
        return say_first(findings.violations, f"{run} is not what was recorded: ")
    if recompute != 0 and not findings.checks["recomputed"].proven:
        asked = "all" if recompute < 0 else recompute
        say(f"--recompute = {asked}: no step of {run} could be recomputed")
        return SUCCESS if recompute_optional else FAILURE
    return SUCCESS
