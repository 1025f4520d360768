from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedsim.plugins.report import charts
from fedsim.plugins.report.page import GENERATOR, make_page
from fedsim.plugins.report.study import Study
from fedsim.recording.findings import FILES, Findings
from fedsim.recording.reader import load_run

EVIL = "<script>alert(1)</script>&\"'\x1b[2J\u2028"


class Elements(HTMLParser):
    """Every element of a page, and its text outside of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    def with_tag(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(
    *paths: Path, findings: Findings | None = None, in_full: bool = False, label: str = ""
) -> str:
    studies = [Study(load_run(p), label or p.name, alone=len(paths) == 1) for p in paths]
    figures = [charts.draw(key, studies) for key in charts.KEYS]
    found = [findings or Findings()] * len(paths)
    return make_page(studies, figures, found, in_full=in_full)


@pytest.fixture(scope="module")
def page(small: Path) -> Elements:
    return Elements(page_of(small))


def test_every_figure_has_its_place_and_its_data(page: Elements) -> None:
    figures = json.loads(page.scripts[0])
    assert [figure["key"] for figure in figures] == list(charts.KEYS)
    assert {a["id"] for a in page.with_tag("figure")} == set(charts.KEYS)
    places = {a["id"] for a in page.with_tag("div") if (a.get("id") or "").startswith("plot-")}
    assert places == {f"plot-{key}" for key in charts.KEYS}


def test_the_page_allows_its_own_scripts_alone(page: Elements) -> None:
    data, plotly, ours = page.scripts
    hashes = [
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        for script in (plotly, ours)
    ]
    (policy,) = (m["content"] for m in page.with_tag("meta") if "http-equiv" in m)
    assert policy == (
        f"default-src 'none'; script-src 'sha256-{hashes[0]}' 'sha256-{hashes[1]}'; "
        "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    assert json.loads(data)


def test_the_page_refers_to_nothing_outside(page: Elements) -> None:
    for tag, attributes in page.tags:
        assert "src" not in attributes, tag
        assert (attributes.get("href") or "#").startswith(("#", "data:,")), tag
    links = {(a["href"] or "")[1:] for a in page.with_tag("a")}
    assert links == {a["id"] for a in page.with_tag("h2")}


def test_the_summary_is_that_of_the_run(page: Elements, small: Path) -> None:
    run = load_run(small)
    last = run.round_rows[-1]
    assert "finished, 3 of 3 rounds" in page.text
    assert f"{last['global_accuracy']:.4f} after round 3" in page.text
    assert "9 trained, 0 failed" in page.text
    assert last["state_sha256"][:16] in page.text
    for key in run.config.to_mapping():
        assert key in page.text


def test_the_model_of_the_summary_names_the_strategy(page: Elements) -> None:
    assert "cnn, batch norm, delta-fedavg" in page.text


def test_each_run_is_in_a_legend_once_and_many_are_not_the_title(small: Path, other: Path) -> None:
    both = Elements(page_of(small, other))
    assert "small · other: fedsim report" in both.text
    for figure in json.loads(both.scripts[0]):
        if figure["matrix"] or figure["key"] in ("round_time", "client_time", "bytes"):
            continue
        data = figure["views"][0]["data"]
        assert figure["layout"]["showlegend"] == (len(data) > 1)
        names = [trace["name"] for trace in data if trace.get("showlegend", True)]
        assert names in (["small", "other"], ["small"]), figure["key"]
    many = Elements(page_of(*[small] * 5))
    assert "5 runs: fedsim report" in many.text


def test_keys_that_differ_are_marked(small: Path, other: Path) -> None:
    text = page_of(small, other)
    marked = re.findall(r'<tr class="differs"><th>([^<]*)</th>', text)
    assert marked[:3] == ["rounds", "capture", "max-failures"]


def test_nothing_of_a_run_is_markup(small: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(small, tmp_path / "run"))
    manifest = json.loads((path / "run.json").read_bytes())
    manifest |= {"status": "failed", "error": EVIL, "created": EVIL}
    manifest["versions"]["torch"] = EVIL
    manifest["versions"][EVIL] = "1"
    manifest["config"]["output"] = EVIL.replace("\x1b", "")
    (path / "run.json").write_text(json.dumps(manifest))
    findings = Findings()
    findings.violate(FILES, EVIL)
    findings.leave(FILES, EVIL)
    text = page_of(path, findings=findings, label=EVIL)
    page = Elements(text)
    assert len(page.scripts) == 3
    assert "<script>alert" not in text
    assert "\x1b" not in text.replace(page.scripts[1], "")
    # Title, heading, status, created, versions twice, output, violation, reason.
    assert page.text.count("<script>alert(1)</script>") == 9


@pytest.mark.parametrize("name", ["fc.weight</script><script>", "<img src=x onerror=alert(1)>"])
def test_names_of_parameters_are_no_markup(small: Path, tmp_path: Path, name: str) -> None:
    path = Path(shutil.copytree(small, tmp_path / "run"))
    manifest = json.loads((path / "run.json").read_bytes())
    manifest["model"]["parameters"][0]["name"] = name
    (path / "run.json").write_text(json.dumps(manifest))
    study = Study(load_run(path), "run", budget=3)
    figures = [charts.draw(key, [study]) for key in charts.KEYS]
    text = make_page([study], figures, [Findings()], in_full=False)
    assert name not in text
    assert len(Elements(text).scripts) == 3


def test_the_level_of_the_verification_is_told(small: Path) -> None:
    quick, full = page_of(small), page_of(small, in_full=True)
    assert "Tensors were not; <code>fedsim report --verify</code> checks them." in quick
    assert "Everything was checked, as <code>fedsim verify</code> does." in full
    # What was not looked at is no row of a quick check.
    assert ("<th>replay</th>" in quick, "<th>replay</th>" in full) == (False, True)


def test_what_is_wrong_is_listed_up_to_a_limit(small: Path) -> None:
    findings = Findings()
    for number in range(52):
        findings.violate(FILES, f"file {number} is not what was written")
    text = Elements(page_of(small, findings=findings)).text
    assert "This run is not what was recorded." in text
    assert "52 wrong" in text
    assert "file 49 is" in text
    assert "file 50 is" not in text
    assert "and 2 more" in text


def test_a_report_says_that_it_is_one(small: Path) -> None:
    assert GENERATOR in page_of(small)[:256]


def test_figures_that_are_absent_say_why(make_run: Any) -> None:
    path = make_run("bare", capture="none", rounds=1)
    page = Elements(page_of(path))
    keys = [figure["key"] for figure in json.loads(page.scripts[0])]
    assert set(charts.KEYS) - set(keys) == {"conflict", "noise"}
    assert "capture = 'none' keeps no first step of a client." in page.text
    assert {"id": "conflict"} in page.with_tag("figure")


def test_the_name_of_a_run_does_not_end_the_data(small: Path) -> None:
    page = Elements(page_of(small, small, label=EVIL))
    assert len(page.scripts) == 3
    names = {view["name"] for figure in json.loads(page.scripts[0]) for view in figure["views"]}
    shown = EVIL.replace("\x1b", "\N{REPLACEMENT CHARACTER}").replace(
        "\u2028", "\N{REPLACEMENT CHARACTER}"
    )
    assert f"{shown}, round 1" in names
