"""A layer that has laid a shortcut, and what its next step must be: the definition's, whatever has changed."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import steadynorm as sn
from support import assert_close, wide
from support_kernels import Step, expected, randn

SHAPE = (6, 3, 4, 5)


def values(seed: int = 0, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> Tensor:
    return randn(*shape, seed=seed, mean=1, std=2).to(dtype)


def trained(x: Tensor | None = None, residual: Tensor | None = None, **options) -> sn.BatchNorm2d:
    """A layer that has taken a step by its shortcut, with weights and statistics of its own."""
    layer = sn.BatchNorm2d(3, **{"activation": "relu", **options})
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            parameter.add_(randn(3, seed=20 + i) / 4)
    layer(values() if x is None else x, residual=residual)
    assert layer.shortcut is not None, "no shortcut: nothing is tested"
    return layer


def check_next(
    layer: sn.BatchNorm2d, x: Tensor | None = None, residual: Tensor | None = None, upstream: Tensor | None = None
) -> None:
    """The next step and its backward by the definition; the state that it must go by is the layer's now."""
    x = values(seed=1) if x is None else x
    upstream = randn(*x.shape, seed=2).to(x.dtype) if upstream is None else upstream
    weight, bias = layer.weight, layer.bias
    buffers = layer.running_mean, layer.running_var, layer.num_batches_tracked
    mean, var, tracked = (None if t is None else t.clone() for t in buffers)
    x = x.detach().requires_grad_()
    residual = None if residual is None else residual.detach().requires_grad_()
    y = layer(x, residual=residual)
    leaves = [t for t in (x, weight, bias, residual) if t is not None and t.is_leaf]  # a parametrized weight is none
    grads = iter(torch.autograd.grad(y, leaves, upstream))

    def first(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().movedim(layer.channel_dim, 1)

    activation = None if layer.activation is None else layer.activation.name
    wanted = expected(
        Step(
            first(x), weight, bias, first(residual), activation=activation,
            grad_y=first(upstream), eps=layer.eps,
        )
    )  # fmt: skip
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    assert_close(first(y), wanted.y, "output")
    assert_close(first(next(grads)), wanted.grad_x, "gradient")
    root = np.sqrt(x.numel() / layer.num_features)  # what a sum grows with
    for t, of in ((weight, wanted.grad_gamma), (bias, wanted.grad_beta)):
        if t is not None and t.is_leaf:
            found = next(grads)
            assert found.dtype == t.dtype
            assert_close(found.double() / root, of / root, "gradient", x.dtype)
    if residual is not None:
        found = next(grads)
        assert found.dtype == residual.dtype
        coarsest = max(x.dtype, residual.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        assert_close(first(found), wanted.grad_residual, "gradient", coarsest)
    if mean is not None and tracked is None:
        share = layer.momentum
    elif mean is not None:
        share = 1 / (tracked.item() + 1) if layer.momentum is None else layer.momentum
        assert layer.num_batches_tracked.item() == tracked.item() + 1
    if mean is not None:
        unbiased = wanted.m2 / (wanted.count - 1)
        assert_close(layer.running_mean, (1 - share) * wide(mean) + share * wanted.mean, "statistic", torch.float32)
        assert_close(layer.running_var, (1 - share) * wide(var) + share * unbiased, "statistic", torch.float32)


def assert_refused(error: type[Exception], layer: nn.Module, x: Tensor, residual: Tensor | None = None) -> None:
    """Here, and by a layer in the same state that has laid no shortcut; neither remembers anything."""
    other = copy.deepcopy(layer)
    assert other.shortcut is None
    for each in (other, layer):
        before = [t.clone() for t in each.buffers()]
        with pytest.raises(error) as raised:
            each(x, residual=residual)
        assert raised.type is error
        for t, was in zip(each.buffers(), before, strict=True):
            assert t.is_meta or torch.equal(t, was)
