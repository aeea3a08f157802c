"""After a residual and a kink a layer keeps a bit per value: it must be the right one, whichever way memory is read."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import steadynorm as sn
from steadynorm.ops.cpu.bits import WORD
from support import assert_close, laid_out, threads
from support_kernels import EPS, Result, Step, check, expected, randn


def step_of(shape: tuple[int, ...], dtype: torch.dtype, activation: str, layout: str, residual: torch.dtype) -> Step:
    """Values of which many lie on either side of the kinks, also of relu6's second."""
    channels = shape[1]
    return Step(
        laid_out(randn(*shape, mean=3, std=2).to(dtype), layout),
        (1 + 0.5 * randn(channels, seed=1)).float(),
        (1 + 0.5 * randn(channels, seed=2)).float(),
        laid_out((3 * randn(*shape, seed=4)).to(residual), layout),
        activation=activation,
        grad_y=laid_out(randn(*shape, seed=3).to(dtype), layout),
    )


def leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_()


def layer_for(step: Step) -> sn.BatchNorm1d | sn.BatchNorm2d:
    kind = sn.BatchNorm2d if step.x.dim() == 4 else sn.BatchNorm1d
    layer = kind(step.x.shape[1], eps=EPS, activation=step.activation)
    with torch.no_grad():
        layer.weight.copy_(step.gamma)
        layer.bias.copy_(step.beta)
    return layer


def outcome(step: Step, grad_y: Tensor) -> tuple[Result, list[Tensor]]:
    """What a layer and its backward give, and the tensors that were kept between them."""
    layer, x, residual = layer_for(step), leaf(step.x), leaf(step.residual)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x, residual=residual)
    y.backward(grad_y)
    wanted = expected(step)
    found = Result(
        y.detach(), torch.from_numpy(wanted.count.astype(float)), torch.from_numpy(wanted.mean.astype(float)),
        torch.from_numpy(wanted.m2.astype(float)), x.grad, layer.weight.grad, layer.bias.grad, residual.grad,
    )  # fmt: skip
    check(found, wanted, step.x.dtype)
    return found, kept


FLOAT, HALF = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("why", "shape", "n", "layout", "activation", "dtype", "residual"),
    [
        ("planes of some words and a rest, in runs", (3, 4, 33, 40), 1, "contiguous", "relu", FLOAT, FLOAT),
        ("parts that begin within a plane", (5, 1, 101, 103), 4, "contiguous", "relu", FLOAT, FLOAT),
        ("rows shorter than a word's multiple", (37, 70), 1, "contiguous", "relu", FLOAT, FLOAT),
        ("several examples a row, the last row shorter", (99, 19), 1, "contiguous", "relu", FLOAT, FLOAT),
        ("chunks, the last one shorter", (9, 2500), 1, "contiguous", "relu", FLOAT, FLOAT),
        ("chunks of whole small planes", (5, 40, 6, 7), 1, "contiguous", "relu", FLOAT, FLOAT),
        ("parts of rows", (4099, 16), 4, "contiguous", "relu", FLOAT, FLOAT),
        ("channels last", (6, 24, 10, 11), 1, "channels_last", "relu", FLOAT, FLOAT),
        ("a slope below the kink", (3, 4, 33, 40), 1, "contiguous", "leaky_relu", FLOAT, FLOAT),
        ("two kinks", (37, 70), 1, "contiguous", "relu6", FLOAT, FLOAT),
        ("bfloat16", (37, 70), 1, "contiguous", "relu6", HALF, HALF),
        ("a wider residual", (37, 70), 1, "contiguous", "relu", HALF, FLOAT),
    ],
)
def test_by_what_was_kept(why, shape, n, layout, activation, dtype, residual):
    step = step_of(shape, dtype, activation, layout, residual)
    with threads(n):
        _, kept = outcome(step, step.grad_y)
        large = [t for t in kept if t.numel() > 3 * shape[1]]
        assert [t.data_ptr() for t in large if t.dtype == dtype] == [step.x.data_ptr()], "x, and no residual"
        (bits,) = (t for t in kept if t.dtype == torch.int64)
        assert bits.numel() <= step.x.numel() / 32 + WORD
        # A gradient of other strides than x goes another way; so does one that is wanted for a second derivative.
        outcome(step, torch.stack([step.grad_y, step.grad_y], -1)[..., 0])


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "relu6"])
def test_second_derivatives(activation):
    step = step_of((4, 3, 2), torch.float64, activation, "contiguous", torch.float64)
    layer = sn.BatchNorm1d(3, dtype=torch.float64, activation=activation)
    inputs = [leaf(step.x), leaf(step.residual)]

    def call(x: Tensor, residual: Tensor) -> Tensor:
        return layer(x, residual=residual)

    with torch.no_grad():
        z = sn.BatchNorm1d(3, dtype=torch.float64)(step.x) + step.residual
    assert np.abs(np.stack([z, z - 6])).min() > 1e-3, "a kink within reach of the differences"
    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs)


def test_a_smooth_activation_keeps_the_residual():
    step = step_of((37, 70), FLOAT, "silu", "contiguous", FLOAT)
    _, kept = outcome(step, step.grad_y)
    assert step.residual.data_ptr() in [t.data_ptr() for t in kept]
    assert all(t.dtype != torch.int64 for t in kept)


def test_the_number_of_threads_may_change_between_forward_and_backward():
    step = step_of((4099, 16), FLOAT, "relu", "contiguous", FLOAT)
    layer, x, residual = layer_for(step), leaf(step.x), leaf(step.residual)
    with threads(4):
        y = layer(x, residual=residual)
    with threads(1):
        y.backward(step.grad_y)
    wanted = expected(step)
    assert_close(x.grad, wanted.grad_x, "gradient")
    assert_close(residual.grad, wanted.grad_residual, "gradient")
