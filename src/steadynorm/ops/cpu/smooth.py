"""The smooth activations and their derivatives over a block of values in L1, in place.

Which one it is comes as a number at run time, so that one kernel serves them all: each has its own loop, without a
branch inside, so that it is vectorised. Most are written in terms of e = exp(-|z|) <= 1, which cannot overflow.
"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# (Numba types its functions itself)

from typing import Final

from numba import njit

from steadynorm.activations import Activation
from steadynorm.errors import ArgumentError
from steadynorm.ops.cpu.elementary import (
    INLINE,
    PRECISE,
    exponential,
    exponential_less_1,
    logarithm_of_1_plus,
    normal_tail,
    number,
)

__all__ = ["code_of", "slopes", "values"]

_ELU, _SELU, _SILU, _GELU, _GELU_TANH, _HARDSWISH, _HARDSIGMOID, _SIGMOID, _TANH, _SOFTPLUS, _MISH = range(11)
_CODES: Final = {
    "elu": _ELU,
    "celu": _ELU,
    "selu": _SELU,
    "silu": _SILU,
    "gelu": _GELU,
    "gelu_tanh": _GELU_TANH,
    "hardswish": _HARDSWISH,
    "hardsigmoid": _HARDSIGMOID,
    "sigmoid": _SIGMOID,
    "tanh": _TANH,
    "softplus": _SOFTPLUS,
    "mish": _MISH,
}
_SELU_ALPHA: Final = 1.6732632423543772848170429916717
_SELU_SCALE: Final = 1.0507009873554804934193349852946
_TWICE_ROOT: Final = 1.5957691216057308  # 2 sqrt(2 / π)
_CUBIC: Final = 0.044715


def code_of(activation: Activation) -> tuple[int, float, float]:
    """The number that `values` and `slopes` know an activation by, and its parameters p and q.

    p and q are α and 1/α' of scale α (exp(z/α') - 1) for elu, celu and selu, β and the threshold for softplus, and 0
    for the others.

    Args:
        activation: One of those that are not piecewise linear.

    Returns:
        code, p, q.

    Raises:
        ArgumentError: A celu whose alpha is not positive.

    Example:
        >>> from steadynorm.activations import Activation
        >>> code_of(Activation("celu", (2.0,)))
        (0, 2.0, 0.5)
    """
    code, params = _CODES[activation.name], activation.params
    if activation.name == "selu":
        return code, _SELU_ALPHA, 1.0
    if activation.name == "elu":
        return code, params[0], 1.0
    if activation.name == "celu":
        if not params[0] > 0:
            raise ArgumentError(f"celu takes an alpha above 0, got {params[0]!r}. Choose one, such as 1.0.")
        return code, params[0], 1 / params[0]
    if activation.name == "softplus":
        return code, params[0], params[1]
    return code, 0.0, 0.0


@njit(**INLINE)
def _sigmoid(z):  # pragma: no cover
    e = exponential(-abs(z))
    one = number(z, 1.0)
    return (e if z < number(z, 0.0) else one) / (one + e)


@njit(**INLINE)
def _silu_slope(z):  # pragma: no cover
    """s (1 + z (1 - s)) = s + z e / (1 + e)²."""
    e = exponential(-abs(z))
    one = number(z, 1.0)
    inverse = one / (one + e)
    return ((e if z < number(z, 0.0) else one) + z * e * inverse) * inverse


@njit(**INLINE)
def _bell(z):  # pragma: no cover
    """s (1 - s) = e / (1 + e)²."""
    e = exponential(-abs(z))
    inverse = number(z, 1.0) / (number(z, 1.0) + e)
    return e * inverse * inverse


@njit(**INLINE)
def _gelu(z):  # pragma: no cover
    tail, _ = normal_tail(z)
    return z * (tail if z < number(z, 0.0) else number(z, 1.0) - tail)


@njit(**INLINE)
def _gelu_slope(z):  # pragma: no cover
    """Φ(z) + z φ(z)."""
    tail, moment = normal_tail(z)
    below = tail - moment
    return below if z < number(z, 0.0) else number(z, 1.0) - below


@njit(**INLINE)
def _gelu_tanh(z):  # pragma: no cover
    """z (1 + tanh(y)) / 2 = z sigmoid(2 y), 2 y = 2 sqrt(2/π) (z + 0.044715 z³)."""
    return z * _sigmoid(number(z, _TWICE_ROOT) * (z + number(z, _CUBIC) * (z * z * z)))


@njit(**INLINE)
def _gelu_tanh_slope(z):  # pragma: no cover
    one, root, cubic = number(z, 1.0), number(z, _TWICE_ROOT), number(z, _CUBIC)
    far = number(z, 40.0)  # where it has become 0 or 1, long before the square overflows
    z = far if z > far else (-far if z < -far else z)
    square = z * z
    e = exponential(-abs(root * (z + cubic * (square * z))))
    inverse = one / (one + e)
    rise = root * z * (one + number(z, 3 * _CUBIC) * square)
    return ((e if z < number(z, 0.0) else one) + rise * e * inverse) * inverse


@njit(**INLINE)
def _hardsigmoid(z):  # pragma: no cover
    zero, six = number(z, 0.0), number(z, 6.0)
    z += number(z, 3.0)
    z = zero if z < zero else z
    return (six if z > six else z) * number(z, 1 / 6)


@njit(**INLINE)
def _hardsigmoid_slope(z):  # pragma: no cover
    return number(z, 1 / 6) if abs(z) < number(z, 3.0) else number(z, 0.0)


@njit(**INLINE)
def _hardswish_slope(z):  # pragma: no cover
    three = number(z, 3.0)
    slope = z * number(z, 1 / 3) + number(z, 0.5)
    slope = number(z, 1.0) if z >= three else slope
    return number(z, 0.0) if z <= -three else slope


@njit(**INLINE)
def _tanh(z):  # pragma: no cover
    change = exponential_less_1(number(z, -2.0) * abs(z))
    size = change / (number(z, 2.0) + change)
    return size if z < number(z, 0.0) else -size


@njit(**INLINE)
def _mish(z):  # pragma: no cover
    """z tanh(ln(1 + w)) = z ((1 + w)² - 1) / ((1 + w)² + 1), w = exp(z); above 0 in terms of e = 1/w."""
    one, two = number(z, 1.0), number(z, 2.0)
    e = exponential(-abs(z))
    negative = z < number(z, 0.0)
    numerator = e * (e + two) if negative else one + two * e
    return z * (numerator / (numerator + (two if negative else two * e * e)))


@njit(**INLINE)
def _mish_slope(z):  # pragma: no cover
    """t + 4 z w (1 + w) / ((1 + w)² + 1)² with t = tanh(ln(1 + w)); above 0 in terms of e = 1/w."""
    one, two = number(z, 1.0), number(z, 2.0)
    e = exponential(-abs(z))
    square = e * e
    negative = z < number(z, 0.0)
    numerator = e * (e + two) if negative else one + two * e
    inverse = one / (numerator + (two if negative else two * square))
    rise = z * (number(z, 4.0) * ((one + e) * (e if negative else square)))  # 4 z may overflow
    return (numerator + rise * inverse) * inverse


@njit(**PRECISE)
def values(code, p, q, z, n):  # pragma: no cover
    """z[:n] = f(z[:n]), the activation by its code and parameters."""
    v = z[:n]
    if code in (_ELU, _SELU):
        scale = number(z[0], _SELU_SCALE if code == _SELU else 1.0)
        below, rate, zero = scale * number(z[0], p), number(z[0], q), number(z[0], 0.0)
        for i in range(v.size):
            change = exponential_less_1(zero if v[i] > zero else rate * v[i])
            v[i] = scale * v[i] if v[i] > zero else below * change
    elif code == _SILU:
        for i in range(v.size):
            v[i] *= _sigmoid(v[i])
    elif code == _GELU:
        for i in range(v.size):
            v[i] = _gelu(v[i])
    elif code == _GELU_TANH:
        for i in range(v.size):
            v[i] = _gelu_tanh(v[i])
    elif code == _HARDSWISH:
        for i in range(v.size):
            v[i] *= _hardsigmoid(v[i])
    elif code == _HARDSIGMOID:
        for i in range(v.size):
            v[i] = _hardsigmoid(v[i])
    elif code == _SIGMOID:
        for i in range(v.size):
            v[i] = _sigmoid(v[i])
    elif code == _TANH:
        for i in range(v.size):
            v[i] = _tanh(v[i])
    elif code == _SOFTPLUS:
        beta, per_beta, threshold, zero = number(z[0], p), number(z[0], 1 / p), number(z[0], q), number(z[0], 0.0)
        for i in range(v.size):
            scaled = beta * v[i]
            bend = logarithm_of_1_plus(exponential(-abs(scaled)))
            soft = per_beta * ((scaled if scaled > zero else zero) + bend)
            v[i] = v[i] if scaled > threshold else soft
    elif code == _MISH:
        for i in range(v.size):
            v[i] = _mish(v[i])


@njit(**PRECISE)
def slopes(code, p, q, z, n):  # pragma: no cover
    """z[:n] = f'(z[:n]), the activation by its code and parameters; at a kink as `Activation.derivative` has it."""
    v = z[:n]
    if code in (_ELU, _SELU):
        scale = number(z[0], _SELU_SCALE if code == _SELU else 1.0)
        rate, zero = number(z[0], q), number(z[0], 0.0)
        below = scale * number(z[0], p * q)
        for i in range(v.size):
            v[i] = scale if v[i] > zero else below * exponential(rate * v[i])
    elif code == _SILU:
        for i in range(v.size):
            v[i] = _silu_slope(v[i])
    elif code == _GELU:
        for i in range(v.size):
            v[i] = _gelu_slope(v[i])
    elif code == _GELU_TANH:
        for i in range(v.size):
            v[i] = _gelu_tanh_slope(v[i])
    elif code == _HARDSWISH:
        for i in range(v.size):
            v[i] = _hardswish_slope(v[i])
    elif code == _HARDSIGMOID:
        for i in range(v.size):
            v[i] = _hardsigmoid_slope(v[i])
    elif code == _SIGMOID:
        for i in range(v.size):
            v[i] = _bell(v[i])
    elif code == _TANH:
        for i in range(v.size):
            v[i] = number(v[i], 4) * _bell(number(v[i], 2) * v[i])
    elif code == _SOFTPLUS:
        beta, threshold = number(z[0], p), number(z[0], q)
        for i in range(v.size):
            scaled = beta * v[i]
            v[i] = number(v[i], 1) if scaled > threshold else _sigmoid(scaled)
    elif code == _MISH:
        for i in range(v.size):
            v[i] = _mish_slope(v[i])
