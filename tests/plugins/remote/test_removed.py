"""Copies of runs whose gradients were removed."""

from __future__ import annotations

from pathlib import Path

from fedsim.plugins.remote.collect import collect
from fedsim.plugins.remote.folder import Folder
from fedsim.plugins.remote.mirror import fetch, push
from fedsim.recording.reader import load_run
from fedsim.recording.runs import remove_gradients
from fedsim.recording.verify import verify
from tests.recording.conftest import Recorded


def test_gradients_that_were_removed_come_back_from_a_copy(
    recorded: Recorded, copied: Path
) -> None:
    remove_gradients(copied)
    run = load_run(copied)
    removed = run.removed
    collected = collect(run, [str(recorded.path)])
    assert (collected.files, collected.wrong, collected.missing) == (len(removed), [], [])
    assert load_run(copied).removed == []
    findings = verify(copied)
    assert findings.violations == []
    assert findings.checks["replay"].proven == verify(recorded.path).checks["replay"].proven > 0
    assert not any("were removed" in text for c in findings.checks.values() for text in c.unproven)
    # And go again, whatever the lines said before.
    remove_gradients(copied)
    assert load_run(copied).removed == removed


def test_copies_of_a_run_without_its_gradients(
    recorded: Recorded, copied: Path, tmp_path: Path
) -> None:
    whole, without = tmp_path / "whole", tmp_path / "without"
    push(copied, Folder(str(whole)))
    remove_gradients(copied)
    # A copy that has them keeps them; a new one has none, and says so.
    push(copied, Folder(str(whole)))
    push(copied, Folder(str(without)))
    fetch(str(whole), tmp_path / "first")
    fetch(str(without), tmp_path / "second")
    first, second = (load_run(tmp_path / name) for name in ("first", "second"))
    assert (first.removed, second.removed) == ([], load_run(copied).removed)
    assert verify(first.path).checks["replay"].proven > 0
    for path in (first.path, second.path):
        assert verify(path).violations == []
