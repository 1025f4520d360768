"""Proofs of what a strategy keeps from round to round, and of where plain averages move a model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fedsim.core.errors import InputError
from fedsim.core.partition import fold_order
from fedsim.core.server_optimizer import (
    Numbers,
    Range,
    clipping_norms_after,
    kept_after,
    kept_by,
    mean_weights,
    moved_to,
    sent_by,
)
from fedsim.recording.findings import KEPT, STATE, Findings
from fedsim.recording.layout import CLIPPING_NORM, strategy_key
from fedsim.recording.reader import Run

_NORM_ROUNDING = 1e-5
"""Of the float32 norm of an update, relative to it."""
_WHERE_NEAR_ZERO = "as near as a delta tells what was sent, which is rounded where that is near 0"


def kept_keys(run: Run) -> list[str] | None:
    """Name the arrays that the strategy keeps after each round; None where only it knows."""
    strategy = run.config.strategy
    if ":" in strategy.name:
        return None
    kinds = ("control",) if strategy.name == "scaffold" else kept_by(strategy)
    keys = [strategy_key(what, name) for what in kinds for name in run.shapes]
    return keys + ([CLIPPING_NORM] if _is_adaptive(run) else [])


def prove_kept(run: Run, number: int, findings: Findings) -> None:
    """Check that what is kept after a round follows from what was before, and the deltas.

    Where the deltas tell to the last bit what the clients sent, so do they what is kept. SCAFFOLD's
    control variates are proven with the state, which moves by the same sums.
    """
    strategy, at = run.config.strategy, (number, None)
    path = run.layout.strategy(number)
    keys = kept_keys(run)
    if keys is None:
        reason = f"arrays that {strategy.name} keeps: they follow from its own code"
        findings.leave(KEPT, reason, at=at)
        return
    found = run.round(number).strategy_state
    if odd := sorted(set(found).symmetric_difference(keys)):
        findings.violate(KEPT, f"{path}: {odd[0]} is missing or one too many")
        return
    proven = strategy.name == "scaffold" or strategy.dp is None
    if strategy.dp is not None and kept_by(strategy):
        reason = f"with dp = {strategy.dp!r}, what {strategy.name} keeps follows from updates that "
        findings.leave(KEPT, f"{reason}are not recorded as they were clipped", at=at)
    elif kept_by(strategy) and _has_diverged(run, number):
        reason = f"what {strategy.name} keeps is not followed from deltas that are not finite"
        findings.leave(KEPT, reason, at=at)
        proven = False
    elif kept_by(strategy):
        proven = _prove_arrays(run, number, findings)
    if _is_adaptive(run):
        proven = _prove_clipping_norm(run, number, findings)
    if proven:
        findings.prove(KEPT)


def _has_diverged(run: Run, number: int) -> bool:
    """Say whether a run that may go on without finite numbers did so in a round."""
    return run.config.allow_divergence and not all(
        bool(client.delta[name].isfinite().all())
        for client in run.round(number).clients.values()
        for name in run.shapes
    )


def _prove_arrays(run: Run, number: int, findings: Findings) -> bool:
    strategy = run.config.strategy
    now = run.round(number).strategy_state
    before = run.round(number - 1).strategy_state if number > 1 else {}
    exact = True
    for name, start, mean in means_of_sent(run, number):
        kept = {what: before[strategy_key(what, name)].numpy() for what in kept_by(strategy)
                if number > 1}  # fmt: skip
        for what, expected in kept_after(strategy, kept, start, mean).items():
            key = strategy_key(what, name)
            array = now[key].numpy()
            if array.dtype != expected.low.dtype or array.shape != expected.low.shape:
                findings.violate(KEPT, f"{run.layout.strategy(number)}: {key} has another form")
                return False
            if not expected.holds(array):
                findings.violate(
                    KEPT,
                    f"{run.layout.strategy(number)}: {key} does not follow from the one before and "
                    "the deltas",
                )
                return False
            exact = exact and expected.is_one
    findings.note(KEPT, "bit for bit" if exact else _WHERE_NEAR_ZERO)
    return True


def _prove_clipping_norm(run: Run, number: int, findings: Findings) -> bool:
    config, path = run.config, run.layout.strategy(number)
    strategy, clients = config.strategy, run.round(number).clients
    before = strategy.clipping_norm or 0.0
    if number > 1:
        before = float(run.round(number - 1).strategy_state[CLIPPING_NORM])
    found = run.round(number).strategy_state[CLIPPING_NORM].numpy()
    expected = clipping_norms_after(
        before,
        noise_multiplier=strategy.noise_multiplier or 0.0,
        sampled=config.num_participants(1),
        told=len(clients),
        seed=config.seed,
        round_number=number,
    )
    lengths = [
        np.sqrt(
            sum(float((c.delta[name].numpy().astype(np.float64) ** 2).sum()) for name in run.shapes)
        )
        for c in clients.values()
    ]
    # Clients that clip are at the norm afterwards: any of those may have been above it.
    most = sum(length > before * (1 - _NORM_ROUNDING) for length in lengths)
    least = sum(length > before * (1 + _NORM_ROUNDING) for length in lengths)
    told = float(found)
    if found.dtype == np.float64 and any(
        abs(told - norm) <= 4 * np.finfo(np.float64).eps * norm
        for norm in expected[least : most + 1]
    ):
        return True
    findings.violate(KEPT, f"{path}: {CLIPPING_NORM} is not what that many clipped updates lead to")
    return False


def moved_parameters(
    run: Run, number: int, state: dict[str, Numbers], findings: Findings
) -> dict[str, Numbers] | None:
    """Give the parameters that a plain average leads to; None where the strategy is no such one.

    None too where a client diverged: what it sent does not follow from a delta that is not finite.

    Of all arrays that the deltas allow it is the recorded one, if that is among them.
    """
    strategy = run.config.strategy
    moved: dict[str, Numbers] = {}
    exact = True
    if strategy.dp is not None or moved_to(strategy, *_NOTHING) is None:
        return None
    if _has_diverged(run, number):
        return None
    for name, start, mean in means_of_sent(run, number):
        found = moved_to(strategy, start, mean)
        if found is None:
            return None
        moved[name] = state[name] if found.holds(state[name]) else found.low
        exact = exact and found.is_one
    if not exact:
        findings.note(STATE, f"{strategy.name} {_WHERE_NEAR_ZERO}")
    return moved


_NOTHING = (np.zeros(1, np.float32), Range(np.zeros(1, np.float32), np.zeros(1, np.float32)))


def means_of_sent(run: Run, number: int) -> Iterator[tuple[str, Numbers, Range]]:
    """Give each parameter before a round, and the mean of what clients sent of it.

    Raises
    ------
    InputError
        When a delta is one that no client can have sent, or is not finite.
    """
    clients = run.round(number).clients
    sizes = [len(indices) for indices in run.partition.values()]
    order = fold_order(list(clients), sizes)
    total = sum(sizes[partition] for partition in order)
    before = run.round(number - 1).state

    def sent(name: str, start: Numbers) -> Iterator[tuple[Range, int]]:
        for partition in order:
            client = clients[partition]
            try:
                yield sent_by(client.delta[name].numpy(), start), sizes[partition]
            except ValueError as error:
                where = f"{name} of client {partition}"
                raise InputError(f"{client.delta_path}: {where} {error}") from None

    for name in run.shapes:
        start = before[name].numpy()
        yield name, start, mean_weights(sent(name, start), total)


def _is_adaptive(run: Run) -> bool:
    return bool(run.config.strategy.dp) and str(run.config.strategy.dp).endswith("-adaptive")
