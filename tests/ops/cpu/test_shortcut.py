"""A shortcut called with something else than it was laid for: other inputs, residuals, gradients, threads.

Each test takes a plain step first, and compares the next one with the definition.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from steadynorm.ops.cpu.shortcut import Shortcut
from support import ACTIVATIONS, Array, assert_close, batch_norm, laid_out, threads, wide
from support_kernels import Step, expected, randn
from support_processes import finished, start
from support_shortcuts import SHAPE, check_next, trained, values


@pytest.fixture
def steps(monkeypatch) -> list[Shortcut]:
    """The shortcuts taken so far."""
    taken, step = [], Shortcut.step
    monkeypatch.setattr(Shortcut, "step", lambda shortcut, *a: (taken.append(shortcut), step(shortcut, *a))[1])
    return taken


def test_steps_alike_take_the_shortcut(steps):
    layer = trained()
    for seed in (1, 2, 3):
        check_next(layer, values(seed))
    assert steps == [layer.shortcut] * 4


INPUTS: dict[str, Callable[[], Tensor]] = {
    "more examples": lambda: values(1, (8, 3, 4, 5)),
    "as many values in another shape": lambda: values(1, (6, 3, 5, 4)),
    "channels last": lambda: values(1).contiguous(memory_format=torch.channels_last),
    "batch fastest": lambda: laid_out(values(1), "permuted"),
    "sliced": lambda: laid_out(values(1), "sliced"),
    "offset": lambda: laid_out(values(1), "offset"),
    "expanded": lambda: values(1)[:1].expand(SHAPE),
    "negated memory": lambda: torch._neg_view(values(1)),
    "bfloat16": lambda: values(1, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("name", INPUTS)
def test_another_kind_of_input(name):
    layer = trained()
    x = INPUTS[name]()
    check_next(layer, x)
    check_next(layer, values(2))
    check_next(layer, x)


RESIDUALS: dict[str, Callable[[], Tensor]] = {
    "alike": lambda: values(4),
    "channels last": lambda: values(4).contiguous(memory_format=torch.channels_last),
    "sliced": lambda: laid_out(values(4), "sliced"),
    "expanded": lambda: values(4)[:1].expand(SHAPE),
    "negated memory": lambda: torch._neg_view(values(4)),
    "float64": lambda: randn(*SHAPE, seed=4),
    "bfloat16": lambda: values(4, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("name", RESIDUALS)
def test_a_residual_appears_and_disappears(name, activation):
    layer = trained(activation=activation)
    residual = RESIDUALS[name]()
    check_next(layer, residual=residual)
    check_next(layer, values(2), residual=residual)
    check_next(layer)
    other = trained(residual=values(5), activation=activation)
    check_next(other, residual=residual)


def test_a_float32_residual_beside_bfloat16():
    x = values(dtype=torch.bfloat16)
    layer = trained(x)
    check_next(layer, values(1, dtype=torch.bfloat16), residual=values(4))
    check_next(layer, values(2, dtype=torch.bfloat16), residual=values(5, dtype=torch.bfloat16))


UPSTREAM: dict[str, Callable[[], Tensor]] = {
    "one number for all": lambda: torch.tensor(0.75).expand(SHAPE),
    "one for each channel": lambda: randn(1, 3, 1, 1).float().expand(SHAPE),
    "channels last": lambda: values(6).contiguous(memory_format=torch.channels_last),
    "sliced": lambda: laid_out(values(6), "sliced"),
    "negated memory": lambda: torch._neg_view(values(6)),
}


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("name", UPSTREAM)
def test_another_kind_of_upstream_gradient(name, activation, residual, steps):
    beside = values(4) if residual else None
    layer = trained(residual=beside, activation=activation)
    check_next(layer, residual=beside, upstream=UPSTREAM[name]())
    assert len(steps) == 2


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ["relu", None])
def test_what_was_saved_comes_back_behind_other_strides(activation, residual):
    """As from `torch.autograd.graph.save_on_cpu(pin_memory=True)`, which packs whatever it is given row by row."""
    x = values(1).contiguous(memory_format=torch.channels_last)
    beside = values(4).contiguous(memory_format=torch.channels_last) if residual else None
    layer = trained(x, beside, activation=activation)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.contiguous().clone()):
        check_next(layer, x, beside, values(6).contiguous(memory_format=torch.channels_last))


def test_gradients_of_gradients():
    """By the definition: the first derivative's own, along random directions."""
    layer, x = trained(activation=None), values(1).requires_grad_()
    upstream, along = values(6).requires_grad_(), values(7)
    (grad,) = torch.autograd.grad(layer(x), x, upstream, create_graph=True)
    (found,) = torch.autograd.grad((grad * along).sum(), upstream)
    # dL/dx is linear in dL/dy: its derivative along `along` is what the Jacobian makes of `along`.
    h = 1e-6
    weight, bias = layer.weight, layer.bias
    ahead, behind = (batch_norm(wide(x) + s * h * wide(along), weight, bias) for s in (1, -1))
    np.testing.assert_allclose(wide(found), (ahead - behind) / (2 * h), rtol=1e-5, atol=1e-5)


def test_without_gradients(steps):
    layer, x = trained(), values(1)
    wanted: Array = batch_norm(x, layer.weight, layer.bias, activation=ACTIVATIONS["relu"])
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            y = layer(x)
        assert not y.requires_grad
        assert_close(y, wanted, "output")
    assert len(steps) == 3
    assert layer.num_batches_tracked.item() == 3
    check_next(layer)


def test_only_what_is_asked_for_has_a_gradient():
    layer, x = trained(residual=values(5)), values(1)
    layer.weight.requires_grad_(False)
    y = layer(x, residual=values(4))
    y.backward(values(6))
    wanted = expected(Step(x, layer.weight, layer.bias, values(4), activation="relu", grad_y=values(6)))
    assert (x.grad, layer.weight.grad) == (None, None)
    root = np.sqrt(x.numel() / 3)
    assert_close(layer.bias.grad / root, wanted.grad_beta / root, "gradient")


def test_other_numbers_of_threads():
    """From one to several and back, where the values are enough for several."""
    shape = (64, 3, 16, 16)
    for n in (1, 2):
        with threads(n):
            layer = trained(values(shape=shape))
        with threads(3 - n):
            check_next(layer, values(1, shape))
            check_next(layer, values(2, shape))


def test_where_new_tensors_go_elsewhere():
    """torch's default device is about tensors that are made, not about those that are given."""
    code = """
    import steadynorm as sn
    x = randn(6, 3, 4, 5).float()
    layers = [sn.BatchNorm2d(3, activation="relu") for _ in range(2)]
    layers[0](x)
    for layer in layers:
        given = x.clone().requires_grad_()
        with torch.device("meta"):
            y = layer(given)
            grad, = torch.autograd.grad(y, given, torch.ones(x.shape, device="cpu"))
        wanted = expected(Step(x, activation="relu", grad_y=torch.ones_like(x)))
        for found, right in ((y.detach(), wanted.y), (grad, wanted.grad_x)):
            print(abs(found.double().numpy() - right).max() < 1e-5)
    """
    assert finished(start(code)).split() == ["True"] * 4
