from __future__ import annotations

import ast
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import fedsim
from fedsim import api
from fedsim.core.config import RunConfig
from fedsim.core.errors import ConfigError, InputError
from fedsim.core.plan import RunPlan
from fedsim.flower.client_app import app
from fedsim.flower.server_app import execute
from tests.local_grid import LocalGrid
from tests.observers import Memory
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[1]
VALUES = {
    "dataset": "digits",
    "model": "cnn",
    "clients": 4,
    "clients-per-round": 2,
    "rounds": 2,
    "capture": "none",
    "device": "cpu",
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    plan = RunPlan.prepare(RunConfig.from_mapping(VALUES))
    execute(
        LocalGrid(app, 4, recordings=folder),
        plan,
        folder / "run",
        observer=Memory(),
        workers=1,
        stop=threading.Event(),
    )
    return folder / "run"


def test_the_package_gives_the_same_class_everywhere(path: Path) -> None:
    run = fedsim.load_run(path)
    assert type(run) is fedsim.Run is api.Run
    assert fedsim.Run(path).round_rows == run.round_rows
    assert list(run.telemetry()["round"]) == [1, 1, 2, 2]


@pytest.mark.parametrize("form", ["mapping", "config", "toml", "text", "json"])
def test_a_configuration_may_be_given_in_any_form(path: Path, tmp_path: Path, form: str) -> None:
    toml = tmp_path / "run.toml"
    toml.write_text('clients = 4\nmodel = "cnn"\nclients-per-round = 2\n')
    mapping = {"clients": 4, "model": "cnn", "clients-per-round": 2}
    given: dict[str, Any] = {
        "mapping": mapping,
        "config": RunConfig.from_mapping(mapping),
        "toml": toml,
        "text": str(toml),
        "json": path / "run.json",
    }
    config = api._as_config(given[form])
    assert (config.clients, config.model, config.clients_per_round) == (4, "cnn", 2)


def test_bad_input_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path.parent / "elsewhere"))
    with pytest.raises(ConfigError, match="clients-per-round = 30 cannot be used"):
        fedsim.simulate({"clients-per-round": 30})
    with pytest.raises(ConfigError, match="clients_per_round"):
        fedsim.simulate({"clients_per_round": 4})
    with pytest.raises(InputError, match=r"no\.toml"):
        fedsim.simulate("no.toml")
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="exists already"):
        fedsim.simulate({"model": "cnn", "output": "there"})
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_an_unknown_tracker_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    asked = VALUES | {"output": str(tmp_path / "run")}
    with pytest.raises(InputError, match=r"^tracker = 'board' cannot be used; expected one of"):
        fedsim.simulate(asked, tracker=["board"])
    assert list(tmp_path.iterdir()) == []


def test_the_example_goes_from_a_run_to_a_figure_in_fifteen_lines() -> None:
    text = (ROOT / "examples" / "drift.py").read_text()
    assert len(text.splitlines()) <= 16
    ast.parse(text)


@pytest.mark.matrix
@pytest.mark.slow
def test_runs_one_after_another_in_one_program_and_an_interrupt(tmp_path: Path) -> None:
    """As a notebook does it: no process of its own for each run."""
    program = f"""
import asyncio, os, signal, threading, sys
import fedsim

VALUES = {VALUES!r}

async def notebook():
    # A notebook has a running event loop.
    first = fedsim.simulate(
        VALUES | {{"output": "{tmp_path}/first"}}, progress=False, tracker=["tensorboard"]
    )
    second = fedsim.simulate(VALUES | {{"output": "{tmp_path}/second"}}, progress=False)
    hashes = [list(run.rounds()["state_sha256"]) for run in (first, second)]
    assert hashes[0] == hashes[1]

    def interrupt():
        rows = "{tmp_path}/third/rounds.jsonl"
        while not os.path.exists(rows) or open(rows).read().count("\\n") < 2:
            pass
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    try:
        fedsim.simulate(VALUES | {{"rounds": 500, "output": "{tmp_path}/third"}}, progress=False)
    except fedsim.core.errors.RunInterruptedError as error:
        print(error)

if __name__ == "__main__":
    import fedsim.core.errors
    # Not asyncio.run: its own handler keeps the first interrupt from what runs.
    asyncio.new_event_loop().run_until_complete(notebook())
    print("went on")
"""
    script = tmp_path / "script.py"
    script.write_text(program)
    done = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.stdout.splitlines() == [
        f"interrupted; the finished rounds are kept in {tmp_path}/third, and "
        f"`fedsim resume {tmp_path}/third` continues",
        "went on",
    ], done.stderr
    assert done.returncode == 0
    assert list((tmp_path / "first" / "tensorboard").iterdir())
    assert not (tmp_path / "second" / "tensorboard").exists()
