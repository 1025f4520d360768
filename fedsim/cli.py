"""The ``fedsim`` command."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fedsim import __version__
from fedsim.core.characters import NEAREST, show_nearest
from fedsim.core.errors import FedsimError, InputError, RunInterruptedError

if TYPE_CHECKING:
    from fedsim.core.plan import RunPlan
    from fedsim.flower.simulation import WorkerPool
    from fedsim.recording.recovery import Recovery
    from fedsim.recording.runs import FoundRun

SUCCESS, FAILURE, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

_ONE_REQUEST_S = 0.5

_LOADING = "loading    torch, Flower and Ray"


_RUNS = Path("runs")


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; `{self.prog} --help` lists what is allowed")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and end the process with its exit code.

    0 success, 1 a failure during a run, 2 bad input, 130 interrupted.
    """
    _prepare_streams()
    code = run(sys.argv[1:] if arguments is None else arguments)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        pass
    except OSError as error:
        if code == SUCCESS:
            _say(f"standard output cannot be written: {error.strerror}")
            code = FAILURE
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    # Flower leaves threads that wait for ever when its engine fails: end the process for certain.
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
        parsed = _parse(arguments)
        return int(parsed.command(parsed) or SUCCESS)
    except RunInterruptedError as error:
        _say(str(error))
        return INTERRUPTED
    except InputError as error:
        _say(str(error))
        return BAD_INPUT
    except FedsimError as error:
        _say(str(error))
        return FAILURE
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    except SystemExit as ended:
        return int(ended.code or SUCCESS)


def _say(text: str) -> None:
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    # Whoever closed the terminal hears nothing.
    with contextlib.suppress(OSError):
        print(f"fedsim: {line}", file=sys.stderr)  # noqa: T201


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="fedsim", description="Federated averaging that you can replay.")
    parser.add_argument("--version", action="version", version=f"fedsim {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    asks = {"-h", "--help"} & {*arguments}
    if list(arguments[:1]) in (["run"], ["resume"], ["compare"]) and not asks:
        # It takes seconds, more on a busy machine: say what the user is waiting for.
        _tell_loading()
    # The keys come with torch: only who asks for a run waits for it.
    _add_run(commands, with_keys="run" in arguments[:1])
    _add_plan(commands, with_keys="plan" in arguments[:1])
    _add_resume(commands, with_keys="resume" in arguments[:1])
    _add_compare(commands, with_keys="compare" in arguments[:1])
    _add_inspect(commands)
    _add_runs(commands)
    _add_verify(commands)
    _add_collect(commands)
    _add_export(commands)
    _add_report(commands)
    _add_push(commands)
    _add_fetch(commands)
    _add_deploy(commands)
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        _refuse(unknown[0], arguments, parsed.command)
    return parsed


def _tell_loading() -> None:
    if "torch" not in sys.modules:
        _tell(_LOADING)


def _refuse(unknown: str, arguments: Sequence[str], command: Any) -> NoReturn:
    """Refuse what no command takes; a misspelt key of a run gets the nearest one."""
    if command in (_run, _plan, _resume, _compare) and unknown.startswith("--"):
        from fedsim.core.config import RunConfig
        from fedsim.core.fields import unknown_key

        key, _, value = unknown.removeprefix("--").partition("=")
        # From all arguments: argparse has taken the value for the name of the file.
        after = arguments[arguments.index(unknown) + 1 :]
        given = value or " ".join(a for a in after[:1] if not a.startswith("--"))
        raise unknown_key(key, given, RunConfig)
    raise InputError(f"unrecognized argument {unknown!r}; `fedsim --help` lists what is allowed")


def _add_run(commands: Any, *, with_keys: bool) -> None:
    command = commands.add_parser(
        "run",
        help="run a simulation and record it",
        description="Run a simulation and record it. Flags override the file; lists and tables "
        "are written as in TOML, like --batch-size '[16, 32]', and `none` unsets a key.",
        allow_abbrev=False,
    )
    command.set_defaults(command=_run)
    command.add_argument(
        "config",
        nargs="?",
        type=Path,
        help="a TOML file, or the run.json of an earlier run (default: the quickstart)",
    )
    command.add_argument("--verbose", action="store_true", help="show what Flower and Ray log")
    _add_tracker(command)
    if with_keys:
        _add_keys(command)


def _add_plan(commands: Any, *, with_keys: bool) -> None:
    command = commands.add_parser(
        "plan",
        help="say what a run would do and write, and whether there is room",
        description="Say what a run would do and how many bytes it would write in a step, a round "
        "and in all, without starting it. Takes what `fedsim run` takes; exit code 2 where that "
        "would refuse.",
        allow_abbrev=False,
    )
    command.set_defaults(command=_plan)
    command.add_argument("config", nargs="?", type=Path, help="as for `fedsim run`")
    if with_keys:
        _add_keys(command)


def _add_resume(commands: Any, *, with_keys: bool) -> None:
    command = commands.add_parser(
        "resume",
        help="continue a run after its last whole round",
        description="Continue a run after its last whole round, with the configuration that it "
        "was recorded with. --rounds may be raised, and what decides no bit of a round (workers, "
        "ray-address, data-root, max-failures, capture-budget, mirror) may change; any other "
        "change is refused. What a run alone does not decide is given again: --strategy where "
        "it is a class of your own, --mirror (`none`: no copy any more), and --ray-address "
        "(otherwise: this machine).",
        allow_abbrev=False,
    )
    command.set_defaults(command=_resume)
    command.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    command.add_argument("--verbose", action="store_true", help="show what Flower and Ray log")
    _add_tracker(command)
    if with_keys:
        # What is not given is as it was recorded.
        _add_keys(command, with_defaults=False)


def _add_compare(commands: Any, *, with_keys: bool) -> None:
    command = commands.add_parser(
        "compare",
        help="run a grid of configurations and tabulate what came of them",
        description="Run every combination of the values given, one after another, each into a "
        "folder of its own, and print a table. The same command goes on where one was stopped, "
        "and repeats no finished run. Takes every key of `fedsim run` for all of them.",
        allow_abbrev=False,
    )
    command.set_defaults(command=_compare)
    command.add_argument("config", nargs="?", type=Path, help="as for `fedsim run`")
    command.add_argument("--strategies", metavar="A,B", help="the same as --vary strategy=A,B")
    command.add_argument("--seeds", metavar="A,B", help="the same as --vary seed=A,B")
    command.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="KEY=A,B",
        help="values of any key, like alpha=0.1,0.5,10 (repeatable)",
    )
    command.add_argument(
        "--target", metavar="ACCURACY", help="count the rounds to this accuracy, like 0.5"
    )
    command.add_argument(
        "--output",
        metavar="VALUE",
        help="folder of the comparison (default: a dated one under runs/)",
    )
    command.add_argument("--verbose", action="store_true", help="log what Flower and Ray log")
    _add_tracker(command)
    if with_keys:
        _add_keys(command, but=("output",))


def _add_tracker(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--tracker",
        action="append",
        default=[],
        metavar="NAME",
        help="tell the run to tensorboard, mlflow, wandb or trackio too (repeatable)",
    )


_GROUPS = {
    "dataset": "data and clients",
    "model": "model and local training",
    "capture": "captured gradients",
    "strategy": "aggregation",
    "workers": "machine",
    "evaluate-every": "course of the run",
    "output": "output",
}
"""Headings of the help, each by the first key below it, in the order of the configuration."""


def _add_keys(
    command: argparse.ArgumentParser, *, but: Sequence[str] = (), with_defaults: bool = True
) -> None:
    from fedsim.core.config import RunConfig, describe, flag_text
    from fedsim.core.fields import choices_of

    defaults = RunConfig().to_mapping()
    # As a flag takes it.
    defaults["strategy"] = defaults["strategy"]["name"]
    defaults["capture-layers"] = ",".join(defaults["capture-layers"])
    group: Any = command
    for name, field in RunConfig.model_fields.items():
        key = name.replace("_", "-")
        if key in _GROUPS:
            group = command.add_argument_group(_GROUPS[key])
        if key in but:
            continue
        default = defaults[key]
        shown = f" (default: {flag_text(default)})"
        if default in (None, {}) or not with_defaults:
            shown = ""
        choices = choices_of(field.annotation)
        metavar = "{" + ",".join(choices) + "}" if choices else "VALUE"
        # `--nesterov` alone means true.
        alone: dict[str, Any] = {}
        if field.annotation is bool:
            alone, metavar = {"nargs": "?", "const": "true"}, "{true,false}"
        group.add_argument(
            f"--{key}",
            metavar=metavar,
            dest=key,
            **alone,
            help=f"{describe(name)}{shown}".replace("%", "%%"),
        )


def _add_inspect(commands: Any) -> None:
    command = commands.add_parser(
        "inspect", help="print what a run directory holds", allow_abbrev=False
    )
    command.set_defaults(command=_inspect)
    command.add_argument("run", type=Path, metavar="RUN", help="a run directory")


def _add_runs(commands: Any) -> None:
    command = commands.add_parser(
        "runs",
        help="list runs with what they take, and remove them or their gradients",
        description="List the runs in a folder and in the folders right below it, as a comparison "
        "has them: state, rounds, strategy, when they were begun (UTC), bytes in all and of "
        "gradients. Nothing is ever removed of a run that is being written, of a folder that is "
        "no run, or of a run that holds files of yours; links are not followed, and copies "
        "elsewhere (`mirror`, nodes) stay. Removing asks first, or takes --yes.",
        allow_abbrev=False,
    )
    command.set_defaults(command=_runs)
    command.add_argument(
        "folder", type=Path, nargs="?", default=_RUNS, metavar="FOLDER", help="default: %(default)s"
    )
    either = command.add_mutually_exclusive_group()
    either.add_argument(
        "--remove", type=Path, nargs="+", default=[], metavar="RUN", help="remove these runs"
    )
    either.add_argument(
        "--keep-gradients-of",
        type=int,
        metavar="N",
        help="remove the captured gradients of all runs in the folder but the N newest. Deltas, "
        "states and rows stay: the runs can be read, verified and continued, and `fedsim verify` "
        "says that gradients were removed. `fedsim collect` brings them back from a copy",
    )
    command.add_argument(
        "--yes", action="store_true", help="do not ask before something is removed"
    )


def _add_verify(commands: Any) -> None:
    command = commands.add_parser(
        "verify",
        help="prove that a run directory holds what happened",
        description="Check a run directory against itself: files, partition, participants, "
        "batches, deltas, states, the recorded gradients by replay, and losses and accuracies by "
        "evaluating each state again. Says what could not be proven and why. Exit code 1 where "
        "something is wrong.",
        allow_abbrev=False,
    )
    command.set_defaults(command=_verify)
    command.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    command.add_argument(
        "--round", type=int, action="append", metavar="R", help="this round only (repeatable)"
    )
    command.add_argument(
        "--client", type=int, action="append", metavar="P", help="this client only (repeatable)"
    )
    command.add_argument(
        "--evaluate",
        default="all",
        metavar="N",
        help="evaluate N states again, drawn at random, or all (default: all)",
    )
    command.add_argument(
        "--recompute",
        default="0",
        metavar="N",
        help="compute N local steps again from the data, drawn at random, or all (default: 0)",
    )
    command.add_argument(
        "--recompute-seed",
        type=int,
        metavar="SEED",
        help="repeat the draw of an earlier --recompute or --evaluate, which prints its seed",
    )
    command.add_argument(
        "--recompute-optional",
        action="store_true",
        help="exit with 0 also where --recompute could compute no step again",
    )
    command.add_argument("--data-root", metavar="FOLDER", help="where the data is")
    command.add_argument(
        "--strategy",
        metavar="CLASS",
        help="your own strategy, which made the run, as module:Class or FILE.py:Class",
    )
    command.add_argument("--jobs", type=int, metavar="N", help="threads (default: all cores)")


def _add_collect(commands: Any) -> None:
    command = commands.add_parser(
        "collect",
        help="bring what clients recorded on their own disks into a run directory",
        description="Bring what clients recorded on their own disks into a run directory. Each "
        "file is checked against the hash that the client told when it wrote it. The same command "
        "goes on where it was stopped. Exit code 1 where a file is not what the client wrote.",
        allow_abbrev=False,
    )
    command.set_defaults(command=_collect)
    command.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    command.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="what a node calls its recordings, or the folder of the run in it: a path, or a URL "
        "that fsspec knows",
    )


def _collect(parsed: argparse.Namespace) -> int:
    from fedsim.core.units import format_bytes
    from fedsim.plugins.remote.collect import collect
    from fedsim.recording.reader import load_run
    from fedsim.terminal import ByteProgress, make_console

    console = make_console()
    with ByteProgress(console, f"collecting into {parsed.run}") as progress:
        collected = collect(load_run(parsed.run), parsed.source, progress)
    lines = [f"collected: {collected.files:,} files, {format_bytes(collected.size)}"]
    if collected.missing:
        lines.append(f"not in any source: {len(collected.missing):,} files, {collected.missing[0]}")
    for line in [*lines, *collected.wrong]:
        console.print(line, markup=False, soft_wrap=True)
    if not collected.wrong:
        return SUCCESS
    more = f" (and {len(collected.wrong) - 1} more)" if len(collected.wrong) > 1 else ""
    _say(f"{collected.wrong[0]}{more}")
    return FAILURE


def _add_export(commands: Any) -> None:
    command = commands.add_parser(
        "export",
        help="write recorded gradients in the form of another program",
        description="Write recorded gradients in the form of another program.",
        allow_abbrev=False,
    )
    forms = command.add_subparsers(metavar="FORM", required=True)
    breaching = forms.add_parser(
        "breaching",
        help="local steps of a client, for the gradient-inversion tool of that name",
        description="Write local steps of one client for the gradient-inversion tool breaching, "
        "with the images that they were computed from.",
        allow_abbrev=False,
    )
    notebook = forms.add_parser(
        "notebook",
        help="a round in one file of tensors and one of figures",
        description="Write a round as PREFIX_RR_tensors.pt and PREFIX_RR_meta.json.",
        allow_abbrev=False,
    )
    for form in (breaching, notebook):
        form.add_argument("run", type=Path, metavar="RUN", help="a run directory")
        form.add_argument("--round", type=int, required=True, metavar="R", help="a training round")
    breaching.set_defaults(command=_export_breaching)
    breaching.add_argument("--client", type=int, required=True, metavar="P", help="whose steps")
    breaching.add_argument("--step", type=int, required=True, metavar="S", help="the first, from 0")
    breaching.add_argument(
        "--steps", type=int, default=1, metavar="N", help="how many (default: %(default)s)"
    )
    breaching.add_argument(
        "--allow-not-replayable",
        action="store_true",
        help="export several steps even where breaching cannot repeat them from the images",
    )
    breaching.add_argument("--data-root", metavar="FOLDER", help="where the data is")
    breaching.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="a folder that does not exist"
    )
    notebook.set_defaults(command=_export_notebook)
    notebook.add_argument(
        "--client",
        type=int,
        action="append",
        default=[],
        metavar="P",
        help="this client only (repeatable)",
    )
    notebook.add_argument(
        "--output", type=Path, required=True, metavar="PREFIX", help="how the names begin"
    )


def _add_report(commands: Any) -> None:
    command = commands.add_parser(
        "report",
        help="write one page of figures about one run or several",
        description="Write one HTML page about one run or several, also while they are under way: "
        "accuracy, partition, drift, gradients, time, configuration, verification. It needs no "
        "network.",
        allow_abbrev=False,
    )
    command.set_defaults(command=_report)
    command.add_argument("run", type=Path, nargs="+", metavar="RUN", help="a run directory")
    command.add_argument(
        "--output",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="the page; an earlier report is replaced (default: %(default)s)",
    )
    command.add_argument(
        "--png", type=Path, metavar="FOLDER", help="write each figure as an image too"
    )
    command.add_argument(
        "--verify", action="store_true", help="check all that `fedsim verify` does, not rows alone"
    )
    command.add_argument(
        "--read-budget",
        default="20 GB",
        metavar="BYTES",
        help="most deltas and gradients to read of a run; rounds are left out evenly to keep to it "
        "(default: %(default)s)",
    )
    command.add_argument("--data-root", metavar="FOLDER", help="where the data is")


def _add_push(commands: Any) -> None:
    command = commands.add_parser(
        "push",
        help="copy a run to a URL, or bring a copy up to date",
        description="Copy a run to a URL or path, in an order that leaves a run there wherever it "
        "is cut off; the same command goes on. A run with `mirror` does this by itself.",
        allow_abbrev=False,
    )
    command.set_defaults(command=_push)
    command.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    command.add_argument("url", metavar="URL", help="like s3://bucket/run")


def _add_fetch(commands: Any) -> None:
    command = commands.add_parser(
        "fetch",
        help="copy a run from a URL and check every byte",
        description="Copy a run from a URL or path into a folder that does not exist, and check "
        "every file against its checksum. The same command goes on where one was cut off.",
        allow_abbrev=False,
    )
    command.set_defaults(command=_fetch)
    command.add_argument("url", metavar="URL", help="like s3://bucket/run")
    command.add_argument("folder", type=Path, metavar="RUN", help="the run directory to make")


def _push(parsed: argparse.Namespace) -> None:
    from fedsim.core.units import format_bytes
    from fedsim.plugins.remote.mirror import push
    from fedsim.plugins.remote.urls import RemoteFolder
    from fedsim.recording.reader import load_run
    from fedsim.recording.recovery import check_places
    from fedsim.terminal import ByteProgress, make_console

    load_run(parsed.run)
    check_places(parsed.run)
    console = make_console()
    with ByteProgress(console, f"copying {parsed.run}") as progress:
        size = push(parsed.run, RemoteFolder(parsed.url), progress=progress)
    text = f"copied: {format_bytes(size)} to {parsed.url}, which is up to date"
    console.print(text, markup=False, soft_wrap=True)


def _fetch(parsed: argparse.Namespace) -> None:
    from fedsim.plugins.remote.mirror import fetch
    from fedsim.terminal import ByteProgress, make_console

    console = make_console()
    with ByteProgress(console, f"fetching {parsed.url}") as progress:
        rounds = fetch(parsed.url, parsed.folder, progress)
    # The untrained model is not counted, as everywhere.
    text = f"fetched: {max(rounds - 1, 0)} rounds into {parsed.folder}"
    console.print(text, markup=False, soft_wrap=True)


def _add_deploy(commands: Any) -> None:
    command = commands.add_parser(
        "deploy",
        help="make and start a federation of real Flower nodes",
        description="Make and start a federation of real Flower nodes, for `flwr run`.",
        allow_abbrev=False,
    )
    steps = command.add_subparsers(metavar="STEP", required=True)
    init = steps.add_parser(
        "init",
        help="make the folder of a federation: certificates, keys, configuration, services",
        description="Make the folder of a federation: an authority, the certificate of the server, "
        "a key for each node, and the configuration, systemd units and compose files of all.",
        allow_abbrev=False,
    )
    init.set_defaults(command=_deploy_init)
    init.add_argument(
        "--supernodes", type=int, default=4, metavar="N", help="one a partition (default: 4)"
    )
    init.add_argument(
        "--address",
        default="127.0.0.1",
        help="host name or IP address of the server for the nodes (default: %(default)s)",
    )
    init.add_argument(
        "--listen",
        default="",
        metavar="IP",
        help="address of the server's host at which it takes connections (default: the address, "
        "where that is loopback, and all of the host otherwise)",
    )
    init.add_argument(
        "--port",
        type=int,
        default=9092,
        help="port for the nodes; those after it are used too (default: %(default)s)",
    )
    init.add_argument(
        "--data-root", type=Path, metavar="FOLDER", help="where the nodes have the shared dataset"
    )
    init.add_argument(
        "--capture", action="store_true", help="nodes allow that gradients are captured"
    )
    init.add_argument(
        "--insecure", action="store_true", help="no TLS and no keys: anyone may join and listen"
    )
    start = steps.add_parser(
        "start",
        help="run all of a federation on this machine until Ctrl-C",
        description="Run the SuperLink, its gateway and all SuperNodes on this machine. Ctrl-C "
        "ends all of them.",
        allow_abbrev=False,
    )
    start.set_defaults(command=_deploy_start)
    register = steps.add_parser(
        "register",
        help="register the keys of all nodes at the SuperLink of this host",
        description="Register the public keys of all nodes at the SuperLink of this host, each "
        "for its partition.",
        allow_abbrev=False,
    )
    register.set_defaults(command=_deploy_register)
    gateway = steps.add_parser(
        "gateway",
        help="let the nodes reach the SuperLink of this host",
        description="Pass on to the SuperLink of this host what its nodes may ask, and nothing "
        "else, and log whom it refuses.",
        allow_abbrev=False,
    )
    gateway.set_defaults(command=_deploy_gateway)
    gateway.add_argument(
        "--listen", default="", metavar="IP", help="listen there (default: as `init` was told)"
    )
    renew = steps.add_parser(
        "renew",
        help="make another certificate for the server, or another key for a node",
        description="Make another certificate for the server, with the key of the authority. The "
        "SuperLink and the gateway take it when they are started again. With --node, make another "
        "key for a node instead, to be registered and brought to its host.",
        allow_abbrev=False,
    )
    renew.set_defaults(command=_deploy_renew)
    renew.add_argument(
        "--node", type=int, metavar="N", help="the node of partition N, whose key was lost or told"
    )
    for step, default in ((init, 365), (renew, None)):
        step.add_argument(
            "--days",
            type=int,
            default=default,
            help="validity of the server's certificate (default: 365)",
        )
    for step in (init, start, register, gateway, renew):
        step.add_argument("folder", type=Path, metavar="DIR", help="the folder of the federation")


def _deploy_init(parsed: argparse.Namespace) -> None:
    from fedsim.plugins.deploy.federation import Federation
    from fedsim.plugins.deploy.init import init

    init(
        parsed.folder,
        Federation(
            address=parsed.address,
            listen=parsed.listen,
            port=parsed.port,
            supernodes=parsed.supernodes,
            insecure=parsed.insecure,
        ),
        days=parsed.days,
        data_root=parsed.data_root.absolute() if parsed.data_root else None,
        capture=parsed.capture,
    )
    if parsed.insecure:
        _say("insecure: whoever reaches the server may join, listen and change what is sent")
    _tell(f"written: {parsed.folder}; `fedsim deploy start {parsed.folder}` starts it here")


def _deploy_start(parsed: argparse.Namespace) -> None:
    from fedsim.plugins.deploy.federation import Federation
    from fedsim.plugins.deploy.start import start

    if Federation.read(parsed.folder).insecure:
        _say("insecure: whoever reaches the server may join, listen and change what is sent")
    stop = threading.Event()
    # A second one must not leave processes behind; the end takes seconds.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    start(parsed.folder, _tell, stop)


def _deploy_register(parsed: argparse.Namespace) -> None:
    from fedsim.plugins.deploy.start import register

    register(parsed.folder, _tell)


def _deploy_renew(parsed: argparse.Namespace) -> None:
    from fedsim.plugins.deploy.init import renew, renew_node

    if parsed.node is None:
        renew(parsed.folder, days=365 if parsed.days is None else parsed.days)
        _tell(f"written: {parsed.folder}/server/server.crt, server.key")
        return
    if parsed.days is not None:
        raise InputError("--days is for the server's certificate; a node's key does not expire")
    private, public, replaced = renew_node(parsed.folder, parsed.node)
    _tell(f"written: {private}, for the host of the node")
    _tell(f"         {public}, which `fedsim deploy register {parsed.folder}` registers")
    if replaced:
        _tell_how_to_unregister(parsed.folder, replaced)


def _tell_how_to_unregister(folder: Path, public_key: bytes) -> None:
    from fedsim.plugins.deploy.federation import CONNECTION, Federation, Places
    from fedsim.plugins.deploy.registered import node_id_of

    places = Places(folder.absolute())
    try:
        node: int | str | None = node_id_of(places, Federation.read(folder), public_key)
    except FedsimError as error:
        _tell(f"{error}; if it knows the old key, under the id that the node's log says,")
        node = "NODE-ID"
    if node is not None:
        command = f"flwr supernode unregister {node} {CONNECTION}"
        _tell(f"FLWR_HOME={shlex.quote(str(places.user))} {command}   (takes the old key away)")


def _deploy_gateway(parsed: argparse.Namespace) -> None:
    from dataclasses import replace

    from fedsim.plugins.deploy.federation import Federation, Places

    federation = Federation.read(parsed.folder)
    if federation.insecure:
        raise InputError(f"{parsed.folder} is insecure: its nodes reach the SuperLink itself")

    from fedsim.plugins.deploy.gateway import serve

    listen = parsed.listen or federation.listen
    serve(Places(parsed.folder.absolute()), replace(federation, listen=listen))


def _tell(text: str) -> None:
    # Without what prints tables, which brings in torch.
    # A federation goes on without a reader; what could not be written is told at the end.
    with contextlib.suppress(OSError):
        print(text, flush=True)  # noqa: T201


def _report(parsed: argparse.Namespace) -> int:
    from fedsim.core.errors import ConfigError
    from fedsim.core.units import parse_bytes
    from fedsim.plugins.report.report import write_report
    from fedsim.terminal import ByteProgress, make_console

    try:
        budget = parse_bytes(parsed.read_budget)
    except ValueError as error:
        raise ConfigError("--read-budget", parsed.read_budget, str(error)) from None
    console = make_console()
    with ByteProgress(console, "reading") as progress:
        written, violations = write_report(
            parsed.run,
            parsed.output,
            images=parsed.png,
            in_full=parsed.verify,
            budget=budget,
            data_root=parsed.data_root,
            progress=progress,
        )
    page, *images = written
    console.print(f"written: {page}", markup=False, soft_wrap=True)
    if images:
        text = f"written: {len(images)} images in {parsed.png}"
        console.print(text, markup=False, soft_wrap=True)
    if not violations:
        return SUCCESS
    more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
    _say(f"{violations[0]}{more}")
    return FAILURE


def _export_breaching(parsed: argparse.Namespace) -> None:
    from fedsim.plugins.export.export import export_breaching
    from fedsim.recording.reader import load_run
    from fedsim.terminal import make_console

    reasons = export_breaching(
        load_run(parsed.run),
        parsed.round,
        parsed.client,
        parsed.step,
        steps=parsed.steps,
        output=parsed.output,
        allow_not_replayable=parsed.allow_not_replayable,
        data_root=parsed.data_root,
    )
    console = make_console()
    console.print(f"written: {parsed.output}", markup=False, soft_wrap=True)
    if reasons:
        console.print(f"not replayable: {', '.join(reasons)}", markup=False, soft_wrap=True)


def _export_notebook(parsed: argparse.Namespace) -> None:
    from fedsim.plugins.export.export import export_notebook
    from fedsim.recording.reader import load_run
    from fedsim.terminal import ByteProgress, make_console

    console = make_console()
    with ByteProgress(console, f"collecting round {parsed.round}") as progress:
        paths = export_notebook(
            load_run(parsed.run),
            parsed.round,
            output=parsed.output,
            clients=parsed.client,
            progress=progress,
        )
    for path in paths:
        console.print(f"written: {path}", markup=False, soft_wrap=True)


def _verify(parsed: argparse.Namespace) -> int:
    import time

    for name, value, least in (
        ("jobs", parsed.jobs, 1),
        ("recompute-seed", parsed.recompute_seed, 0),
    ):
        if value is not None and value < least:
            raise InputError(f"--{name} = {value} cannot be used; it must be {least} or more")
    evaluations = _count_or_all("evaluate", parsed.evaluate)
    recomputations = _count_or_all("recompute", parsed.recompute)

    from fedsim.recording.verify import verify
    from fedsim.terminal import ByteProgress, make_console, print_findings

    console = make_console()
    started = time.perf_counter()
    with ByteProgress(console, f"verifying {parsed.run}") as progress:
        findings = verify(
            parsed.run,
            rounds=parsed.round,
            clients=parsed.client,
            evaluate=evaluations,
            recompute=recomputations,
            seed=parsed.recompute_seed,
            data_root=parsed.data_root,
            strategy=parsed.strategy,
            jobs=parsed.jobs,
            progress=progress,
            tell=progress.tell,
        )
    print_findings(console, findings, time.perf_counter() - started)
    if not (violations := findings.violations):
        if recomputations != 0 and not findings.checks["recomputed"].proven:
            _say(f"--recompute = {parsed.recompute}: no step of {parsed.run} could be recomputed")
            return SUCCESS if parsed.recompute_optional else FAILURE
        return SUCCESS
    more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
    _say(f"{parsed.run} is not what was recorded: {violations[0]}{more}")
    return FAILURE


def _count_or_all(flag: str, text: str) -> int | None:
    """Read a number of things, or ``all`` as None."""
    if text == "all":
        return None
    if text.isascii() and text.isdigit():
        return int(text)
    raise InputError(f"--{flag} = {text!r} cannot be used; it must be 0, a larger number, or all")


def _flags_of(parsed: argparse.Namespace) -> dict[str, Any]:
    """Give the keys of a run that stand on the command line."""
    from fedsim.core.config import RunConfig, parse_text

    keys = [name.replace("_", "-") for name in RunConfig.model_fields]
    texts = {key: getattr(parsed, key) for key in keys}
    return {key: parse_text(key, text) for key, text in texts.items() if text is not None}


def _check_trackers(parsed: argparse.Namespace) -> None:
    if parsed.tracker:
        from fedsim.trackers import check_tracker

        for name in parsed.tracker:
            check_tracker(name)


def _prepared(
    parsed: argparse.Namespace, tell: Callable[[str], None] = lambda _: None
) -> tuple[RunPlan, WorkerPool, Path]:
    from fedsim.core.config import RunConfig, read_config_file

    flags = _flags_of(parsed)
    values = read_config_file(parsed.config, flags) if parsed.config else {}
    config = RunConfig.from_mapping({**values, **flags})

    from fedsim.core.plan import RunPlan
    from fedsim.flower.server_app import default_output
    from fedsim.flower.simulation import fit_pool
    from fedsim.terminal import preparing_line

    pool = fit_pool(config)
    output = Path(config.output) if config.output else default_output()
    tell(preparing_line(config.dataset))
    return RunPlan.prepare(config), pool, output


def _run(parsed: argparse.Namespace) -> None:
    _check_trackers(parsed)
    # Data may be downloaded, and loading takes seconds: say what the user is waiting for.
    plan, pool, output = _prepared(parsed, _tell)

    from fedsim.flower.server_app import check_output

    check_output(output, plan)
    _simulate(parsed, plan, pool, output)


def _resume(parsed: argparse.Namespace) -> None:
    from fedsim.core.config import RunConfig, take_recorded
    from fedsim.core.plan import RunPlan
    from fedsim.flower.scratch import sweep
    from fedsim.flower.server_app import check_resume
    from fedsim.flower.simulation import fit_pool
    from fedsim.recording.reader import load_run
    from fedsim.recording.recovery import check_continuable
    from fedsim.terminal import make_console, preparing_line, printable

    _check_trackers(parsed)
    # Also where nothing is left to do.
    sweep()
    run = load_run(parsed.run)
    check_continuable(run)
    values = take_recorded(run.config.to_mapping(), _flags_of(parsed), run.path)
    config = RunConfig.from_mapping(values)
    _tell(preparing_line(config.dataset))
    # Nothing is downloaded to where a run from elsewhere says that its data was.
    plan = RunPlan.prepare(config, download=getattr(parsed, "data-root") is not None)
    recovery = check_resume(run, plan)
    # The cluster comes last: whatever is wrong here is said before anything is asked of it.
    pool = fit_pool(config)
    if recovery.damage:
        make_console(lasting=True).print(
            printable(f"continuing after round {recovery.round}: {'; '.join(recovery.damage)}"),
            markup=False,
            soft_wrap=True,
        )
    _simulate(parsed, plan, pool, parsed.run, recovery)


def _simulate(
    parsed: argparse.Namespace,
    plan: RunPlan,
    pool: WorkerPool,
    output: Path,
    recovery: Recovery | None = None,
) -> None:
    from fedsim.api import how_to_go_on, run_plan
    from fedsim.terminal import TerminalObserver

    workers = "1 worker" if pool.workers == 1 else f"{pool.workers} workers"
    where = f"Ray and {workers}" if plan.config.cluster is None else "the workers"
    _tell(f"starting   {where}")
    stop, stop_after_round = threading.Event(), threading.Event()
    _stop_on_signals(stop, stop_after_round, lambda: how_to_go_on(plan.config, output))
    with contextlib.closing(TerminalObserver()) as terminal:
        run_plan(
            plan,
            output,
            pool,
            stop=stop,
            observer=terminal,
            tracker=parsed.tracker,
            warn=_say,
            verbose=parsed.verbose,
            recovery=recovery,
            stop_after_round=stop_after_round,
        )


def _plan(parsed: argparse.Namespace) -> None:
    plan, pool, output = _prepared(parsed)

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


def _compare(parsed: argparse.Namespace) -> int:
    from fedsim.core.config import read_config_file
    from fedsim.plugins.compare.cells import make_cells, parse_axis

    axes = []
    for flag, key in (("strategies", "strategy"), ("seeds", "seed")):
        if (text := getattr(parsed, flag)) is not None:
            axes.append(parse_axis(key, text))
    for given in parsed.vary:
        key, equals, text = given.partition("=")
        if not equals:
            raise InputError(f"--vary {given} cannot be used; expected KEY=A,B like alpha=0.1,1")
        axes.append(parse_axis(key, text))
    flags = _flags_of(parsed)
    for axis in axes:
        if axis.key in flags:
            raise InputError(f"{axis.key} is both varied and set by a flag; expected only one")
    target = _target_of(parsed.target)
    _check_trackers(parsed)
    known = {*flags, *(axis.key for axis in axes)}
    values = {**(read_config_file(parsed.config, known) if parsed.config else {}), **flags}
    named = values.pop("output", None)
    cells = make_cells(values, axes)

    from fedsim.core.config import RunConfig
    from fedsim.flower.scratch import sweep
    from fedsim.flower.simulation import fit_pool
    from fedsim.plugins.compare import compare
    from fedsim.plugins.compare.tables import GridProgress, group_rows, print_comparison
    from fedsim.terminal import make_console

    # Checked as the same key of a run is.
    folder = RunConfig.from_mapping({"output": named} if named is not None else {}).output
    output = Path(folder) if folder else compare.default_output()
    compare.check_grid(output, cells)
    _tell(f"preparing  {len(cells)} cells")
    sweep()
    works = compare.find_work(output, cells, fit_pool)
    more = [f"--tracker={name}" for name in parsed.tracker]
    more += ["--verbose"] if parsed.verbose else []
    stop, stop_after_round = threading.Event(), threading.Event()
    launch = compare.ProcessLauncher(output, more, stop_after_round)
    console = make_console(lasting=True)
    progress = GridProgress(console)
    kept = (
        f"the finished rounds are kept in {output}, and the same command"
        f"{'' if named else f' with --output {output}'} continues"
    )
    _stop_on_signals(stop, stop_after_round, lambda: kept)
    try:
        with compare.begun(output, works):
            figures = compare.compare(
                works, output, target=target, stop=stop, launch=launch, observer=progress
            )
    except RunInterruptedError:
        how = "stopped after a round" if stop_after_round.is_set() else "interrupted"
        raise RunInterruptedError(f"{how}; {kept}") from None
    finally:
        progress.close()
    console.print()
    print_comparison(console, group_rows(cells, figures, target=target), target=target)
    console.print(f"written: {output}/table.csv, table.json, cells.csv", markup=False)
    failed = [name for name, f in figures.items() if f.status == "failed"]
    if not failed:
        return SUCCESS
    others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
    _say(f"{failed[0]} failed: {figures[failed[0]].error}{others}; the same command tries it again")
    return FAILURE


def _target_of(text: str | None) -> float | None:
    if text is None:
        return None
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= 1:
            return float(text)
    raise InputError(f"--target = {text!r} cannot be used; expected an accuracy above 0, up to 1")


def _stop_on_signals(
    stop: threading.Event, stop_after_round: threading.Event, how_to_go_on: Callable[[], str]
) -> None:
    """End a run at an interrupt, at once at a second one, and after the round at SIGUSR1."""
    asked = -math.inf

    def interrupt(number: int, frame: object) -> None:
        nonlocal asked
        if stop.is_set():
            # One request can arrive twice: from the terminal, and forwarded by what started this.
            if time.monotonic() - asked < _ONE_REQUEST_S:
                return
            _say_at_once(f"ended at once; {how_to_go_on()}")
            os._exit(INTERRUPTED)
        asked = time.monotonic()
        stop.set()
        _say_at_once("stopping after an interrupt; a second one ends at once")

    def warn(number: int, frame: object) -> None:
        if not stop_after_round.is_set():
            _say_at_once("stopping after this round, as SIGUSR1 asks; an interrupt ends it now")
        stop_after_round.set()

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    # With it batch systems say that the time is nearly over.
    signal.signal(signal.SIGUSR1, warn)
    # The terminal was closed, and not under nohup.
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, interrupt)


def _say_at_once(text: str) -> None:
    # A signal may arrive in the midst of what Python writes to the same stream.
    with contextlib.suppress(OSError):
        os.write(2, f"fedsim: {text}\n".encode(sys.stderr.encoding or "ascii", NEAREST))


def _runs(parsed: argparse.Namespace) -> None:
    keep = parsed.keep_gradients_of
    if keep is not None and keep < 0:
        raise InputError(f"--keep-gradients-of = {keep} cannot be used; expected 0 or more")

    from fedsim.recording import runs
    from fedsim.terminal import make_console, print_runs

    if parsed.remove:
        chosen = [runs.find_run(path) for path in {p.absolute(): p for p in parsed.remove}.values()]
        # All of them, before one is removed.
        for run in chosen:
            runs.check_removable(run.path)
        _remove(chosen, gradients=False, yes=parsed.yes)
        return
    # Where nothing was recorded yet there is no folder of that name.
    none_yet = parsed.folder == _RUNS and not parsed.folder.exists()
    found = [] if none_yet else runs.find_runs(parsed.folder)
    if keep is None:
        print_runs(make_console(), found)
        return
    chosen = []
    for run in runs.outdated(found, keep):
        try:
            runs.check_removable(run.path)
            chosen.append(run)
        except InputError as error:
            _say(f"{error}; its gradients stay")
    _remove(chosen, gradients=True, yes=parsed.yes)


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
        raise InputError("nobody is there to be asked before something is removed; --yes says so")
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def _inspect(parsed: argparse.Namespace) -> None:
    from fedsim.recording.reader import load_run
    from fedsim.terminal import make_console, print_run

    print_run(make_console(), load_run(parsed.run))
