"""The README's own lines, in a notebook that is executed and made a page."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.installed import needs
from tests.patience import PATIENCE

pytest.importorskip("ipykernel", reason="notebooks need the packages of the extra dev")
nbconvert = pytest.importorskip("nbconvert", reason="notebooks need the packages of the extra dev")
nbformat = pytest.importorskip("nbformat", reason="notebooks need the packages of the extra dev")

ROOT = Path(__file__).parents[1]


def lines_of_the_guide() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.partition("## From Python and notebooks")[2].partition("```python\n")[2]
    imported, *lines = ast.parse(block.partition("```")[0]).body
    assert ast.unparse(imported) == "import fedsim"
    return [ast.unparse(line) for line in lines]


@needs("report")
@pytest.mark.matrix
@pytest.mark.slow
def test_a_notebook_of_the_guides_lines_is_a_page_with_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Neither the user's kernels and settings, nor files among them.
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    first, *calls = lines_of_the_guide()
    assert calls[-1] == "run.plot.noise()"
    last = "print(run.rounds()['global_accuracy'].max())"
    cells = [f"import fedsim\n{first}", *calls, "run.plot.drift_pairs().show()", last]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    executor = nbconvert.preprocessors.ExecutePreprocessor(timeout=int(PATIENCE))
    executor.preprocess(notebook, {"metadata": {"path": str(tmp_path)}})
    outputs = {cell.source: cell.outputs for cell in notebook.cells}
    streams = [o for found in outputs.values() for o in found if o.output_type == "stream"]
    assert {o.name for o in streams} == {"stdout"}
    assert "round 10/10  loss" in "".join(o.text for o in outputs[cells[0]])
    assert float(outputs[last][0].text) > 0.7
    assert "drift()" in outputs["run.plot"][0].data["text/plain"]
    page, _ = nbconvert.HTMLExporter().from_notebook_node(notebook)
    shown = page.partition("<main")[2]
    assert shown.count('src="data:image/png;base64,') == 3
    assert "<script" not in shown
