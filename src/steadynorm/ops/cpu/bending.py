"""The activation within a kernel's loop: straight lines computed there, anything smooth prepared run by run.

none      f(z) = z
RELU      f(z) = max(z, 0)
BENT      f(z) = min(max(z, 0) + slope min(z, 0), cap):  leaky_relu, relu6
SMOOTH    what smooth.py computes, from and to a scratch array in L1
"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUnknownLambdaType=false
# pyright: reportUnknownVariableType=false
# (Numba types its functions itself)

import numpy as np
from numba import types

from steadynorm.ops.cpu.call import RELU, SMOOTH
from steadynorm.ops.cpu.compiling import overload
from steadynorm.ops.cpu.memory import ABSENT, load, narrow, of_column, room

__all__ = ["prepare_pulls", "prepare_values", "pull_at", "scratch_for", "value_at"]


_RELU, _SMOOTH = getattr(types, RELU), getattr(types, SMOOTH)


def scratch_for(activation, memory, size):
    """Room for a run, in the dtype that computes; none where no smooth activation needs it."""
    raise NotImplementedError


def prepare_values(activation, a, xs, rs, scratch, centre, scale, shift):
    """scratch = f((x - centre) scale + shift + residual) of a run, for a smooth f alone."""
    raise NotImplementedError


def prepare_pulls(activation, a, xs, rs, gs, scratch, centre, scale, shift):
    """scratch = dL/dy f'((x - centre) scale + shift + residual) of a run, for a smooth f alone."""
    raise NotImplementedError


def value_at(activation, scratch, j, z, slope, cap):
    """f(z), or what was prepared."""
    raise NotImplementedError


def pull_at(activation, scratch, j, z, g, slope, cap):
    """g f'(z), at a kink with the slope of the flat side; or what was prepared.

    Never a product that the compiler could merge with what is taken from it: where a gradient is exactly 0 by algebra,
    both sides must have been rounded alike.
    """
    raise NotImplementedError


@overload(scratch_for)
def _scratch_for(activation, memory, size):
    if activation != _SMOOTH:
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
def _prepare_pulls(activation, a, xs, rs, gs, scratch, centre, scale, shift):
    if activation != _SMOOTH:
        return lambda activation, a, xs, rs, gs, scratch, centre, scale, shift: None
    from steadynorm.ops.cpu.smooth import slopes

    def prepare(activation, a, xs, rs, gs, scratch, centre, scale, shift):
        for j in range(xs.size):
            d = load(xs, j) - of_column(centre, j)
            scratch[j] = d * of_column(scale, j) + of_column(shift, j) + narrow(a.memory, load(rs, j))
        slopes(np.int64(a.code), a.p, a.q, scratch, xs.size)
        for j in range(xs.size):
            scratch[j] *= load(gs, j)

    return prepare


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

    def bent(activation, scratch, j, z, slope, cap):
        zero = narrow(slope, 0.0)
        above = zero if z < zero else z  # NaN stays NaN
        below = z if z < zero else zero
        value = above + slope * below
        return cap if value > cap else value

    return bent


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
        below = slope * g
        rising = g if z > zero else below
        return rising if z < cap else zero

    return bent
