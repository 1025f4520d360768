"""From run directories to a report: what ``fedsim report`` does."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from fedsim.core.errors import InputError
from fedsim.plugins.report import charts
from fedsim.plugins.report.figures import Absent, Figure
from fedsim.plugins.report.image_view import write_images
from fedsim.plugins.report.page import GENERATOR, make_page
from fedsim.plugins.report.study import DEFAULT_BUDGET, Study
from fedsim.recording.files import temporary
from fedsim.recording.reader import Run, load_run
from fedsim.recording.verify import verify

Progress = Callable[[int, int], None]


def write_report(
    paths: Sequence[Path],
    output: Path,
    *,
    images: Path | None = None,
    in_full: bool = False,
    budget: int = DEFAULT_BUDGET,
    data_root: str | None = None,
    progress: Progress = lambda done, total: None,
) -> tuple[list[Path], list[str]]:
    """Write the page of one or several runs, and on request an image of each figure.

    Parameters
    ----------
    paths : sequence of Path
        Run directories. They may be under way.
    output : Path
        The page. An earlier report is replaced, any other file is not.
    images : Path, optional
        Folder for PNG files; made where it is not there.
    in_full : bool
        Verify the runs as `fedsim.recording.verify.verify` does, rather than their rows alone.
    budget : int
        Most bytes of deltas and gradients to read of each run.
    data_root : str, optional
        Folder of the data, where it is not the one of the run.
    progress : callable, optional
        Told bytes read and bytes to read.

    Returns
    -------
    tuple of (list of Path, list of str)
        The files that were written, and what is wrong with the runs.

    Raises
    ------
    InputError
        When a run cannot be read or a file cannot be written; nothing is written then.
    """
    _check_output(output)
    if images is not None:
        _check_folder(images)
    done = total = 0

    def told(count: int) -> None:
        nonlocal done
        done += count
        progress(done, max(done, total))

    runs = [load_run(path) for path in paths]
    studies = [
        Study(
            run,
            label,
            alone=len(runs) == 1,
            budget=budget,
            data_root=data_root,
            told=told,
        )
        for run, label in zip(runs, labels_of(runs), strict=True)
    ]
    total = sum(study.bytes_to_read for study in studies)
    figures = [charts.draw(key, studies) for key in charts.KEYS]
    findings = [verify(path, rounds=None if in_full else (), data_root=data_root) for path in paths]
    page = make_page(studies, figures, findings, in_full=in_full)
    written = _write(figures, page, output, images)
    violations = [
        f"{path} is not what was recorded: {violation}"
        for path, found in zip(paths, findings, strict=True)
        for violation in found.violations
    ]
    return written, violations


def labels_of(runs: Sequence[Run]) -> list[str]:
    """Call runs by the names of their folders, with a number where these are the same.

    Cells of a comparison are called by the values alone where they differ in one key.
    """
    names = [run.path.resolve().name for run in runs]
    parts = [name.split("=") for name in names]
    if len(runs) > 1 and all(len(p) == 2 and p[0] == parts[0][0] for p in parts):
        names = [value for _, value in parts]
    return [
        name if names.count(name) == 1 else f"{name} ({names[:position].count(name) + 1})"
        for position, name in enumerate(names)
    ]


def _write(
    figures: Sequence[Figure | Absent], page: str, output: Path, images: Path | None
) -> list[Path]:
    try:
        if images is not None:
            images.mkdir(parents=True, exist_ok=True)
        with temporary(output) as unfinished:
            unfinished.write_text(page, encoding="utf-8")
        written = [output]
        for figure in figures:
            if images is not None and isinstance(figure, Figure):
                written += write_images(figure, images)
    except OSError as error:
        raise InputError(
            f"{error.filename or output} cannot be written: {error.strerror}"
        ) from None
    return written


def _check_output(path: Path) -> None:
    try:
        if path.is_dir():
            raise InputError(f"--output = {str(path)!r} is a folder; expected the name of a page")
        if not path.parent.is_dir():
            raise InputError(f"--output = {str(path)!r} cannot be made: its folder is not there")
        # Refuses a name that no file can have.
        with contextlib.suppress(FileNotFoundError):
            path.lstat()
        if os.path.lexists(path) and GENERATOR.encode() not in _beginning(path):
            raise InputError(
                f"--output = {str(path)!r} exists and is not a report; expected a new name "
                "or a report, which is replaced"
            )
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--output = {str(path)!r} cannot be made: {reason}") from None


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(256)


def _check_folder(path: Path) -> None:
    try:
        if os.path.lexists(path) and not path.is_dir():
            raise InputError(f"--png = {str(path)!r} is not a folder; expected the name of one")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--png = {str(path)!r} cannot be made: {reason}") from None
