"""Masks and sample weights: padded sequences, ragged images, both outputs of a masked position, and the algebra.

What the padding holds is NaN wherever a test does not say otherwise: nothing of it may show.
"""

from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import grad, gradcheck, gradgradcheck

import ranks
import steadynorm as sn
from steadynorm.errors import ArgumentError, RejectedBatchWarning
from support import ACTIVATIONS, assert_close, batch_norm, central_differences, normalized, stats

NAN = float("nan")


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1).to(dtype)


def layer_of(x: Tensor, **options) -> sn.BatchNorm1d | sn.BatchNorm2d | sn.BatchNorm3d:
    """A layer for x, with γ, β and running statistics away from where they start."""
    kind = {2: sn.BatchNorm1d, 3: sn.BatchNorm1d, 4: sn.BatchNorm2d, 5: sn.BatchNorm3d}[x.dim()]
    layer = kind(x.shape[options.get("channel_dim", 1)], dtype=x.dtype, **options)
    for seed, t in enumerate((*layer.parameters(), layer.running_mean)):
        nn.init.trunc_normal_(t, generator=torch.Generator().manual_seed(seed + 50))
    layer.running_var.fill_(2.25)
    return layer


def lengths(*each: int, longest: int) -> Tensor:
    """Which positions of padded sequences are real."""
    return torch.arange(longest) < torch.tensor(each)[:, None]


def sizes(*each: tuple[int, int], within: tuple[int, int]) -> Tensor:
    """Which pixels of padded images are real."""
    return torch.stack([lengths(h, longest=within[0]).T & lengths(w, longest=within[1]) for h, w in each])


def at_positions(mask: Tensor, x: Tensor, channel_dim: int = 1) -> Tensor:
    """The mask in x's shape."""
    full = mask.reshape(*mask.shape, *(1,) * (x.dim() - 1 - mask.dim()))
    return full.unsqueeze(channel_dim).expand_as(x)


def unchanged(layer: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(t, before[name]) for name, t in layer.named_buffers())


def buffers(layer: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in layer.named_buffers()}


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


RENORM = sn.Renorm(1.5, 0.5, warmup=0, ramp=0)


class TestPass:
    """masked="pass": a masked position keeps its input, bit for bit, and its gradient."""

    @pytest.mark.parametrize(
        ("options", "mode"),
        [({}, "train"), ({"activation": "sigmoid"}, "train"), ({"activation": "sigmoid"}, "eval"), ({}, "frozen"),
         ({"ghost_batch_size": 2}, "train"), ({"renorm": RENORM}, "train"),
         ({"ghost_batch_size": 2, "renorm": RENORM, "activation": "relu"}, "train")],
        ids=str,
    )  # fmt: skip
    @pytest.mark.parametrize("with_residual", [False, True])
    def test_in_every_regime(self, options, mode, with_residual):
        mask, upstream = lengths(4, 2, 3, 0, 1, longest=4), rand(5, 3, 4, seed=2)
        inside = at_positions(mask, upstream)
        found = {}
        for masked in ("zero", "pass"):
            x, residual = (torch.where(inside, rand(5, 3, 4, seed=seed), NAN).requires_grad_() for seed in (0, 1))
            with torch.no_grad():
                x[3, 1, 2] = float("inf")
            layer = layer_of(x, masked=masked, **options).train(mode != "eval")
            if mode == "frozen":
                sn.freeze_(layer)
            y = layer(x, mask=mask, residual=residual if with_residual else None)
            derivatives = grad(y, [x, residual] if with_residual else [x], upstream)
            found[masked] = [x.detach(), y.detach(), *derivatives, *buffers(layer).values()]
        (_, zero, d_zero, *rest), (x, y, dx, *same) = found["zero"], found["pass"]
        torch.testing.assert_close(y[~inside], x[~inside], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(y[inside], zero[inside])
        assert torch.equal(dx[~inside], upstream[~inside])
        assert torch.equal(dx[inside], d_zero[inside])
        for other, wanted in zip(same, rest, strict=True):  # the residual's gradient, the running statistics
            assert torch.equal(other, wanted)
        if with_residual:
            assert (same[0][~inside] == 0).all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_keeps_the_dtype_and_the_memory_format(self, dtype):
        x = rand(2, 3, 4, 5, dtype=dtype).contiguous(memory_format=torch.channels_last)
        mask = sizes((4, 2), (3, 5), within=(4, 5))
        y = layer_of(x, masked="pass")(x, mask=mask)
        inside = at_positions(mask, x)
        assert (y.dtype, y.stride()) == (dtype, x.stride())
        assert torch.equal(y[~inside], x[~inside])

    def test_by_the_functions(self):
        x, mask = rand(4, 3, 5), lengths(5, 3, 1, 0, longest=5)
        inside = at_positions(mask, x)
        mean, var = torch.zeros(3).double(), torch.ones(3).double()
        for y in (
            sn.functional.batch_norm(x, None, None, training=True, mask=mask, masked="pass"),
            sn.functional.batch_norm_with_moments(x, mask=mask, masked="pass")[0],
        ):
            assert_close(y, np.where(inside, batch_norm(x, mask=mask), x.numpy()), "output")
        y = sn.functional.batch_norm(x, mean, var, mask=mask, masked="pass")
        assert_close(y, np.where(inside, normalized(x, mean.numpy(), var.numpy()), x.numpy()), "output")

    def test_compiled(self):
        torch._dynamo.reset()
        x, mask, upstream = rand(4, 3, 5), lengths(5, 3, 1, 0, longest=5), rand(4, 3, 5, seed=1)
        inside = at_positions(mask, x)
        x = torch.where(inside, x, NAN).requires_grad_()
        layer = layer_of(x, masked="pass", momentum=1.0)
        y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x, mask=mask)
        expected = batch_norm(x.detach().nan_to_num(), layer.weight, layer.bias, mask=mask)
        assert_close(y, np.where(inside, expected, np.nan), "output")
        dx = grad(y, x, upstream)[0]
        assert torch.equal(dx[~inside], upstream[~inside])
        assert torch.isfinite(dx).all()
        assert_close(layer.running_mean, stats(x, weight=mask).mean, "statistic")

    def test_compiled_where_sequences_are_of_any_length(self):
        """The compiler takes the length for a symbol before it has seen the first mask."""
        torch._dynamo.reset()
        layer = layer_of(rand(4, 3, 5), masked="pass")
        step = torch.compile(layer, backend="aot_eager", fullgraph=True)
        for longest in (4, 6):
            step(rand(4, 3, longest))
        for longest in (5, 3, 7):
            x, mask = rand(4, 3, longest), lengths(3, 2, 1, 3, longest=longest)
            expected = batch_norm(x, layer.weight, layer.bias, mask=mask)
            assert_close(step(x, mask=mask), np.where(at_positions(mask, x), expected, x.numpy()), "output")

    def test_nothing_else_is_an_option(self):
        x = rand(4, 3)
        with pytest.raises(ArgumentError, match=r"masked must be one of \('zero', 'pass'\), got 'skip'"):
            sn.BatchNorm1d(3, masked="skip")
        with pytest.raises(ArgumentError, match=r"masked must be one of \('zero', 'pass'\), got 'skip'"):
            sn.functional.batch_norm(x, None, None, training=True, masked="skip")


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


# Algebra, for any batch: what the padding is made of, and in which order the examples come, changes nothing.

GARBAGE = st.sampled_from([0.0, -0.0, 1.0, -1e300, 1e300, float("inf"), float("-inf"), NAN, 5e-324])


@st.composite
def batches(draw) -> tuple[Tensor, Tensor]:
    """A batch of sequences with at least two real positions, and which ones are."""
    n, length = draw(st.integers(1, 5)), draw(st.integers(2, 6))
    real = draw(st.lists(st.integers(0, length), min_size=n, max_size=n))
    real[0] = max(real[0], 2)
    seed = draw(st.integers(0, 10_000))
    offset, scale = draw(st.sampled_from([(0.0, 1.0), (1e3, 1.0), (-3.0, 1e-3)]))
    return rand(n, 2, length, seed=seed) * scale + offset, lengths(*real, longest=length)


def step(x: Tensor, mask: Tensor, upstream: Tensor, options: dict) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, input's gradient, and all that has one shape whatever the batch: parameters' gradients, buffers."""
    x = x.clone().requires_grad_()
    layer = layer_of(x, activation="silu", **options)
    y = layer(x, mask=mask)
    dx, *parameters = grad(y, [x, *layer.parameters()], upstream)
    return y.detach(), dx, [*parameters, *layer.buffers()]


OPTIONS = st.sampled_from([{}, {"renorm": RENORM}, {"masked": "pass"}, {"momentum": None}])


@settings(max_examples=60, deadline=None)
@given(batches(), GARBAGE, st.integers(0, 2), st.integers(0, 3), OPTIONS)
def test_padding_of_any_kind_and_amount_changes_nothing(batch, garbage, more_examples, more_positions, options):
    x, mask = batch
    upstream = rand(*x.shape, seed=1)
    n, c, length = x.shape
    padded = torch.full((n + more_examples, c, length + more_positions), garbage, dtype=x.dtype)
    real = torch.zeros(n + more_examples, length + more_positions, dtype=torch.bool)
    wider = torch.full_like(padded, NAN)
    inside = at_positions(mask, x)
    padded[:n, :, :length] = torch.where(inside, x, garbage)
    real[:n, :length] = mask
    wider[:n, :, :length] = torch.where(inside, upstream, NAN)
    y, dx, others = step(x, mask, upstream, options)
    y_padded, dx_padded, others_padded = step(padded, real, wider, options)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(y_padded[:n, :, :length][inside], y[inside], **close)
    torch.testing.assert_close(dx_padded[:n, :, :length][inside], dx[inside], **close)
    for a, b in zip(others_padded, others, strict=True):
        torch.testing.assert_close(a, b, **close)


@settings(max_examples=30, deadline=None)
@given(batches(), st.randoms(use_true_random=False), OPTIONS)
def test_the_order_of_the_examples_is_no_matter(batch, random, options):
    x, mask = batch
    order = list(range(len(x)))
    random.shuffle(order)
    upstream = rand(*x.shape, seed=1)
    y, dx, others = step(x, mask, upstream, options)
    y_shuffled, dx_shuffled, others_shuffled = step(x[order], mask[order], upstream[order], options)
    for a, b in zip([y_shuffled, dx_shuffled, *others_shuffled], [y[order], dx[order], *others], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# Over ranks: the oracle is one process with the concatenated batch.


def synced(rank, group, parts, masks, weights, upstreams):
    x = torch.where(at_positions(masks[rank], parts[rank]), parts[rank], NAN).requires_grad_()
    layer = layer_of(x, activation="silu", momentum=0.5, process_group=group)
    y = layer(x, mask=masks[rank], sample_weight=None if weights is None else weights[rank])
    y.backward(upstreams[rank])
    return y.detach(), x.grad, layer.weight.grad, layer.running_mean, layer.running_var, layer.num_batches_tracked


SYNCED = {  # examples per rank, and the real lengths
    "unequal": [lengths(4, 2, 3, longest=4), lengths(1, longest=4)],
    "one rank all masked": [lengths(4, 2, 3, longest=4), lengths(0, longest=4)],
    "one rank empty": [lengths(4, 2, 3, longest=4), torch.zeros(0, 4, dtype=torch.bool)],
    "all masked": [lengths(0, 0, longest=4), lengths(0, longest=4)],
}


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", SYNCED)
def test_over_ranks_it_is_one_batch(name, weighted):
    masks = SYNCED[name]
    mask, counts = torch.cat(masks), [len(m) for m in masks]
    x, upstream, weight = rand(sum(counts), 3, 4), rand(sum(counts), 3, 4, seed=1), rand(sum(counts), seed=2).abs()
    weights = weight.split(counts) if weighted else None
    results = ranks.run(synced, 2, x.split(counts), masks, weights, upstream.split(counts))
    layer = layer_of(x)
    gamma, beta = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    definition = {
        "activation": ACTIVATIONS["silu"], "mask": mask, "sample_weight": weight if weighted else None,
    }  # fmt: skip

    def loss(x, gamma):
        return (batch_norm(x, gamma, beta, **definition) * upstream.numpy()).sum()

    y, dx, d_gamma = (torch.cat([r[i] for r in results]) for i in range(3))
    assert_close(y, batch_norm(x, gamma, beta, **definition), "output")
    assert_close(dx, central_differences(lambda v: loss(v, gamma), x), "gradient")
    d_gamma = d_gamma.reshape(2, 3).sum(0)  # a parameter's gradient is each rank's own
    assert_close(d_gamma, central_differences(lambda v: loss(x.numpy(), v), gamma), "gradient")
    seen = stats(x, weight=mask * weight[:, None] if weighted else mask)
    for *_, mean, var, tracked in results:
        if name == "all masked":
            assert torch.equal(mean, layer.running_mean)
            assert torch.equal(var, layer.running_var)
            assert tracked.item() == 0
        else:
            assert_close(mean, (layer.running_mean.numpy() + seen.mean) / 2, "statistic")
            assert_close(var, (2.25 + seen.unbiased) / 2, "variance")
            assert tracked.item() == 1


def nothing_left(rank, group, options):
    x = torch.full((4 - rank, 3, 2), NAN).double().requires_grad_()
    layer = layer_of(x, activation="sigmoid", process_group=group, **options)
    before = buffers(layer)
    y = layer(x, mask=torch.zeros(4 - rank, 2, dtype=torch.bool))
    y.backward(torch.ones_like(y))
    return y.detach().abs().sum().item(), x.grad.abs().sum().item(), unchanged(layer, before)


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("options", [{"ghost_batch_size": 2}, {"renorm": RENORM}, {"momentum": None}], ids=str)
def test_nothing_left_on_any_rank_changes_nothing(options):
    assert ranks.run(nothing_left, 2, options) == [(0, 0, True)] * 2


class RowsAsSequences(nn.Module):
    """Digits read row by row: a network per row with a norm after it, and the mean over the real rows."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.rows = nn.Conv1d(16, 32, 1, bias=False)
        self.norm = norm
        self.classes = nn.Linear(32, 10)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.rows(x)
        y = self.norm(y, mask=mask) if isinstance(self.norm, sn.BatchNorm1d) else self.norm(y)
        y = torch.where(mask[:, None], torch.relu(y), 0)
        return self.classes(y.sum(2) / mask.sum(1, keepdim=True))


def padded(images: Tensor, longest: int, garbage: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each digit's first 5 to 8 rows, each with its number in one-hot code, padded with large garbage."""
    real = lengths(*torch.randint(5, 9, (len(images),), generator=generator).tolist(), longest=longest)
    x = garbage * torch.randn(len(images), 16, longest, generator=generator)
    rows = torch.cat([images.transpose(1, 2), torch.eye(8).expand(len(images), 8, 8)], 1)
    x[:, :, :8] = torch.where(real[:, None, :8], rows, x[:, :, :8])
    return x, real


def accuracy_after_training(norm: nn.Module) -> float:
    from sklearn.datasets import load_digits

    images, labels = (torch.from_numpy(t) for t in load_digits(return_X_y=True))
    images = images.float().reshape(-1, 8, 8) / 16
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = RowsAsSequences(norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for _ in range(150):
        chosen = torch.randint(0, 1200, (64,), generator=generator)
        longest = int(torch.randint(8, 25, (), generator=generator))
        x, mask = padded(images[chosen], longest, 300.0, generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x, mask), labels[chosen]).backward()
        optimizer.step()
    model.eval()
    x, mask = padded(images[1200:], 8, 300.0, generator)
    with torch.no_grad():
        return (model(x, mask).argmax(1) == labels[1200:]).double().mean().item()


def test_training_on_padded_sequences():
    """Everything else masks already: the padding reaches the network through the plain layer's statistics alone."""
    assert accuracy_after_training(sn.BatchNorm1d(32)) > 0.7
    assert accuracy_after_training(nn.BatchNorm1d(32)) < 0.3


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
