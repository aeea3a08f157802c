"""The command line: what it prints, where, and with which exit code."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from support_cli import Done, run


@pytest.fixture
def steadynorm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs the command line in this process."""

    return partial(run, monkeypatch, capsys)


@pytest.mark.parametrize("command", [(), ("explain",), ("compare",)])
def test_help_shows_an_example(steadynorm: Callable[..., Done], command: tuple[str, ...]) -> None:
    done = steadynorm(*command, "--help")
    assert done.code == 0
    assert "steadynorm" in done.out
    assert not command or "Examples:" in done.out


def test_version(steadynorm: Callable[..., Done]) -> None:
    assert steadynorm("--version").out.startswith("steadynorm ")


def test_explain_prints_the_worked_example(steadynorm: Callable[..., Done]) -> None:
    done = steadynorm("explain", 3, 5, 8, 9, 11, 24, "--digits", 2)
    assert done.code == 0
    for figure in ("46", "6.78", "-1.03", "-0.74", "-0.29", "-0.15", "0.15", "2.06"):
        assert figure in done.out


def test_explain_takes_negative_numbers_and_prints_json(steadynorm: Callable[..., Done]) -> None:
    done = steadynorm("explain", -3, 5, "--eps", 0, "--json")
    feature = json.loads(done.out)["features"][0]
    assert feature["mean"] == 1.0
    assert feature["variance"] == 16.0
    assert feature["x_hat"] == [-1.0, 1.0]


def test_explain_reads_several_features(steadynorm: Callable[..., Done], tmp_path: Path) -> None:
    table = tmp_path / "batch.csv"
    table.write_text("height,weight\n1,10\n3,30\n")
    done = steadynorm("explain", "--csv", table, "--gamma", "1,2", "--eps", 0, "--json")
    height, weight = json.loads(done.out)["features"]
    assert (height["name"], height["y"]) == ("height", [-1.0, 1.0])
    assert (weight["name"], weight["y"]) == ("weight", [-2.0, 2.0])


def test_compare_hands_its_options_on_and_prints_the_report(steadynorm: Callable[..., Done], tmp_path: Path) -> None:
    """A real comparison, as small as one can be: two seeds, ten steps, no studies."""
    small = (
        "--seeds",
        2,
        "--tuning-seeds",
        1,
        "--steps",
        10,
        "--arms",
        "plain,after",
        "--studies",
        "",
        "--jobs",
        1,
        "--quiet",
    )
    done = steadynorm("compare", *small, "--target", 0.5, "--out", tmp_path)
    assert done.code == 0
    assert str(tmp_path / "report.html") in done.out.replace("\n", "")
    assert (tmp_path / "report.html").stat().st_size > 10_000
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["status"] == "complete"
    assert results["target"] == 0.5
    assert [arm["id"] for arm in results["arms"]] == ["plain", "after"]
    assert {**results["settings"], "seeds": 2, "tuning_seeds": 1, "steps": 10} == results["settings"]

    again = steadynorm("compare", *small, "--target", 0.5, "--out", tmp_path, "--json")
    printed = json.loads(again.out)
    assert printed["runs"] == results["runs"]


def test_ctrl_c_says_what_is_kept(
    steadynorm: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("steadynorm.experiment.comparison.carry_out", interrupted)
    done = steadynorm("compare", "--out", tmp_path, "--quiet")
    assert done.code == 130
    assert str(tmp_path) in done.err.replace("\n", "")
    assert json.loads((tmp_path / "results.json").read_text())["status"] == "interrupted"


BAD = {
    "no values": ("explain",),
    "one value": ("explain", "3"),
    "not a number": ("explain", "3", "x"),
    "a misspelt option": ("explain", "3", "4", "--gama", "2"),
    "not finite": ("explain", "3", "nan"),
    "no such file": ("explain", "--csv", "no/such/file.csv"),
    "values and a file": ("explain", "3", "4", "--csv", "batch.csv"),
    "no such data": ("compare", "--data", "no/such/folder"),
    "no such model": ("compare", "--model", "no-such-model"),
    "no such module": ("compare", "--model", "no_such_package.nets:build"),
    "a target that is none": ("compare", "--target", "high"),
    "a target out of range": ("compare", "--target", "1.5"),
    "no such optimizer": ("compare", "--optimizer", "lion"),
    "no such arm": ("compare", "--arms", "plain,beside"),
    "no plain arm": ("compare", "--arms", "before,after"),
    "no such study": ("compare", "--studies", "astrology"),
    "seeds below one": ("compare", "--seeds", "0"),
}


@pytest.mark.parametrize("arguments", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_exit_code_2(
    steadynorm: Callable[..., Done], arguments: tuple[str, ...], tmp_path: Path
) -> None:
    out = ("--out", str(tmp_path / "report")) if arguments[0] == "compare" else ()
    done = steadynorm(*arguments, *out)
    assert done.code == 2
    assert done.out == ""
    assert "Traceback" not in done.err
    assert len(done.err.strip()) > 20
    assert not (tmp_path / "report" / "results.json").exists()
