"""Plugins are found by their entry points, and each can be taken out."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedsim.core import plugins
from fedsim.core.errors import InputError
from tests.installed import PLUGINS, ROOT, needs

COMMANDS = {
    "cluster": set(),
    "compare": {"compare"},
    "deploy": {"deploy"},
    "export": {"export"},
    "remote": {"collect", "fetch", "push"},
    "report": {"report"},
}
OWN = {"inspect", "plan", "resume", "run", "runs", "verify"}
# What each leaves undone, and what the user asked for.
REFUSED = {
    "cluster": (["plan", "--ray-address", "127.0.0.1:1"], "ray-address"),
    "remote": (["plan", "--mirror", "copy"], "mirror"),
}


def copied_without(plugin: str, folder: Path) -> Path:
    """Copy what fedsim is made of and its tests, but for one plugin."""

    def left_out(parent: str, names: list[str]) -> set[str]:
        taken_out = {plugin} if Path(parent).name == "plugins" else set()
        return {name for name in names if name == "__pycache__"} | taken_out

    for name in ("fedsim", "strategies", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=left_out)
    for name in ("pyproject.toml", "README.md", "run_simulation.py", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    for name in ("docs", "examples", "configs", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )


def commands_of(text: str) -> set[str]:
    return {line.split()[0] for line in text.partition("Commands:\n")[2].splitlines()}


@pytest.mark.parametrize("plugin", PLUGINS)
def test_without_a_plugin_the_others_are_there(plugin: str, tmp_path: Path) -> None:
    folder = copied_without(plugin, tmp_path)
    done = python(folder, "fedsim", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    others = {name for p in PLUGINS if p != plugin for name in COMMANDS[p]}
    assert commands_of(done.stdout) == OWN | others
    for command in COMMANDS[plugin]:
        done = python(folder, "fedsim", command)
        told = f"fedsim: no such command '{command}'; see `fedsim --help`\n"
        assert (done.returncode, done.stderr) == (2, told)
    if plugin in REFUSED:
        arguments, asked = REFUSED[plugin]
        done = python(folder, "fedsim", *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert done.stderr.startswith(f"fedsim: {asked} needs a plugin that provides ")


@needs("report")
@pytest.mark.parametrize(
    "asks",
    [
        "from fedsim.cli import run; sys.exit(run(['report', 'none']))",
        "from fedsim.core.plugins import provider; provider('plots', 'run.plot')",
    ],
)
def test_a_plugin_whose_needs_are_not_installed_names_its_extra(asks: str) -> None:
    # For Python, a package that is None is not there.
    program = f"import sys; sys.modules['plotly'] = None; {asks}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == (2 if "cli" in asks else 1)
    assert done.stderr.splitlines()[-1].partition(": ")[2] == (
        "the plugin report needs plotly, which is not installed; the extra 'report' brings it "
        "(in a clone: `pip install --editable '.[report]'`)"
    )


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("plugin", PLUGINS)
def test_without_a_plugin_no_test_elsewhere_fails(plugin: str, tmp_path: Path) -> None:
    folder = copied_without(plugin, tmp_path)
    # All of them can at least be imported.
    selection = ["-m", "not slow", "-k", "test_house.py or test_api.py or test_cli.py"]
    done = python(folder, "pytest", "-q", "-p", "no:cacheprovider", *selection)
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=str)
def test_only_the_tests_of_a_plugin_import_it(path: Path) -> None:
    imported = [
        node.module or ""
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
    ]
    rooms = {name.split(".")[2] for name in imported if name.startswith("fedsim.plugins.")}
    assert rooms <= {path.parent.name}


def points(**values: str) -> object:
    found = [EntryPoint(name, value, plugins.GROUP) for name, value in values.items()]
    return lambda: [SimpleNamespace(entry_points=found)]


def test_what_is_provided_is_found_by_feature_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = SimpleNamespace(PROVIDES={"sum": "math:fsum", "late": "no.such.module:thing"})
    monkeypatch.setitem(sys.modules, "an_own_plugin", ours)
    monkeypatch.setattr(plugins, "distributions", points(z="no_such_plugin", own="an_own_plugin"))
    assert plugins.provider("sum", "a sum")([1, 2]) == 3.0
    told = "mirror needs a plugin that provides 'mirror', and none is installed; installing "
    with pytest.raises(InputError, match=told):
        plugins.provider("mirror", "mirror")
    told = r"the plugin own cannot be loaded \(ModuleNotFoundError: No module named 'no'\); "
    with pytest.raises(InputError, match=told):
        plugins.provider("late", "what is late")


def test_what_an_older_installation_left_in_the_working_folder_hides_no_plugin(
    tmp_path: Path,
) -> None:
    left = tmp_path / "fedsim.egg-info"
    left.mkdir()
    (left / "PKG-INFO").write_text("Metadata-Version: 2.4\nName: fedsim\nVersion: 0.0.9\n")
    (left / "entry_points.txt").write_text("[fedsim.plugins]\nreport = fedsim.report\n")
    program = "from importlib.metadata import version; print(version('fedsim'))\n"
    program += "from fedsim.core.plugins import provided; print(*sum(provided('commands'), []))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    version, commands = done.stdout.splitlines()
    assert version == "0.0.9"
    assert "report" in commands
