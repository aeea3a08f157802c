"""`steadynorm recalibrate` on files, as it is called; bad files are one line and exit code 2."""

import json
import pickle
import sys
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel

import steadynorm as sn
from support_cli import run
from support_population import bits, images, network, norms


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with weights, data and the code of the factory, which is the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(
        "import torch\nfrom support_population import network, images\ndef build(): return network()\n"
        "def loader(): return [(b, torch.zeros(len(b))) for b in images(40).split(9)]\ndef nothing(): return 3\n"
        "def stopped():\n    yield images(4)\n    raise KeyboardInterrupt\n"
    )
    model = network()
    torch.save(model.state_dict(), "w.pt")
    save_file(model.state_dict(), "w.safetensors")
    np.save("x.npy", images(40).numpy())
    np.savez("x.npz", x=images(40).numpy(), y=np.zeros(40))
    save_file({"inputs": images(40).double()}, "x.safetensors")
    yield tmp_path
    sys.modules.pop("nets", None)


@pytest.fixture
def call(place, monkeypatch, capsys):
    return partial(run, monkeypatch, capsys, "recalibrate")


@pytest.mark.parametrize("data", ["x.npy", "x.npz", "x.safetensors", "nets:loader"])
@pytest.mark.parametrize("weights", ["w.pt", "w.safetensors"])
def test_weights_come_out_with_the_statistics_of_the_data(call, weights, data):
    code, out, err = call(
        "nets:build", "--weights", weights, "--data", data, "--out", "o.safetensors", "--batch-size", "9", "--json"
    )
    assert (code, err) == (0, "")
    assert json.loads(out)["examples"] == 40
    model = network()
    sn.recalibrate_(model, images(40).split(9))
    found = load_file("o.safetensors")
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[k], v) for k, v in model.state_dict().items())


def test_averaged_weights_into_the_file_they_came_from(call, place):
    torch.save({"state_dict": AveragedModel(network()).state_dict(), "epoch": 3}, "swa.pt")
    code, out, _ = call(
        "nets:build", "--weights", "swa.pt", "--data", "x.npy", "--out", "w.safetensors", "--order", "sequential"
    )
    assert code == 0
    assert "3 layers (sequential, 3 passes) on 40 examples" in out
    assert "Weights: w.safetensors" in out
    assert not list(place.glob(".*.part"))
    model = network()
    model.load_state_dict(load_file("w.safetensors"))
    assert not torch.equal(norms(model)["1"].running_mean, norms(network())["1"].running_mean)


class Evil:
    def __reduce__(self):
        return open, ("owned", "w")


def damage(place):
    (place / "evil.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"a": Evil()}, place / "evil2.pt")
    torch.save(network(), place / "whole.pt")
    torch.save({"a": 1}, place / "numbers.pt")
    torch.save({"a": torch.zeros(1)}, place / "other.pt")
    (place / "cut.pt").write_bytes((place / "w.pt").read_bytes()[:-200])
    (place / "cut.safetensors").write_bytes((place / "w.safetensors").read_bytes()[:-200])
    (place / "empty.pt").write_bytes(b"")
    (place / "cut.npy").write_bytes((place / "x.npy").read_bytes()[:-200])
    (place / "cut.npz").write_bytes((place / "x.npz").read_bytes()[:-200])
    np.save(place / "objects.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    np.savez(place / "two.npz", a=np.zeros(2), b=np.zeros(2))
    np.save(place / "wide.npy", np.zeros((4, 7, 8, 8), "float32"))
    np.save(place / "text.npy", np.array(["a"]))
    np.save(place / "number.npy", np.float32(3))


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        *(("--weights", name, "more than tensors") for name in ("evil.pt", "evil2.pt", "whole.pt")),
        ("--weights", "numbers.pt", "state_dict"),
        ("--weights", "other.pt", "do not fit"),
        ("--weights", "cut.pt", "damaged"),
        ("--weights", "empty.pt", "damaged"),
        ("--weights", "cut.safetensors", "damaged"),
        ("--weights", "none.pt", "cannot read"),
        *(("--data", name, "plain arrays") for name in ("cut.npy", "cut.npz", "objects.npy", "text.npy", "none.npy")),
        ("--data", "two.npz", "it holds a, b"),
        ("--data", "wide.npy", "channels"),
        ("--data", "number.npy", "single number"),
        ("--data", "x.tar", "--data must be"),
        ("--data", "nets:none", "no 'none'"),
        ("--data", "nets:nothing", "iterable"),
        ("--out", "o.pt", ".safetensors file"),
        ("--out", "none/o.safetensors", "does not exist"),
        ("--order", "both", "--order"),
        ("nets", "nets:nothing", "must build"),
    ],
)
def test_bad_input_is_one_line_and_code_2(call, place, option, value, said):
    damage(place)
    options = {"--weights": "w.pt", "--data": "x.npy", "--out": "o.safetensors"}
    if option != "nets":
        options[option] = value
    code, out, err = call("nets:build" if option != "nets" else value, *(t for pair in options.items() for t in pair))
    assert (code, out) == (2, "")
    assert said in err
    assert err.startswith("steadynorm: ")
    assert err.count("\n") == 1
    assert not (place / "owned").exists()
    assert not (place / "o.safetensors").exists()


def test_ctrl_c_writes_nothing(call, place):
    code, _, err = call("nets:build", "--weights", "w.pt", "--data", "nets:stopped", "--out", "w.safetensors")
    assert code == 130
    assert "nothing was written" in err
    assert all(torch.equal(v, bits(network())[k]) for k, v in load_file("w.safetensors").items())


def test_help_has_examples(call):
    code, out, _ = call("--help")
    assert code == 0
    assert "steadynorm recalibrate mypkg.nets:build" in " ".join(out.split())
