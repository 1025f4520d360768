from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedsim import cli
from fedsim.core.errors import FedsimError
from fedsim.plugins.report.charts import KEYS
from fedsim.plugins.report.report import labels_of, write_report
from fedsim.recording.reader import load_run
from fedsim.recording.writer import is_being_written


def run_command(*arguments: object) -> int:
    return cli.run(["report", *map(str, arguments)])


def test_a_page_and_images_of_two_runs(
    small: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, images = tmp_path / "page.html", tmp_path / "made" / "images"
    assert run_command(small, other, "--output", page, "--png", images) == 0
    out, err = capsys.readouterr()
    assert out == f"written: {page}\nwritten: {len(list(images.iterdir()))} images in {images}\n"
    assert err == ""
    assert page.stat().st_size < 8e6
    assert {p.stem.split("-")[0] for p in images.iterdir()} == set(KEYS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made", "page.html"]


def test_an_earlier_report_is_replaced_and_nothing_else(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "report.html"
    write_report([small], page)
    before = page.read_bytes()
    assert run_command(small, "--output", page) == 0
    assert len(page.read_bytes()) == len(before)
    page.write_text("<!doctype html>mine")
    assert run_command(small, "--output", page) == 2
    assert page.read_text() == "<!doctype html>mine"
    assert "exists and is not a report" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--output", "{}"], "is a folder; expected the name of a page"),
        (["--output", "{}/no/page.html"], "its folder is not there"),
        (["--output", "{}/file/page.html"], "its folder is not there"),
        (["--output", "{}/file"], "exists and is not a report"),
        (["--output", "{}/\0"], "embedded null byte"),
        (["--png", "{}/file"], "is not a folder; expected the name of one"),
        (["--read-budget", "much"], "--read-budget = 'much' cannot be used; expected a number"),
        (["--rounds", "3"], "unrecognized argument '--rounds'"),
    ],
)
def test_what_cannot_be_used_is_refused(
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert run_command(small, *(flag.format(tmp_path) for flag in flags)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "name",
    [
        "run.json",
        "rounds.jsonl",
        "clients.jsonl",
        "partition.safetensors",
        "rounds/0002/clients/0003/delta.safetensors",
        "rounds/0002/clients/0003/gradients-00000.safetensors",
        "rounds/0002/global.safetensors",
    ],
)
def test_a_broken_run_is_one_sentence(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = Path(shutil.copytree(small, tmp_path / "run"))
    content = (path / name).read_bytes()
    (path / name).write_bytes(b"\x01" * 40 + content[40:])
    assert run_command(small, path, "--output", tmp_path / "page.html") == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert str(path) in err
    assert not (tmp_path / "page.html").exists()


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(tmp_path, "--output", tmp_path / "page.html") == 2
    assert "is not a run directory" in capsys.readouterr().err


def test_a_run_that_was_changed_is_told_on_the_page_and_by_the_exit_code(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(small, tmp_path / "run"))
    state = path / "rounds/0003/global.safetensors"
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    page = tmp_path / "page.html"
    assert run_command(path, "--output", page) == 0
    assert "Nothing wrong was found." in page.read_text()
    assert run_command(path, "--output", page, "--verify") == 1
    problem = "rounds/0003/global.safetensors is not what was written"
    assert problem in page.read_text()
    assert capsys.readouterr().err.startswith(f"fedsim: {path} is not what was recorded: ")


def test_rows_that_were_changed_are_found_without_reading_tensors(
    small: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(small, tmp_path / "run"))
    rows = [json.loads(line) for line in (path / "rounds.jsonl").read_bytes().splitlines()]
    rows[3]["global_accuracy"] = 0.99
    (path / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, violations = write_report([path], tmp_path / "page.html")
    assert violations == [f"{path} is not what was recorded: rounds.jsonl is not what was written"]


def test_a_run_under_way_is_reported_as_far_as_it_is(make_run: Any, tmp_path: Path) -> None:
    pages: list[str] = []

    class Reporter:
        def __getattr__(self, name: str) -> Any:
            return lambda *told: None

        def run_started(self, plan: Any, workers: int, path: Path) -> None:
            self.path = path

        def round_finished(self, row: Any) -> None:
            assert is_being_written(self.path)
            _, violations = write_report([self.path], tmp_path / "page.html")
            assert violations == []
            pages.append((tmp_path / "page.html").read_text())

    make_run("live", observer=Reporter(), rounds=2)
    told = ["running, 0 of 2 rounds", "running, 1 of 2 rounds", "running, 2 of 2 rounds"]
    assert [text in page for text, page in zip(told, pages, strict=True)] == [True] * 3


def test_a_run_that_failed_and_one_that_was_killed_say_so(make_run: Any, tmp_path: Path) -> None:
    failed: list[Path] = []
    with contextlib.suppress(FedsimError):
        make_run("failed", stop_after=1, told=failed.append)
    path = failed[0]
    write_report([path], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "failed: " in text
    assert "1 of 3 rounds" in text
    manifest = json.loads((path / "run.json").read_bytes())
    (path / "run.json").write_text(json.dumps(manifest | {"status": "running"}))
    write_report([path], tmp_path / "page.html")
    assert (
        "killed; `fedsim resume` continues, 1 of 3 rounds" in (tmp_path / "page.html").read_text()
    )


def test_progress_ends_at_all_bytes(small: Path, other: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    write_report([small, other], tmp_path / "page.html", progress=lambda *done: told.append(done))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert len({total for _, total in told}) == 1
    assert told[-1][0] == told[-1][1]


def test_runs_of_one_name_are_numbered(small: Path, tmp_path: Path) -> None:
    twin = Path(shutil.copytree(small, tmp_path / "small"))
    runs = [load_run(small), load_run(twin)]
    assert labels_of(runs) == ["small (1)", "small (2)"]
    assert labels_of(runs[:1]) == ["small"]


@pytest.mark.parametrize(
    ("folders", "labels"),
    [
        (["strategy=fedavg", "strategy=fedprox"], ["fedavg", "fedprox"]),
        (["strategy=fedavg"], ["strategy=fedavg"]),
        (["alpha=1,seed=1", "alpha=2,seed=1"], ["alpha=1,seed=1", "alpha=2,seed=1"]),
        (["alpha=1", "seed=1"], ["alpha=1", "seed=1"]),
        (["a=1", "b/a=1"], ["1 (1)", "1 (2)"]),
    ],
)
def test_cells_of_one_axis_are_called_by_its_values(
    small: Path, tmp_path: Path, folders: list[str], labels: list[str]
) -> None:
    copies = [Path(shutil.copytree(small, tmp_path / name)) for name in folders]
    assert labels_of([load_run(copy) for copy in copies]) == labels
