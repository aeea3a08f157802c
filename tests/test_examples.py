"""Every example runs as it stands, says something, and leaves nothing behind."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# Run by tests of their own: under torchrun (test_torchrun.py), and as a notebook (test_notebook.py).
ELSEWHERE = {"ddp", "fsdp2", "first_batch_norm", "make_notebook"}
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem not in ELSEWHERE)


@pytest.mark.parametrize("name", SCRIPTS)
def test_example(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out.strip()
    assert not list(tmp_path.iterdir())


def test_an_example_says_what_it_shows_and_stays_short():
    for path in EXAMPLES.glob("*.py"):
        if path.stem not in {"first_batch_norm", "make_notebook"}:
            text = path.read_text()
            assert text.startswith('"""'), path.name
            assert len(text.splitlines()) <= 80, path.name
