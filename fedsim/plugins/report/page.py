"""One HTML page of all figures and facts of runs, complete in itself."""

from __future__ import annotations

import base64
import datetime
import hashlib
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

from plotly.offline import get_plotlyjs

import fedsim
from fedsim.core.units import format_bytes
from fedsim.plugins.report.figures import Absent, Figure, Matrix
from fedsim.plugins.report.plotly_view import layout, traces
from fedsim.plugins.report.study import Study
from fedsim.recording.findings import Findings
from fedsim.recording.writer import is_being_written
from fedsim.terminal import format_seconds, printable

GENERATOR = '<meta name="generator" content="fedsim report">'
"""In the first bytes of every report."""

_SECTIONS = {
    "Model": ("accuracy", "loss"),
    "Data and participation": ("partition", "participation"),
    "Local training": ("client_loss", "gradient_norm", "layer_norms"),
    "Client drift": ("drift", "delta_norm", "pair_cosines", "drift_pairs"),
    "Captured gradients": ("conflict", "noise"),
    "Time and bytes": ("round_time", "client_time", "bytes"),
}
_MOST_LINES = 50
_HEIGHT, _ROW_HEIGHT, _MOST_HEIGHT = 340, 15, 1100
_MOST_IN_TITLE = 4
_MOST_BESIDE = 6
"""Names of series that fit above a figure of the usual height."""


def make_page(
    studies: Sequence[Study],
    figures: Sequence[Figure | Absent],
    findings: Sequence[Findings],
    *,
    in_full: bool,
) -> str:
    """Write the report.

    Parameters
    ----------
    studies : sequence of Study
        The runs.
    figures : sequence of Figure or Absent
        What to show, of all runs together.
    findings : sequence of Findings
        What a verification of each run found.
    in_full : bool
        Whether it was a whole verification, or only a look at rows and partition.

    Returns
    -------
    str
        HTML that needs no other file and asks for none.
    """
    files = resources.files("fedsim.plugins.report")
    style = (files / "page.css").read_text(encoding="utf-8")
    scripts = [get_plotlyjs(), (files / "page.js").read_text(encoding="utf-8")]
    known = {figure.key: figure for figure in figures}
    sections = [
        (title, "".join(_figure(known[key]) for key in keys)) for title, keys in _SECTIONS.items()
    ]
    sections = [(title, f'<div class="figures">{body}</div>') for title, body in sections]
    sections.append(("Configuration", _configuration(studies)))
    sections.append(("Verification", _verification(studies, findings, in_full=in_full)))
    sections.append(("Versions", _versions(studies)))
    title = " · ".join(study.label for study in studies)
    if len(studies) > _MOST_IN_TITLE:
        title = f"{len(studies)} runs"
    drawn = [_plot(figure) for figure in figures if isinstance(figure, Figure)]
    links = "".join(f'<a href="#{_slug(name)}">{name}</a>' for name, _ in sections)
    bodies = "".join(f'<h2 id="{_slug(name)}">{name}</h2>{body}' for name, body in sections)
    written = datetime.datetime.now().astimezone().isoformat(" ", "minutes")
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">' + GENERATOR,
            f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f"<title>{_text(title)}: fedsim report</title><style>{style}</style></head><body>",
            f"<h1>{_text(title)}</h1>",
            f'<p class="faint">Report of fedsim {fedsim.__version__}, written {written}.</p>',
            _summary(studies),
            f"<nav>{links}</nav>",
            "<noscript>Figures are drawn by the scripts in this file, which are off.</noscript>",
            bodies,
            f'<script type="application/json" id="figures">{_json(drawn)}</script>',
            *(f"<script>{script}</script>" for script in scripts),
            "</body></html>\n",
        ]
    )


def _policy(scripts: Iterable[str]) -> str:
    """Allow these scripts and nothing else: neither others nor the network."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'"
        for s in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _text(text: str) -> str:
    return html.escape(printable(text))


def _slug(title: str) -> str:
    return title.lower().replace(" ", "-")


def _json(value: Any) -> str:
    # A "<" could end the element that it stands in.
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _figure(figure: Figure | Absent) -> str:
    head = f"<h3>{figure.title}</h3>"
    if isinstance(figure, Absent):
        reason = f'<p class="faint">{_text(figure.reason)}</p>'
        return f'<figure id="{figure.key}">{head}{reason}</figure>'
    wide = ' class="wide"' if figure.key == "layer_norms" else ""
    return (
        f'<figure id="{figure.key}"{wide}>{head}<div class="views" id="views-{figure.key}"></div>'
        f'<div class="plot" id="plot-{figure.key}" style="min-height:{_height(figure)}px" '
        f'role="img" aria-label="{_text(figure.caption)}"></div>'
        f"<figcaption>{_text(figure.caption)}</figcaption></figure>"
    )


def _height(figure: Figure) -> int:
    rows = [len(m.rows) for view in figure.views for m in view.marks if isinstance(m, Matrix)]
    if figure.colour is not None and figure.x == figure.y:
        # A square of clients.
        return 460
    named = max(view.listed for view in figure.views)
    if named > _MOST_BESIDE:
        # Above the axes, names get half of the height.
        return min(_MOST_HEIGHT, max(_HEIGHT, 60 + 38 * named))
    return min(_MOST_HEIGHT, max(_HEIGHT, 110 + _ROW_HEIGHT * min(max(rows, default=0), 64)))


def _plot(figure: Figure) -> dict[str, Any]:
    return {
        "key": figure.key,
        "layout": layout(figure),
        "height": _height(figure),
        "matrix": figure.is_matrix,
        "views": [{"name": printable(v.name), "data": traces(figure, v)} for v in figure.views],
    }


def _table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], *, marked: bool) -> str:
    """Make a table of a row for each key and a column for each run."""
    lines = ["<tr><th></th>" + "".join(f"<th>{_text(name)}</th>" for name in head) + "</tr>"]
    if len(head) == 1:
        lines = []
    for key, cells in rows:
        differs = ' class="differs"' if marked and len(set(cells)) > 1 else ""
        row = "".join(f"<td>{_text(cell)}</td>" for cell in cells)
        lines.append(f"<tr{differs}><th>{_text(key)}</th>{row}</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _labels(studies: Sequence[Study]) -> list[str]:
    return [study.label for study in studies]


def _by_key(parts: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    keys = dict.fromkeys(key for part in parts for key in part)
    return [(key, [part.get(key, "") for part in parts]) for key in keys]


def _summary(studies: Sequence[Study]) -> str:
    return _table(_labels(studies), _by_key([_facts(study) for study in studies]), marked=False)


def _facts(study: Study) -> dict[str, str]:
    run, config = study.run, study.run.config
    rows = run.round_rows
    evaluated = [row for row in rows if row["global_accuracy"] is not None]
    finished = max(0, len(rows) - 1)
    status = run.status
    if status == "running":
        status = "running" if is_being_written(run.path) else "killed; `fedsim resume` continues"
    if status == "failed" and run.manifest.get("error"):
        status = f"failed: {run.manifest['error']}"
    facts = {"status": f"{status}, {finished} of {config.rounds} rounds"}
    if evaluated:
        best = max(evaluated, key=lambda row: row["global_accuracy"])
        last = evaluated[-1]
        facts["test accuracy"] = (
            f"{last['global_accuracy']:.4f} after round {last['round']}, at best "
            f"{best['global_accuracy']:.4f} after round {best['round']}"
        )
    failed = sum(len(row["failed"]) for row in rows)
    sizes = run.entry("partition")["sizes"]
    facts |= {
        "data": f"{config.dataset}, {config.partition} over {config.clients} clients of "
        f"{min(sizes)} to {max(sizes)} samples",
        "model": f"{config.described_model}, {config.strategy.name}",
        "clients": f"{len(study.ok_rows)} trained, {failed} failed",
        "captured": f"{config.capture}, "
        f"{format_bytes(sum(row['bytes_captured'] for row in study.ok_rows))}",
        "time": format_seconds(sum(row["seconds"]["total"] for row in rows)),
    }
    if rows:
        facts["state"] = f"sha256 {rows[-1]['state_sha256'][:16]}"
    return facts


def _configuration(studies: Sequence[Study]) -> str:
    parts = [
        {key: _shown(value) for key, value in study.run.config.to_mapping().items()}
        for study in studies
    ]
    note = "<p class='faint'>Keys marked * differ.</p>" if len(studies) > 1 else ""
    return note + _table(_labels(studies), _by_key(parts), marked=True)


def _shown(value: Any) -> str:
    if value is None:
        return "not set"
    return value if isinstance(value, str) else json.dumps(value)


def _versions(studies: Sequence[Study]) -> str:
    parts = [
        {
            "created": str(study.run.entry("created")),
            "device": str(study.run.entry("device")["type"]),
            **study.run.entry("versions"),
            "partition": f"sha256 {study.run.entry('partition')['sha256'][:16]}",
            "data": f"sha256 {study.run.entry('dataset')['sha256'][:16]}",
        }
        for study in studies
    ]
    return _table(_labels(studies), _by_key(parts), marked=True)


def _verification(studies: Sequence[Study], findings: Sequence[Findings], *, in_full: bool) -> str:
    level = (
        "Everything was checked, as <code>fedsim verify</code> does."
        if in_full
        else "Checked when this page was written: run.json, the rows of rounds and clients, and "
        "the partition. Tensors were not; <code>fedsim report --verify</code> checks them."
    )
    parts = [f"<p>{level}</p>"]
    for study, found in zip(studies, findings, strict=True):
        if len(studies) > 1:
            parts.append(f"<h3>{_text(study.label)}</h3>")
        parts.append(_findings(found, in_full=in_full))
    return "".join(parts)


def _findings(found: Findings, *, in_full: bool) -> str:
    lines = ["<tr><th>check</th><th>proven</th><th>what</th></tr>"]
    for check in found.checks.values():
        if not (in_full or check.proven or check.violations):
            continue
        wrong = f', <span class="bad">{len(check.violations)} wrong</span>'
        proven = f"{check.proven:,} {check.unit}" if check.proven else "none"
        detail = "; ".join([check.meaning, *check.notes, *check.unproven])
        lines.append(
            f"<tr><th>{check.name}</th><td>{proven}{wrong if check.violations else ''}</td>"
            f"<td>{_text(detail)}</td></tr>"
        )
    if not found.violations:
        verdict = '<p class="good">Nothing wrong was found.</p>'
    else:
        items = "".join(f"<li>{_text(v)}</li>" for v in found.violations[:_MOST_LINES])
        more = len(found.violations) - _MOST_LINES
        items += f"<li>and {more} more</li>" if more > 0 else ""
        verdict = f'<p class="bad">This run is not what was recorded.</p><ul>{items}</ul>'
    return f'{verdict}<div class="scroll"><table>{"".join(lines)}</table></div>'
