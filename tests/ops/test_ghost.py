"""How a batch is cut into ghost batches, and what is pooled of them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steadynorm.ops.ghost import chunk_sizes, smallest_chunk, train
from steadynorm.ops.layout import Layout, align
from steadynorm.ops.reference import Operands, Train
from support import assert_close, stats


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("batch", "ghost", "per_example", "sizes"),
    [
        (8, 4, 1, [4, 4]),
        (10, 4, 1, [4, 4, 2]),  # the rest is a chunk of its own
        (9, 4, 1, [4, 5]),  # a single value has no variance: it joins the chunk before it
        (9, 4, 49, [4, 4, 1]),  # one image has many values
        (3, 4, 1, [3]),  # a chunk larger than the batch is the batch
        (1, 4, 1, [1]),  # nobody there to join
        (3, 1, 49, [1, 1, 1]),
        (3, 1, 1, [1, 1, 1]),  # no rest: what was asked for is what is refused
        (0, 4, 1, [0]),
    ],
)
def test_sizes_by_hand(batch, ghost, per_example, sizes):
    assert chunk_sizes(batch, ghost, per_example) == sizes


@given(st.integers(0, 300), st.integers(1, 64), st.integers(1, 3))
def test_every_example_is_in_one_chunk_and_no_rest_is_a_single_value(batch, ghost, per_example):
    sizes = chunk_sizes(batch, ghost, per_example)
    assert sum(sizes) == batch
    assert all(size == ghost for size in sizes[:-1])
    assert sizes[-1] <= ghost + 1
    if batch > 1 and ghost > 1:
        assert min(sizes) * per_example > 1


@pytest.mark.parametrize(
    ("shape", "ghost", "values"),
    [
        ((10, 3), None, 10), ((10, 3), 4, 2), ((9, 3), 4, 4), ((9, 3, 2), 4, 2), ((6, 3), 1, 1), ((1, 3), 4, 1),
        ((1, 3, 5), 4, 5), ((0, 3), 4, 0), ((3, 3, 0), 2, 0),
    ],
)  # fmt: skip
def test_values_in_the_smallest_chunk(shape, ghost, values):
    x = torch.empty(shape)
    assert smallest_chunk(Layout.of(x), len(x), ghost) == values


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("channel_dim", [1, 2])
def test_pooled_are_the_moments_of_the_whole_batch(channel_dim, offset):
    """Chunks of unequal size and weight, with means far apart: neither variances nor means may merely be averaged."""
    x = rand(7, 3, 4) + offset
    x[:3] += 100
    weight, mask = rand(7, seed=1).abs(), torch.arange(7 * x[0].numel() // x.shape[channel_dim]).reshape(7, -1) % 5 > 0
    mask[3:6] = False  # a chunk with nothing in it
    layout = Layout.of(x, channel_dim)
    valid = align(mask, x, layout)
    position_weight = torch.where(valid, align(weight, x, layout), 0)
    spec = Train(layout, 1e-5, None)
    _, pooled = train(Operands(x, position_weight=position_weight, valid=valid), spec, None, 3)
    expected = stats(x, channel_dim, mask * weight[:, None])
    for found, wanted in zip(pooled, expected, strict=True):
        np.testing.assert_allclose(found.numpy(), wanted.astype(float), rtol=1e-10 if offset == 0 else 1e-9)
    parts = [
        stats(p, channel_dim, m * w[:, None]) for p, m, w in zip(*(t.split(3) for t in (x, mask, weight)), strict=True)
    ]
    averaged = np.nanmean([p.m2 / np.where(p.count, p.count, np.nan) for p in parts], 0)
    assert (expected.biased > 100 * averaged).all(), "an average of variances would have passed unseen"


def test_pooled_carry_no_gradient_and_the_output_does():
    x = rand(6, 2).requires_grad_()
    y, pooled = train(Operands(x), Train(Layout.of(x), 1e-5, None), None, 2)
    assert y.requires_grad
    assert not any(t.requires_grad for t in pooled)
    assert_close(pooled.mean, stats(x).mean, "statistic")
