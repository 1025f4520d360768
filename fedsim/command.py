"""What commands are made of: words, options, and the keys of a run from its model.

click reads the command line. The keys are options made from the fields of
`fedsim.core.config.RunConfig`, when a command that takes them is called and not before: torch comes
with them.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import click

from fedsim.core.errors import FedsimError, InputError
from fedsim.core.plugins import lacked_by

SUCCESS, FAILURE, BAD_INPUT = 0, 1, 2
HELP = {"help_option_names": ["-h", "--help"]}


def say(text: str) -> None:
    """Print one line for the person at the terminal to standard error."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    # The terminal may have been closed.
    with contextlib.suppress(OSError):
        print(f"fedsim: {line}", file=sys.stderr)  # noqa: T201


def tell(text: str) -> None:
    """Print a line without what prints tables, which brings in torch."""
    # The work goes on without a reader; what could not be written is told at the end.
    with contextlib.suppress(OSError):
        print(text, flush=True)  # noqa: T201


def say_first(sentences: Sequence[str], before: str = "", after: str = "") -> int:
    """Say the first of what went wrong and how many more there are; give the exit code."""
    if not sentences:
        return SUCCESS
    more = f" (and {len(sentences) - 1} more)" if len(sentences) > 1 else ""
    say(f"{before}{sentences[0]}{more}{after}")
    return FAILURE


def refusal(error: click.UsageError) -> InputError:
    """Turn what click refuses into one sentence."""
    path = error.ctx.command_path if error.ctx else "fedsim"
    text = error.format_message().rstrip(".")
    if isinstance(error, click.NoSuchOption):
        text = f"unrecognized argument {error.option_name!r}"
    return InputError(f"{text[:1].lower()}{text[1:]}; see `{path} --help`")


class _Printing(click.Command):
    """A command whose help may be printed to a pipe that is closed, or a disk that is full."""

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **options: Any,
    ) -> click.Context:
        """Read the arguments; --help and --version print and raise `Exit`."""
        try:
            return super().make_context(info_name, args, parent, **options)
        except BrokenPipeError:
            raise click.exceptions.Exit(SUCCESS) from None
        except OSError as error:
            raise FedsimError(f"standard output cannot be written: {error.strerror}") from None


class Group(_Printing, click.Group):
    """A command of commands."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(name, context_settings=HELP, no_args_is_help=False, **options)


class Command(_Printing):
    """A command that may take the keys of a run as options.

    Parameters
    ----------
    keys : bool
        Whether it takes keys: its function gets the text of each, or None, by the field's name.
    but : collection of str
        Keys that it does not take.
    show_defaults : bool
        Whether the help tells what the keys are by default.
    waits : bool
        Whether loading is announced before it begins.
    """

    allow_extra_args = True

    def __init__(
        self,
        name: str,
        *,
        keys: bool = False,
        but: Sequence[str] = (),
        show_defaults: bool = True,
        waits: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(name, context_settings=HELP, **options)
        self._takes_keys, self._but, self._show_defaults = keys, but, show_defaults
        self._waits = waits

    @cached_property
    def _keys(self) -> list[tuple[str, click.Option]]:
        return [*_key_options(self._but, self._show_defaults)] if self._takes_keys else []

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **options: Any,
    ) -> click.Context:
        """Announce what takes seconds, more on a busy machine, before it begins."""
        asks_help = {*HELP["help_option_names"]} & {*args}
        if self._waits and not asks_help and "torch" not in sys.modules:
            tell("loading    torch, Flower and Ray")
        return super().make_context(info_name, args, parent, **options)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; of a plugin, say which extra brings what is not installed."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            raise lacked_by(self.callback.__module__, error) or error from None

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Give the keys after the command's own parameters."""
        return [*super().get_params(ctx), *(option for _, option in self._keys)]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse what the command does not take, in one sentence."""
        given = [*args]
        try:
            rest = super().parse_args(ctx, args)
        except click.UsageError as error:
            if (
                self._keys
                and isinstance(error, click.NoSuchOption)
                and error.option_name[:2] == "--"
            ):
                raise _unknown_key(error.option_name, given) from None
            error.ctx = ctx
            raise
        if rest:
            raise click.UsageError(f"unrecognized argument {rest[0]!r}", ctx)
        for param in self.get_params(ctx):
            if str(ctx.params.get(param.name)).startswith("--"):
                # The next option was taken for it.
                raise click.BadOptionUsage(
                    param.opts[0], f"option {param.opts[0]!r} requires an argument", ctx
                )
        return rest

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the keys in groups."""
        sections: dict[str, list[tuple[str, str]]] = {}
        own = [("Options", p) for p in super().get_params(ctx) if isinstance(p, click.Option)]
        for heading, option in [*own, *self._keys]:
            if record := option.get_help_record(ctx):
                sections.setdefault(heading, []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


_GROUPS = {
    "dataset": "Data and clients",
    "model": "Model and local training",
    "capture": "Captured gradients",
    "strategy": "Aggregation",
    "workers": "Machine",
    "evaluate-every": "Course of the run",
    "output": "Output",
}
"""Headings of the help, each by the first key below it, in the order of the configuration."""


def _key_options(but: Sequence[str], show_defaults: bool) -> Iterator[tuple[str, click.Option]]:
    """Make the options of the keys, each with its heading."""
    from fedsim.core.config import RunConfig, choices_for, describe, flag_text

    defaults = RunConfig().to_mapping()
    # As a flag takes it.
    defaults["strategy"] = defaults["strategy"]["name"]
    defaults["capture-layers"] = ",".join(defaults["capture-layers"])
    heading = ""
    for name, field in RunConfig.model_fields.items():
        key = name.replace("_", "-")
        heading = _GROUPS.get(key, heading)
        if key in but:
            continue
        default = defaults[key]
        is_shown = show_defaults and default not in (None, {})
        choices = ",".join(choices_for(name))
        is_switch = field.annotation is bool
        # `--nesterov` alone means true.
        switch: dict[str, Any] = {"is_flag": False, "flag_value": "true"} if is_switch else {}
        yield (
            heading,
            click.Option(
                [f"--{key}", name],
                metavar="[{true,false}]" if is_switch else f"{{{choices}}}" if choices else "VALUE",
                help=describe(name) + f" (default: {flag_text(default)})" * is_shown,
                **switch,
            ),
        )


def _unknown_key(option: str, arguments: Sequence[str]) -> InputError:
    """Refuse a misspelt key with what was given for it and the nearest one."""
    from fedsim.core.config import RunConfig
    from fedsim.core.fields import unknown_key

    at = next(i for i, a in enumerate(arguments) if a.partition("=")[0] == option)
    after = arguments[at + 1 : at + 2]
    value = arguments[at].partition("=")[2] or " ".join(a for a in after if a[:2] != "--")
    return unknown_key(option.removeprefix("--"), value, RunConfig)


class Whole(click.ParamType[int]):
    """A whole number, of at least so much where that is said."""

    name = "integer"

    def __init__(self, least: int | None = None) -> None:
        self._least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read it."""
        flag = param.opts[0] if param else ""
        try:
            number = int(value)
        except ValueError:
            raise InputError(
                f"{flag} = {value!r} cannot be used; expected a whole number"
            ) from None
        if self._least is not None and number < self._least:
            raise InputError(f"{flag} = {number} cannot be used; expected {self._least} or more")
        return number


class CountOrAll(click.ParamType[Any]):
    """A number of things, or ``all``, which is given as -1."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read it."""
        if value == "all":
            return -1
        if isinstance(value, int) or (value.isascii() and value.isdigit()):
            return int(value)
        flag = param.opts[0] if param else ""
        raise InputError(f"{flag} = {value!r} cannot be used; expected 0, a larger number, or all")


tracked = click.option(
    "--tracker",
    multiple=True,
    metavar="NAME",
    help="tell the run to tensorboard, mlflow, wandb or trackio too, or to your own as "
    "module:NAME (repeatable)",
)
verbose = click.option("--verbose", is_flag=True, help="show what Flower and Ray log")
config_file = click.argument(
    "config",
    required=False,
    type=Path,
    help="a TOML file, or the run.json of an earlier run (default: the quickstart)",
)
run_argument = click.argument("run", type=Path, metavar="RUN", help="a run directory")
data_root = click.option("--data-root", metavar="FOLDER", help="where the data is")


def keys_of(texts: Mapping[str, str | None]) -> dict[str, Any]:
    """Read the keys of a run that stand on the command line, by the names of their fields."""
    from fedsim.core.config import parse_text

    given = {name.replace("_", "-"): text for name, text in texts.items() if text is not None}
    return {key: parse_text(key, text) for key, text in given.items()}


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that is unknown or not installed, before anything is loaded for a run."""
    if names:
        from fedsim.tracking import check_tracker

        for name in names:
            check_tracker(name)
