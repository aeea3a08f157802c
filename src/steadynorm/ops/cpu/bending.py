"""The activation within a kernel's loop: straight lines computed there, anything smooth prepared run by run.

none      f(z) = z
RELU      f(z) = max(z, 0)
BENT      f(z) = min(max(z, 0) + slope min(z, 0), cap):  leaky_relu, relu6; none and relu where kernels of their own are
          not worth compiling; a cap of NaN caps nothing
KEPT      as BENT; forward keeps a bit per value by which backward tells the slopes apart, see bits.py
SMOOTH    what smooth.py computes, from and to a scratch array in L1
"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUnknownLambdaType=false
# pyright: reportUnknownVariableType=false
# (Numba types its functions itself)

import numpy as np
from numba import types

from steadynorm.ops.cpu.bits import pack, unpack
from steadynorm.ops.cpu.call import KEPT, RELU, SMOOTH
from steadynorm.ops.cpu.compiling import compiled, overload
from steadynorm.ops.cpu.memory import ABSENT, load, narrow, of_column, room

__all__ = ["addend_at", "keep_bits", "prepare_pulls", "prepare_values", "pull_at", "scratch_for", "value_at"]


_RELU, _KEPT, _SMOOTH = getattr(types, RELU), getattr(types, KEPT), getattr(types, SMOOTH)


def scratch_for(activation, memory, size):
    """Room for a run, in the dtype that computes; none where neither a smooth activation nor kept bits need it."""
    raise NotImplementedError


def prepare_values(activation, a, xs, rs, scratch, centre, scale, shift):
    """scratch = f((x - centre) scale + shift + residual) of a run, for a smooth f alone."""
    raise NotImplementedError


def prepare_pulls(activation, a, xs, rs, gs, scratch, centre, scale, shift, word):
    """scratch = dL/dy f'((x - centre) scale + shift + residual) of a run, for a smooth f; or whether f rises, kept."""
    raise NotImplementedError


def keep_bits(activation, a, scratch, n, word):
    """Keeps whether f rises at each of the n values of a run, in `a.bits` from a word on, for KEPT alone."""
    raise NotImplementedError


def addend_at(activation, memory, rs, j):
    """The residual as backward needs it to recompute z: not where f's slope was kept."""
    raise NotImplementedError


def value_at(activation, scratch, j, z, slope, cap):
    """f(z), or what was prepared; z is left in scratch for `keep_bits`."""
    raise NotImplementedError


def pull_at(activation, scratch, j, z, g, slope, cap):
    """g f'(z), at a kink with the slope of the flat side; or what was prepared.

    Never a product that the compiler could merge with what is taken from it: where a gradient is exactly 0 by algebra,
    both sides must have been rounded alike.
    """
    raise NotImplementedError


@overload(scratch_for)
def _scratch_for(activation, memory, size):
    if activation not in (_SMOOTH, _KEPT):
        return lambda activation, memory, size: room(memory, 0)
    return lambda activation, memory, size: room(memory, size)


@overload(prepare_values)
def _prepare_values(activation, a, xs, rs, scratch, centre, scale, shift):
    if activation != _SMOOTH:
        return lambda activation, a, xs, rs, scratch, centre, scale, shift: None
    from steadynorm.ops.cpu.smooth import values

    def prepare(activation, a, xs, rs, scratch, centre, scale, shift):
        for j in range(xs.size):
            d = load(xs, j) - of_column(centre, j)
            scratch[j] = d * of_column(scale, j) + of_column(shift, j) + narrow(a.memory, load(rs, j))
        values(np.int64(a.code), a.p, a.q, scratch, xs.size)

    return prepare


@overload(prepare_pulls)
def _prepare_pulls(activation, a, xs, rs, gs, scratch, centre, scale, shift, word):
    if activation == _KEPT:

        def prepare_kept(activation, a, xs, rs, gs, scratch, centre, scale, shift, word):
            unpack(a.bits, word, scratch, xs.size)

        return prepare_kept
    if activation != _SMOOTH:
        return lambda activation, a, xs, rs, gs, scratch, centre, scale, shift, word: None
    from steadynorm.ops.cpu.smooth import slopes

    def prepare(activation, a, xs, rs, gs, scratch, centre, scale, shift, word):
        for j in range(xs.size):
            d = load(xs, j) - of_column(centre, j)
            scratch[j] = d * of_column(scale, j) + of_column(shift, j) + narrow(a.memory, load(rs, j))
        slopes(np.int64(a.code), a.p, a.q, scratch, xs.size)
        for j in range(xs.size):
            scratch[j] *= load(gs, j)

    return prepare


@overload(keep_bits)
def _keep_bits(activation, a, scratch, n, word):
    if activation != _KEPT:
        return lambda activation, a, scratch, n, word: None

    def keep(activation, a, scratch, n, word):
        pack(scratch, n, narrow(a.memory, a.cap), a.bits, word)

    return keep


@overload(addend_at)
def _addend_at(activation, memory, rs, j):
    if activation == _KEPT:
        return lambda activation, memory, rs, j: narrow(memory, 0.0)
    return lambda activation, memory, rs, j: narrow(memory, load(rs, j))


@compiled
def _sloped(value, slope):  # pragma: no cover
    """slope * value, and 0 for a slope of 0, of an infinite value too."""
    zero = narrow(slope, 0.0)
    return slope * value if slope != zero else zero


@compiled
def _bent(z, slope, cap):  # pragma: no cover
    value = _sloped(z, slope) if z < narrow(slope, 0.0) else z  # NaN stays NaN
    return cap if value > cap else value


@overload(value_at)
def _value_at(activation, scratch, j, z, slope, cap):
    if activation == _SMOOTH:
        return lambda activation, scratch, j, z, slope, cap: scratch[j]

    if activation == ABSENT:
        return lambda activation, scratch, j, z, slope, cap: z
    if activation == _RELU:

        def rectified(activation, scratch, j, z, slope, cap):
            zero = narrow(slope, 0.0)
            return zero if z < zero else z  # NaN stays NaN

        return rectified

    if activation == _KEPT:

        def bent_and_kept(activation, scratch, j, z, slope, cap):
            scratch[j] = z
            return _bent(z, slope, cap)

        return bent_and_kept
    return lambda activation, scratch, j, z, slope, cap: _bent(z, slope, cap)


@overload(pull_at)
def _pull_at(activation, scratch, j, z, g, slope, cap):
    if activation == _SMOOTH:
        return lambda activation, scratch, j, z, g, slope, cap: scratch[j]
    if activation == ABSENT:
        return lambda activation, scratch, j, z, g, slope, cap: g
    if activation == _RELU:

        def rectified(activation, scratch, j, z, g, slope, cap):
            zero = narrow(slope, 0.0)
            return g if z > zero else zero

        return rectified

    def bent(activation, scratch, j, z, g, slope, cap):
        zero = narrow(slope, 0.0)
        rising = g if z > zero else _sloped(g, slope)
        return zero if z >= cap else rising

    if activation == _KEPT:

        def by_what_was_kept(activation, scratch, j, z, g, slope, cap):
            return g if scratch[j] > 0 else _sloped(g, slope)

        return by_what_was_kept

    return bent
