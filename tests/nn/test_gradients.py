"""Derivatives of the layers: first, second and third order, to every input, under every option."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck

import steadynorm as sn
from steadynorm.functional import batch_norm_with_moments
from support import ACTIVATIONS, assert_close, batch_norm, central_differences, normalized

ALL = [None, *ACTIVATIONS]


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layer_of(channels: int, dtype: torch.dtype = torch.float64, **options) -> sn.BatchNorm1d:
    """A layer in training with random γ and β."""
    layer = sn.BatchNorm1d(channels, dtype=dtype, **options)
    for seed, parameter in enumerate(layer.parameters()):
        torch.nn.init.trunc_normal_(parameter, generator=torch.Generator().manual_seed(seed + 50))
    return layer


@pytest.mark.parametrize("activation", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_first_order_equals_central_differences_of_the_definition(activation, dtype):
    x, residual, upstream = (rand(6, 2, 3, seed=seed, dtype=dtype) for seed in (0, 1, 2))
    layer = layer_of(2, dtype, activation=activation)
    inputs = [x.requires_grad_(), layer.weight, layer.bias, residual.requires_grad_()]
    found = grad(layer(x, residual=residual), inputs, upstream)
    at = [t.detach().double().numpy() for t in inputs]

    def loss(i, value):
        x, gamma, beta, residual = [value if i == j else other for j, other in enumerate(at)]
        y = batch_norm(x, gamma, beta, activation=ACTIVATIONS.get(activation), residual=residual)
        return (y * upstream.double().numpy()).sum()

    for i, derivative in enumerate(found):
        assert derivative.dtype == dtype
        expected = central_differences(lambda v, i=i: loss(i, v), at[i])
        assert np.abs(expected).max() > 1e-2
        assert_close(derivative, expected, "gradient")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_half_precision_gradients_are_those_of_the_rounded_input(dtype, activation):
    x, upstream = (rand(8, 2, 3, seed=seed, dtype=dtype) for seed in (0, 2))
    layer = layer_of(2, torch.float32, activation=activation)
    found = grad(layer(x.requires_grad_()), x, upstream)[0]
    gamma, beta = (p.detach().double().numpy() for p in layer.parameters())
    expected = central_differences(
        lambda v: (
            batch_norm(v, gamma, beta, activation=ACTIVATIONS.get(activation)) * upstream.double().numpy()
        ).sum(),
        x.detach().double().numpy(),
    )
    assert found.dtype == dtype
    assert_close(found, expected, "gradient")


@pytest.mark.parametrize("activation", ALL)
@pytest.mark.parametrize("training", [True, False])
def test_first_and_second_order_by_gradcheck(activation, training):
    layer = layer_of(2, activation=activation).train(training)
    if training:
        layer.momentum = 0.0
    # relu6 saturates above 6: keep away from kinks by choosing values, not by loosening the tolerance.
    x, residual = rand(4, 2, seed=3).requires_grad_(), rand(4, 2, seed=4).requires_grad_()

    def f(x, gamma, beta, residual):
        return torch.func.functional_call(layer, {"weight": gamma, "bias": beta}, (x,), {"residual": residual})

    inputs = (x, layer.weight, layer.bias, residual)
    assert gradcheck(f, inputs)
    assert gradgradcheck(f, inputs)


@pytest.mark.parametrize("activation", [None, "tanh", "softplus"])
def test_third_order_by_gradcheck(activation):
    layer = layer_of(2, activation=activation, momentum=0.0)
    u, v = rand(4, 2, seed=5), rand(4, 2, seed=6)

    def second(x):
        (first,) = grad(layer(x), x, u, create_graph=True)
        return grad(first, x, v, create_graph=True)[0]

    x = rand(4, 2, seed=7).requires_grad_()
    assert second(x).abs().max() > 1e-2
    assert gradcheck(second, (x,))


@pytest.mark.parametrize("activation", [None, "silu"])
def test_a_residual_that_depends_on_x_is_counted_once_at_every_order(activation):
    layer = layer_of(2, activation=activation, momentum=0.0)
    x = rand(4, 2, seed=8).requires_grad_()
    for f in (
        lambda x: layer(x, residual=x),
        lambda x: layer(x, residual=(x**2).sin()),
        lambda x: layer(x**3, residual=x),
    ):
        assert gradcheck(f, (x,))
        assert gradgradcheck(f, (x,))


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_derivative_that_can_be_differentiated_is_the_derivative(activation, masked):
    """gradgradcheck cannot see this: it takes the first order with create_graph=True for granted."""
    layer = layer_of(2, activation=activation, momentum=0.0)
    x, upstream = rand(5, 2, seed=8).requires_grad_(), rand(5, 2, seed=9)
    mask = torch.tensor([True, True, False, True, True]) if masked else None
    for residual in (None, x, (x**2).sin(), rand(5, 2, seed=10).requires_grad_()):
        inputs = [x, *layer.parameters()]
        if residual is not None and residual is not x:
            inputs.append(residual)
        plain, graph = (
            grad(layer(x, residual=residual, mask=mask), inputs, upstream, create_graph=further, retain_graph=True)
            for further in (False, True)
        )
        for a, b in zip(plain, graph, strict=True):
            torch.testing.assert_close(b, a)


def test_parameters_that_depend_on_x_are_counted_once():
    def f(x):
        return batch_norm_with_moments(x, x[0].exp(), x.sum(0), activation="tanh")[0]

    x = rand(4, 2, seed=9).requires_grad_()
    assert gradcheck(f, (x,))
    assert gradgradcheck(f, (x,))


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_masks_weights_and_returned_moments(mask, weights):
    options = {
        "mask": torch.tensor([True, False, True, True, True]) if mask else None,
        "sample_weight": rand(5, seed=10).abs() if weights else None,
    }

    def f(x, gamma, residual):
        y, m = batch_norm_with_moments(x, gamma, activation="silu", residual=residual, **options)
        return y, m.mean, m.m2, m.variance(unbiased=not weights)

    inputs = tuple(t.requires_grad_() for t in (rand(5, 2, seed=11), rand(2, seed=12), rand(5, 2, seed=13)))
    assert gradcheck(f, inputs)
    assert gradgradcheck(f, inputs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_nan_in_the_padding_reaches_no_gradient(activation, training):
    layer = layer_of(2, activation=activation).train(training)
    mask = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
    inside = mask.unsqueeze(1).expand(3, 2, 3)
    x, residual = (torch.where(inside, rand(3, 2, 3, seed=seed), torch.nan).requires_grad_() for seed in (14, 15))
    upstream = torch.where(inside, rand(3, 2, 3, seed=16), torch.nan)  # a loss may well be NaN there too
    inputs = [x, residual, layer.weight, layer.bias]
    clean = [t.detach().nan_to_num().requires_grad_() for t in (x, residual)]
    found = grad(layer(x, residual=residual, mask=mask), inputs, upstream)
    wanted = grad(
        layer(clean[0], residual=clean[1], mask=mask), [*clean, layer.weight, layer.bias], upstream.nan_to_num()
    )
    for derivative, expected in zip(found, wanted, strict=True):
        assert torch.equal(derivative, expected)
        assert torch.isfinite(derivative).all()
    assert (found[0][~inside] == 0).all()
    assert (found[1][~inside] == 0).all()
    dx = grad(layer(x, residual=residual, mask=mask), x, upstream, create_graph=True)[0]
    torch.testing.assert_close(dx, wanted[0])  # the composite, that second derivatives are made from, too


def test_whoever_needs_no_gradient_gets_none():
    x, residual = rand(4, 2), rand(4, 2, seed=1).requires_grad_()
    layer = layer_of(2)
    layer.weight.requires_grad_(False)
    layer(x, residual=residual).backward(upstream := rand(4, 2, seed=2))
    assert layer.weight.grad is None
    assert torch.equal(residual.grad, upstream)
    torch.testing.assert_close(layer.bias.grad, upstream.sum(0))


def test_a_residual_of_another_float_dtype_gets_its_gradient_in_that_dtype():
    for activation in (None, "relu"):
        x, residual = rand(6, 2, dtype=torch.float32), rand(6, 2, seed=1, dtype=torch.float64).requires_grad_()
        y = layer_of(2, torch.float32, activation=activation)(x, residual=residual)
        assert grad(y, residual, rand(6, 2, seed=2, dtype=torch.float32))[0].dtype == torch.float64


def test_the_gradient_penalty_of_a_whole_network():
    """Second order through two layers with a convolution between: against central differences of the first order."""
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 4), sn.BatchNorm1d(4, activation="tanh"), torch.nn.Linear(4, 2), sn.BatchNorm1d(2)
    ).double()
    for seed, parameter in enumerate(net.parameters()):
        torch.nn.init.trunc_normal_(parameter, generator=torch.Generator().manual_seed(seed))
    upstream = rand(6, 2, seed=1)

    def penalty(x):
        return grad(net(x), x, upstream, create_graph=True)[0].square().sum()

    assert gradcheck(penalty, (rand(6, 3, seed=2).requires_grad_(),))


def test_create_graph_with_frozen_inputs():
    """Only a residual, or only gamma beside a returned mean, is left to differentiate."""
    x, residual = torch.randn(5, 2), torch.randn(5, 2).requires_grad_()
    y = sn.functional.batch_norm(x, None, None, training=True, residual=residual)
    (g,) = torch.autograd.grad((y * y).sum(), residual, create_graph=True)
    assert torch.equal(g, 2 * y)
    gamma = torch.randn(2).requires_grad_()
    y, moments = sn.functional.batch_norm_with_moments(x, gamma)
    upstream = torch.randn(5, 2)
    (g,) = torch.autograd.grad((y * upstream).sum() + moments.mean.sum(), gamma, create_graph=True)
    expected = (upstream.numpy() * normalized(x, *(x.numpy().mean(0), x.numpy().var(0)))).sum(0)
    assert_close(g, expected, "gradient")
