"""`steadynorm diagnose`: findings on standard output, exit codes, and one line for each bad input."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from support_cli import Done, run
from support_diagnosis import digits, mlp, trained

FACTORIES = """
import torch
from torch import nn
from support_diagnosis import batches, digits, mlp

def build():
    return mlp()

def other():
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))

def no_model():
    return 3

def loader():
    x, y = digits()
    return batches(x[1200:], y[1200:])

def arrays():
    x, y = digits()
    return x[1200:], y[1200:]

def broken():
    raise RuntimeError("no disk")
"""


@pytest.fixture
def diagnose(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Done]:
    (tmp_path / "factories_of_test.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "factories_of_test", raising=False)

    return partial(run, monkeypatch, capsys, "diagnose")


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return trained(mlp, 0).state_dict()


@pytest.fixture
def files(tmp_path: Path, state: dict[str, torch.Tensor]) -> tuple[Path, Path]:
    """A healthy checkpoint, and one whose second batch norm is stale."""
    stale = {name: t.clone() for name, t in state.items()}
    stale["5.running_mean"] += 2 * stale["5.running_var"].sqrt()
    torch.save(state, tmp_path / "healthy.pt")
    torch.save({"state_dict": stale}, tmp_path / "stale.pt")
    return tmp_path / "healthy.pt", tmp_path / "stale.pt"


def test_a_checkpoint_alone(diagnose, files, state, tmp_path):
    done = diagnose(files[0], "--fail-on", "warning")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("healthy.pt, 2 batch norms: nothing found.")
    torch.save(state | {"2.running_var": -state["2.running_var"]}, tmp_path / "negative.pt")
    done = diagnose(tmp_path / "negative.pt", "--json", "--html", tmp_path / "new" / "page.html")
    found = json.loads(done.out)
    assert (done.code, found["worst"], found["findings"][0]["layer"]) == (0, "error", "2")
    assert (tmp_path / "new" / "page.html").read_text().startswith("<!doctype html>")
    assert diagnose(tmp_path / "negative.pt", "--fail-on", "error", "--html", tmp_path / "page.html").code == 1


def test_a_model_with_weights_and_data(diagnose, files, tmp_path):
    model = "factories_of_test:build"
    done = diagnose(model, "--weights", files[1], "--data", "factories_of_test:loader", "--json", "--fail-on", "error")
    found = json.loads(done.out)
    assert (done.code, done.err) == (1, "")
    assert (found["findings"][0]["kind"], found["findings"][0]["layer"]) == ("stale statistics", "5")
    x, y = digits()
    np.savez(tmp_path / "rest.npz", x=x[1200:, 0].numpy(), y=y[1200:].numpy())
    for data in ("factories_of_test:arrays", "rest.npz"):
        done = diagnose(model, "--weights", files[0], "--data", data, "--fail-on", "warning", "--examples", 300)
        assert done.code == 0, done
        assert "Measured: examples 320" in done.out
    done = diagnose(model, "--weights", files[1], "--data", "rest.npz", "--reference", "factories_of_test:loader")
    assert "nor of the reference" in " ".join(done.out.split())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere.pt"], "nowhere.pt"),
        (["healthy.pt", "--fail-on", "note"], "--fail-on"),
        (["healthy.pt", "--data", "digits"], "need the model's code"),
        (["factories_of_test:build", "--reference", "digits"], "give both"),
        (["factories_of_test:nothing"], "nothing"),
        (["factories_of_test:no_model"], "must build a torch.nn.Module"),
        (["factories_of_test:broken"], "no disk"),
        (["factories_of_test:other", "--weights", "healthy.pt"], "do not fit"),
        (["factories_of_test:build", "--data", "nowhere.npz"], "nowhere.npz"),
        (["factories_of_test:other", "--data", "factories_of_test:loader"], "forward failed"),
        (["healthy.pt", "--html", "healthy.pt/page.html"], "healthy.pt"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(diagnose, files, arguments, says):
    done = diagnose(*arguments)
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert done.err.startswith("steadynorm: ")
    assert says in done.err
