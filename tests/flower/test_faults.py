"""Every fault at every moment: how the run ends, what is on disk, and that it resumes exactly.

The outcomes are the table of docs/faults.md; ``python -m tests.flower.test_faults`` writes it anew.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from fedsim.core.config import RunConfig
from fedsim.core.errors import FedsimError, InputError
from fedsim.core.plan import RunPlan
from fedsim.flower.server_app import execute
from fedsim.recording.files import read_lines
from fedsim.recording.recovery import find_recovery
from fedsim.recording.verify import verify
from tests.faults import KINDS, MOMENTS, Fault, app, injected, uncover
from tests.flower.test_resume import contents, hashes
from tests.local_grid import LocalGrid
from tests.observers import Memory
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "faults.md"
HANGS_AFTER = 30
"""Seconds; of clients that do not hang, none takes a tenth of it on a machine with much to do."""
OF_PROCESSES = ("kill worker", "kill server", "hang")
ROUNDS = 5
VALUES = {
    "dataset": "synthetic:300:10",
    "model": "cnn",
    "clients": 4,
    "clients-per-round": 3,
    "rounds": ROUNDS,
    "batch-size": 16,
    "capture": "all",
    "workers": 2,
    "device": "cpu",
}
outcomes: dict[tuple[str, str], tuple[str, str, str, str]] = {}
"""Kind and moment to exit code, sentence, what `verify` says and after which round it resumed."""


@pytest.fixture(scope="module")
def plan() -> RunPlan:
    return RunPlan.prepare(RunConfig.from_mapping(VALUES))


@pytest.fixture(scope="module")
def whole(plan: RunPlan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "run"
    assert run_here(plan, path) == (0, "")
    return path


def run_here(plan: RunPlan, path: Path, *, resume: bool = False) -> tuple[int, str]:
    """Run without Ray; give the exit code and the sentence that the command would end with."""
    try:
        execute(
            LocalGrid(app, plan.config.clients, recordings=path.parent),
            plan,
            path,
            observer=Memory(),
            workers=2,
            stop=threading.Event(),
            recovery=find_recovery(path) if resume else None,
        )
    except FedsimError as error:
        return 2 if isinstance(error, InputError) else 1, str(error)
    except Exception as error:
        return 1, f"{type(error).__name__}: {error}"
    return 0, ""


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A real disk of 16 MiB: the run takes 10."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk takes more rights than this user has")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def told(text: str, path: Path) -> str:
    """What is said, without what differs from run to run."""
    text = text.replace(str(path), "RUN")
    text = re.sub(r"client \d", "client P", text)
    text = re.sub(r"round \d\b", "round R", text)
    text = re.sub(r"clients/\d{4}", "clients/PPPP", text)
    text = re.sub(r"\.\d+\.partial", ".PID.partial", text)
    text = re.sub(r"\b\d+( bytes)", r"N\1", text)
    text = re.sub(r"bytes, not \d+", "bytes, not M", text)
    text = re.sub(r"line \d+ in", "line N in", text)
    return re.sub(r'File ".*?/(\w+\.py)"', r'File "\1"', text)


def note(fault: Fault, path: Path, code: int, sentence: str) -> None:
    """Remember an outcome, checking what holds for all: whole rounds are there and as they were."""
    violations = verify(path).violations
    rows = [row["round"] for row in read_lines(path / "rounds.jsonl")]
    assert rows == list(range(len(rows)))
    recovery = find_recovery(path)
    seen = told("; ".join(violations), path) or "accepts it"
    after = "after the newest round" if recovery.round == rows[-1] else "after the one before"
    if recovery.round == ROUNDS:
        after = "is not needed"
    outcomes[fault.kind, fault.moment] = (str(code), told(sentence, path), seen, after)


def check_end(path: Path, whole: Path) -> None:
    assert hashes(path) == hashes(whole)
    assert contents(path) == contents(whole)
    assert verify(path).violations == []
    assert list(path.rglob("*.partial")) == []


@pytest.mark.matrix
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in OF_PROCESSES])
def test_a_fault_stops_the_run_with_its_cause_and_a_resume_ends_the_same(
    plan: RunPlan, whole: Path, tmp_path: Path, kind: str, moment: str
) -> None:
    fault = Fault(kind, moment, 3)
    (tmp_path / "marks").mkdir()
    with small_disk(tmp_path / "disk") as disk:
        path = disk / "run"
        with injected(fault, marks=tmp_path / "marks"):
            code, sentence = run_here(plan, path)
        assert (tmp_path / "marks" / str(fault)).exists()
        if kind == "unwritable directory":
            uncover(path / "rounds")
        (disk / "ballast").unlink(missing_ok=True)
        assert code == 1
        assert "\n" not in sentence
        note(fault, path, code, sentence)
        assert run_here(plan, path, resume=True) == (0, "")
        check_end(path, whole)


# With real processes: a run is started, ended by a fault, resumed into the next fault, and so on.


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    # Ray's sockets live below it, and the path of a socket has room for 107 characters.
    path = Path(tempfile.mkdtemp(prefix="fs-"))
    for name in ("tmp", "marks"):
        (path / name).mkdir()
    yield path
    shutil.rmtree(path, ignore_errors=True)


def run_there(folder: Path, faults: list[Fault], *arguments: str) -> tuple[int, str]:
    """Run the command with faults; give its exit code and last words."""
    command = ["tests.faults", ",".join(map(str, faults)), str(folder / "marks")]
    finished = subprocess.run(
        [sys.executable, "-m", *(command if faults else ["fedsim"]), *arguments],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(folder / "tmp")},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    err = finished.stderr.strip()
    assert "Traceback" not in err
    assert err.count("\n") == 0
    return finished.returncode, err.removeprefix("fedsim: ")


def flags() -> list[str]:
    return [f"--{key}={value}" for key, value in VALUES.items()]


def nothing_is_left(folder: Path) -> None:
    """Neither a process nor a file, also of a process that was killed."""
    running = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("TMPDIR") == str(folder / "tmp"):
                running.append(process)
    # The janitor of a killed server is at work until they are gone.
    _, alive = psutil.wait_procs(running, timeout=PATIENCE)
    assert alive == []
    assert list((folder / "tmp").iterdir()) == []


def kill_workers(whole: Path) -> None:
    """Kill a worker in each round, each at another moment."""
    with temporary_folder() as folder:
        path = folder / "run"
        faults = [Fault("kill worker", moment, n) for n, moment in enumerate(MOMENTS, start=1)]
        assert run_there(folder, faults, "run", *flags(), "--output", str(path)) == (0, "")
        nothing_is_left(folder)
        assert sorted(p.name for p in (folder / "marks").iterdir()) == sorted(map(str, faults))
        for fault in faults:
            note(fault, path, 0, "")
        check_end(path, whole)


def resume_from_fault_to_fault(whole: Path, kind: str) -> None:
    """End a run by a fault, resume it into the same one at the next moment, and so on."""
    with temporary_folder() as folder:
        path = folder / "run"
        limit = [f"--client-timeout={HANGS_AFTER}"] if kind == "hang" else []
        arguments = ["run", *flags(), *limit, "--output", str(path)]
        last = 0
        for moment in MOMENTS:
            # After the first round that this process makes.
            fault = Fault(kind, moment, last + 1 + (moment == "between rounds"))
            code, sentence = run_there(folder, [fault], *arguments)
            assert (folder / "marks" / str(fault)).exists()
            nothing_is_left(folder)
            assert code == {"kill server": -9, "hang": 1}[kind]
            note(fault, path, code, sentence)
            last = find_recovery(path).round
            arguments = ["resume", str(path)]
        assert run_there(folder, [], *arguments) == (0, "")
        nothing_is_left(folder)
        check_end(path, whole)


@pytest.fixture(scope="module")
def hanging(whole: Path) -> Iterator[Future[None]]:
    """The runs that hang, which mostly wait, beside those that are killed."""
    with ThreadPoolExecutor() as pool:
        yield pool.submit(resume_from_fault_to_fault, whole, "hang")


@pytest.mark.matrix
@pytest.mark.slow
@pytest.mark.usefixtures("hanging")
def test_killed_workers_are_replaced_and_their_clients_repeated(whole: Path) -> None:
    kill_workers(whole)


@pytest.mark.matrix
@pytest.mark.slow
@pytest.mark.usefixtures("hanging")
def test_a_killed_run_resumed_into_the_next_kill_ends_the_same(whole: Path) -> None:
    resume_from_fault_to_fault(whole, "kill server")


@pytest.mark.matrix
@pytest.mark.slow
def test_a_run_that_hangs_resumed_into_the_next_hang_ends_the_same(hanging: Future[None]) -> None:
    hanging.result()


def table() -> str:
    """The outcomes as a page."""
    lines = [
        "# Faults",
        "",
        "What happens to a run of five rounds when something goes wrong, for every fault and",
        "moment, as the tests found it (`tests/flower/test_faults.py` makes this page). After each",
        "of them `fedsim resume` ended with the same bytes as a run that nothing had happened to:",
        "every hash, state, delta and gradient. Exit code -9 is that of a process killed by signal",
        "9; a killed worker is replaced and its client repeated, so that nothing needs resuming.",
        "",
        "| fault | moment | exit code | what is said | `fedsim verify` | `fedsim resume` |",
        "| --- | --- | ---: | --- | --- | --- |",
    ]
    for kind in KINDS:
        for moment in MOMENTS:
            code, sentence, seen, after = outcomes[kind, moment]
            cells = (kind, moment, code, sentence, seen, after)
            lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(lines) + "\n"


@pytest.mark.matrix
@pytest.mark.slow
def test_the_table_in_the_documentation_is_what_happened() -> None:
    if len(outcomes) < len(KINDS) * len(MOMENTS):
        pytest.skip("takes the outcomes of all tests of this file")
    if os.environ.get("FEDSIM_WRITE_FAULTS"):
        TABLE.write_text(table())
    assert TABLE.read_text() == table()


if __name__ == "__main__":
    os.environ["FEDSIM_WRITE_FAULTS"] = "1"
    raise SystemExit(pytest.main([__file__, "-q"]))
