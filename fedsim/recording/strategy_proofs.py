"""Proofs of the state after a round, and of what the strategy kept, by the strategy's own check."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedsim.core.aggregation import Array, State, apply_delta, local_work, state_sha256
from fedsim.core.algorithm import Algorithm, Claim, Keeps, Moves, Range, Unproven, Update
from fedsim.core.partition import fold_order
from fedsim.recording.findings import KEPT, STATE, Findings
from fedsim.recording.reader import Client, Run
from fedsim.recording.rows import updates_of

_WHERE_NEAR_ZERO = "as near as a delta tells what was sent, which is rounded where that is near 0"


class Files(Protocol):
    """Which files of a run directory can be relied on."""

    def whole(self, check: str, paths: Sequence[Path]) -> bool:
        """Say whether all are; if not, leave the check of the round open and say why."""

    def is_listed(self, path: Path) -> bool:
        """Say whether the run says that it wrote a file."""


class _NotWholeError(Exception):
    """A proof needs files that cannot be relied on."""

    def __init__(self, paths: Sequence[Path]) -> None:
        super().__init__(paths)
        self.paths = paths


def prove_strategy(run: Run, number: int, findings: Findings, files: Files) -> None:
    """Check the state after a round, its hash, and what the strategy kept.

    Buffers follow from the aggregate. Parameters and what is kept are what the strategy's own
    `Algorithm.check` says; what it makes no claim of is named as not proven.

    Parameters
    ----------
    run : Run
        The run.
    number : int
        The round, from 0.
    findings : Findings
        Told what was found, as `STATE` and `KEPT`.
    files : Files
        Asked before any file is looked at.
    """
    if number:
        _RoundProof(run, number, findings, files).prove()
    elif files.whole(STATE, [run.layout.state(0)]):
        with findings.guarded(STATE, str(run.layout.state(0))):
            _prove_hash(run, 0, findings)


def _prove_hash(run: Run, number: int, findings: Findings) -> None:
    state = {name: tensor.numpy() for name, tensor in run.round(number).state.items()}
    if state_sha256(state) == run.round(number).row["state_sha256"]:
        findings.prove(STATE)
    else:
        path = run.layout.state(number)
        findings.violate(STATE, f"{path} has another hash than its row in rounds.jsonl")


class _RoundProof:
    """Compares what is on record of a round with the claims of its strategy."""

    def __init__(self, run: Run, number: int, findings: Findings, files: Files) -> None:
        self._run = run
        self._number = number
        self._findings = findings
        self._files = files
        self._name = run.config.strategy.name
        self._at = (number, None)
        self._state_path = run.layout.state(number)
        self._kept_path = run.layout.strategy(number)
        # None where there is nothing to compare with, or no more need to.
        self._state: Mapping[str, Tensor] | None = None
        self._kept: Mapping[str, Tensor] | None = None
        self._odd: str | None = None
        self._open: set[str] = set()
        self._claimed: dict[str, set[str]] = {STATE: set(), KEPT: set()}
        self._ranges: dict[str, list[bool]] = {STATE: [], KEPT: []}

    def prove(self) -> None:
        run, number, layout = self._run, self._number, self._run.layout
        before, aggregate = layout.state(number - 1), layout.aggregate(number)
        with self._findings.guarded(STATE, str(self._state_path)):
            if self._files.whole(STATE, [self._state_path, before, aggregate]):
                self._state = run.round(number).state
        with self._findings.guarded(KEPT, str(self._kept_path)):
            self._kept = self._as_kept(run.algorithm)
        if run.algorithm is not None and not (self._state is self._kept is None):
            self._follow(run.algorithm)
        if self._state is not None:
            with self._findings.guarded(STATE, str(self._state_path)):
                self._close_state()
        if self._kept is not None:
            self._close_kept(run.algorithm)

    def _as_kept(self, algorithm: Algorithm | None) -> Mapping[str, Tensor] | None:
        """Open what was kept, if it has the form that the strategy gives it."""
        path, is_listed = self._kept_path, self._files.is_listed(self._kept_path)
        if algorithm is None:
            if is_listed and self._files.whole(KEPT, [path]):
                reason = f"arrays that {self._name} keeps: they follow from its own code"
                self._findings.leave(KEPT, reason, at=self._at)
            return None
        keeps = algorithm.keeps()
        if not keeps:
            if is_listed:
                name = path.relative_to(self._run.path).as_posix()
                self._findings.violate(KEPT, f"{name} is there, and {self._name} keeps nothing")
            return None
        if not self._files.whole(KEPT, [path]):
            return None
        kept = self._run.round(self._number).strategy_state
        if odd := sorted(set(kept).symmetric_difference(keeps)):
            self._findings.violate(KEPT, f"{path}: {odd[0]} is missing or unexpected")
            return None
        for key, spec in keeps.items():
            array = kept[key].numpy()
            if array.dtype.name != spec.dtype or array.shape != spec.shape:
                self._findings.violate(KEPT, f"{path}: {key} has another shape or dtype")
                return None
        return kept

    def _follow(self, algorithm: Algorithm) -> None:
        """Compare what the algorithm claims, as far as the files that it needs are whole."""
        this_round = _RecordedRound(self._run, self._number, algorithm, self._files, self._keep_of)
        try:
            for claim in algorithm.check(this_round):
                self._take(claim)
        except _NotWholeError as missing:
            for check in self._unfinished(algorithm):
                self._files.whole(check, missing.paths)
                self._drop(check)
        except Exception:
            check = next(iter(self._unfinished(algorithm)), STATE)
            self._drop(check)
            with self._findings.guarded(check, f"round {self._number}"):
                raise
        if self._kept is not None and this_round.not_kept:
            reason = f"what {self._name} keeps of clients: its check does not say how it follows"
            self._findings.leave(KEPT, reason, at=self._at)

    def _unfinished(self, algorithm: Algorithm) -> list[str]:
        """Name the checks whose claims are still to come."""
        due = {STATE: set(self._run.shapes), KEPT: set(algorithm.keeps())}
        there = {STATE: self._state, KEPT: self._kept}
        return [
            check
            for check, found in there.items()
            if found is not None and check not in self._open and due[check] - self._claimed[check]
        ]

    def _drop(self, check: str) -> None:
        if check == STATE:
            self._state = None
        else:
            self._kept = None

    def _take(self, claim: Claim) -> None:
        if isinstance(claim, Unproven):
            check = STATE if claim.about == "parameters" else KEPT
            self._leave(check, claim.reason)
        elif isinstance(claim, Moves):
            if self._state is not None and claim.name in self._run.shapes:
                self._claimed[STATE].add(claim.name)
                if not self._holds(STATE, self._state[claim.name].numpy(), claim.to):
                    self._odd = self._odd or claim.name
        elif isinstance(claim, Keeps) and self._kept is not None and claim.key in self._kept:
            self._claimed[KEPT].add(claim.key)
            if not self._holds(KEPT, self._kept[claim.key].numpy(), claim.array):
                self._findings.violate(
                    KEPT,
                    f"{self._kept_path}: {claim.key} does not follow from the one before and the "
                    "deltas",
                )
                self._kept = None

    def _holds(self, check: str, found: Array, expected: Array | Range) -> bool:
        if not isinstance(expected, Range):
            return first_difference({"": found}, {"": expected}) is None
        self._ranges[check].append(expected.is_one)
        form = found.dtype == expected.low.dtype and found.shape == expected.low.shape
        return form and expected.holds(found)

    def _leave(self, check: str, reason: str = "") -> None:
        self._open.add(check)
        if check == STATE and not reason:
            dp = self._run.config.strategy.dp
            how = self._name + (f" with dp = {dp!r}" if dp else "")
            reason = f"parameters: how {how} moves them is not followed from the deltas"
        if (self._state if check == STATE else self._kept) is not None:
            self._findings.leave(check, reason, at=self._at)

    def _keep_of(self, client: Client, arrays: State) -> None:
        """Compare what is on record as kept of a client with what its algorithm keeps."""
        if self._kept is None:
            return
        path = self._run.layout.control(self._number, client.partition)
        if not self._files.whole(KEPT, [path]):
            self._kept = None
        elif odd := first_difference(arrays_of(client.control), dict(arrays)):
            self._findings.violate(KEPT, f"{path}: {odd} does not follow from the delta")
            self._kept = None

    def _close_state(self) -> None:
        """Compare buffers, and parameters of which claims were made; then the hash."""
        run, this = self._run, self._run.round(self._number)
        if set(run.shapes) - self._claimed[STATE] and STATE not in self._open:
            self._leave(STATE)
        before, aggregate = arrays_of(run.round(self._number - 1).state), arrays_of(this.aggregate)
        buffers = [name for name in before if name not in run.shapes]
        moved = apply_delta({n: before[n] for n in buffers}, aggregate)
        odd = self._odd or first_difference({n: this.state[n].numpy() for n in buffers}, moved)
        if list(this.state) != list(before):
            odd = "the order"
        if odd is not None:
            step = f"the step of {self._name}"
            if odd not in run.shapes:
                step = "the aggregate"
            elif run.algorithm is not None and run.algorithm.step:
                step = run.algorithm.step
            text = f"{self._state_path}: {odd} is not the state before plus {step}"
            self._findings.violate(STATE, text)
            return
        if not all(self._ranges[STATE]):
            self._findings.note(STATE, f"{self._name} {_WHERE_NEAR_ZERO}")
        _prove_hash(run, self._number, self._findings)

    def _close_kept(self, algorithm: Algorithm | None) -> None:
        keeps = algorithm.keeps() if algorithm is not None else {}
        left = sorted(set(keeps) - self._claimed[KEPT])
        if left and KEPT not in self._open:
            reason = f"{left[0]}: the check of {self._name} does not say how it follows"
            self._findings.leave(KEPT, reason, at=self._at)
        if self._claimed[KEPT]:
            self._findings.prove(KEPT)
        if ranges := self._ranges[KEPT]:
            self._findings.note(KEPT, "bit for bit" if all(ranges) else _WHERE_NEAR_ZERO)


class _RecordedRound:
    """A round as it is on record, for an algorithm to look at again."""

    def __init__(
        self, run: Run, number: int, algorithm: Algorithm, files: Files, keep_of: Any
    ) -> None:
        self.number = number
        self.not_kept = {*run.round(number).clients} if algorithm.keeps_of_client() else set()
        self._run = run
        self._algorithm = algorithm
        self._files = files
        self._keep_of = keep_of
        self._clients = run.round(number).clients

    @cached_property
    def before(self) -> State:
        """The parameters before the round."""
        self._need([self._run.layout.state(self.number - 1)])
        return _Arrays(self._run.round(self.number - 1).state, self._run.shapes)

    @cached_property
    def kept(self) -> State:
        """What was kept before the round."""
        if self.number > 1 and self._algorithm.keeps():
            self._need([self._run.layout.strategy(self.number - 1)])
        return self._run.kept_before(self.number)

    @cached_property
    def kept_after(self) -> State:
        """What is on record as kept after the round."""
        self._need([self._run.layout.strategy(self.number)])
        kept = self._run.round(self.number).strategy_state
        return _Arrays(kept, kept)

    @cached_property
    def has_diverged(self) -> bool:
        """Whether a delta is not finite in a run that may go on with it."""
        if not self._run.config.allow_divergence:
            return False
        self._need([client.delta_path for client in self._clients.values()])
        return not all(
            bool(client.delta[name].isfinite().all())
            for client in self._clients.values()
            for name in self._run.shapes
        )

    def updates(self) -> Iterator[Update]:
        """Give the updates in the order of folding."""
        paths = [client.delta_path for client in self._clients.values()]
        self._need([self._run.layout.partition, *dict.fromkeys(paths)])
        sizes = [len(indices) for indices in self._run.partition.values()]
        for partition in fold_order(list(self._clients), sizes):
            yield self._update(self._clients[partition], sizes[partition])

    def mean(self) -> State:
        """Give the aggregate on record, which is proven on its own."""
        self._need([self._run.layout.aggregate(self.number)])
        return _Arrays(self._run.round(self.number).aggregate, self._run.shapes)

    def _update(self, client: Client, samples: int) -> Update:
        settings = self._run.config.training_of(client.partition).optimizer

        def kept() -> State:
            if client.control_round is not None:
                layout = self._run.layout
                self._need([layout.control(client.control_round, client.partition)])
            return arrays_of(client.former_control)

        def keep(arrays: State) -> None:
            self.not_kept.discard(client.partition)
            self._keep_of(client, arrays)

        return Update(
            client.partition,
            samples,
            _Arrays(client.delta, self._run.shapes),
            work=lambda: local_work(
                updates_of(client.telemetry),
                learning_rate=settings.learning_rate,
                momentum=settings.momentum,
                nesterov=settings.nesterov,
            ),
            kept=kept,
            keep=keep,
        )

    def _need(self, paths: Sequence[Path]) -> None:
        if not self._files.whole("", paths):
            raise _NotWholeError(paths)


class _Arrays(Mapping[str, NDArray[np.generic]]):
    """Some tensors of a file as arrays, each read when it is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, Any]) -> None:
        self._tensors = tensors
        self._names = list(names)

    def __getitem__(self, name: str) -> NDArray[np.generic]:
        array: NDArray[np.generic] = self._tensors[name].numpy()
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def arrays_of(tensors: Mapping[str, Tensor]) -> dict[str, NDArray[np.generic]]:
    """Look at tensors as arrays."""
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def first_difference(found: State, expected: State) -> str | None:
    """Name the first array that is not the same to the last bit."""
    if list(found) != list(expected):
        return min(set(found).symmetric_difference(expected), default="the order")
    for name, array in expected.items():
        other = found[name]
        if other.dtype != array.dtype or other.shape != array.shape:
            return name
        bits = np.dtype(f"i{array.dtype.itemsize}")
        if not np.array_equal(np.ravel(other).view(bits), np.ravel(array).view(bits)):
            return name
    return None
