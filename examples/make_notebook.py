"""Turns examples/first_batch_norm.py into the notebook beside it, runs it, and saves it with its outputs.

    python examples/make_notebook.py

The script is the source: `# %%` starts a cell of code, `# %% [markdown]` one of text.
"""

import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

SOURCE = Path(__file__).with_name("first_batch_norm.py")
NOTEBOOK = SOURCE.with_suffix(".ipynb")
_CELL = re.compile(r"^# %%( \[markdown\])?\n", re.MULTILINE)


def read_cells(source: str) -> nbformat.NotebookNode:
    """The notebook of a script in cells, not yet run."""
    _, *parts = _CELL.split(source)
    cells = []
    for number, (is_text, body) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        body = body.strip("\n")
        if is_text:
            cell = nbformat.v4.new_markdown_cell(re.sub(r"^# ?", "", body, flags=re.MULTILINE))
        else:
            cell = nbformat.v4.new_code_cell(body)
        cell["id"] = f"cell-{number}"  # the same each time, so that a rebuilt notebook differs only where it must
        cells.append(cell)
    metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def run(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook with its outputs; an exception in a cell is raised here."""
    NotebookClient(notebook, timeout=600, record_timing=False, coalesce_streams=True).execute()
    return notebook


def main() -> None:
    """Builds the notebook and writes it beside the script."""
    aside = NOTEBOOK.with_suffix(".part")
    nbformat.write(run(read_cells(SOURCE.read_text(encoding="utf-8"))), aside)
    aside.replace(NOTEBOOK)
    print(f"{NOTEBOOK.name}: {NOTEBOOK.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
