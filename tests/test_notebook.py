"""The notebook for learners: made from its script, run to the end, and free of anything of the machine that ran it."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_notebook", EXAMPLES / "make_notebook.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(EXAMPLES / "first_batch_norm.ipynb", as_version=4)


def test_is_valid_and_made_from_the_script_as_it_stands(maker: ModuleType, notebook: nbformat.NotebookNode):
    nbformat.validate(notebook)
    source = maker.read_cells(maker.SOURCE.read_text())
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in source.cells
    ], "run examples/make_notebook.py"


def test_was_run_to_the_end_in_order(notebook: nbformat.NotebookNode):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "execute_result", "display_data"}
    assert not [output for output in outputs if output.get("name") == "stderr"], "warnings and progress bars"


def test_names_no_path_of_the_machine(notebook: nbformat.NotebookNode):
    text = nbformat.writes(notebook)
    assert not re.search(r"/(home|root|Users|tmp|work|usr)/|site-packages", text)


def test_walkthrough_and_comparison_show_themselves(notebook: nbformat.NotebookNode):
    shown = {
        cell.source.partition("(")[0]: cell.outputs[-1].data.get("text/html", "")
        for cell in notebook.cells
        if cell.cell_type == "code" and cell.source.startswith("sn.")
    }
    assert "6.782330" in shown["sn.explain"]  # sqrt(46)
    assert "<svg" in shown["sn.compare"]


@pytest.mark.slow
def test_its_quick_cells_run(maker: ModuleType):
    quick = maker.read_cells(maker.SOURCE.read_text())
    quick.cells = [cell for cell in quick.cells if "sn.compare(" not in cell.source or cell.cell_type == "markdown"]
    maker.run(quick)
    assert all(cell.execution_count for cell in quick.cells if cell.cell_type == "code")
