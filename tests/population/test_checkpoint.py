"""Checkpoints read without the model's code: what is found in them, and what is refused."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from steadynorm.errors import MissingDependencyError, ModelError
from steadynorm.population.checkpoint import diagnose_checkpoint, read_states, read_tensors


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def model(var: float = -1.0) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 5), nn.BatchNorm1d(5))
    for bn in (net[1], net[4]):
        nn.init.uniform_(bn.running_mean, -1, 1)
        nn.init.uniform_(bn.running_var, 0.5, 2)
        bn.num_batches_tracked.fill_(1000)
    net[4].running_var[2] = var
    return net


def wrap(state: dict, how: str) -> object:
    return {
        "plain": state,
        "nested": {"state_dict": state, "epoch": 3},
        "parallel": {"module." + name: t for name, t in state.items()},
        "compiled": {"model": {"_orig_mod.module." + name: t for name, t in state.items()}, "step": torch.ones(1)},
    }[how]


@pytest.mark.parametrize("how", ["plain", "nested", "parallel", "compiled"])
def test_torch_files_of_every_nesting(tmp_path, how):
    net, path = model(), tmp_path / "net.pt"
    torch.save(wrap(net.state_dict(), how), path)
    states = read_states(path)
    assert [state.name for state in states] == ["1", "4"]
    assert torch.equal(states[1].var, net[4].running_var)
    assert torch.equal(states[1].gamma, net[4].weight.detach().double())
    assert states[1].tracked == 1000
    assert not states[1].settings_known
    found = diagnose_checkpoint(path)
    assert [(f.kind, f.layer, f.evidence["first_channel"]) for f in found.findings] == [("negative variance", "4", 2)]
    net2 = model()
    net2.load_state_dict(read_tensors(path))
    assert torch.equal(net2[4].running_var, net[4].running_var)


def test_safetensors_and_layers_without_affine_or_counter(tmp_path):
    state = model().state_dict()
    kept = {name: t for name, t in state.items() if name.rpartition(".")[2] in ("running_mean", "running_var")}
    save_file(kept, tmp_path / "net.safetensors")
    states = read_states(tmp_path / "net.safetensors")
    assert [(s.name, s.gamma, s.beta, s.tracked) for s in states] == [("1", None, None, None), ("4", None, None, None)]
    assert diagnose_checkpoint(tmp_path / "net.safetensors").findings[0].kind == "negative variance"


def test_two_models_in_one_file_keep_their_names(tmp_path):
    torch.save({"model": model().state_dict(), "ema": model(1.0).state_dict()}, tmp_path / "net.pt")
    assert [s.name for s in read_states(tmp_path / "net.pt")] == ["model.1", "model.4", "ema.1", "ema.4"]
    assert [f.layer for f in diagnose_checkpoint(tmp_path / "net.pt").findings] == ["model.4"]


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path, legacy):
    target, path = tmp_path / "ran", tmp_path / "net.pt"
    if legacy:
        path.write_bytes(pickle.dumps({"a": Bomb(target)}))
    else:
        torch.save({"a": Bomb(target)}, path)
    with pytest.raises(ModelError, match="is refused: it holds more than tensors") as caught:
        diagnose_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert not target.exists()
    pickle.loads(pickle.dumps(Bomb(target)))  # it would have
    assert target.exists()


def damaged(folder: Path, which: str) -> Path:
    path = folder / which
    if which.startswith("cut"):
        whole = folder / ("whole" + path.suffix)
        if path.suffix == ".pt":
            torch.save(model().state_dict(), whole)
        else:
            save_file(model().state_dict(), whole)
        path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    elif which == "pickle.pt":
        path.write_bytes(b"\x80\x02garbage")
    elif which == "linear.pt":
        torch.save(nn.Linear(2, 2).state_dict(), path)
    elif which != "absent.pt":
        path.write_bytes(b"hello, world" if which != "empty.pt" else b"")
    return path


@pytest.mark.parametrize(
    ("which", "says"),
    [
        ("cut.pt", "damaged, incomplete"),
        ("cut.safetensors", "damaged, incomplete"),
        ("text.safetensors", "damaged, incomplete"),
        ("pickle.pt", "damaged|refused"),
        ("text.pt", "no checkpoint that can be read"),
        ("empty.pt", "no checkpoint that can be read"),
        ("absent.pt", "cannot read"),
        ("linear.pt", "holds no batch norm"),
    ],
)
def test_damaged_and_foreign_files_are_one_line(tmp_path, which, says):
    with pytest.raises(ModelError, match=says) as caught:
        diagnose_checkpoint(damaged(tmp_path, which))
    assert "\n" not in str(caught.value)
    assert which in str(caught.value)


def test_onnx_without_onnx(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(MissingDependencyError, match=r"steadynorm\[onnx\]"):
        read_states(tmp_path / "net.onnx")


def test_onnx_nodes(tmp_path):
    onnx = pytest.importorskip("onnx")
    from onnx import helper, numpy_helper

    bn = model()[4]
    tensors = {"s": bn.weight, "b": bn.bias, "bn.running_mean": bn.running_mean, "bn.running_var": bn.running_var}
    nodes = [
        helper.make_node("BatchNormalization", ["x", *tensors], ["y"], epsilon=1e-3),
        helper.make_node("BatchNormalization", ["y", "s", "b", "y", "y"], ["z"], name="fed"),
    ]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, 5]) for name in ("x", "z")]
    parts = [numpy_helper.from_array(t.detach().numpy(), name) for name, t in tensors.items()]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], parts)), tmp_path / "net.onnx")
    (state,) = read_states(tmp_path / "net.onnx")
    assert (state.name, state.eps, state.momentum) == ("bn", pytest.approx(1e-3), pytest.approx(0.1))
    assert torch.equal(state.var, bn.running_var)
    assert diagnose_checkpoint(tmp_path / "net.onnx").findings[0].kind == "negative variance"
    (tmp_path / "text.onnx").write_bytes(b"hello, world")
    with pytest.raises(ModelError, match="damaged or no ONNX"):
        read_states(tmp_path / "text.onnx")
    with pytest.raises(ModelError, match="cannot read"):
        read_states(tmp_path / "absent.onnx")
    onnx.save(helper.make_model(helper.make_graph([], "g", ends[:1], ends[:1])), tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="no BatchNormalization node"):
        read_states(tmp_path / "none.onnx")


@pytest.mark.parametrize(
    "var",
    [
        torch.ones(3, dtype=torch.complex64),
        torch.ones(3).to_sparse(),
        torch.ones(3, device="meta"),
        torch.ones(3, dtype=torch.int64),
    ],
)
def test_statistics_that_are_no_numbers_are_one_error(tmp_path, var):
    torch.save({"bn.running_mean": torch.zeros(3), "bn.running_var": var}, tmp_path / "odd.pt")
    with pytest.raises(ModelError, match="no dense real numbers"):
        diagnose_checkpoint(tmp_path / "odd.pt")


def test_statistics_of_one_byte_and_a_count_that_is_none(tmp_path):
    one = torch.ones(3)
    state = {"bn.running_mean": 0 * one, "bn.running_var": one.to(torch.float8_e4m3fn)}
    torch.save(state | {"bn.num_batches_tracked": torch.tensor(torch.nan)}, tmp_path / "odd.pt")
    assert diagnose_checkpoint(tmp_path / "odd.pt").layers == 1
