"""`steadynorm check`: the table, the JSON, the exit codes; bad input is one line and exit code 2."""

import json
import sys
from functools import partial

import numpy as np
import pytest
import torch

from steadynorm.errors import ModelError
from steadynorm.surgery import checking
from support_cli import run
from support_population import images, network


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(
        "import torch\nfrom support_population import network\ndef build(): return network()\ndef nothing(): return 3\n"
        "def norms(): return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU())\n"
        "def plain(): return torch.nn.Linear(2, 2)\n"
        "class Own(torch.nn.BatchNorm1d):\n    def forward(self, x): return super().forward(x) * 2\n"
        "def own(): return torch.nn.Sequential(Own(3), torch.nn.BatchNorm1d(3))\n"
    )
    torch.save(network().state_dict(), "w.pt")
    np.save("x.npy", images(9).numpy())
    yield partial(run, monkeypatch, capsys, "check")
    sys.modules.pop("nets", None)


def test_side_by_side(call):
    shape = "x".join(map(str, images(9).shape))
    for example in ("x.npy", shape):
        done = call("nets:build", "--weights", "w.pt", "--example", example, "--seconds", "0.05")
        assert (done.code, done.err) == (0, "")
        assert done.out.startswith(("safe to switch: ", "what stands in the way: on this example a training step"))
        for part in ("torch", "steadynorm", "error: input gradient", "training step", "memory for backward", "fold: "):
            assert part in done.out


def test_json(call):
    done = call("nets:norms", "--example", "30x3", "--seconds", "0.05", "--json")
    report = json.loads(done.out)
    assert [side["name"] for side in report["sides"]] == ["torch", "steadynorm", "fused"]
    assert all(side["seconds"] > 0 and side["memory"] > 0 for side in report["sides"])
    assert all(error < 1e-4 for side in report["sides"] for error in side["errors"].values())
    assert report["safe"] == (not report["reasons"])
    assert report["convert"]["converted"] == report["fuse"]["fused"] == report["fold"]["folded"] == 1


@pytest.mark.parametrize(("flag", "code"), [((), 0), (("--fail-on-unsafe",), 1)])
def test_exit_code_of_an_unsafe_switch(call, flag, code):
    done = call("nets:own", "--example", "8x3", "--seconds", "0.05", *flag)
    assert (done.code, done.err) == (code, "")
    assert done.out.startswith("what stands in the way: 1 of 2 batch norms are left as they are (0, nets.Own")
    assert call("nets:plain", *flag).code == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nets:build", "--example", "three"], "must be a shape such as"),
        (["nets:build", "--example", "gone.npy"], "cannot be read"),
        (["nets:build", "--example", "2x2x2x2x2"], "inputs that the model takes"),
        (["nets:own", "--example", "1x3"], "Expected more than 1 value"),
        (["nets:build", "--weights", "gone.pt"], "cannot read gone.pt"),
        (["nets:nothing"], "must build a torch.nn.Module"),
        (["nets:gone"], "gone"),
    ],
)
def test_bad_input_is_one_line(call, arguments, says):
    done = call(*arguments)
    assert (done.code, done.out) == (2, "")
    assert says in done.err
    assert len(done.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("raised", "code", "said"), [(KeyboardInterrupt, 130, "Interrupted"), (ModelError("odd"), 2, "steadynorm: odd")]
)
def test_what_ends_it(call, monkeypatch, raised, code, said):
    def ended(*_, **__):
        raise raised

    monkeypatch.setattr(checking, "check", ended)
    done = call("nets:build", "--example", "x.npy")
    assert (done.code, done.out) == (code, "")
    assert said in done.err


def test_help_shows_examples(call):
    done = call("--help")
    assert "Examples:" in done.out
    assert "--fail-on-unsafe" in done.out
