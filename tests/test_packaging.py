"""What people install: it is found from anywhere, and holds what it needs and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = {"fedsim/py.typed"}


def test_a_folder_of_the_same_name_does_not_hide_the_package(tmp_path: Path) -> None:
    # What somebody meets who works beside a clone: `git clone .../fedsim`, and Python above it.
    for name in ("fedsim", "strategies"):
        (tmp_path / name).mkdir()
    done = subprocess.run(
        [sys.executable, "-c", "import fedsim, strategies; print(fedsim.__version__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("0.1.0\n", "")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("built")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--directory", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return {path.suffix: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def code() -> set[str]:
    paths = [p for name in ("fedsim", "strategies") for p in (ROOT / name).rglob("*.py")]
    pages = [p for kind in ("css", "js") for p in (ROOT / "fedsim/plugins").rglob(f"*.{kind}")]
    return {path.relative_to(ROOT).as_posix() for path in [*paths, *pages]} | DATA


def test_the_wheel_holds_the_two_packages_and_nothing_else(
    built: dict[str, Path], code: set[str], tmp_path: Path
) -> None:
    with zipfile.ZipFile(built[".whl"]) as wheel:
        assert {n for n in wheel.namelist() if ".dist-info/" not in n} == code
    shutil.unpack_archive(built[".whl"], tmp_path, "zip")
    program = "import fedsim.cli, fedsim.app, fedsim.terminal as found; print(found.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == (f"{tmp_path / 'fedsim/terminal.py'}\n", "")


def test_the_source_distribution_builds_the_same(built: dict[str, Path], code: set[str]) -> None:
    with tarfile.open(built[".gz"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names == code | {".gitignore", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml"}
