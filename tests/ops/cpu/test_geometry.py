"""How memory is read: for any order of the axes, element (n, c, *) lies where A, C and S say."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steadynorm.ops.cpu.geometry import LONGEST, Geometry, dense, geometry, positions
from steadynorm.ops.layout import Layout, align

SIZES = st.integers(1, 5)


@st.composite
def dense_tensors(draw, sizes=SIZES):
    """A block of memory 0, 1, 2, ... behind axes in any order; axes of size 1 have whatever stride."""
    shape = draw(st.lists(sizes, min_size=2, max_size=5))
    order = draw(st.permutations(range(len(shape))))
    memory = torch.arange(math.prod(shape)).view([shape[d] for d in order])
    x = memory.permute([order.index(d) for d in range(len(shape))])
    strides = [draw(st.integers(0, 7)) if size == 1 else stride for size, stride in zip(shape, x.stride(), strict=True)]
    return x.as_strided(x.shape, strides)


@st.composite
def strided_tensors(draw):
    """Any shape behind any small strides: with holes, overlapping, or dense by chance."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    strides = [draw(st.sampled_from([0, 1, 2, 3, 4, 6, 8, 12])) for _ in shape]
    reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return torch.arange(reach + 1).as_strided(shape, strides)


@given(st.one_of(dense_tensors(), strided_tensors()))
def test_dense_is_what_fills_a_block_of_memory_once(x):
    """The offsets of all elements, one by one, are 0 to n - 1."""
    offsets = sorted(
        sum(i * stride for i, stride in zip(index, x.stride(), strict=True))
        for index in itertools.product(*map(range, x.shape))
    )
    assert dense(x) == (offsets == list(range(x.numel())))


@given(dense_tensors(), st.data(), st.integers(1, 4), st.booleans())
def test_element_n_c_lies_where_a_c_s_say(x, data, threads, weighted):
    """Memory read as (A, C, S), C at the axis of the channels, against the axes in the order that is given for them."""
    dim = data.draw(st.integers(1, x.dim() - 1))
    layout = Layout.of(x, dim)
    read = geometry(x, layout, threads, weighted)
    assert sorted(read.order) == sorted(layout.positions)
    memory = torch.arange(x.numel()).view(read.outer, layout.channels, read.inner)
    found = x.permute(*read.order, dim).reshape(read.outer, read.inner, layout.channels).transpose(1, 2)
    assert torch.equal(found, memory)


@given(dense_tensors(), st.data())
def test_weights_come_in_the_order_of_memory(x, data):
    """One per position, from any shape that broadcasts to the positions, also where it is expanded."""
    layout = Layout.of(x, data.draw(st.integers(1, x.dim() - 1)))
    sizes = [x.shape[d] for d in layout.positions]
    shape = [data.draw(st.sampled_from([1, size])) for size in sizes[: data.draw(st.integers(1, len(sizes)))]]
    weight = torch.arange(math.prod(shape)).view(shape)
    read = geometry(x, layout, 1, True)
    found = positions(align(weight, x, layout), x, read.order, layout.dim, torch.float32)
    full = weight.view(*shape, *(1,) * (len(sizes) - len(shape))).expand(sizes)
    wanted = full.permute([layout.positions.index(d) for d in read.order]).reshape(-1)
    assert found.is_contiguous()
    assert found.dtype == torch.float32
    assert torch.equal(found.view(-1), wanted.float())


LONG = st.one_of(st.integers(1, 40), st.sampled_from([49, 196, 511, 512, 513, 1024, 1025, 2048, 5000]))


@given(
    st.lists(LONG, min_size=2, max_size=4), st.integers(1, 64), st.booleans(), st.booleans(), st.sampled_from([2, 4, 8])
)
def test_tasks_cover_everything_in_pieces_that_kernels_can_take(shape, threads, weighted, channels_last, item):
    """What the kernels rely on, of shapes far too large to be computed here."""
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[item]
    x = torch.empty(shape, device="meta", dtype=dtype)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    layout = Layout.of(x)
    read = geometry(x, layout, threads, weighted)
    unit = layout.channels * read.inner
    assert read.outer * read.inner == layout.count
    assert read.parts >= 1
    if threads == 1:
        assert read.parts == 1, "parts cost a pass of their own"
    if not read.columns:
        assert read.chunks == layout.channels
        assert read.parts <= layout.count
        return
    assert read.width % unit == 0
    if weighted:
        assert read.width == unit, "a row of several positions has no one weight"
        assert read.inner == 1
    assert 0 < read.chunk <= LONGEST, "the scratch is no longer"
    assert read.chunk % read.inner == 0, "a chunk of broken planes"
    assert (read.chunks - 1) * read.chunk < read.width <= read.chunks * read.chunk
    if read.chunks > 1:
        assert read.width == unit, "two chunks would share a channel"


@pytest.mark.parametrize(
    ("shape", "threads"),
    [
        ((16, 1, 112, 112), 2),  # one channel
        ((1, 3, 512, 512), 8),  # one example, three channels
        ((6400, 2048), 4),  # many channels, one position each
        ((32, 64, 56, 56), 4),
        ((32, 64, 7, 7), 4),
        ((100_000, 8), 4),
    ],
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_thread_has_work(shape, threads, layout):
    x = torch.empty(shape, device="meta")
    if layout == "channels_last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    read = geometry(x, Layout.of(x), threads, False)
    assert isinstance(read, Geometry)
    assert read.chunks * read.parts >= threads
