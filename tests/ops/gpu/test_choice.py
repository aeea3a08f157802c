"""Who computes for a tensor on a GPU."""

import logging
import sys

import pytest
import torch

import steadynorm as sn
from steadynorm.errors import ArgumentError, MissingDependencyError
from steadynorm.ops import backends, reference
from support import assert_close
from support_kernels import expected, make, randn


@pytest.fixture
def chosen():
    """Who computes on a GPU, looked up anew."""
    backends._gpu.cache_clear()
    yield backends._gpu
    backends._gpu.cache_clear()


def test_torchs_own_operations_unless_asked_which_is_said_once(chosen, monkeypatch, caplog):
    monkeypatch.delenv("STEADYNORM_GPU", raising=False)
    with caplog.at_level(logging.DEBUG, logger="steadynorm.ops.backends"):
        assert chosen() is reference
        assert chosen() is reference
    assert [record.levelname for record in caplog.records] == ["DEBUG"]
    assert "STEADYNORM_GPU=triton" in caplog.text


def test_asked_for_and_missing_is_an_error(chosen, monkeypatch):
    monkeypatch.setenv("STEADYNORM_GPU", "triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [name for name in sys.modules if name.startswith("steadynorm.ops.gpu")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("steadynorm.ops.gpu", raising=False)
    with pytest.raises(MissingDependencyError, match="Triton, which cannot be imported"):
        chosen()


def test_asked_for_something_else(chosen, monkeypatch):
    monkeypatch.setenv("STEADYNORM_GPU", "cudnn")
    with pytest.raises(ArgumentError, match="must be reference or triton, got 'cudnn'"):
        chosen()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(3, 4, 5, 7), (64, 2, 56, 56), (512, 70)])
def test_a_layer_on_a_gpu(shape, chosen, monkeypatch):
    """By the definition, and the running statistics with it."""
    monkeypatch.setenv("STEADYNORM_GPU", "triton")
    step = make(shape, residual=randn(*shape, seed=4).float())
    layers = {2: sn.BatchNorm1d, 4: sn.BatchNorm2d}
    layer = layers[len(shape)](shape[1], activation="relu").cuda()
    with torch.no_grad():
        layer.weight.copy_(step.gamma)
        layer.bias.copy_(step.beta)
    x = step.x.cuda().requires_grad_()
    y = layer(x, residual=step.residual.cuda())
    y.backward(step.grad_y.cuda())
    right = expected(step)
    assert_close(y, right.y, "output")
    assert_close(x.grad, right.grad_x, "gradient")
    assert_close(layer.running_mean, 0.1 * right.mean, "statistic")
