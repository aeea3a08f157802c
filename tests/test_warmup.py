"""What is compiled ahead of time is what a layer's first step needs."""

import pytest
import torch

import steadynorm as sn
from steadynorm import warmup
from steadynorm.ops.cpu.kernel import Kernel


@pytest.fixture
def compiled(monkeypatch) -> list:
    """Which kernels are compiled for which kinds, all of which are ready at once."""
    asked = []
    monkeypatch.setattr(Kernel, "compile", lambda kernel, kinds: asked.append((kernel.function, kinds)))
    return asked


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "silu"])
def test_all_that_a_layer_needs_is_there(dtype, activation, compiled, monkeypatch):
    assert warmup.main(["--dtype", dtype, "--activation", activation]) == 0
    needed = []
    bind = Kernel.bind
    monkeypatch.setattr(
        Kernel, "bind", lambda kernel, kinds: needed.append((kernel.function, kinds)) or bind(kernel, kinds)
    )
    monkeypatch.setattr("steadynorm.nn.shortcuts.take_shortcut", lambda *_: (torch.zeros(()), False))
    for shape in ((4, 3, 30, 30), (8, 3, 4, 5), (1, 1, 300, 300)):
        x = torch.randn(shape).to(getattr(torch, dtype))
        layer = sn.BatchNorm2d(shape[1], activation=None if activation == "none" else activation)
        layer = layer.double() if dtype == "float64" else layer
        layer(x)
        layer(x, residual=x)
    assert len(needed) == 12
    assert set(needed) <= set(compiled)


def test_it_says_how_many(compiled, capsys):
    assert warmup.main([]) == 0
    assert f"{len(compiled)} kernels are ready" in capsys.readouterr().out
    assert len(set(compiled)) == len(compiled) == 5 * 8


def test_what_it_does_not_know(capsys):
    with pytest.raises(SystemExit) as error:
        warmup.main(["--dtype", "int8"])
    assert error.value.code == 2
    assert "int8" in capsys.readouterr().err
