"""What kernels of every layout compute channel by channel, in float64: statistics settled, constants, coefficients."""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUnknownLambdaType=false
# pyright: reportUnknownVariableType=false
# (Numba types its functions itself)

import numpy as np

from steadynorm.ops.cpu.compiling import compiled
from steadynorm.ops.cpu.geometry import LONGEST
from steadynorm.ops.cpu.memory import array_at, fill, load, narrow, present, store, take

__all__ = [
    "SAMPLES",
    "around",
    "coefficients",
    "constants",
    "gather_gradients",
    "gather_statistics",
    "keep_gradients",
    "keep_statistics",
    "kth",
    "settled",
]

SAMPLES = 8
# Squares of float32 that are subnormal or overflow within a sum lie outside; the sum is then taken again in float64.
_LEAST, _MOST = 1e-30, 1e37
_FAR = 4.0


@compiled
def around(a, c):  # pragma: no cover
    """A value that the channel's lie around, the mean of a few of them: sums are taken relative to it.

    A large mean then costs no digits. A constant channel gives its own value to the bit.
    """
    positions = a.outer * a.inner
    x = array_at(a.x, positions * a.channels, a.memory)
    weight = array_at(a.position_weight, positions, a.weights)
    origin, total, found = 0.0, 0.0, 0
    for k in range(SAMPLES):
        at, end = k * positions // SAMPLES, (k + 1) * positions // SAMPLES
        if present(a.weights):
            while at < end and not load(weight, at) > 0:
                at += 1
        if at < end:
            row = at // a.inner
            value = np.float64(load(x, (row * a.channels + c) * a.inner + at - row * a.inner))
            if found == 0:
                origin = value
            total += value - origin
            found += 1
    return origin + total / max(found, 1)


@compiled
def settled(a, c, around, first, second):  # pragma: no cover
    """Mean and m2 from Σ w d and Σ w d², d = x - around; from the values again where those sums have lost digits."""
    offset = first / a.count if a.count > 0 else 0.0
    m2 = second - first * offset
    constant = first == 0 and second == 0
    if constant or (_LEAST < second < _MOST and first * offset <= _FAR * m2):
        return around + offset, m2
    return _measured_in_float64(a, c, around)


@compiled
def _measured_in_float64(a, c, around):  # pragma: no cover
    """By the definition, whatever the values: for the rare channel, so that its speed is of no account."""
    positions = a.outer * a.inner
    x = array_at(a.x, positions * a.channels, a.memory)
    weight = array_at(a.position_weight, positions, a.weights)
    mean, m2 = around, 0.0
    for _ in range(2):  # the second time round the mean itself, with its rounding error taken out, and m2
        first, m2 = 0.0, 0.0
        for row in range(a.outer):
            for i in range(a.inner):
                w = 1.0
                if present(a.weights):
                    w = np.float64(load(weight, row * a.inner + i))
                if w > 0:
                    d = np.float64(load(x, (row * a.channels + c) * a.inner + i)) - mean
                    first += w * d
                    m2 += w * d * d
        offset = first / a.count if a.count > 0 else 0.0
        mean += offset
        m2 -= first * offset
    return mean, m2


@compiled
def _statistics(a, c, n):  # pragma: no cover
    """Count, mean and m2 of n channels from c on."""
    table = array_at(a.statistics, 3 * a.channels, np.float64(0))
    at = a.channels + c
    return table[c : c + n], table[at : at + n], table[at + a.channels : at + a.channels + n]


@compiled
def kth(rooms, k, n):  # pragma: no cover
    """The first n numbers of the k-th of rooms for LONGEST."""
    return rooms[k * LONGEST : k * LONGEST + n]


@compiled
def keep_statistics(a, c, mean, m2):  # pragma: no cover
    """Writes a channel's count, mean and m2."""
    statistics = array_at(a.statistics, 3 * a.channels, np.float64(0))
    statistics[c] = a.count
    statistics[a.channels + c] = mean
    statistics[2 * a.channels + c] = 0.0 if m2 < 0 else m2  # and NaN stays NaN


@compiled
def constants(a, c, n, numbers):  # pragma: no cover
    """centre, scale and shift of y = (x - centre) scale + shift, of n channels from c on: the first three rooms.

    The centre is the mean rounded to the dtype that computes, so that x - centre loses nothing; shift makes up for the
    rounding.
    """
    counts, means, m2s = _statistics(a, c, n)
    centre, scale, shift = kth(numbers, 0, n), kth(numbers, 1, n), kth(numbers, 2, n)
    eps = a.eps
    for k in range(means.size):
        variance = m2s[k] / counts[k] if counts[k] > 0 else 0.0
        centre[k] = narrow(a.memory, means[k])
        scale[k] = 1 / np.sqrt(variance + eps)
    if a.weight != 0:
        weight = array_at(a.weight, a.channels, a.affine)[c : c + n]
        for k in range(scale.size):
            scale[k] *= load(weight, k)
    for k in range(scale.size):
        shift[k] = (centre[k] - means[k]) * scale[k]
    if a.bias != 0:
        bias = array_at(a.bias, a.channels, a.affine)[c : c + n]
        for k in range(shift.size):
            shift[k] += load(bias, k)


@compiled
def keep_gradients(a, c, sum_g, sum_gd):  # pragma: no cover
    """Writes Σ g and Σ g (x - μ) / σ as the gradients of β and γ, from Σ g and Σ g d, d = x - centre."""
    statistics = array_at(a.statistics, 3 * a.channels, np.float64(0))
    n, mean, m2 = statistics[c], statistics[a.channels + c], statistics[2 * a.channels + c]
    centred = sum_gd + (np.float64(narrow(a.memory, mean)) - mean) * sum_g
    sums = array_at(a.sums, 2 * a.channels, np.float64(0))
    sums[c], sums[a.channels + c] = sum_g, centred
    if a.grad_weight != 0:
        invstd = 1 / np.sqrt((m2 / n if n > 0 else 0.0) + a.eps)
        store(array_at(a.grad_weight, a.channels, a.affine), c, centred * invstd)
    if a.grad_bias != 0:
        store(array_at(a.grad_bias, a.channels, a.affine), c, sum_g)


@compiled
def coefficients(a, c, n, numbers):  # pragma: no cover
    """The three of dx = ac (g - w (k1 d + k0)), d = x - centre, of n channels from c on: the first three rooms.

        ac = γ / σ,   k1 = Σ g (x - μ) / σ² / n,   k0 = Σ g / n + k1 (centre - μ)

    A single value gets dx = 0 to the bit. Where the statistics are constants (a.sums is not given), dx = ac g.
    """
    counts, means, m2s = _statistics(a, c, n)
    ac, k1, k0 = kth(numbers, 0, n), kth(numbers, 1, n), kth(numbers, 2, n)
    eps = a.eps
    for k in range(means.size):
        variance = m2s[k] / counts[k] if counts[k] > 0 else 0.0
        ac[k] = 1 / np.sqrt(variance + eps)
    if a.sums != 0:
        sums = array_at(a.sums, 2 * a.channels, np.float64(0))
        sum_g, sum_gd = sums[c : c + n], sums[a.channels + c : a.channels + c + n]
        for k in range(means.size):
            per_count = 1 / counts[k] if counts[k] > 0 else 0.0
            k1[k] = ac[k] * ac[k] * sum_gd[k] * per_count
            k0[k] = sum_g[k] * per_count + k1[k] * (np.float64(narrow(a.memory, means[k])) - means[k])
    else:
        fill(k1, 0.0)
        fill(k0, 0.0)
    if a.weight != 0:
        weight = array_at(a.weight, a.channels, a.affine)[c : c + n]
        for k in range(ac.size):
            ac[k] *= load(weight, k)


@compiled
def _gathered(a, c):  # pragma: no cover
    """The two sums that the parts of a channel have left."""
    partial = array_at(a.partial, 2 * a.parts * a.channels, np.float64(0))
    first, second = 0.0, 0.0
    for part in range(a.parts):
        first += partial[part * a.channels + c]
        second += partial[(a.parts + part) * a.channels + c]
    return first, second


@compiled
def gather_statistics(a, me, phase):  # pragma: no cover
    """Adds up what the parts of each channel have measured, and writes its statistics."""
    partial = array_at(a.partial, (2 * a.parts + 1) * a.channels, np.float64(0))
    while True:
        c = take(a, me, phase, a.channels)
        if c >= a.channels:
            break
        first, second = _gathered(a, c)
        mean, m2 = settled(a, c, partial[2 * a.parts * a.channels + c], first, second)
        keep_statistics(a, c, mean, m2)


@compiled
def gather_gradients(a, me, phase):  # pragma: no cover
    """Adds up Σ g and Σ g d of the parts of each channel, and writes its gradients."""
    while True:
        c = take(a, me, phase, a.channels)
        if c >= a.channels:
            break
        first, second = _gathered(a, c)
        keep_gradients(a, c, first, second)
