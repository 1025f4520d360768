"""Captures: what is kept of a client's local steps, and the list of those that ship.

A capture is one class in one file: what it costs, the observer that records it, the view that
reads it back and the proof of what it recorded. Nothing else knows it by name.
"""

from __future__ import annotations

import bisect
import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from fedsim.core import registry
from fedsim.core.errors import ConfigError
from fedsim.core.units import parse_count

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from fedsim.core.config import RunConfig
    from fedsim.core.support import Taps
    from fedsim.core.training import Step


class Sizes(Protocol):
    """What the size of a capture follows from.

    Attributes
    ----------
    parameters : dict of str to tuple of int
        Shapes of the model's parameters, in ``model.parameters()`` order.
    supports : dict of str to (tuple of int or None)
        Live taps of each parameter in the first step. Found when asked for, by computing one.
    """

    @property
    def parameters(self) -> Mapping[str, tuple[int, ...]]: ...  # noqa: D102

    @property
    def supports(self) -> Mapping[str, Taps | None]: ...  # noqa: D102


class Sink(Protocol):
    """Where an observer records, and what it is told about the training.

    Attributes
    ----------
    folder : Path
        The client's folder of the round, empty at first.
    files : dict of str to Checksum
        Finished files by name. An observer adds its own.
    num_steps : int
        Local steps that will be made.
    shapes : mapping of str to tuple of int
        Shapes of the model's parameters, in ``model.parameters()`` order.
    model : torch.nn.Module or None
        The model in training, for hooks.
    at_end : ExitStack
        Closed when training has ended, however it did: hooks are removed there.
    """

    folder: Path
    files: dict[str, Any]
    num_steps: int
    shapes: Mapping[str, tuple[int, ...]]
    model: nn.Module | None
    at_end: ExitStack

    def to_host(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """Give tensors on the CPU in a dtype; valid until the next call."""
        ...


class SeenStep(Protocol):
    """A local step as observers see it.

    Attributes
    ----------
    index : int
        Local step of the round, from 0.
    gradients : mapping of str to Tensor of float32
        Those that any observer wanted, on the device of the training.
    row : dict
        The step's line of ``steps.jsonl``. Observers may add to it.
    packed : mapping of str to Tensor of float32
        The same gradients without dead taps (`fedsim.core.support`). Packed once, when asked for.
    taps : mapping of str to (tuple of int or None)
        The support that each was packed with.
    nonzero : int
        Entries of the gradients that are not +0.
    """

    @property
    def index(self) -> int: ...  # noqa: D102

    @property
    def gradients(self) -> Mapping[str, Tensor]: ...  # noqa: D102

    @property
    def row(self) -> dict[str, Any]: ...  # noqa: D102

    @property
    def packed(self) -> Mapping[str, Tensor]: ...  # noqa: D102

    @property
    def taps(self) -> Mapping[str, Taps | None]: ...  # noqa: D102

    @property
    def nonzero(self) -> int: ...  # noqa: D102


class Pending(Protocol):
    """What an observer has measured and not written yet."""

    @property
    def nbytes(self) -> int:
        """Bytes to write. Few are written at once, many by another thread."""
        ...


class Observer:
    """Records one capture of one client in one round.

    Attributes
    ----------
    due : int
        Steps that must have been kept when training ends.
    kept : int
        Steps kept so far.
    nbytes : int
        Bytes kept so far.
    """

    due: int = 0
    kept: int = 0
    nbytes: int = 0

    def wants(self, step: Step) -> Collection[str] | None:
        """Name the parameters whose gradients are needed of a step; None to skip the step."""
        return step.gradients.keys()

    def measure(self, seen: SeenStep) -> Pending | None:
        """Compute what is to be kept of a step; give what is left to be written.

        Runs between two steps of training on a CPU, and in the writer's thread on a GPU.
        """

    def write(self, pending: Any) -> None:
        """Write what `measure` gave. May run in another thread, while training goes on."""

    def finish(self) -> None:
        """Finish the files after the last step, and list them in ``sink.files``."""

    def discard(self) -> None:
        """Stop after an error. The recorder empties the folder."""


class Retrace(Protocol):
    """Compares a training with what was recorded of the same one, step by step."""

    difference: str | None
    """The first thing that is not as recorded."""

    def __call__(self, step: Step) -> None:
        """Look at one step."""
        ...


class Vector(Protocol):
    """A vector in pieces that stay on the disk until they are looked at."""

    def pieces(self, name: str) -> Mapping[int, Tensor]:
        """Give the pieces of a layer by number; one that is not there is zero."""
        ...


class Capture(ABC):
    """One kind of thing that is kept of a client's local steps. Immutable.

    Attributes
    ----------
    layers : tuple of str
        Globs; a parameter takes part when one of them matches its whole name.
    most_count : int or inf
        The largest K of a form with K.
    limit : str
        Says so in the refusal of a larger one, or is empty.
    reads : frozenset of str
        Names that the reader's clients have from `open`.
    """

    layers: tuple[str, ...] = ("*",)
    most_count: ClassVar[float] = math.inf
    limit: ClassVar[str] = ""
    reads: ClassVar[frozenset[str]] = frozenset()

    # Choice and size

    @classmethod
    @abstractmethod
    def of(cls, config: RunConfig) -> Self:
        """Make the capture that a configuration asks for."""

    @property
    def keeps_files(self) -> bool:
        """Whether clients record files of it, which a node may refuse."""
        return True

    @property
    def form(self) -> list[str]:
        """How its numbers are stored, where the configuration chooses."""
        return []

    def kept_steps(self, num_steps: int) -> range:
        """Give the kept steps among `num_steps` local steps of a round."""
        return range(num_steps)

    def layers_of(self, parameters: Iterable[str]) -> list[str]:
        """Select the parameter names that take part, in the order given."""
        return [n for n in parameters if any(fnmatchcase(n, glob) for glob in self.layers)]

    @abstractmethod
    def step_bytes(self, sizes: Sizes) -> int:
        """Estimate the bytes of one kept step."""

    def most_step_bytes(self, sizes: Sizes) -> int:
        """Bound the bytes of one kept step from above, for any gradients."""
        return self.step_bytes(sizes)

    def bytes_of(self, steps: int, parameters: Mapping[str, tuple[int, ...]]) -> int | None:
        """Give the bytes of so many kept steps where they follow from the configuration."""
        return None if steps else 0

    def smaller(self) -> Iterable[tuple[str, Capture]]:
        """Give changes of the configuration that keep the same steps in fewer bytes.

        Yields
        ------
        tuple of (str, Capture)
            Like ``"capture-dtype = 'bfloat16'"``, and what that makes of this one.
        """
        return ()

    def fewer(self, most_steps: int, fits: Callable[[Capture], bool]) -> Capture | None:
        """Keep as little less as fits, of rounds of at most so many steps; None for nothing."""
        return None

    # Files

    @classmethod
    def owns(cls, name: str) -> bool:
        """Say whether a file in a client's folder is one that this capture writes."""
        return False

    @classmethod
    def may_remove(cls, name: str) -> bool:
        """Say whether a file may be removed to make room, which leaves the run whole."""
        return False

    # Recording, reading, proving

    @abstractmethod
    def record(self, sink: Sink) -> Observer | None:
        """Begin to record a client's round; None where there is nothing to record."""

    @classmethod
    def open(cls, client: Any) -> Any:
        """Give what a client of the reader has of this capture: an object with `reads`.

        Parameters
        ----------
        client : fedsim.recording.reader.Client
            Of a run with this capture or without.
        """
        return None

    def vector(self, client: Any, step: int) -> Vector | None:
        """Give a step as a vector whose inner products are those of gradients, or estimate them."""
        return None

    def vector_layers(self, parameters: Iterable[str]) -> list[str]:
        """Name the layers of `vector`."""
        return self.layers_of(parameters)

    def basis(self, parameters: Sequence[str]) -> str:
        """Say what a `vector` lacks of a whole gradient, in a sentence; empty for nothing."""
        return ""

    def leave(self, client: Any, findings: Any) -> None:  # noqa: B027
        """Name what is not proven of a client until something proves it."""

    def check_steps(self, client: Any, findings: Any) -> None:  # noqa: B027
        """Prove what the lines of a client's ``steps.jsonl`` have of this capture."""

    def work(self, client: Any) -> int:
        """Estimate what `check` does beyond reading files once, as bytes for the progress."""
        return 0

    def check(self, evidence: Any) -> None:  # noqa: B027
        """Prove what a client recorded of this capture.

        Parameters
        ----------
        evidence : fedsim.recording.evidence.Evidence
            The client, its files, and where to tell what was found.
        """

    def measures(self, client: Any, findings: Any) -> Any:
        """Follow captured gradients in a proof by another capture; None where nothing follows."""
        return None

    def retrace(self, client: Any, whole: frozenset[str]) -> Retrace | None:
        """Compare a repeated training with the record while it runs.

        None, as by default, to record again and compare the files.
        """
        return None


@dataclass(frozen=True)
class Listed:
    """A capture in the list.

    Parameters
    ----------
    place : str
        ``module:Class``; imported when it is first needed.
    forms : tuple of str
        How the key ``capture`` asks for it, with ``:K`` where a number follows. Without a form it
        is part of every run, as other keys say.
    keeps : str
        What it keeps, in the plural.
    help : str
        About its forms.
    """

    place: str
    forms: tuple[str, ...] = ()
    keeps: str = ""
    help: str = ""

    def load(self) -> type[Capture]:
        """Import the class."""
        module, _, name = self.place.partition(":")
        found: type[Capture] = getattr(importlib.import_module(module), name)
        return found


LISTED = [
    Listed("fedsim.captures.statistics:Statistics"),
    Listed(
        "fedsim.captures.gradients:Gradients",
        ("none", "all", "first:K", "last:K", "every:K"),
        "gradients",
    ),
    Listed(
        "fedsim.captures.sketch:Sketch",
        ("sketch:K",),
        "sketches",
        "a random projection of every step to K numbers",
    ),
]
"""In the order in which they see a step."""


_own: dict[str, type[Capture]] = {}


def all_captures() -> list[type[Capture]]:
    """Import every listed capture; give those of the user's that are loaded, too."""
    return [*(listed.load() for listed in LISTED), *_own.values()]


def is_own(text: str) -> bool:
    """Say whether ``capture`` names a class of the user's, ``module:NAME`` or ``FILE.py:NAME``."""
    place, _, name = text.rpartition(":")
    forms = {form.partition(":")[0] for listed in LISTED for form in listed.forms}
    return bool(place) and name.isidentifier() and place not in forms


def check_form(text: str) -> None:
    """Refuse what `parse_form` does not read; loads no code of the user's."""
    if not is_own(text):
        parse_form(text)


def _load_own(text: str) -> type[Capture]:
    if text not in _own:
        found = registry.factory("capture", "captures", text)
        if not (isinstance(found, type) and issubclass(found, Capture)):
            raise ConfigError("capture", text, "a subclass of fedsim.core.capture.Capture")
        _own[text] = found
    return _own[text]


def is_at_hand(text: str) -> bool:
    """Say whether ``capture`` names one of ours, or a class of the user's that may be loaded."""
    return not is_own(text) or registry.may_load(text)


def not_at_hand(text: str) -> str:
    """Say why what such a class recorded is not proven."""
    return (
        f"capture = {text!r} is code that was not named to this process; "
        f"{registry.TRUSTED}={text} in the environment names it"
    )


def captures_of(config: RunConfig, *, only_at_hand: bool = False) -> tuple[Capture, ...]:
    """Give what a run captures, in the order in which it sees a step.

    Parameters
    ----------
    config : RunConfig
        Of the run.
    only_at_hand : bool
        Leave out a class of the user's that the user did not name to this process, instead of
        raising `InputError`.
    """
    always = [listed.load().of(config) for listed in LISTED if not listed.forms]
    if only_at_hand and not is_at_hand(config.capture):
        return tuple(always)
    return (*always, parse_form(config.capture)[0].of(config))


def parse_form(text: str) -> tuple[type[Capture], str, int]:
    """Read ``NAME``, ``NAME:K``, or the name of a class of the user's, which is loaded.

    Returns
    -------
    tuple of (type of Capture, str, int)
        The capture that has the form, its name, and K; 1 for a form without.

    Raises
    ------
    ValueError
        With all forms, when `text` is not one of them.
    InputError
        When it is code that the user did not name to this process, or no capture.
    """
    if is_own(text):
        return _load_own(text), text, 1
    name, _, digits = text.partition(":")
    for listed in LISTED:
        for form in listed.forms:
            if form.partition(":")[0] != name:
                continue
            found, counted = listed.load(), ":" in form
            count = (parse_count(digits) or 0) if counted else 1
            if 1 <= count <= found.most_count and (counted or text == name):
                return found, name, count
    *others, last = (form for listed in LISTED for form in listed.forms)
    limits = "".join(f", {found.limit}" for found in all_captures() if found.limit)
    raise ValueError(f"{', '.join(others)} or {last} with K from 1{limits}")


def forms_help() -> str:
    """List all forms for the help of the key ``capture``."""
    *others, last = (
        form + (f" ({listed.help})" if listed.help else "")
        for listed in LISTED
        for form in listed.forms
    )
    return f"{', '.join(others)}, or {last}"


def kept_kinds() -> str:
    """List what captures keep, like ``gradients, sketches``."""
    return ", ".join(listed.keeps for listed in LISTED if listed.keeps)


def first_fitting(
    counts: range, make: Callable[[int], Capture], fits: Callable[[Capture], bool]
) -> Capture | None:
    """Find the first that fits among captures whose bytes only fall along their K."""
    position = bisect.bisect_left(counts, True, key=lambda count: fits(make(count)))
    return make(counts[position]) if position < len(counts) else None
