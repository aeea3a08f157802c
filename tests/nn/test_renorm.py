"""Batch renormalization: z r + d from its definition, what backward sees of it, its schedule, and its small batches."""

import copy
import pickle
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad

import ranks
import steadynorm as sn
from steadynorm.errors import ArgumentError, RejectedBatchWarning
from support import ACTIVATIONS, Array, Wide, assert_close, central_differences, normalized, stats, wide

NAN = float("nan")
EPS = Wide(1e-5)
AT_ONCE = {"warmup": 0, "ramp": 0}
TIGHT = sn.Renorm(1.2, 0.3, **AT_ONCE)  # binds in some channels of these tests, and not in others
LOOSE = sn.Renorm(1e4, 1e4, **AT_ONCE)  # binds nowhere


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1).to(dtype)


def layer_of(x: Tensor, renorm: sn.Renorm = TIGHT, counted: int = 1, **options) -> sn.BatchNorm1d | sn.BatchNorm2d:
    """A layer of three channels for x, with running statistics that some batches are near to and others are not."""
    kind = sn.BatchNorm2d if x.dim() == 4 else sn.BatchNorm1d
    layer = kind(3, dtype=x.dtype, renorm=renorm, **options)
    for seed, t in enumerate(layer.parameters()):
        nn.init.trunc_normal_(t, generator=torch.Generator().manual_seed(seed + 50))
    layer.running_mean.copy_(torch.tensor([1.0, -2.0, 0.75]))
    layer.running_var.copy_(torch.tensor([4.0, 0.5, 30.0]))
    layer.num_batches_tracked.fill_(counted)
    return layer


class Running(NamedTuple):
    """The running statistics of a layer, as they were before a batch."""

    mean: Array
    var: Array

    @classmethod
    def of(cls, layer: nn.Module) -> "Running":
        return cls(wide(layer.running_mean).copy(), wide(layer.running_var).copy())


def corrections(x: Array, running: Running, renorm: sn.Renorm, weight: Array | None = None) -> tuple[Array, Array]:
    """r and d of Ioffe 2017, section 3, at the schedule's end, with ε within both roots."""
    batch = stats(x, weight=weight)
    sigma = np.sqrt(running.var + EPS)
    r = np.sqrt(batch.m2 / np.maximum(batch.count, 1) + EPS) / sigma
    d = (batch.mean - running.mean) / sigma
    return np.clip(r, 1 / Wide(renorm.r_max), renorm.r_max), np.clip(d, -renorm.d_max, renorm.d_max)


def renormed(x: Array, gamma: Array, beta: Array, r: Array, d: Array, weight: Array | None = None, **options) -> Array:
    """f(γ (z r + d) + β + residual), z by the batch, 0 where masked."""
    batch = stats(x, weight=weight)
    biased = batch.m2 / np.maximum(batch.count, 1)
    gamma, beta = wide(gamma), wide(beta)
    return normalized(x, batch.mean, biased, gamma * r, gamma * d + beta, **options)


def plain_numbers(*tensors: Tensor) -> list[Array]:
    return [t.detach().double().numpy().copy() for t in tensors]


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


class TestSchedule:
    def test_the_papers(self):
        """Ioffe 2017, section 4: r_max 1 and d_max 0 for 5,000 steps, then to 3 at 40,000 and to 5 at 25,000."""
        by_hand = {
            0: (1, 0), 4_999: (1, 0), 5_000: (1, 0), 15_000: (1 + 2 * 10 / 35, 2.5), 25_000: (1 + 2 * 20 / 35, 5),
            40_000: (3, 5), 1_000_000: (3, 5),
        }  # fmt: skip
        for step, expected in by_hand.items():
            for given in (step, torch.tensor(step)):
                assert [t.item() for t in sn.Renorm().limits(given)] == pytest.approx(expected, rel=1e-14)

    @pytest.mark.parametrize(
        ("warmup", "ramp", "by_hand"),
        [
            (0, 0, {0: (2, 4), 1: (2, 4)}),  # at once
            (3, 0, {2: (1, 0), 3: (2, 4), 4: (2, 4)}),
            (2, 4, {2: (1, 0), 3: (1.25, 1), 4: (1.5, 2), 6: (2, 4), 7: (2, 4)}),
            (2, (4, 0), {1: (1, 0), 2: (1, 4), 4: (1.5, 4)}),
            (2, (0, 4), {1: (1, 0), 2: (2, 0), 4: (2, 2)}),
        ],
        ids=str,
    )
    def test_limits_by_hand(self, warmup, ramp, by_hand):
        renorm = sn.Renorm(2.0, 4.0, warmup, ramp)
        for step, expected in by_hand.items():
            assert [t.item() for t in renorm.limits(step)] == pytest.approx(expected)

    def test_a_layer_follows_it_by_the_batches_it_has_committed(self):
        renorm = sn.Renorm(2.0, 1.0, warmup=2, ramp=4)
        layer = layer_of(rand(4, 3), renorm, counted=0, momentum=0.01)
        for step, limits in enumerate([(1, 0), (1, 0), (1, 0), (1.25, 0.25), (1.5, 0.5), (1.75, 0.75), (2, 1), (2, 1)]):
            x, running = rand(4, 3, seed=step) * 3, Running.of(layer)
            with pytest.warns(RejectedBatchWarning):
                layer(torch.full_like(x, NAN))  # not committed, not counted
            assert layer.num_batches_tracked.item() == step
            r, d = corrections(wide(x), running, sn.Renorm(*limits, **AT_ONCE))
            assert_close(layer(x), renormed(wide(x), layer.weight.detach(), layer.bias.detach(), r, d), "output")

    @pytest.mark.parametrize(
        "wrong",
        [{"r_max": 0.5}, {"r_max": NAN}, {"r_max": float("inf")}, {"d_max": -1.0}, {"d_max": NAN},
         {"d_max": float("inf")}, {"warmup": -1}, {"ramp": -1}, {"ramp": (1, -1)}, {"ramp": (1, 2, 3)}],
        ids=str,
    )  # fmt: skip
    def test_out_of_range(self, wrong):
        with pytest.raises(ArgumentError, match="Renorm needs"):
            sn.Renorm(**wrong)

    def test_the_first_batch_is_plain_for_there_is_nothing_to_be_corrected_towards(self):
        x = rand(4, 3) * 5 + 30
        layer, plain = sn.BatchNorm1d(3, dtype=x.dtype, renorm=LOOSE), sn.BatchNorm1d(3, dtype=x.dtype)
        assert torch.equal(layer(x), plain(x))
        assert not torch.equal(layer(x), plain(x))

    def test_statistics_measured_by_update_bn_stay_within_biased_and_unbiased(self):
        model = nn.Sequential(
            sn.BatchNorm1d(3, renorm=TIGHT), nn.Linear(3, 4), sn.BatchNorm1d(4, renorm=TIGHT)
        ).double()
        same = [rand(32, 3)] * 3  # of which each batch is the whole
        torch.optim.swa_utils.update_bn(same, model)
        hidden = model[1](
            torch.from_numpy(normalized(same[0], stats(same[0]).mean, stats(same[0]).biased).astype(float))
        )
        # The first batch is normalised by its biased variance, the others by the unbiased one, 32/31 of it.
        expected = stats(hidden).unbiased * (1 + 31 / 32 + 31 / 32) / 3
        assert_close(model[2].running_var, expected, "output", torch.float32)

    @pytest.mark.parametrize("wrong", [{"warmup": "5"}, {"ramp": [1, 2]}, {"r_max": None}], ids=str)
    def test_no_numbers(self, wrong):
        with pytest.raises(ArgumentError, match="Renorm is made of numbers"):
            sn.Renorm(**wrong)

    def test_a_layer_wants_a_schedule_and_running_statistics(self):
        with pytest.raises(ArgumentError, match=r"renorm must be a steadynorm\.Renorm or None, got True"):
            sn.BatchNorm1d(3, renorm=True)
        with pytest.raises(ArgumentError, match="renorm needs track_running_stats=True"):
            sn.BatchNorm1d(3, renorm=TIGHT, track_running_stats=False)


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


class TestSmallBatches:
    @pytest.mark.parametrize("shape", [(n, 3, *tail) for n in (1, 2, 3, 4) for tail in ((), (2, 2))], ids=str)
    def test_one_to_four(self, shape):
        x, upstream = rand(*shape).requires_grad_(), rand(*shape, seed=1)
        layer = layer_of(x, LOOSE, momentum=0.5)
        running, at = Running.of(layer), plain_numbers(x, layer.weight, layer.bias)
        y = layer(x)
        assert_close(y, normalized(at[0], *running, *at[1:]), "output")
        found = grad(y, x, upstream)[0]
        if x[:, 0].numel() == 1:  # by the running statistics, which are constants
            view = (1, 3, *(1,) * (x.dim() - 2))
            by_running = (wide(layer.weight) / np.sqrt(running.var + EPS)).reshape(view)
            assert_close(found, wide(upstream) * by_running, "gradient")
            assert layer.num_batches_tracked.item() == 1
        else:
            r, d = corrections(at[0], running, LOOSE)
            expected = central_differences(lambda v: (renormed(v, *at[1:], r, d) * upstream.numpy()).sum(), at[0])
            assert_close(found, expected, "gradient")
            assert_close(layer.running_var, (running.var + stats(at[0]).unbiased) / 2, "variance")
            assert layer.num_batches_tracked.item() == 2

    def test_one_value_where_beta_was_asked_for(self):
        x = rand(1, 3)
        layer = layer_of(x, LOOSE, single_value="beta")
        r, d = corrections(wide(x), Running.of(layer), LOOSE)
        assert_close(layer(x), renormed(wide(x), *plain_numbers(*layer.parameters()), r, d), "output")
        assert layer.num_batches_tracked.item() == 1

    def test_the_cumulative_average(self):
        layer = layer_of(rand(2, 3), counted=0, momentum=None)
        batches = [rand(2, 3, seed=seed) for seed in range(4)]
        for x in batches:
            running = Running.of(layer)
            r, d = (
                corrections(wide(x), running, TIGHT) if x is not batches[0] else (np.ones(3, Wide), np.zeros(3, Wide))
            )
            assert_close(layer(x), renormed(wide(x), *plain_numbers(*layer.parameters()), r, d), "output")
        assert_close(layer.running_mean, sum(stats(x).mean for x in batches) / 4, "statistic")
        assert_close(layer.running_var, sum(stats(x).unbiased for x in batches) / 4, "variance")

    def test_the_same_batch_again_is_corrected_towards_what_the_first_time_has_made_of_the_statistics(self):
        x = rand(4, 3)
        layer = layer_of(x, momentum=0.5)
        for _ in range(3):
            r, d = corrections(wide(x), Running.of(layer), TIGHT)
            assert_close(layer(x), renormed(wide(x), *plain_numbers(*layer.parameters()), r, d), "output")

    def test_several_forwards_before_backward_each_have_their_own_corrections(self):
        layer, parts = layer_of(rand(4, 3), momentum=0.5), [rand(4, 3, seed=s).requires_grad_() for s in range(3)]
        upstream, made, outputs = rand(4, 3, seed=9), [], []
        for x in parts:
            made.append(corrections(wide(x), Running.of(layer), TIGHT))
            outputs.append(layer(x))
        gamma, beta = plain_numbers(*layer.parameters())
        found = grad(outputs, parts, [upstream] * 3)
        for x, (r, d), dx in zip(parts, made, found, strict=True):
            expected = central_differences(
                lambda v, r=r, d=d: (renormed(v, gamma, beta, r, d) * upstream.numpy()).sum(), x
            )
            assert_close(dx, expected, "gradient")

    def test_a_batch_that_is_not_finite_leaves_no_trace(self):
        x, layer = rand(4, 3), layer_of(rand(4, 3))
        before = copy.deepcopy(layer.state_dict())
        with pytest.warns(RejectedBatchWarning):
            layer(torch.where(torch.arange(4)[:, None] == 2, torch.inf, x))
        assert all(torch.equal(before[name], t) for name, t in layer.state_dict().items())
        r, d = corrections(wide(x), Running.of(layer), TIGHT)
        assert_close(layer(x), renormed(wide(x), *plain_numbers(*layer.parameters()), r, d), "output")


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


WEIGHTS = {"no weights": None, "per example": rand(5, seed=7).abs(), "per position": rand(5, 4, seed=8).abs()}


class TestMasksAndWeights:
    @pytest.mark.parametrize("weights", WEIGHTS)
    @pytest.mark.parametrize("masked", [False, True])
    def test_against_the_definition(self, masked, weights):
        weight = WEIGHTS[weights]
        mask = torch.arange(20).reshape(5, 4) % 3 != 1 if masked else None
        inside = torch.ones(5, 1, 4).bool().expand(5, 3, 4) if mask is None else mask[:, None].expand(5, 3, 4)
        x, upstream = rand(5, 3, 4), rand(5, 3, 4, seed=1)
        holed = torch.where(inside, x, NAN).requires_grad_()
        layer = layer_of(x, activation="silu", momentum=0.5)
        running, at = Running.of(layer), plain_numbers(x, *layer.parameters())
        counted = (inside[:, 0] * (1.0 if weight is None else weight.reshape(5, -1))).numpy()
        r, d = corrections(at[0], running, TIGHT, counted)
        y = layer(holed, mask=mask, sample_weight=weight)

        def definition(x, gamma, beta):
            return renormed(x, gamma, beta, r, d, counted, mask=mask, activation=ACTIVATIONS["silu"])

        assert_close(y, definition(*at), "output")
        found = grad(y, [holed, *layer.parameters()], torch.where(inside, upstream, NAN))
        for i, derivative in enumerate(found):
            expected = central_differences(
                lambda v, i=i: (definition(*at[:i], v, *at[i + 1 :]) * upstream.numpy()).sum(), at[i]
            )
            assert_close(derivative, expected, "gradient")
        batch = stats(at[0], weight=counted)
        assert_close(layer.running_mean, (running.mean + batch.mean) / 2, "statistic")
        assert_close(layer.running_var, (running.var + batch.unbiased) / 2, "variance")


class TestGhost:
    @pytest.mark.parametrize("masked", [False, True])
    def test_every_chunk_is_corrected_by_itself_towards_the_same_running_statistics(self, masked):
        x, upstream = rand(7, 3, 2), rand(7, 3, 2, seed=1)
        mask = torch.arange(14).reshape(7, 2) % 5 != 1
        mask[3:6] = False
        layer = layer_of(x, ghost_batch_size=3, activation="silu", momentum=0.5)
        running, at = Running.of(layer), plain_numbers(x, *layer.parameters())
        counted = mask.numpy() if masked else np.ones((7, 2), bool)
        parts = [slice(0, 3), slice(3, 6), slice(6, 7)]
        made = [corrections(at[0][part], running, TIGHT, counted[part]) for part in parts]
        leaf = (torch.where(mask[:, None], x, NAN) if masked else x).requires_grad_()
        y = layer(leaf, mask=mask if masked else None)

        def definition(x):
            options = {"activation": ACTIVATIONS["silu"]}
            chunks = [
                renormed(x[part], *at[1:], *rd, counted[part], mask=counted[part], **options)
                for part, rd in zip(parts, made, strict=True)
            ]
            return np.concatenate(chunks)

        assert_close(y, definition(at[0]), "output")
        expected = central_differences(lambda v: (definition(v) * upstream.numpy()).sum(), at[0])
        assert_close(grad(y, leaf, upstream)[0], expected, "gradient")
        batch = stats(at[0], weight=counted)
        assert_close(layer.running_mean, (running.mean + batch.mean) / 2, "statistic")
        assert_close(layer.running_var, (running.var + batch.unbiased) / 2, "variance")
        assert layer.num_batches_tracked.item() == 2


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


# Over ranks: one batch, one r and one d for all.


def synced(rank, group, parts, masks, upstreams):
    x = parts[rank].clone().requires_grad_()
    layer = layer_of(x, activation="silu", momentum=0.5, process_group=group)
    y = layer(x, mask=None if masks is None else masks[rank])
    y.backward(upstreams[rank])
    return y.detach(), x.grad, layer.weight.grad, layer.running_mean, layer.running_var


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("counts", [(4, 1), (3, 0)], ids=str)
def test_over_ranks_it_is_one_batch(counts, masked):
    n = sum(counts)
    x, upstream = rand(n, 3, 2), rand(n, 3, 2, seed=1)
    mask = torch.arange(2 * n).reshape(n, 2) % 5 != 1
    masks = mask.split(counts) if masked else None
    results = ranks.run(synced, 2, x.split(counts), masks, upstream.split(counts))
    layer = layer_of(x)
    running, at = Running.of(layer), plain_numbers(x, *layer.parameters())
    counted = mask.numpy() if masked else np.ones((n, 2), bool)
    r, d = corrections(at[0], running, TIGHT, counted)

    def definition(x, gamma, beta):
        return renormed(x, gamma, beta, r, d, counted, mask=counted, activation=ACTIVATIONS["silu"])

    y, dx = (torch.cat([result[i] for result in results]) for i in range(2))
    assert_close(y, definition(*at), "output")
    losses = [lambda v, i=i: (definition(*at[:i], v, *at[i + 1 :]) * upstream.numpy()).sum() for i in range(2)]
    assert_close(dx, central_differences(losses[0], at[0]), "gradient")
    d_gamma = results[0][2] + results[1][2]  # a parameter's gradient is each rank's own
    assert_close(d_gamma, central_differences(losses[1], at[1]), "gradient")
    batch = stats(at[0], weight=counted)
    for *_, mean, var in results:
        assert_close(mean, (running.mean + batch.mean) / 2, "statistic")
        assert_close(var, (running.var + batch.unbiased) / 2, "variance")
