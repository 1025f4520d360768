"""From runs to figures: one function for each figure, over one run or several."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsim.plugins.report.figures import (
    Absent,
    Axis,
    Band,
    Bars,
    Figure,
    Line,
    Mark,
    Matrix,
    Number,
    Points,
    View,
    spread,
)
from fedsim.plugins.report.study import MOST_CELLS, Study
from fedsim.recording.layout import STEPS

_MOST_POINTS = 3000
_ROUND = Axis(title="round")
_CLIENT = Axis(title="client", unit="partition id")
_COSINE = Axis(title="cosine", limits=(-1, 1))

Studies = Sequence[Study]


class _NoFigureError(Exception):
    """there is nothing to draw; the text says why."""


def draw(key: str, studies: Studies) -> Figure | Absent:
    """Make a figure of one run, or of several in one.

    Parameters
    ----------
    key : str
        One of `KEYS`.
    studies : sequence of Study
        The runs.

    Raises
    ------
    InputError
        When a file of a run that the figure needs cannot be read.
    """
    title, chart = _CHARTS[key]
    try:
        x, y, views, caption, options = chart(studies)
    except _NoFigureError as reason:
        return Absent(key=key, title=title, reason=str(reason))
    return Figure(key=key, title=title, caption=caption, x=x, y=y, views=views, **options)


_Drawn = tuple[Axis, Axis, list[View], str, dict[str, Any]]


def _finite(value: float | None) -> Number:
    return None if value is None or not math.isfinite(value) else float(value)


def _together(
    studies: Studies, draw_one: Callable[[int, Study], Iterable[Mark]]
) -> tuple[list[View], str]:
    """Draw all runs into one view, and say what is missing of which run."""
    marks: list[Mark] = []
    missing = ""
    for series, study in enumerate(studies):
        try:
            marks += draw_one(series, study)
        except _NoFigureError as reason:
            missing += _about(studies, study, str(reason))
    if not marks:
        raise _NoFigureError(missing.strip())
    return [View(name="", marks=marks)], missing


def _in_turn(
    studies: Studies, draw_one: Callable[[Study], Iterable[View]]
) -> tuple[list[View], str]:
    """Draw views of each run, and say what is missing of which run."""
    views: list[View] = []
    missing = ""
    for study in studies:
        try:
            for view in draw_one(study):
                names = [study.label] if len(studies) > 1 else []
                names += [view.name] if view.name else []
                views.append(View(name=", ".join(names), marks=view.marks))
        except _NoFigureError as reason:
            missing += _about(studies, study, str(reason))
    if not views:
        raise _NoFigureError(missing.strip())
    return views, missing


def _about(studies: Studies, study: Study, text: str) -> str:
    return f" {study.label}: {text}" if len(studies) > 1 else f" {text}"


def _name(study: Study, what: str) -> str:
    return what if study.alone else f"{study.label}: {what}"


# Curves of the global model


def _curve(studies: Studies, key: str, title: str, unit: str, caption: str) -> _Drawn:
    def draw_one(series: int, study: Study) -> Iterable[Mark]:
        rows = [row for row in study.run.round_rows if row["global_accuracy"] is not None]
        if not rows:
            raise _NoFigureError("No round has been evaluated yet.")
        yield Line(
            name=study.label,
            x=[row["round"] for row in rows],
            y=[_finite(row[key]) for row in rows],
            series=series,
        )

    views, missing = _together(studies, draw_one)
    return _ROUND, Axis(title=title, unit=unit), views, caption + missing, {}


def _accuracy(studies: Studies) -> _Drawn:
    return _curve(
        studies,
        "global_accuracy",
        "test accuracy",
        "share of the test split",
        "Accuracy of the global model after each round's update; round 0 is the untrained model.",
    )


def _loss(studies: Studies) -> _Drawn:
    return _curve(
        studies,
        "global_loss",
        "test loss",
        "mean cross-entropy, nats",
        "Loss of the global model after each round's update. A loss that is not finite is a gap.",
    )


# Who has what, and who took part


def _partition(studies: Studies) -> _Drawn:
    first_of: dict[tuple[str, str], Study] = {}
    for study in studies:
        # The same positions in other data are other samples.
        of = study.run.entry("dataset")["sha256"], study.run.entry("partition")["sha256"]
        first_of.setdefault(of, study)
    told = ""
    if len(first_of) < len(studies):
        told = " Runs with the same partition of the same data are shown once."

    def draw_one(study: Study) -> Iterable[View]:
        nonlocal told
        counts, unknown = study.class_counts
        if unknown:
            told += _about(studies, study, unknown)
        clients, classes = counts.shape
        shown = spread(range(clients), MOST_CELLS // classes)
        if len(shown) < clients:
            told += _about(studies, study, f"{len(shown)} of {clients} clients are shown.")
        matrix = Matrix(
            rows=[str(number) for number in shown],
            columns=[str(number) for number in range(classes)],
            values=[[_finite(n) for n in counts[number].tolist()] for number in shown],
        )
        yield View(name="", marks=[matrix])

    chosen = list(first_of.values())
    views, missing = _in_turn(chosen, draw_one)
    caption = f"Training samples of each class at each client.{told}{missing}"
    colour = Axis(title="samples", unit="number")
    return Axis(title="class"), _CLIENT, views, caption, {"colour": colour}


_LEVELS = ("trained", "failed")


def _participation(studies: Studies) -> _Drawn:
    told = ""

    def draw_one(study: Study) -> Iterable[View]:
        nonlocal told
        rows = [row for row in study.run.round_rows if row["round"]]
        if not rows:
            raise _NoFigureError("No round is finished yet.")
        clients = len(study.run.partition)
        shown = spread(rows, max(1, MOST_CELLS // clients))
        if len(shown) < len(rows):
            told += _about(studies, study, f"{len(shown)} of {len(rows)} rounds are shown.")
        clients = min(clients, MOST_CELLS)
        values: list[list[Number]] = [[None] * len(shown) for _ in range(clients)]
        for column, row in enumerate(shown):
            failed = set(row["failed"])
            for client in row["participants"]:
                if client < clients:
                    values[client][column] = 2 if client in failed else 1
        matrix = Matrix(
            rows=[str(number) for number in range(clients)],
            columns=[str(row["round"]) for row in shown],
            values=values,
        )
        yield View(name="", marks=[matrix])

    views, missing = _in_turn(studies, draw_one)
    caption = f"Who was asked to take part in which round, and who failed.{told}{missing}"
    return _ROUND, _CLIENT, views, caption, {"levels": _LEVELS}


# What clients told


def _cloud(
    series: int,
    study: Study,
    rounds: Sequence[int],
    values: Sequence[Number],
    labels: Sequence[str],
) -> Iterable[Mark]:
    """Draw a point for each client-round, or where most of them lie, and their median."""
    grouped: dict[int, list[float]] = {number: [] for number in sorted(set(rounds))}
    for number, value in zip(rounds, values, strict=True):
        if value is not None:
            grouped[number].append(value)
    numbers = list(grouped)
    if len(values) > _MOST_POINTS:
        ends = [
            statistics.quantiles(g, n=10, method="inclusive") if len(g) > 1 else g * 9
            for g in grouped.values()
        ]
        yield Band(
            name=_name(study, "10 % to 90 % of clients"),
            x=numbers,
            low=[end[0] if end else None for end in ends],
            high=[end[-1] if end else None for end in ends],
            series=series,
            listed=study.alone,
        )
    else:
        yield Points(
            name=_name(study, "clients"),
            x=rounds,
            y=values,
            labels=labels,
            series=series,
            listed=study.alone,
        )
    yield Line(
        name="median" if study.alone else study.label,
        x=numbers,
        y=[statistics.median(group) if group else None for group in grouped.values()],
        series=series,
    )


def _medians(studies: Studies) -> str:
    return " Lines are medians." if len(studies) > 1 else ""


def _telemetry(studies: Studies, key: str, y: Axis, caption: str) -> _Drawn:
    def draw_one(series: int, study: Study) -> Iterable[Mark]:
        rows = study.ok_rows
        if not rows:
            raise _NoFigureError("No client has trained yet.")
        return _cloud(
            series,
            study,
            [row["round"] for row in rows],
            [_finite(row[key]) for row in rows],
            [f"client {row['partition']}" for row in rows],
        )

    views, missing = _together(studies, draw_one)
    return _ROUND, y, views, caption + _medians(studies) + missing, {}


def _client_loss(studies: Studies) -> _Drawn:
    return _telemetry(
        studies,
        "local_loss",
        Axis(title="local training loss", unit="mean cross-entropy, nats"),
        "Each client's mean loss over the batches of its local training, before their updates.",
    )


def _gradient_norm(studies: Studies) -> _Drawn:
    return _telemetry(
        studies,
        "gradient_norm",
        Axis(title="gradient norm", unit="Euclidean, first local step", log=True),
        "Norm of each client's gradient at the global model: its first local step, all parameters, "
        "without weight decay.",
    )


def _layer_norms(studies: Studies) -> _Drawn:
    def draw_one(study: Study) -> Iterable[View]:
        by_round: dict[int, list[Mapping[str, Number]]] = {}
        for row in study.ok_rows:
            by_round.setdefault(row["round"], []).append(row["per_layer_norms"])
        if not by_round:
            raise _NoFigureError("No client has trained yet.")
        names = list(study.run.shapes)
        rounds = spread(sorted(by_round), max(2, MOST_CELLS // len(names)))
        matrix = Matrix(
            rows=names,
            columns=[str(number) for number in rounds],
            values=[
                [_log_median(row.get(name) for row in by_round[n]) for n in rounds]
                for name in names
            ],
        )
        yield View(name="", marks=[matrix])

    views, missing = _in_turn(studies, draw_one)
    caption = (
        "Norm of the first local gradient of each parameter, median over the clients of the round."
        f"{missing}"
    )
    colour = Axis(title="norm", unit="log10, Euclidean")
    return _ROUND, Axis(title="parameter"), views, caption, {"colour": colour}


def _log_median(values: Iterable[Number]) -> Number:
    known = [value for value in values if value is not None]
    median = statistics.median(known) if known else 0.0
    return math.log10(median) if median > 0 else None


# Drift


_NO_DELTA = "No client has trained yet."
_TOO_LARGE = "One round has more bytes than --read-budget allows."


def _need(rounds: Sequence[int], there: Sequence[int], otherwise: str) -> None:
    if not rounds:
        raise _NoFigureError(_TOO_LARGE if there else otherwise)


def _drift_cloud(
    studies: Studies, take: Callable[[Any], Iterable[float]], y: Axis, caption: str
) -> _Drawn:
    def draw_one(series: int, study: Study) -> Iterable[Mark]:
        _need(study.drift_rounds, study.trained_rounds, _NO_DELTA)
        drifts = study.drift
        return _cloud(
            series,
            study,
            [drift.round for drift in drifts for _ in drift.clients],
            [_finite(value) for drift in drifts for value in take(drift)],
            [f"client {client}" for drift in drifts for client in drift.clients],
        )

    views, missing = _together(studies, draw_one)
    return _ROUND, y, views, caption + _medians(studies) + _left_out(studies) + missing, {}


def _left_out(studies: Studies) -> str:
    return "".join(study.left_out(study.drift_rounds, study.trained_rounds) for study in studies)


def _drift(studies: Studies) -> _Drawn:
    return _drift_cloud(
        studies,
        lambda drift: drift.to_movement,
        Axis(title="cosine to the movement"),
        "Client drift: the angle between each client's delta (local minus global) and what the "
        "round did to the global model (state after minus state before), over all parameters, "
        "without buffers. 1 is the same direction, 0 none in common, -1 the opposite.",
    )


def _delta_norm(studies: Studies) -> _Drawn:
    return _drift_cloud(
        studies,
        lambda drift: drift.lengths,
        Axis(title="norm of the delta", unit="Euclidean", log=True),
        "How far each client moved away from the global model in its local training.",
    )


def _quantile_marks(
    series: int, study: Study, rounds: list[int], quantiles: list[tuple[float, ...] | None]
) -> Iterable[Mark]:
    parts = [q or (None, None, None) for q in quantiles]
    yield Band(
        name=_name(study, "10 % to 90 % of pairs"),
        x=rounds,
        low=[q[0] for q in parts],
        high=[q[2] for q in parts],
        series=series,
        listed=study.alone,
    )
    name = "median" if study.alone else study.label
    yield Line(name=name, x=rounds, y=[q[1] for q in parts], series=series)


def _pair_cosines(studies: Studies) -> _Drawn:
    def draw_one(series: int, study: Study) -> Iterable[Mark]:
        _need(study.drift_rounds, study.trained_rounds, _NO_DELTA)
        drifts = study.drift
        if not any(drift.quantiles for drift in drifts):
            raise _NoFigureError("No round has two clients.")
        return _quantile_marks(
            series, study, [d.round for d in drifts], [d.quantiles for d in drifts]
        )

    views, missing = _together(studies, draw_one)
    caption = f"Cosines of the deltas of all pairs of clients of a round.{_medians(studies)}"
    y = Axis(title="cosine of two clients' deltas")
    return _ROUND, y, views, caption + _left_out(studies) + missing, {}


def _drift_pairs(studies: Studies) -> _Drawn:
    told = ""

    def draw_one(study: Study) -> Iterable[View]:
        nonlocal told
        _need(study.drift_rounds, study.trained_rounds, _NO_DELTA)
        _need(study.matrix_rounds, [], "A round has more pairs of clients than a page can hold.")
        if len(study.matrix_rounds) < len(study.trained_rounds):
            shown = f"{len(study.matrix_rounds)} of {len(study.trained_rounds)} rounds are shown."
            told += _about(studies, study, shown)
        for drift in study.drift:
            if drift.pairs is not None:
                names = [str(client) for client in drift.clients]
                values = [[_finite(v) for v in row] for row in drift.pairs.round(3).tolist()]
                matrix = Matrix(rows=names, columns=names, values=values)
                yield View(name=f"round {drift.round}", marks=[matrix])

    views, missing = _in_turn(studies, draw_one)
    caption = f"Cosines of the deltas of all pairs of clients of one round.{told}{missing}"
    return _CLIENT, _CLIENT, views, caption, {"colour": _COSINE}


# Captured gradients


def _basis(studies: Studies) -> str:
    """Say where the gradients are not whole."""
    text = ""
    for study in studies:
        part = study.run.config.policy.basis(list(study.run.shapes))
        if not part:
            continue
        text += _about(studies, study, part[0].upper() + part[1:])
    return text


def _no_gradients(study: Study, needed: str) -> str:
    kept = study.run.config.capture
    if not study.trained_rounds:
        return _NO_DELTA
    if study.run.removed:
        return "Its captured gradients were removed to make room."
    return f"capture = {kept!r} keeps no {needed}."


def _conflict(studies: Studies) -> _Drawn:
    def draw_one(series: int, study: Study) -> Iterable[Mark]:
        there = study.first_step_rounds
        _need(study.conflict_rounds, there, _no_gradients(study, "first step of a client"))
        found = study.conflict
        if all(conflict.share is None for conflict in found):
            raise _NoFigureError("No round has two clients with a captured first step.")
        yield Line(
            name=study.label,
            x=[conflict.round for conflict in found],
            y=[conflict.share for conflict in found],
            series=series,
        )

    views, missing = _together(studies, draw_one)
    caption = (
        "Share of pairs of clients of a round whose gradients at the global model (their first "
        "local step) have a negative cosine: gradients in conflict (Yu et al., Gradient Surgery "
        "for Multi-Task Learning, 2020)."
    )
    left = "".join(s.left_out(s.conflict_rounds, s.first_step_rounds) for s in studies)
    y = Axis(title="pairs in conflict", unit="share", limits=(-0.02, 1.02))
    return _ROUND, y, views, caption + _basis(studies) + left + missing, {}


def _noise(studies: Studies) -> _Drawn:
    hidden = ""

    def draw_one(series: int, study: Study) -> Iterable[Mark]:
        nonlocal hidden
        there = study.several_step_rounds
        _need(study.noise_rounds, there, _no_gradients(study, "two full batches of a client"))
        found = study.noise
        known = [noise for noise in found if noise.scale is not None]
        if not known:
            raise _NoFigureError("Noise hides the gradient in the captured steps of every client.")
        if len(known) < len(found):
            count = f"{len(found) - len(known)} of {len(found)} estimates are not positive: noise"
            hidden += _about(studies, study, f"{count} hides the gradient there.")
        return _cloud(
            series,
            study,
            [noise.round for noise in known],
            [noise.scale for noise in known],
            [f"client {noise.partition}, {noise.steps} steps" for noise in known],
        )

    views, missing = _together(studies, draw_one)
    steps = max(study.noise_steps for study in studies)
    caption = (
        "Simple noise scale tr(S) / |G|^2 of each client: at a batch of so many samples the noise "
        "of a gradient is as large as the gradient (McCandlish et al., An Empirical Model of "
        f"Large-Batch Training, 2018). From the first {steps} captured full batches of a round at "
        "most; the parameters move between them, which adds to the noise."
    )
    left = "".join(s.left_out(s.noise_rounds, s.several_step_rounds) for s in studies)
    y = Axis(title="simple noise scale", unit="samples", log=True)
    caption += _medians(studies) + _basis(studies) + hidden + left + missing
    return _ROUND, y, views, caption, {}


# Time and bytes


def _stacked(
    studies: Studies, split: Callable[[Study], Mapping[int, Mapping[str, float]]]
) -> tuple[list[View], str]:
    def draw_one(study: Study) -> Iterable[View]:
        rounds = split(study)
        if not rounds:
            raise _NoFigureError("No round is finished yet.")
        names = list(dict.fromkeys(name for parts in rounds.values() for name in parts))
        marks = [
            Bars(
                name=name,
                x=list(rounds),
                y=[parts.get(name, 0.0) for parts in rounds.values()],
                series=position,
            )
            for position, name in enumerate(names)
        ]
        yield View(name="", marks=marks)

    return _in_turn(studies, draw_one)


def _round_time(studies: Studies) -> _Drawn:
    def split(study: Study) -> dict[int, dict[str, float]]:
        rounds = {}
        for row in study.run.round_rows:
            seconds = row["seconds"]
            rest = seconds["total"] - seconds["clients"] - seconds["evaluate"]
            rounds[row["round"]] = {
                "clients and aggregation": seconds["clients"],
                "evaluation": seconds["evaluate"],
                "rest": max(0.0, rest),
            }
        return rounds

    views, missing = _stacked(studies, split)
    y = Axis(title="wall time", unit="s")
    return _ROUND, y, views, f"Where the time of each round went, on the clock.{missing}", {}


_PARTS = ("load", "train", "capture", "write")


def _client_time(studies: Studies) -> _Drawn:
    def split(study: Study) -> dict[int, dict[str, float]]:
        rounds: dict[int, dict[str, float]] = {}
        for row in sorted(study.ok_rows, key=lambda row: int(row["round"])):
            parts = rounds.setdefault(row["round"], dict.fromkeys([*_PARTS, "rest"], 0.0))
            known = {name: row["seconds"].get(name, 0.0) for name in _PARTS}
            known["rest"] = max(0.0, row["seconds"].get("total", 0.0) - sum(known.values()))
            for name, seconds in known.items():
                parts[name] += seconds
        return rounds

    views, missing = _stacked(studies, split)
    y = Axis(title="time of all clients", unit="s")
    caption = (
        "The work of all clients of a round, added up over workers: making batches, training, "
        "handing gradients to the writer with their norms, waiting for the writer, and the rest."
    )
    return _ROUND, y, views, caption + missing, {}


def _bytes(studies: Studies) -> _Drawn:
    def split(study: Study) -> dict[int, dict[str, float]]:
        layout = study.run.layout
        rounds: dict[int, dict[str, float]] = {}
        for row in study.run.round_rows:
            number = row["round"]
            clients = [r for r in study.run.client_rows_of(number) if r["status"] == "ok"]
            gradients = sum(r["bytes_captured"] for r in clients)
            trained = study.run.round(number).clients.values()
            controls = [layout.control(number, client.partition) for client in trained]
            deltas = {client.delta_path for client in trained}
            shared = {c.steps_path for c in trained if STEPS not in c.telemetry["files"]}
            listed = sum(file["bytes"] for r in clients for file in r["files"].values())
            listed += sum(map(_size, shared))
            rounds[number] = {
                "captured gradients": gradients / 1e6,
                "deltas": sum(map(_size, deltas)) / 1e6,
                "state, aggregate, strategy": (
                    _size(layout.state(number))
                    + _size(layout.aggregate(number))
                    + _size(layout.strategy(number))
                    + sum(map(_size, controls))
                )
                / 1e6,
                "steps and headers": max(0, listed - gradients) / 1e6,
            }
        return rounds

    views, missing = _stacked(studies, split)
    y = Axis(title="written", unit="MB")
    return _ROUND, y, views, f"What each round wrote to the disk.{missing}", {}


def _size(path: Path) -> int:
    try:
        return os.lstat(path).st_size
    except OSError:
        return 0


_CHARTS: dict[str, tuple[str, Callable[[Studies], _Drawn]]] = {
    "accuracy": ("Accuracy", _accuracy),
    "loss": ("Loss", _loss),
    "partition": ("Partition", _partition),
    "participation": ("Participation", _participation),
    "client_loss": ("Local loss", _client_loss),
    "gradient_norm": ("Gradient norm", _gradient_norm),
    "layer_norms": ("Gradient norm of each parameter", _layer_norms),
    "drift": ("Client drift", _drift),
    "pair_cosines": ("Agreement of clients", _pair_cosines),
    "drift_pairs": ("Agreement of each pair of clients", _drift_pairs),
    "delta_norm": ("Length of deltas", _delta_norm),
    "conflict": ("Gradient conflict", _conflict),
    "noise": ("Gradient noise", _noise),
    "round_time": ("Time of rounds", _round_time),
    "client_time": ("Time of clients", _client_time),
    "bytes": ("Bytes of rounds", _bytes),
}
KEYS = tuple(_CHARTS)
"""Names of all figures, in the order of the page."""
