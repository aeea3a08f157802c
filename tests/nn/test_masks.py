"""Masks and sample weights against the definition: padded sequences, ragged images, repetitions, and nothing left.

What the padding holds is NaN wherever a test does not say otherwise: nothing of it may show.
"""

from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck

import steadynorm as sn
from steadynorm.errors import ArgumentError, RejectedBatchWarning
from support import ACTIVATIONS, assert_close, batch_norm, central_differences, normalized, stats
from support_masks import NAN, RENORM, at_positions, buffers, layer_of, lengths, rand, sizes, unchanged


class Case(NamedTuple):
    """Data that is not there everywhere."""

    shape: tuple[int, ...]
    mask: Tensor
    channel_dim: int = 1


CASES = {
    "padded sequences": Case((4, 3, 6), lengths(6, 4, 1, 0, longest=6)),
    "ragged images": Case((3, 2, 4, 5), sizes((4, 5), (2, 3), (3, 1), within=(4, 5))),
    "ragged volumes": Case((2, 2, 3, 2, 2), sizes((3, 2), (1, 2), within=(3, 2))),  # (N, D, H) of (N, D, H, W)
    "whole examples": Case((5, 3), torch.tensor([True, False, True, True, False])),
    "whole images": Case((3, 2, 2, 3), torch.tensor([True, False, True])),
    "one mask for all": Case((4, 3, 5), lengths(3, longest=5)),
    "channels last": Case((4, 6, 3), lengths(6, 4, 1, 0, longest=6), -1),
    "images, channels last": Case((3, 4, 5, 2), sizes((4, 5), (2, 3), (3, 1), within=(4, 5)), -1),
    "as many positions as channels": Case((3, 3, 3), lengths(3, 1, 2, longest=3), -1),  # only the axis tells them apart
}


class TestAgainstTheDefinition:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("name", CASES)
    def test_training(self, name, dtype):
        shape, mask, dim = CASES[name]
        inside = at_positions(mask, torch.empty(shape), dim)
        x, residual, upstream = (rand(*shape, seed=seed, dtype=dtype) for seed in range(3))
        holed, holed_residual = (torch.where(inside, t, NAN).requires_grad_() for t in (x, residual))
        layer = layer_of(x, channel_dim=dim, activation="silu", momentum=1.0)
        gamma, beta = layer.weight, layer.bias

        y = layer(holed, residual=holed_residual, mask=mask)
        options = {"activation": ACTIVATIONS["silu"], "mask": mask, "channel_dim": dim}
        assert_close(y, batch_norm(x, gamma, beta, residual=residual, **options), "output")
        assert (y[~inside] == 0).all()
        assert_close(layer.running_mean, stats(x, dim, mask).mean, "statistic")
        assert_close(layer.running_var, stats(x, dim, mask).unbiased, "variance")

        inputs = [holed, gamma, beta, holed_residual]
        found = grad(y, inputs, torch.where(inside, upstream, NAN))
        at = [t.detach().double().numpy() for t in (x, gamma, beta, residual)]

        def loss(i, value):
            x, gamma, beta, residual = [value if i == j else other for j, other in enumerate(at)]
            return (batch_norm(x, gamma, beta, residual=residual, **options) * upstream.double().numpy()).sum()

        for i, derivative in enumerate(found):
            assert_close(derivative, central_differences(lambda v, i=i: loss(i, v), at[i]), "gradient")
        assert (found[0][~inside] == 0).all()
        assert (found[3][~inside] == 0).all()

    @pytest.mark.parametrize("name", CASES)
    def test_evaluation(self, name):
        shape, mask, dim = CASES[name]
        inside = at_positions(mask, torch.empty(shape), dim)
        x, residual = rand(*shape), rand(*shape, seed=1)
        layer = layer_of(x, channel_dim=dim, activation="sigmoid").eval()
        before = buffers(layer)
        y = layer(torch.where(inside, x, NAN), residual=torch.where(inside, residual, NAN), mask=mask)
        running = (t.numpy().astype(np.longdouble) for t in (layer.running_mean, layer.running_var))
        expected = normalized(
            x, *running, layer.weight, layer.bias,
            activation=ACTIVATIONS["sigmoid"], residual=residual, mask=mask, channel_dim=dim,
        )  # fmt: skip
        assert_close(y, expected, "output")
        assert unchanged(layer, before)

    def test_weights_of_positions_beside_a_mask(self):
        """The derivative of a weighted layer: a position counts w times in the statistics, once in the output."""
        x, upstream, mask = rand(3, 2, 4), rand(3, 2, 4, seed=1), lengths(4, 2, 3, longest=4)
        for weight in (rand(3, 4, seed=2).abs() + 0.5, rand(3, seed=3).abs() + 0.5, torch.tensor([2, 0, 3])):
            layer = layer_of(x, momentum=1.0)
            holed = torch.where(mask[:, None], x, NAN).requires_grad_()
            y = layer(holed, mask=mask, sample_weight=weight)
            definition = {"mask": mask, "sample_weight": weight}
            assert_close(y, batch_norm(x, layer.weight, layer.bias, **definition), "output")
            expected = central_differences(
                lambda v, d=definition, layer=layer: (
                    batch_norm(v, layer.weight, layer.bias, **d) * upstream.numpy()
                ).sum(),
                x,
            )
            assert_close(grad(y, holed, upstream)[0], expected, "gradient")
            both = mask * weight.reshape(3, -1)
            assert_close(layer.running_var, stats(x, weight=both).unbiased, "variance")

    @pytest.mark.parametrize("masked", ["zero", "pass"])
    def test_second_order(self, masked):
        mask = lengths(3, 1, 2, longest=3)
        layer = layer_of(torch.empty(3, 2, 3, dtype=torch.float64), activation="tanh", momentum=0.0, masked=masked)

        def f(x, residual):
            return layer(x, residual=residual, mask=mask)

        inputs = rand(3, 2, 3).requires_grad_(), rand(3, 2, 3, seed=1).requires_grad_()
        assert gradcheck(f, inputs)
        assert gradgradcheck(f, inputs)
        upstream = rand(3, 2, 3, seed=2)  # which gradgradcheck cannot see: what it differentiates is the derivative
        plain, graph = (grad(f(*inputs), inputs, upstream, create_graph=further) for further in (False, True))
        for a, b in zip(plain, graph, strict=True):
            torch.testing.assert_close(b, a)


class TestWeights:
    def test_a_boolean_weight_and_a_mask_differ_in_the_output_only(self):
        """Both leave positions out of the statistics; a weight of 0 still gets its output and its gradient."""
        x, upstream, mask = rand(4, 3, 5).requires_grad_(), rand(4, 3, 5, seed=1), lengths(5, 3, 1, 2, longest=5)
        inside = at_positions(mask, x)
        layers = [layer_of(x, momentum=1.0) for _ in range(3)]
        outputs = [
            layers[0](x, mask=mask), layers[1](x, sample_weight=mask), layers[2](x, sample_weight=mask.double())
        ]  # fmt: skip
        found = [[y, *buffers(layer).values()] for y, layer in zip(outputs, layers, strict=True)]
        for a, b in zip(found[1], found[2], strict=True):
            assert torch.equal(a, b)
        for a, b in zip(found[0][1:], found[1][1:], strict=True):
            assert torch.equal(a, b)
        assert torch.equal(outputs[0][inside], outputs[1][inside])
        batch = stats(x, weight=mask)
        assert_close(outputs[1], normalized(x, batch.mean, batch.biased, layers[1].weight, layers[1].bias), "output")
        masked, weighted = (grad(y, x, upstream)[0] for y in outputs[:2])
        invstd = (layers[1].weight.detach().numpy() / np.sqrt(batch.biased + np.longdouble(1e-5))).reshape(1, 3, 1)
        outside = ~inside
        assert_close(weighted[outside], (upstream.numpy() * invstd)[outside.numpy()], "gradient")
        assert (masked[outside] == 0).all()

    def test_weight_2_is_the_row_twice_in_the_gradient_too(self):
        times = torch.tensor([1, 2, 1, 3])
        x, upstream = rand(4, 3, 2).requires_grad_(), rand(4, 3, 2, seed=1)
        repeated = x.repeat_interleave(times, 0)
        once = times.cumsum(0) - times  # one of each row's copies
        weighted = layer_of(x)(x, sample_weight=times)
        by_copies = layer_of(x)(repeated)[once]
        torch.testing.assert_close(weighted, by_copies, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            grad(weighted, x, upstream)[0], grad(by_copies, x, upstream)[0], rtol=1e-12, atol=1e-12
        )

    @pytest.mark.parametrize("options", [{}, {"ghost_batch_size": 2}, {"renorm": RENORM}], ids=str)
    def test_ones_and_true_are_nothing(self, options):
        """Bit for bit would ask for one order of summation; rounding is all that may differ."""
        x, upstream = rand(5, 3, 4).requires_grad_(), rand(5, 3, 4, seed=1)
        found = []
        for call in ({}, {"mask": torch.ones(5, 4, dtype=torch.bool)}, {"sample_weight": torch.ones(5)}):
            layer = layer_of(x, **options)
            y = layer(x, **call)
            found.append([y, *grad(y, [x, *layer.parameters()], upstream), *layer.buffers()])
        for other in found[1:]:
            for a, b in zip(found[0], other, strict=True):
                torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)

    def test_only_ratios_of_weights_normalise(self):
        x, weight = rand(5, 3, 4), rand(5, 4, seed=1).abs()
        y, scaled = (layer_of(x)(x, sample_weight=w) for w in (weight, 7 * weight))
        torch.testing.assert_close(y, scaled, rtol=1e-12, atol=1e-12)


class TestNothingLeft:
    """All positions masked: output 0, gradients 0, nothing written, in every regime."""

    @pytest.mark.parametrize(
        "options",
        [{"momentum": None}, {"ghost_batch_size": 2}, {"renorm": RENORM}, {"ghost_batch_size": 2, "renorm": RENORM},
         {"masked": "pass"}, {"domains": ("a", "b"), "domain_affine": True}],
        ids=str,
    )  # fmt: skip
    def test_changes_nothing(self, options):
        x = torch.full((5, 3, 4), NAN, requires_grad=True)
        layer = layer_of(x, activation="sigmoid", **options)
        before = buffers(layer)
        with sn.domain(layer, "a") if layer.domains else nullcontext():
            y = layer(x, mask=torch.zeros(5, 4, dtype=torch.bool))
        y.backward(upstream := torch.ones_like(y))
        passed = options.get("masked") == "pass"
        torch.testing.assert_close(y, x if passed else torch.zeros_like(x), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(x.grad, upstream if passed else torch.zeros_like(x))
        assert unchanged(layer, before)
        assert layer.rejected_batches == 0
        assert layer.weight.grad.tolist() == layer.bias.grad.tolist() == [0, 0, 0]

    def test_within_an_accumulated_batch_it_adds_nothing(self):
        x, layer = rand(4, 3, 5), layer_of(rand(4, 3, 5), momentum=1.0)
        with sn.accumulate(layer):
            layer(x)
            layer(torch.full_like(x, NAN), mask=torch.zeros(4, dtype=torch.bool))
        assert_close(layer.running_mean, stats(x).mean, "statistic")
        assert_close(layer.running_var, stats(x).unbiased, "variance")


def test_padding_gets_gradient_0_also_where_a_valid_position_is_not_finite():
    x = torch.randn(4, 3).index_fill_(0, torch.tensor([0]), float("inf")).requires_grad_()
    with pytest.warns(RejectedBatchWarning):
        y = sn.BatchNorm1d(3)(x, mask=torch.tensor([True, True, True, False]))
    y.backward(torch.ones(4, 3))
    assert x.grad[3].tolist() == [0, 0, 0]


@pytest.mark.parametrize("wrong", [{"mask": [True] * 4}, {"sample_weight": 2.0}], ids=str)
def test_what_is_no_tensor_is_refused_by_name(wrong):
    with pytest.raises(ArgumentError, match=r"must be a (boolean )?tensor, got (list|float)"):
        sn.BatchNorm1d(3)(torch.randn(4, 3), **wrong)
