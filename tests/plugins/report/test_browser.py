"""The page as a browser shows it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedsim.plugins.report import charts
from fedsim.plugins.report.charts import KEYS
from fedsim.plugins.report.page import make_page
from fedsim.plugins.report.report import write_report
from fedsim.plugins.report.study import Study
from fedsim.recording.findings import Findings
from fedsim.recording.reader import load_run
from tests.plugins.report.browser import BINARY, Page, browser

pytestmark = pytest.mark.skipif(BINARY is None, reason="no Chromium is installed")

# Visible marks of every figure: lines, symbols, filled bands, bars, or a heatmap's image.
COUNT_MARKS = """
(() => Object.fromEntries(JSON.parse(document.getElementById("figures").textContent).map(f => [
  f.key,
  document.querySelectorAll(`#plot-${f.key} :is(.js-line, .point, .js-fill, .hm image)`).length,
])))()
"""
TITLES = """
[...document.querySelectorAll(":is(.xtitle, .ytitle)")].map(title => title.textContent)
"""
OVERLAPPING = """
(() => { const wide = document.documentElement.clientWidth;
  return [...document.querySelectorAll("figure, table, h1, .plot, .main-svg")]
    .filter(e => !e.closest(".scroll") && e.getBoundingClientRect().right > wide + 1)
    .map(e => e.className.baseVal ?? (e.id || e.tagName)); })()
"""


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def ten(make_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of ten rounds with everything in it."""
    path = tmp_path_factory.mktemp("report") / "ten.html"
    write_report([make_run("ten", rounds=10, clients=20, clients_per_round=5)], path)
    return path


def test_a_report_is_small(ten: Path) -> None:
    assert ten.stat().st_size < 8e6


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_figure_is_shown_without_a_complaint_or_a_request(
    page: Page, ten: Path, width: int, dark: bool
) -> None:
    page.events.clear()
    page.look(width=width, dark=dark).open(ten)
    marks = page.evaluate(COUNT_MARKS)
    assert set(marks) == set(KEYS)
    assert [key for key, count in marks.items() if not count] == []
    titles = page.evaluate(TITLES)
    assert len(titles) == 2 * len(KEYS)
    assert "" not in titles
    assert page.evaluate(OVERLAPPING) == []
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.complaints() == []
    assert [u for u in page.requests() if not u.startswith("data:")] == [ten.as_uri()]
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(21, 24, 28)" if dark else "rgb(255, 255, 255)"
    )


def test_the_colour_scheme_may_change_while_the_page_is_open(page: Page, ten: Path) -> None:
    colour = "getComputedStyle(document.querySelector('#plot-accuracy .xtitle')).fill"
    page.look(width=1280).open(ten)
    assert page.evaluate(colour) == "rgb(27, 31, 36)"
    page.look(width=1280, dark=True)
    page.wait_for(f"{colour} === 'rgb(230, 233, 237)'")


def test_paper_is_white_and_all_of_it_fits(page: Page, ten: Path) -> None:
    page.look(width=720, dark=True).open(ten)
    page.look(width=720, dark=True, media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    fill = "getComputedStyle(document.querySelector('#plot-accuracy .xtitle')).fill"
    page.wait_for(f"{fill} === 'rgb(0, 0, 0)'")
    assert page.evaluate(OVERLAPPING) == []
    page.look(width=720, dark=True)


def test_views_are_chosen_by_the_reader(page: Page, ten: Path) -> None:
    page.look(width=1280).open(ten)
    shown = "document.querySelector('#views-drift_pairs select').selectedOptions[0].textContent"
    names = "document.getElementById('plot-drift_pairs').data[0].y.join(' ')"
    assert page.evaluate(shown) == "round 10"
    last = page.evaluate(names)
    page.evaluate(
        "(() => { const slider = document.querySelector('#views-drift_pairs input');"
        "slider.value = 0; slider.dispatchEvent(new Event('input')); })()"
    )
    assert page.evaluate(shown) == "round 1"
    assert page.evaluate(names) != last


def test_two_hundred_clients_stay_within_the_page(
    page: Page, make_run: Any, tmp_path: Path
) -> None:
    run = make_run(
        "many",
        dataset="synthetic:2400:10",
        clients=200,
        clients_per_round=200,
        min_samples=2,
        rounds=1,
        capture="none",
    )
    path = tmp_path / "many.html"
    write_report([run], path)
    assert path.stat().st_size < 8e6
    page.events.clear()
    for width in (1280, 390):
        page.look(width=width).open(path)
        assert page.evaluate(OVERLAPPING) == []
        labels = (
            "[...document.querySelectorAll('#plot-participation .ytick text')]"
            ".map(t => t.getBoundingClientRect().top)"
        )
        tops = sorted(page.evaluate(labels))
        assert len(tops) > 10
        assert min(b - a for a, b in itertools.pairwise(tops)) > 8
    assert page.complaints() == []


def test_a_run_with_an_evil_name_does_nothing(page: Page, small: Path, tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)><a href='javascript:alert(2)'>here</a>"
    path = tmp_path / "page.html"
    studies = [Study(load_run(small), name, alone=False) for name in (evil, "other")]
    figures = [charts.draw(key, studies) for key in KEYS]
    path.write_text(make_page(studies, figures, [Findings()] * 2, in_full=False))
    page.events.clear()
    page.look(width=1280).open(path)
    assert page.evaluate("document.querySelectorAll('img, svg a, [href^=javascript]').length") == 0
    assert evil in page.evaluate("document.querySelector('#plot-accuracy').textContent")
    assert page.complaints() == []
