"""`steadynorm shift`: the report on standard output, exit codes, and one line for each bad input."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from support_cli import Done, run


@pytest.fixture
def shift(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs `steadynorm shift` in this process."""

    return partial(run, monkeypatch, capsys, "shift")


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """The same twice over, and one in which `x` has moved by half a deviation."""
    paths = []
    for i, move in enumerate((0.0, 0.0, 0.5)):
        rng = np.random.default_rng(i)
        rows = zip(rng.normal(move, 1, 2000), rng.choice(["a", "b"], 2000), strict=True)
        paths.append(tmp_path / f"{i}.csv")
        paths[-1].write_text("x,zip\n" + "\n".join(f"{x},{c}" for x, c in rows) + "\n")
    return paths[0], paths[1], paths[2]


def test_a_shift_is_said_and_fails_only_where_asked(shift, files):
    done = shift(files[0], files[2], "--classifier-rows", 200)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("Shifted: x (1 of 2 features).")
    assert "not yet a lost accuracy" in done.out
    assert shift(files[0], files[2], "--fail-on-shift", "--classifier-rows", 0).code == 1
    assert shift(files[0], files[1], "--fail-on-shift", "--classifier-rows", 0).code == 0


def test_json_alone_goes_to_standard_output(shift, files, tmp_path):
    out = tmp_path / "report" / "shift.html"
    done = shift(files[0], files[2], "--json", "--out", out, "--classifier-rows", 0, "--columns", "x")
    report = json.loads(done.out)
    assert [feature["name"] for feature in report["features"]] == ["x"]
    assert report["sides"]["reference"]["name"] == "0.csv"
    assert out.read_text().startswith("<!doctype html>")


def test_options_are_handed_on(shift, files):
    done = shift(files[0], files[2], "--tolerance", 0.7, "--type", "zip=text", "--sample", 500, "--seed", 3, "--json",
                 "--confidence", 0.9, "--classifier-rows", 0)  # fmt: skip
    report = json.loads(done.out)
    assert report["settings"] == {
        "tolerance": 0.7, "confidence": 0.9, "sample": 500, "classifier_rows": 0, "seed": 3
    }  # fmt: skip
    assert report["verdict"] != "shifted"
    assert {f["name"]: f["kind"] for f in report["features"]} == {"x": "numeric", "zip": "text"}


@pytest.mark.parametrize(
    ("write", "arguments", "words"),
    [
        (None, ["nowhere.csv"], "nowhere.csv"),
        (None, ["*.nothing"], "nothing"),
        ("", ["bad.csv"], "bad.csv"),
        ("x,zip\n", ["bad.csv"], "rows are required"),
        ("x,zip\n1,a\n1,a,3,4\n", ["bad.csv"], "bad.csv"),
        ("y\n1\n", ["bad.csv"], "column"),
        (b"PAR1 this is not Parquet PAR1", ["bad.parquet"], "bad.parquet"),
        (b"\x93NUMPY nonsense", ["bad.npy"], "bad.npy"),
        ("x,zip\n1,a\n", ["bad.csv", "--type", "zip"], "NAME=KIND"),
        ("x,zip\n1,a\n", ["bad.csv", "--type", "zip=colour"], "colour"),
        ("x,zip\n1,a\n", ["bad.csv", "--columns", "nope"], "nope"),
        ("x,zip\n1,a\n", ["bad.csv", "--tolerance", 0], "tolerance"),
        ("x,zip\n1,a\n", ["bad.xyz"], "bad.xyz"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(shift, files, tmp_path, monkeypatch, write, arguments, words):
    monkeypatch.chdir(tmp_path)
    if write is not None:
        (tmp_path / arguments[0]).write_bytes(write if isinstance(write, bytes) else write.encode())
    done = shift(files[0], *arguments)
    assert done.code == 2
    assert done.out == ""
    assert words in done.err
    assert done.err.startswith("steadynorm: ")
    assert done.err.count("\n") == 1
    assert "Traceback" not in done.err


def test_a_folder_without_images(shift, files, tmp_path):
    (tmp_path / "empty").mkdir()
    done = shift(tmp_path / "empty", tmp_path / "empty")
    assert (done.code, done.err.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seed", -1], "seed must be"),
        (["--seed", 2**40], "seed must be"),
        (["--tolerance", "1e-300"], "tolerance must be"),
        (["--confidence", "0.9999999999999999"], "confidence must be"),
        (["--classifier-rows", 10], "at least 50 rows"),
        (["--columns", ""], "at least one column"),
        (["--out", "."], "--out must name a file"),
        (["--out", ""], "--out must name a file"),
        (["--out", "1.csv/page.html"], "1.csv"),
        (["--out", "x" * 300], "x" * 300),
    ],
)
def test_settings_that_cannot_be_are_one_line_and_exit_code_2(shift, files, tmp_path, monkeypatch, options, words):
    """Never 1, which says that there was a shift."""
    monkeypatch.chdir(tmp_path)
    done = shift(files[0], files[1], *options)
    assert done.code == 2
    assert words in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_output_in_an_encoding_that_lacks_a_sign(files, encoding):
    """As where it is redirected to a file on another system."""
    command = [sys.executable, "-c", "from steadynorm.cli import main; main()", "shift", files[0], files[2]]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([*map(str, command), "--classifier-rows", "0"], capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"shifted" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_one_line_and_exit_code_2(files):
    command = [sys.executable, "-c", "from steadynorm.cli import main; main()", "shift", files[0], files[0], "--json"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*map(str, command), "--classifier-rows", "0"], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1
