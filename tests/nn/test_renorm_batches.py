"""Renorm by what counts as the batch: a few examples, what a mask and weights leave, a chunk, all ranks' together."""

import copy

import numpy as np
import pytest
import torch
from torch.autograd import grad

import ranks
from steadynorm.errors import RejectedBatchWarning
from support import ACTIVATIONS, Wide, assert_close, central_differences, normalized, stats, wide
from support_renorm import EPS, LOOSE, NAN, TIGHT, Running, corrections, layer_of, plain_numbers, rand, renormed


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
