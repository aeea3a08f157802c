"""`steadynorm fold`: what is written computes what the network does; bad input is one line and exit code 2."""

import json
import sys
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import steadynorm as sn
from support_cli import run
from support_population import images, network


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(
        "import torch\nfrom support_population import network\ndef build(): return network()\ndef nothing(): return 3\n"
        "class Two(torch.nn.Module):\n    def forward(self, a, b): return a * b\ndef two(): return Two()\n"
    )
    model = network()
    torch.save(model.state_dict(), "w.pt")
    np.save("x.npy", images(6).numpy())
    save_file({"a": torch.rand(3, 2), "b": torch.rand(3, 2)}, "two.safetensors")
    yield partial(run, monkeypatch, capsys, "fold")
    sys.modules.pop("nets", None)


@pytest.mark.parametrize("example", ["x.npy", None])
def test_weights_of_the_folded_network(call, example):
    done = call(
        "nets:build", "--weights", "w.pt", "--out", "f.safetensors", *(("--example", example) if example else ())
    )
    assert done.code == 0, done.err
    model = network()
    model.load_state_dict(torch.load("w.pt", weights_only=True))
    folded = sn.fold(model.eval())
    saved = load_file("f.safetensors")
    assert saved.keys() == folded.state_dict().keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in folded.state_dict().items())
    assert "batch norms folded" in done.out
    assert ("largest error" in done.out) == (example is not None)


@pytest.mark.parametrize(("out", "runner"), [("m.pt2", "torch"), ("m.onnx", "onnxruntime")])
@pytest.mark.parametrize("fold", ["--fold", "--no-fold"])
def test_programs(call, out, runner, fold):
    if runner == "onnxruntime":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    done = call("nets:build", "--weights", "w.pt", "--example", "x.npy", "--out", out, fold, "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["file"]["checked"].startswith(runner)
    assert report["file"]["error"] <= report["file"]["bound"]
    assert ("fold" in report) == (fold == "--fold")


def test_without_the_check(call):
    done = call("nets:build", "--example", "x.npy", "--out", "m.pt2", "--no-verify", "--json")
    report = json.loads(done.out)
    assert (report["fold"]["error"], report["file"]["error"]) == (None, None)


def test_several_arguments_and_a_shape(call):
    assert call("nets:two", "--example", "two.safetensors", "--out", "two.pt2").code == 0
    shape = "x".join(str(size) for size in images(3).shape)
    assert call("nets:build", "--example", shape, "--out", "m.pt2").code == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nets:build", "--out", "m.bin"], "--out must be"),
        (["nets:build", "--out", "no/m.pt2", "--example", "x.npy"], "does not exist"),
        (["nets:build", "--out", "m.onnx"], "needs --example"),
        (["nets:build", "--out", "m.pt2", "--example", "three"], "must be a shape such as"),
        (["nets:build", "--out", "m.pt2", "--example", "gone.npy"], "cannot be read"),
        (["nets:build", "--out", "m.pt2", "--example", "2x2x2x2x2"], "inputs that the model takes"),
        (["nets:build", "--out", "m.pt2", "--example", "x.npy", "--weights", "gone.pt"], "cannot read gone.pt"),
        (["nets:nothing", "--out", "m.pt2", "--example", "x.npy"], "must build a torch.nn.Module"),
        (["nets:gone", "--out", "m.pt2", "--example", "x.npy"], "gone"),
    ],
)
def test_bad_input_is_one_line(call, tmp_path, arguments, says):
    before = sorted(path.name for path in tmp_path.iterdir())
    done = call(*arguments)
    assert done.code == 2
    assert says in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert done.out == ""
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == before


def test_help_shows_examples(call):
    done = call("--help")
    assert "Examples:" in done.out
    assert "--fixed-batch" in done.out
