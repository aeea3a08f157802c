"""The examples in the site's pages and in the README run, and print what the page says they print."""

import doctest
import importlib.util
import re
from pathlib import Path

import pytest

from steadynorm.experiment.claims import STATEMENTS

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^ *```(?:pycon|python)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
BLANK_IN_OUTPUT = re.compile(r"^\n(?!>>>|\Z)", re.MULTILINE)
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def examples(page: Path) -> str:
    """The page's interactive examples, one after another: they share their names, as a reader's session would.

    A blank line would end the expected output, so it is written as doctest wants it: no reader should have to see that.
    """
    blocks = [block for block in FENCE.findall(page.read_text(encoding="utf-8")) if ">>>" in block]
    return "\n".join(BLANK_IN_OUTPUT.sub("<BLANKLINE>\n", block) for block in blocks)


PAGES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if examples(page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_of_the_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    case = doctest.DocTestParser().get_doctest(examples(page), {}, page.name, str(page), 0)
    said: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS).run(case, out=said.append)
    assert not said, "".join(said)


def test_the_claims_page_states_what_the_code_judges_by():
    page = (ROOT / "docs/learn/claims.md").read_text(encoding="utf-8")
    rows = [line for line in page.partition("## Measured")[0].splitlines() if line.startswith("| ")][2:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [statement.claim for statement in STATEMENTS]
    for row, statement in zip(rows, STATEMENTS, strict=True):
        assert re.search(rf"\b{statement.smallest_effect:g}\b", row.split(" | ")[2]), statement.id


@pytest.mark.parametrize(
    ("path", "page"),
    [("README.md", "readme"), ("docs/learn/claims.md", "claims"), ("docs/guides/small-batches.md", "small-batches")],
)
def test_the_measured_tables_say_what_the_measurements_do(path: str, page: str):
    spec = importlib.util.spec_from_file_location("measured", ROOT / "benchmarks" / "measured.py")
    measured = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(measured)
    written = re.search(r"<!-- measured -->\n(.*?)<!-- /measured -->", (ROOT / path).read_text(), re.DOTALL)
    assert written[1] == measured.block(page), "run python benchmarks/measured.py"


def test_the_page_on_shift_says_what_was_measured():
    spec = importlib.util.spec_from_file_location("shift_pages", ROOT / "benchmarks" / "shift_pages.py")
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    page = pages.PAGE.read_text(encoding="utf-8")
    assert page == pages.written(page), "run python benchmarks/shift_pages.py"
