"""The reference backend's closed-form derivative against central differences of the definition, input by input."""

import numpy as np
import pytest
import torch

from steadynorm.activations import Activation
from steadynorm.ops import reference
from steadynorm.ops.layout import Layout, align
from steadynorm.ops.reference import Operands, Train
from support import ACTIVATIONS, assert_close, batch_norm, central_differences, stats


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_every_term_of_the_closed_form(weighted, masked, activation):
    x, gamma, beta, residual, upstream = (
        rand(5, 2, 3),
        rand(2, seed=1),
        rand(2, seed=2),
        rand(5, 2, 3, seed=3),
        rand(5, 2, 3, seed=4),
    )
    to_mean, to_m2 = rand(2, seed=5), rand(2, seed=6)
    mask = rand(5, 3, seed=7) > -0.6 if masked else None
    weight = rand(5, seed=8).abs() if weighted else None
    layout = Layout.of(x)
    valid = None if mask is None else align(mask, x, layout)
    used = weight if weight is None else align(weight, x, layout)
    if valid is not None:
        used = valid if used is None else torch.where(valid, used, 0)
    spec = Train(layout, 1e-5, None if activation is None else Activation(activation))
    operands = Operands(x, gamma, beta, residual, used, valid)
    _, statistics = reference.train(operands, spec)
    found = reference.backward(upstream, to_mean, to_m2, operands, statistics, spec)

    inputs = {"x": x.numpy(), "weight": gamma.numpy(), "bias": beta.numpy(), "residual": residual.numpy()}
    positions = None if used is None else used.expand(5, 1, 3)[:, 0].numpy()

    def loss(name, value):
        at = {**inputs, name: value}
        y = batch_norm(
            at["x"], at["weight"], at["bias"], activation=ACTIVATIONS.get(activation), residual=at["residual"],
            mask=mask, sample_weight=weight,
        )  # fmt: skip
        m = stats(at["x"], weight=positions)
        return (y * upstream.numpy()).sum() + (m.mean * to_mean.numpy()).sum() + (m.m2 * to_m2.numpy()).sum()

    for name, value in inputs.items():
        expected = central_differences(lambda v, name=name: loss(name, v), value)
        assert np.abs(expected).max() > 1e-2, "a derivative that is 0 anyway tests nothing"
        assert_close(getattr(found, name), expected, "gradient")


def test_gradients_of_the_statistics_alone():
    """dμ/dx = 1 / n and dm2/dx = 2 (x - μ), with no gradient to y; nor is one returned for what was not given."""
    x = rand(4, 2)
    spec = Train(Layout.of(x), 1e-5, None)
    _, statistics = reference.train(Operands(x), spec)
    arguments = (Operands(x), statistics, spec)
    to_mean = rand(2, seed=1)
    only_mean = reference.backward(None, to_mean, None, *arguments)
    assert only_mean[1:] == (None, None, None)
    torch.testing.assert_close(only_mean.x, (to_mean / 4).expand(4, 2))
    only_m2 = reference.backward(None, None, to_mean, *arguments)
    torch.testing.assert_close(only_m2.x, 2 * to_mean * (x - x.mean(0)))
