"""Arithmetic over planes: the values of a channel lie in A runs of S neighbours, as in a contiguous (N, C, H, W).

A task is a channel, or a part of one where there are few: its values are numbered from 0 to A S, run after run. A
channel that is one task is measured and normalised in one go, so that the second pass finds it in the cache; so are
the two passes of backward.
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
from steadynorm.ops.cpu.channel import coefficients, constants
from steadynorm.ops.cpu.compiling import compiled
from steadynorm.ops.cpu.geometry import LONGEST
from steadynorm.ops.cpu.memory import array_at, load, narrow, present, store, widest_vectors

__all__ = ["part_of", "pulls", "rooms", "spread", "sums", "write"]

# Values at a time: few enough for float32 sums of them to lose nothing, and for scratch to stay in L1.
_RUN = 1024


@compiled
def _run(a, c, at, stop):  # pragma: no cover
    """Where in memory a channel's values from number `at` on lie, and how many of them side by side."""
    row = at // a.inner
    i = at - row * a.inner
    return (row * a.channels + c) * a.inner + i, min(a.inner - i, stop - at, _RUN)


@compiled
def _word(a, c, at):  # pragma: no cover
    """Where the bits of a run are kept: those of each plane begin with a new word."""
    row = at // a.inner
    return (row * a.channels + c) * ((a.inner + WORD - 1) // WORD) + (at - row * a.inner) // WORD


@compiled
def sums(a, c, start, stop, near):  # pragma: no cover
    """Σ w d and Σ w d² with d = x - near: each run in the dtype that computes, the runs in float64."""
    widest_vectors()
    x = array_at(a.x, a.outer * a.channels * a.inner, a.memory)
    weight = array_at(a.position_weight, a.outer * a.inner, a.weights)
    zero = narrow(a.memory, 0.0)
    first, second = 0.0, 0.0
    at = start
    while at < stop:
        begin, n = _run(a, c, at, stop)
        xs, ws = x[begin : begin + n], weight[at : at + n]
        run1, run2 = zero, zero
        for j in range(xs.size):
            d = load(xs, j) - near
            if present(a.weights):
                w = load(ws, j)
                d = d if w > zero else zero  # where the weight is 0, x may hold anything
                run1 += w * d
                run2 += w * d * d
            else:
                run1 += d
                run2 += d * d
        first += run1
        second += run2
        at += n
    return first, second


@compiled
def rooms(a):  # pragma: no cover
    """Scratch of a thread: what a smooth activation needs, and three numbers of a channel."""
    return scratch_for(a.activation, a.memory, _RUN), np.empty(2 * LONGEST + 1)


@compiled
def _of_channel(a, c, numbers, for_backward):  # pragma: no cover
    """A channel's three constants, or its three coefficients, in the dtype that computes."""
    if for_backward:
        coefficients(a, c, 1, numbers)
    else:
        constants(a, c, 1, numbers)
    return narrow(a.memory, numbers[0]), narrow(a.memory, numbers[LONGEST]), narrow(a.memory, numbers[2 * LONGEST])


@compiled
def write(a, c, start, stop, scratch, numbers):  # pragma: no cover
    """y = f((x - centre) scale + shift + residual), 0 where not valid."""
    widest_vectors()
    centre, scale, shift = _of_channel(a, c, numbers, False)
    slope, cap, zero = narrow(a.memory, a.slope), narrow(a.memory, a.cap), narrow(a.memory, 0.0)
    size, positions = a.outer * a.channels * a.inner, a.outer * a.inner
    x, y = array_at(a.x, size, a.memory), array_at(a.y, size, a.memory)
    residual, valid = array_at(a.residual, size, a.added), array_at(a.valid, positions, a.mask)
    at = start
    while at < stop:
        begin, n = _run(a, c, at, stop)
        xs, ys, rs, vs = x[begin : begin + n], y[begin : begin + n], residual[begin : begin + n], valid[at : at + n]
        prepare_values(a.activation, a, xs, rs, scratch, centre, scale, shift)
        for j in range(xs.size):
            z = (load(xs, j) - centre) * scale + shift + narrow(a.memory, load(rs, j))
            out = value_at(a.activation, scratch, j, z, slope, cap)
            if present(a.mask):
                out = out if vs[j] else zero
            store(ys, j, out)
        keep_bits(a.activation, a, scratch, n, _word(a, c, at))
        at += n


@compiled
def pulls(a, c, start, stop, scratch, numbers):  # pragma: no cover
    """Σ g and Σ g d with g = dL/dy f'(z) and d = x - centre."""
    widest_vectors()
    centre, scale, shift = _of_channel(a, c, numbers, False)
    slope, cap, zero = narrow(a.memory, a.slope), narrow(a.memory, a.cap), narrow(a.memory, 0.0)
    size, positions = a.outer * a.channels * a.inner, a.outer * a.inner
    x, grad_y = array_at(a.x, size, a.memory), array_at(a.grad_y, size, a.memory)
    residual, valid = array_at(a.residual, size, a.added), array_at(a.valid, positions, a.mask)
    first, second = 0.0, 0.0
    at = start
    while at < stop:
        begin, n = _run(a, c, at, stop)
        xs, gs, rs = x[begin : begin + n], grad_y[begin : begin + n], residual[begin : begin + n]
        vs = valid[at : at + n]
        prepare_pulls(a.activation, a, xs, rs, gs, scratch, centre, scale, shift, _word(a, c, at))
        run1, run2 = zero, zero
        for j in range(xs.size):
            d = load(xs, j) - centre
            z = d * scale + shift + addend_at(a.activation, a.memory, rs, j)
            g = pull_at(a.activation, scratch, j, z, load(gs, j), slope, cap)
            if present(a.mask):
                g = g if vs[j] else zero
                d = d if vs[j] else zero
            run1 += g
            run2 += g * d
        first += run1
        second += run2
        at += n
    return first, second


@compiled
def spread(a, c, start, stop, scratch, numbers):  # pragma: no cover
    """dx = ac (g - w (k1 d + k0)), and g for the residual; both 0 where not valid."""
    widest_vectors()
    centre, scale, shift = _of_channel(a, c, numbers, False)
    ac, k1, k0 = _of_channel(a, c, numbers, True)
    slope, cap, zero = narrow(a.memory, a.slope), narrow(a.memory, a.cap), narrow(a.memory, 0.0)
    pulled = a.sums != 0  # else the statistics are constants, and d may be infinite
    size, positions = a.outer * a.channels * a.inner, a.outer * a.inner
    x, grad_y, grad_x = (
        array_at(a.x, size, a.memory),
        array_at(a.grad_y, size, a.memory),
        array_at(a.grad_x, size, a.memory),
    )
    residual, grad_residual = array_at(a.residual, size, a.added), array_at(a.grad_residual, size, a.added)
    weight, valid = array_at(a.position_weight, positions, a.weights), array_at(a.valid, positions, a.mask)
    at = start
    while at < stop:
        begin, n = _run(a, c, at, stop)
        xs, gs, dxs = x[begin : begin + n], grad_y[begin : begin + n], grad_x[begin : begin + n]
        rs, drs = residual[begin : begin + n], grad_residual[begin : begin + n]
        ws, vs = weight[at : at + n], valid[at : at + n]
        prepare_pulls(a.activation, a, xs, rs, gs, scratch, centre, scale, shift, _word(a, c, at))
        for j in range(xs.size):
            d = load(xs, j) - centre
            z = d * scale + shift + addend_at(a.activation, a.memory, rs, j)
            g = pull_at(a.activation, scratch, j, z, load(gs, j), slope, cap)
            taken = k1 * d + k0 if pulled else zero
            if present(a.weights):
                w = load(ws, j)
                taken = taken * w if w > zero else zero
            dx = ac * (g - taken)
            if present(a.mask):
                g = g if vs[j] else zero
                dx = dx if vs[j] else zero
            store(dxs, j, dx)
            if present(a.added):
                store(drs, j, g)
        at += n


@compiled
def part_of(a, task):  # pragma: no cover
    """The channel that a task is about, and from which to which of its values."""
    c = task // a.parts
    part = task - c * a.parts
    return c, part, _boundary(a, part), _boundary(a, part + 1)


@compiled
def _boundary(a, part):  # pragma: no cover
    """The first of a channel's values that belongs to a part: whole words of bits from the first of its plane."""
    at = part * (a.outer * a.inner) // a.parts
    return at - at % a.inner % WORD
