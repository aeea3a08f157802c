"""Batch renormalization: z r + d from its definition, what backward sees of it, its two ends, and its module."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import grad

import steadynorm as sn
from support import ACTIVATIONS, Wide, assert_close, central_differences, normalized, stats, wide
from support_renorm import AT_ONCE, EPS, LOOSE, TIGHT, Running, corrections, layer_of, plain_numbers, rand, renormed

SHAPES = [(8, 3), (3, 3, 4), (2, 3, 2, 2)]


class TestAgainstTheDefinition:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("renorm", [TIGHT, LOOSE, sn.Renorm(1.0, 0.3, **AT_ONCE), sn.Renorm(1.2, 0.0, **AT_ONCE)])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_output_and_gradients_with_r_and_d_as_constants(self, shape, renorm, dtype):
        x, residual, upstream = (rand(*shape, seed=seed, dtype=dtype) for seed in range(3))
        layer = layer_of(x, renorm, activation="silu", momentum=0.5)
        running = Running.of(layer)
        inputs = [x.requires_grad_(), layer.weight, layer.bias, residual.requires_grad_()]
        y = layer(x, residual=residual)
        at = plain_numbers(*inputs)
        r, d = corrections(at[0], running, renorm)
        if renorm is TIGHT:
            clipped = np.concatenate([np.abs(d) >= 0.3, np.abs(np.log(r)) >= np.log(1.2) * (1 - 1e-12)])
            assert 0 < clipped.sum() < 6

        def definition(x, gamma, beta, residual):
            return renormed(x, gamma, beta, r, d, residual=residual, activation=ACTIVATIONS["silu"])

        assert_close(y, definition(*at), "output")
        for i, derivative in enumerate(grad(y, inputs, upstream)):
            expected = central_differences(
                lambda v, i=i: (definition(*at[:i], v, *at[i + 1 :]) * plain_numbers(upstream)[0]).sum(), at[i]
            )
            assert_close(derivative, expected, "gradient")
        batch = stats(at[0])
        assert_close(layer.running_mean, (running.mean + batch.mean) / 2, "statistic")
        assert_close(layer.running_var, (running.var + batch.unbiased) / 2, "variance")

    @pytest.mark.parametrize("renorm", [TIGHT, LOOSE])
    def test_second_order_with_r_and_d_as_constants(self, renorm):
        """Central differences, at a fixed r, of the first order's own formula: dx = γ r / σ (g - ḡ - z mean(g z))."""
        x, upstream, second = rand(6, 3), rand(6, 3, seed=1), rand(6, 3, seed=2)
        layer = layer_of(x, renorm)
        r, _ = corrections(wide(x), Running.of(layer), renorm)
        x.requires_grad_()
        upstream.requires_grad_()
        (dx,) = grad(layer(x), x, upstream, create_graph=True)
        found = grad(dx, [x, upstream, layer.weight], second)

        def first_order(x, g, gamma):
            batch = stats(x)
            z = normalized(x, batch.mean, batch.biased)
            return gamma * r / np.sqrt(batch.biased + EPS) * (g - g.mean(0) - z * (g * z).mean(0))

        at = plain_numbers(x, upstream, layer.weight)
        assert_close(dx, first_order(*map(wide, at)), "gradient")
        for i, derivative in enumerate(found):
            expected = central_differences(
                lambda v, i=i: (first_order(*at[:i], v, *at[i + 1 :]) * second.numpy()).sum(), at[i]
            )
            assert_close(derivative, expected, "gradient")

    def test_differentiating_r_and_d_as_well_would_have_been_noticed(self):
        """Within the limits the output is evaluation's, whose derivative is γ/σ g alone: nearly twice as large here."""
        x, upstream = rand(4, 3).requires_grad_(), rand(4, 3, seed=1)
        layer = layer_of(x, LOOSE)
        through = upstream * (layer.weight / torch.sqrt(layer.running_var + 1e-5)).detach()
        found = grad(layer(x), x, upstream)[0]
        assert (found - through).norm() > 0.3 * through.norm()
        assert_close(found.sum(0), np.zeros(3), "gradient")  # a common shift of the batch does not show through z

    @pytest.mark.parametrize("options", [{"affine": False}, {"bias": False}], ids=str)
    def test_without_parameters(self, options):
        x, upstream = rand(5, 3).requires_grad_(), rand(5, 3, seed=1)
        layer = layer_of(x, **options)
        gamma = np.ones(3) if layer.weight is None else plain_numbers(layer.weight)[0]
        r, d = corrections(wide(x), Running.of(layer), TIGHT)
        y = layer(x)
        at = plain_numbers(x)[0]
        assert_close(y, renormed(at, gamma, np.zeros(3), r, d), "output")
        g = upstream.numpy()
        expected = central_differences(lambda v: (renormed(v, gamma, np.zeros(3), r, d) * g).sum(), at)
        assert_close(grad(y, x, upstream, retain_graph=True)[0], expected, "gradient")
        if layer.weight is not None:
            expected = central_differences(lambda v: (renormed(at, v, np.zeros(3), r, d) * g).sum(), gamma)
            assert_close(grad(y, layer.weight, upstream)[0], expected, "gradient")

    @pytest.mark.parametrize("parameters", [torch.float16, torch.bfloat16, torch.float32])
    def test_low_precision(self, parameters):
        half = torch.float16 if parameters == torch.float32 else parameters
        x, upstream = rand(6, 3, dtype=half).requires_grad_(), rand(6, 3, seed=1, dtype=half)
        layer = layer_of(x).to(parameters)
        running = Running.of(layer)
        y = layer(x)
        at = plain_numbers(x, layer.weight, layer.bias)
        r, d = corrections(at[0], running, TIGHT)
        assert y.dtype == half
        assert layer.running_mean.dtype == torch.float32
        assert_close(y, renormed(*at, r, d), "output")
        found = grad(y, [x, layer.weight, layer.bias], upstream)
        for i, derivative in enumerate(found):
            expected = central_differences(
                lambda v, i=i: (renormed(*at[:i], v, *at[i + 1 :], r, d) * plain_numbers(upstream)[0]).sum(), at[i]
            )
            assert_close(derivative, expected, "gradient", half)


class TestItsTwoEnds:
    """With r = 1 and d = 0 it is batch norm; within the limits it is what evaluation computes."""

    @pytest.mark.parametrize("renorm", [sn.Renorm(), sn.Renorm(1.0, 0.0, **AT_ONCE)], ids=["warmup", "no room"])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_plain_batch_norm_bit_for_bit(self, shape, renorm):
        x, residual, upstream = (rand(*shape, seed=seed, dtype=torch.float32) for seed in range(3))
        found = []
        for option in (renorm, None):
            layer = layer_of(x, option, activation="silu")
            leaf = x.clone().requires_grad_()
            y = layer(leaf, residual=residual)
            found.append([y, *grad(y, [leaf, *layer.parameters()], upstream), *layer.buffers()])
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_evaluation_within_the_limits(self, shape):
        x, residual = rand(*shape) * 3 - 2, rand(*shape, seed=1)
        layer = layer_of(x, LOOSE, activation="gelu")
        running = Running.of(layer)
        y = layer(x, residual=residual)
        expected = normalized(
            x, *running, layer.weight, layer.bias, activation=ACTIVATIONS["gelu"], residual=residual
        )  # fmt: skip
        assert_close(y, expected, "output")
        layer.running_mean.copy_(torch.from_numpy(running.mean.astype(float)))
        layer.running_var.copy_(torch.from_numpy(running.var.astype(float)))
        assert_close(layer.eval()(x, residual=residual), expected, "output")

    def test_evaluation_is_plain(self):
        x = rand(5, 3)
        layer, plain = layer_of(x).eval(), layer_of(x, None).eval()
        assert torch.equal(layer(x), plain(x))


class TestAsAModule:
    def test_the_state_dict_is_torchs(self):
        layer = layer_of(rand(4, 3))
        layer(rand(4, 3))
        theirs = nn.BatchNorm1d(3, dtype=torch.float64)
        theirs.load_state_dict(layer.state_dict(), strict=True)
        assert list(theirs.state_dict()) == list(layer.state_dict())
        other = layer_of(rand(4, 3))
        other.load_state_dict(theirs.state_dict(), strict=True)
        assert torch.equal(other(rand(4, 3)), layer(rand(4, 3)))

    @pytest.mark.parametrize(
        "copied",
        [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))],
        ids=["deepcopy", "copy", "pickle"],
    )
    def test_copies(self, copied):
        layer, x = layer_of(rand(4, 3)), rand(4, 3, seed=1)
        layer(rand(4, 3))
        other = copied(layer)
        assert other.renorm == layer.renorm == TIGHT
        assert repr(other) == repr(layer)
        assert "renorm=Renorm(r_max=1.2, d_max=0.3, warmup=0, ramp=0)" in repr(other)
        with sn.no_commit(layer), sn.no_commit(other):  # a shallow copy has the same buffers
            assert torch.equal(other(x), layer(x))


def test_channels_last_keeps_its_memory_format():
    x = rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    layer = layer_of(x)
    r, d = corrections(wide(x), Running.of(layer), TIGHT)
    y = layer(x)
    assert y.stride() == x.stride()
    assert_close(y, renormed(wide(x), *plain_numbers(*layer.parameters()), r, d), "output")


class TestCompiled:
    def check(self, backend: str, steps: int = 3) -> None:
        torch._dynamo.reset()
        renorm = sn.Renorm(1.2, 0.3, warmup=1, ramp=0)
        layer = layer_of(rand(4, 3), renorm, counted=0, momentum=0.5)
        step = torch.compile(layer, backend=backend, fullgraph=True)
        for seed in range(steps):
            x, upstream = rand(4, 3, seed=seed).requires_grad_(), rand(4, 3, seed=10 + seed)
            running, at = Running.of(layer), plain_numbers(x, *layer.parameters())
            r, d = corrections(at[0], running, TIGHT) if seed else (np.ones(3, Wide), np.zeros(3, Wide))
            y = step(x)
            assert_close(y, renormed(*at, r, d), "output")
            expected = central_differences(
                lambda v, at=at, r=r, d=d, g=upstream: (renormed(v, *at[1:], r, d) * g.numpy()).sum(), at[0]
            )
            assert_close(grad(y, x, upstream)[0], expected, "gradient")
            assert_close(layer.running_mean, (running.mean + stats(at[0]).mean) / 2, "statistic")
        assert layer.num_batches_tracked.item() == steps

    def test_aot_eager(self):
        self.check("aot_eager")

    def test_inductor(self):
        with torch._dynamo.config.patch(error_on_recompile=True):  # the limits widen in one and the same graph
            self.check("inductor")
