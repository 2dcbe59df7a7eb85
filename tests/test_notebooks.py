"""The notebooks as they are stored; `make notebooks` runs them."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
SOURCES = sorted(NOTEBOOKS.glob("[0-9]_*.py"))
LARGEST = 300_000  # bytes: what a code host still shows


@pytest.fixture(params=SOURCES, ids=lambda path: path.stem)
def source(request):
    return request.param


def test_there_are_four():
    assert [path.name[0] for path in SOURCES] == ["1", "2", "3", "4"]


def test_both_forms_say_the_same(source):
    jupytext = pytest.importorskip("jupytext")
    text, notebook = jupytext.read(source), jupytext.read(source.with_suffix(".ipynb"))
    saved = [(cell.cell_type, cell.source) for cell in notebook.cells]
    assert saved == [(cell.cell_type, cell.source) for cell in text.cells], (
        f"run: python notebooks/save.py {source.name[0]}"
    )


def test_saved_with_outputs_small_and_without_traces(source):
    path = source.with_suffix(".ipynb")
    assert path.stat().st_size < LARGEST
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in cells), "saved without having run"
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    texts = [output for output in outputs if output["output_type"] == "stream"]
    assert not re.search(r"/(home|root|tmp|work|Users)/", json.dumps(texts)), "a path of a machine"


def test_every_exercise_has_a_solution_that_is_checked(source):
    text = source.read_text()
    asked = re.findall(r"^exercises\.(\w+)\(my_\w+\)", text, re.MULTILINE)
    solved = re.findall(r"^exercises\.(\w+)\(solved_\w+\)", text, re.MULTILINE)
    assert asked and asked == solved
    saved = source.with_suffix(".ipynb").read_text()
    assert all(f"{name}: right!" in saved for name in solved)
