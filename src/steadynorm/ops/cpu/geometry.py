"""How the memory of a tensor is read by kernels: as (A, C, S), for any dense strides, and cut into tasks."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from steadynorm.ops.layout import Layout

__all__ = ["LONGEST", "Geometry", "dense", "geometry", "positions"]

LONGEST = 1024
"""Columns of a chunk at most: so many fit into L1 with what is kept beside each."""
_SMALL_PLANE = 512  # below so many values a loop over a plane is too short, and planes are read as columns
_FEWEST_ROWS = 4
_CACHED = 1 << 20  # bytes of a chunk that its second pass still finds in a core's cache
_MOST_PARTS = 64
_PER_TASK = 1 << 14  # values that are worth a task of their own
_NARROWEST = 32  # columns of a chunk at least: whole lines of the cache, and enough of them to be fetched ahead


class Geometry(NamedTuple):
    """How a tensor is read, and how many tasks there are.

    Attributes:
        outer: A, the product of the axes outside of the channels' in memory.
        inner: S, that of those inside: neighbours in memory.
        order: The axes but the channels', from the outermost in memory to the innermost.
        columns: Whether as rows of columns (`columns.py`), not as planes (`planes.py`).
        width: The length of such a row.
        chunk: How many of its columns a task takes.
        chunks: Chunks of columns, or channels.
        parts: Parts of each of them; 1 where one task measures and normalises.
    """

    outer: int
    inner: int
    order: tuple[int, ...]
    columns: bool
    width: int
    chunk: int
    chunks: int
    parts: int


def _axes(shape: torch.Size, strides: tuple[int, ...]) -> list[int]:
    """The axes from the outermost in memory to the innermost; those of size 1 where they are."""
    return sorted(range(len(shape)), key=lambda d: strides[d], reverse=True)


def dense(x: Tensor) -> bool:
    """Whether the elements of `x` fill a block of memory, in whatever order of the axes."""
    if x.is_contiguous():
        return True
    expected = 1
    for size, stride in sorted(zip(x.shape, x.stride(), strict=True), key=lambda axis: (axis[1], axis[0])):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def geometry(x: Tensor, layout: Layout, threads: int, weighted: bool) -> Geometry:
    """Reads a dense tensor.

    Args:
        x: Dense, of at least one element.
        layout: Which axis holds the channels.
        threads: How many there are to share the work.
        weighted: Whether positions have weights or a mask, which columns can take by whole rows alone.
    """
    shape, dim, channels = x.shape, layout.dim, layout.channels
    if x.is_contiguous():
        order = layout.positions
        inner = math.prod(shape[dim + 1 :])
    else:
        axes = _axes(shape, x.stride())
        order = tuple([d for d in axes if d != dim])
        inner = math.prod([shape[d] for d in axes[axes.index(dim) + 1 :]]) if channels > 1 else layout.count
    outer = layout.count // inner
    if inner == 1 or (inner < _SMALL_PLANE and outer >= _FEWEST_ROWS and not weighted):
        return _columns(outer, channels, inner, order, threads, weighted, x.element_size())
    parts = 1
    if threads > 1 and channels < 4 * threads:
        parts = max(min(-(-4 * threads // channels), layout.count // _PER_TASK), 1)
    return Geometry(outer, inner, order, False, 0, 0, channels, parts)


def _columns(
    outer: int, channels: int, inner: int, order: tuple[int, ...], threads: int, weighted: bool, item: int
) -> Geometry:
    unit = channels * inner
    fold = 1 if weighted or unit > _NARROWEST * threads else min(max(LONGEST // 2 // unit, 1), outer)
    width, rows = unit * fold, -(-outer // fold)
    most = LONGEST // inner * inner
    if threads == 1:
        chunk, parts = min(width, most), 1
    elif fold == 1 and unit >= threads * max(inner, _NARROWEST) and rows * unit * item <= threads * _CACHED:
        # All rows of a few columns: both passes in one go, and the second finds what the first has read.
        step = inner if inner > 1 else _NARROWEST
        chunk, parts = min(-(-unit // (threads * step)) * step, most), 1
    elif width > most * 2 * threads and rows * most * item <= _CACHED:
        chunk, parts = most, 1
    else:
        chunk = min(width, most)
        size = rows * width * item
        wanted = threads if size <= threads * _CACHED else max(4 * threads, size // _CACHED)
        parts = max(min(-(-wanted // -(-width // chunk)), rows * chunk // _PER_TASK, _MOST_PARTS), 1)
    return Geometry(outer, inner, order, True, width, chunk, -(-width // chunk), parts)


def positions(values: Tensor, x: Tensor, order: tuple[int, ...], dim: int, dtype: torch.dtype) -> Tensor:
    """Weights or a mask, aligned with `x`, as one value per position in the order of x's memory."""
    shape = [1 if d == dim else size for d, size in enumerate(x.shape)]
    return values.to(dtype).expand(shape).permute(*order, dim).contiguous()
