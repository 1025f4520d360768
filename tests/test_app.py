"""The app that Flower packs and sends to nodes."""

from __future__ import annotations

import io
import shutil
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

from tests.test_house import FILES, ROOT


# Flower's use of its library.
@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_nodes_are_sent_our_code_and_nothing_that_lies_beside_it(tmp_path: Path) -> None:
    for path in [*FILES, ROOT / "pyproject.toml", ROOT / ".gitignore", ROOT / "README.md"]:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    for name in (
        "fedsim/run/run.json",
        "lab/nodes/0/node.toml",
        "in/some/lab/nodes/0/recordings/run/rounds/0001/clients/0000/steps.jsonl",
        "in/some/lab/nodes/0/flwr/apps/fedsim.fedsim.0.1.0/fedsim/core/config.py",
        "strategies/tests/test_mine.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("secret = 1")
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(tmp_path))) as app:
        packed = set(app.namelist())
    ours = {str(path.relative_to(ROOT)) for path in FILES if path.parent != ROOT}
    assert packed == ours | {"pyproject.toml", ".info/CONTENT"}
