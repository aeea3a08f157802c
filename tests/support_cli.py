"""The command line, run in the process of the tests."""

import sys
from typing import NamedTuple

import pytest

from steadynorm.cli import main


class Done(NamedTuple):
    code: int
    out: str
    err: str


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> Done:
    """`steadynorm` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["steadynorm", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    captured = capsys.readouterr()
    code = stopped.value.code
    return Done(code if isinstance(code, int) else 0, captured.out, captured.err)
