"""Masks and sample weights over ranks: the oracle is one process with the concatenated batch."""

import pytest
import torch

import ranks
from support import ACTIVATIONS, assert_close, batch_norm, central_differences, stats
from support_masks import NAN, RENORM, at_positions, buffers, layer_of, lengths, rand, unchanged


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
