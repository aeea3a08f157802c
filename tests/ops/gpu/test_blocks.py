"""How tensors are cut up for a GPU: every value belongs to one tile, and every tile to one program."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steadynorm.ops.gpu import blocks
from steadynorm.ops.gpu.blocks import Blocks, blocks_of, cut
from steadynorm.ops.layout import Layout


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def times_read(found: Blocks) -> np.ndarray:
    """How often each position of a channel is read, by the arithmetic of `tiles.place` written anew."""
    reads = np.zeros((found.rows, found.adjacent), int)
    high = found.block_p // found.block_s
    for t in range(found.parts * found.steps):
        top, left = t // found.per_row * high, t % found.per_row * found.block_s
        reads[top : top + high, left : left + found.block_s] += 1
    return reads


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 5000), st.integers(1, 3000), st.sampled_from([2, 4, 8]))
def test_every_value_is_read_once(rows, adjacent, channels, itemsize):
    found = blocks_of(rows * adjacent, adjacent, channels, itemsize)
    assert (times_read(found) == 1).all()
    assert found.across * found.block_c >= channels
    assert -(-found.tiles // found.runs) * found.runs >= found.tiles
    assert all(map(is_power_of_two, (found.block_p, found.block_s, found.block_c)))
    assert found.block_p * found.block_c * itemsize <= 8192
    assert is_power_of_two(found.constants["num_warps"])
    side = channels if found.columns else adjacent
    assert side % found.constants["UNIT"] == 0
    programs, size = found.gathering
    assert size["PARTS"] >= found.parts
    assert programs * size["BLOCK_C"] >= channels
    whole = found.resident
    if whole is not None:
        assert whole.tiles == 1
        assert (times_read(whole) == 1).all()
        assert whole.block_p * whole.block_c * whole.wide <= 32768


@pytest.mark.parametrize(
    ("shape", "resident"),
    [((32, 256, 14, 14), True), ((32, 2048, 7, 7), True), ((32, 64, 56, 56), False), ((128, 512), True)],
)
def test_what_stays_on_chip(shape, resident):
    x = torch.empty(shape)
    assert (cut(x, Layout.of(x))[1].resident is not None) == resident


def test_few_lanes_are_idle_in_the_planes_of_common_networks():
    for side in (112, 56, 28, 14, 7):
        found = blocks_of(32 * side**2, side**2, 64, 4)
        lanes = found.per_row * found.block_s
        assert side**2 / lanes > 0.75, side


def test_programs_fill_a_large_gpu_and_no_more():
    for rows, adjacent, channels in ((256, 3136, 64), (128, 12544, 64), (256, 196, 1024), (32, 802816, 1)):
        found = blocks_of(rows * adjacent, adjacent, channels, 4)
        assert 500 <= found.parts * found.across <= 8192


def test_elements_that_32_bits_do_not_count():
    """The reach within one tile decides: rows of a plane lie C x S elements apart."""
    assert not blocks_of(64 * 49, 49, 4096, 4).constants["LONG"]
    far = blocks_of(64 * 49, 49, 2**31 // 49, 4)
    assert far.block_p // far.block_s * far.channels * far.adjacent >= 2**31
    assert far.constants["LONG"]
    assert blocks._FAR == 2**31


@pytest.mark.parametrize(
    ("x", "columns"),
    [
        (torch.empty(4, 3, 5, 5), False),
        (torch.empty(4, 3, 5, 5).to(memory_format=torch.channels_last), True),
        (torch.empty(4, 3), True),
        (torch.empty(4, 3, 5)[:, :, ::2], False),
    ],
    ids=["contiguous", "channels last", "two axes", "every second"],
)
def test_how_the_tensor_lies(x, columns):
    dense, found = cut(x, Layout.of(x))
    assert found.columns == columns
    assert dense.is_contiguous() or dense.is_contiguous(memory_format=torch.channels_last)
