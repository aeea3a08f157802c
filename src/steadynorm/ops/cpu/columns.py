"""Arithmetic over rows of columns: a channel's values lie apart, as in (N, C), channels_last, or many small planes.

Memory is read as rows of `width` columns, a whole number of times the C S values of one outer step: column j belongs to
channel (j // S) mod C. Sums are kept per column, so that loops run along rows however few channels there are or however
small their planes; at the end a channel's columns are added up. The last row may be shorter than the others.

A task is a chunk of columns over some of the rows, a part. A chunk has whole planes and, unless it is the whole row,
each channel once: no two chunks share one. One that is taken over all rows is measured and normalised in one go.
"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUnknownLambdaType=false
# pyright: reportUnknownVariableType=false
# (Numba types its functions itself)

import numpy as np

from steadynorm.ops.cpu.bending import (
    addend_at,
    keep_bits,
    prepare_pulls,
    prepare_values,
    pull_at,
    scratch_for,
    value_at,
)
from steadynorm.ops.cpu.bits import WORD
from steadynorm.ops.cpu.channel import SAMPLES, coefficients, constants, kth
from steadynorm.ops.cpu.compiling import compiled
from steadynorm.ops.cpu.geometry import LONGEST
from steadynorm.ops.cpu.memory import (
    array_at,
    fill,
    load,
    narrow,
    present,
    room,
    store,
    widest_vectors,
)

__all__ = [
    "channels_of",
    "chunk_of",
    "expand_coefficients",
    "expand_constants",
    "keep_partial",
    "measure_chunk",
    "reduce_chunk",
    "rooms",
    "spread",
    "write",
]

_BLOCK = 64  # rows whose sums are taken in the dtype that computes


@compiled
def chunk_of(a, task):  # pragma: no cover
    """What a task is about: which part, its first and last row, its first and last column."""
    chunks = a.tasks // a.parts
    part = task // chunks
    begin = (task - part * chunks) * a.chunk
    rows = (a.outer * a.channels * a.inner + a.width - 1) // a.width
    return part, part * rows // a.parts, (part + 1) * rows // a.parts, begin, min(begin + a.chunk, a.width)


@compiled
def _span(a, row, begin, end):  # pragma: no cover
    """Where in memory the columns of a row start and end; the last row may have fewer, or none."""
    at = row * a.width
    stop = min(at + end, a.outer * a.channels * a.inner)
    return at + begin, max(at + begin, stop)


@compiled
def _word(a, row, begin):  # pragma: no cover
    """Where the bits of a row of a chunk are kept."""
    chunks = (a.width + a.chunk - 1) // a.chunk
    return (row * chunks + begin // a.chunk) * ((a.chunk + WORD - 1) // WORD)


@compiled
def channels_of(a, begin, end):  # pragma: no cover
    """How many channels a chunk has."""
    return min(a.channels, (end - begin) // a.inner)


@compiled
def _expand(a, per_channel, columns, n):  # pragma: no cover
    """Gives each of n columns its channel's number, in the dtype that computes."""
    channels = channels_of(a, 0, n)
    numbers, step = per_channel[:channels], channels * a.inner
    for begin in range(0, n, step):
        if a.inner == 1:
            these = columns[begin : begin + channels]
            for k in range(these.size):
                these[k] = narrow(a.memory, numbers[k])
        else:
            for k in range(channels):
                fill(columns[begin + k * a.inner : begin + (k + 1) * a.inner], narrow(a.memory, numbers[k]))


@compiled
def _collect(a, columns, n, per_channel):  # pragma: no cover
    """Adds up each channel's columns, out of n."""
    channels = channels_of(a, 0, n)
    numbers, step = per_channel[:channels], channels * a.inner
    fill(numbers, 0.0)
    for begin in range(0, n, step):
        if a.inner == 1:
            these = columns[begin : begin + channels]
            for k in range(these.size):
                numbers[k] += these[k]
        else:
            for k in range(channels):
                these = columns[begin + k * a.inner : begin + (k + 1) * a.inner]
                total = 0.0
                for i in range(these.size):
                    total += these[i]
                numbers[k] += total


@compiled
def _around(a, begin, end, per_channel):  # pragma: no cover
    """What `channel.around` gives for each channel of a chunk, in the order of memory; in the third row."""
    x = array_at(a.x, a.outer * a.channels * a.inner, a.memory)
    weight = array_at(a.position_weight, a.outer, a.weights)
    channels, first = channels_of(a, begin, end), begin // a.inner
    origin, total, mean = kth(per_channel, 0, channels), kth(per_channel, 1, channels), kth(per_channel, 2, channels)
    fill(total, 0.0)
    found = 0
    for k in range(SAMPLES):
        outer, stop = k * a.outer // SAMPLES, (k + 1) * a.outer // SAMPLES
        if present(a.weights):
            while outer < stop and not load(weight, outer) > 0:
                outer += 1
        if outer < stop:
            at = (outer * a.channels + first) * a.inner + k * a.inner // SAMPLES
            for c in range(channels):
                value = np.float64(load(x, at + c * a.inner))
                if found == 0:
                    origin[c] = value
                total[c] += value - origin[c]
            found += 1
    for c in range(channels):
        mean[c] = narrow(a.memory, origin[c] + total[c] / found) if found > 0 else 0.0


@compiled
def _sums(a, first, last, begin, end, per_column, totals):  # pragma: no cover
    """Σ w d and Σ w d² of each column, d = x - near: blocks of rows in the dtype that computes, those in float64."""
    widest_vectors()
    x = array_at(a.x, a.outer * a.channels * a.inner, a.memory)
    weight = array_at(a.position_weight, a.outer, a.weights)
    n, zero, full = end - begin, narrow(a.memory, 0.0), a.outer * a.channels * a.inner // a.width
    near = kth(per_column, 0, n)
    run1, run2 = kth(per_column, 6, n), kth(per_column, 7, n)
    total1, total2 = kth(totals, 0, n), kth(totals, 1, n)
    fill(total1, 0.0)
    fill(total2, 0.0)
    for block in range(first, last, _BLOCK):
        fill(run1, zero)
        fill(run2, zero)
        row, stop = block, min(block + _BLOCK, last)
        while row < stop:
            if not present(a.weights) and row + 4 <= min(stop, full):
                at, step = row * a.width + begin, a.width
                x0, x1 = x[at : at + n], x[at + step : at + step + n]
                x2, x3 = x[at + 2 * step : at + 2 * step + n], x[at + 3 * step : at + 3 * step + n]
                for j in range(x0.size):
                    m = near[j]
                    d0, d1, d2, d3 = load(x0, j) - m, load(x1, j) - m, load(x2, j) - m, load(x3, j) - m
                    run1[j] += (d0 + d1) + (d2 + d3)
                    run2[j] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)
                row += 4
                continue
            at, to = _span(a, row, begin, end)
            xs = x[at:to]
            w = narrow(a.memory, 1.0)
            if present(a.weights):
                w = load(weight, row)
            if w > zero:  # elsewhere x may hold anything
                for j in range(xs.size):
                    d = load(xs, j) - near[j]
                    run1[j] += w * d
                    run2[j] += w * d * d
            row += 1
        for j in range(n):
            total1[j] += run1[j]
            total2[j] += run2[j]


@compiled
def write(a, first, last, begin, end, per_column, scratch):  # pragma: no cover
    """y = f((x - centre) scale + shift + residual), 0 where not valid."""
    widest_vectors()
    n = end - begin
    centre, scale, shift = kth(per_column, 0, n), kth(per_column, 1, n), kth(per_column, 2, n)
    slope, cap, zero = narrow(a.memory, a.slope), narrow(a.memory, a.cap), narrow(a.memory, 0.0)
    size = a.outer * a.channels * a.inner
    x, y, residual = array_at(a.x, size, a.memory), array_at(a.y, size, a.memory), array_at(a.residual, size, a.added)
    valid = array_at(a.valid, a.outer, a.mask)
    for row in range(first, last):
        at, to = _span(a, row, begin, end)
        xs, ys, rs = x[at:to], y[at:to], residual[at:to]
        if present(a.mask):  # noqa: SIM102 (an outer branch that is known when compiled)
            if not valid[row]:
                for j in range(ys.size):
                    store(ys, j, zero)
                continue
        prepare_values(a.activation, a, xs, rs, scratch, centre, scale, shift)
        for j in range(xs.size):
            z = (load(xs, j) - centre[j]) * scale[j] + shift[j] + narrow(a.memory, load(rs, j))
            store(ys, j, value_at(a.activation, scratch, j, z, slope, cap))
        keep_bits(a.activation, a, scratch, xs.size, _word(a, row, begin))


@compiled
def _pulls(a, first, last, begin, end, per_column, totals, scratch):  # pragma: no cover
    """Σ g and Σ g d of each column with g = dL/dy f'(z) and d = x - centre."""
    widest_vectors()
    n = end - begin
    centre, scale, shift = kth(per_column, 0, n), kth(per_column, 1, n), kth(per_column, 2, n)
    slope, cap, zero = narrow(a.memory, a.slope), narrow(a.memory, a.cap), narrow(a.memory, 0.0)
    size = a.outer * a.channels * a.inner
    x, grad_y = array_at(a.x, size, a.memory), array_at(a.grad_y, size, a.memory)
    residual, valid = array_at(a.residual, size, a.added), array_at(a.valid, a.outer, a.mask)
    run1, run2 = kth(per_column, 6, n), kth(per_column, 7, n)
    total1, total2 = kth(totals, 0, n), kth(totals, 1, n)
    fill(total1, 0.0)
    fill(total2, 0.0)
    for block in range(first, last, _BLOCK):
        fill(run1, zero)
        fill(run2, zero)
        for row in range(block, min(block + _BLOCK, last)):
            if present(a.mask):  # noqa: SIM102
                if not valid[row]:
                    continue
            at, to = _span(a, row, begin, end)
            xs, gs, rs = x[at:to], grad_y[at:to], residual[at:to]
            word = _word(a, row, begin)
            prepare_pulls(a.activation, a, xs, rs, gs, scratch, centre, scale, shift, word)
            for j in range(xs.size):
                d = load(xs, j) - centre[j]
                z = d * scale[j] + shift[j] + addend_at(a.activation, a.memory, rs, j)
                g = pull_at(a.activation, scratch, j, z, load(gs, j), slope, cap)
                run1[j] += g
                run2[j] += g * d
        for j in range(n):
            total1[j] += run1[j]
            total2[j] += run2[j]


@compiled
def spread(a, first, last, begin, end, per_column, scratch):  # pragma: no cover
    """dx = ac (g - w (k1 d + k0)), and g for the residual; both 0 where not valid."""
    widest_vectors()
    n = end - begin
    centre, scale, shift = kth(per_column, 0, n), kth(per_column, 1, n), kth(per_column, 2, n)
    ac, k1, k0 = kth(per_column, 3, n), kth(per_column, 4, n), kth(per_column, 5, n)
    slope, cap, zero = narrow(a.memory, a.slope), narrow(a.memory, a.cap), narrow(a.memory, 0.0)
    pulled = a.sums != 0  # else the statistics are constants, and d may be infinite
    size = a.outer * a.channels * a.inner
    x, grad_y = array_at(a.x, size, a.memory), array_at(a.grad_y, size, a.memory)
    grad_x, residual = array_at(a.grad_x, size, a.memory), array_at(a.residual, size, a.added)
    grad_residual = array_at(a.grad_residual, size, a.added)
    weight, valid = array_at(a.position_weight, a.outer, a.weights), array_at(a.valid, a.outer, a.mask)
    for row in range(first, last):
        at, to = _span(a, row, begin, end)
        xs, gs, dxs, rs, drs = x[at:to], grad_y[at:to], grad_x[at:to], residual[at:to], grad_residual[at:to]
        if present(a.mask):  # noqa: SIM102 (an outer branch that is known when compiled)
            if not valid[row]:
                for j in range(dxs.size):
                    store(dxs, j, zero)
                    if present(a.added):
                        store(drs, j, zero)
                continue
        w = narrow(a.memory, 1.0)
        if present(a.weights):
            w = load(weight, row)
        prepare_pulls(a.activation, a, xs, rs, gs, scratch, centre, scale, shift, _word(a, row, begin))
        for j in range(xs.size):
            d = load(xs, j) - centre[j]
            z = d * scale[j] + shift[j] + addend_at(a.activation, a.memory, rs, j)
            g = pull_at(a.activation, scratch, j, z, load(gs, j), slope, cap)
            taken = k1[j] * d + k0[j] if pulled else zero
            if present(a.weights):
                taken = taken * w if w > zero else zero
            store(dxs, j, ac[j] * (g - taken))
            if present(a.added):
                store(drs, j, g)


@compiled
def measure_chunk(a, first, last, begin, end, per_channel, per_column, totals):  # pragma: no cover
    """Σ w d and Σ w d² of the chunk's channels, and what d is relative to: the three rooms of `per_channel`."""
    n = end - begin
    _around(a, begin, end, per_channel)
    _expand(a, kth(per_channel, 2, LONGEST), kth(per_column, 0, LONGEST), n)
    _sums(a, first, last, begin, end, per_column, totals)
    _collect(a, kth(totals, 0, LONGEST), n, kth(per_channel, 0, LONGEST))
    _collect(a, kth(totals, 1, LONGEST), n, kth(per_channel, 1, LONGEST))


@compiled
def reduce_chunk(a, first, last, begin, end, per_channel, per_column, totals, scratch):  # pragma: no cover
    """Σ g and Σ g d of the chunk's channels in the first two rows of `per_channel`."""
    expand_constants(a, begin, end, per_channel, per_column)
    _pulls(a, first, last, begin, end, per_column, totals, scratch)
    _collect(a, kth(totals, 0, LONGEST), end - begin, kth(per_channel, 0, LONGEST))
    _collect(a, kth(totals, 1, LONGEST), end - begin, kth(per_channel, 1, LONGEST))


@compiled
def expand_constants(a, begin, end, per_channel, per_column):  # pragma: no cover
    """The constants of each column of a chunk: the first three rooms of `per_column`."""
    constants(a, begin // a.inner, channels_of(a, begin, end), per_channel)
    for i in range(3):
        _expand(a, kth(per_channel, i, LONGEST), kth(per_column, i, LONGEST), end - begin)


@compiled
def expand_coefficients(a, begin, end, per_channel, per_column):  # pragma: no cover
    """The coefficients of each column of a chunk: the next three."""
    coefficients(a, begin // a.inner, channels_of(a, begin, end), per_channel)
    for i in range(3):
        _expand(a, kth(per_channel, i, LONGEST), kth(per_column, 3 + i, LONGEST), end - begin)


@compiled
def keep_partial(a, part, begin, end, per_channel):  # pragma: no cover
    """Leaves what a part has found for those who gather it."""
    partial = array_at(a.partial, (2 * a.parts + 1) * a.channels, np.float64(0))
    c = begin // a.inner
    for k in range(channels_of(a, begin, end)):
        partial[part * a.channels + c + k] = per_channel[k]
        partial[(a.parts + part) * a.channels + c + k] = per_channel[LONGEST + k]
        partial[2 * a.parts * a.channels + c + k] = per_channel[2 * LONGEST + k]  # the same whichever part writes it


@compiled
def rooms(a):  # pragma: no cover
    """Scratch of a thread, LONGEST numbers at a time.

    Three per channel, eight per column (centre, scale, shift, ac, k1, k0 and two sums in the dtype that computes), two
    totals per column in float64, and what a smooth activation needs.
    """
    return (
        np.empty(3 * LONGEST),
        room(a.memory, 8 * LONGEST),
        np.empty(2 * LONGEST),
        scratch_for(a.activation, a.memory, LONGEST),
    )
