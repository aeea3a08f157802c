"""The activations as Triton code: value and derivative by name, chosen while a kernel is compiled."""

# Triton's kernels are untyped: what stands in for their types is in the docstrings.
# pyright: reportMissingImports=false
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportReturnType=false

import triton
import triton.language as tl

__all__ = ["derivative", "value"]


@triton.jit
def _tanh(z):
    """By exp of a number that is not positive, which cannot overflow."""
    e = tl.exp(-2 * tl.abs(z))
    t = (1 - e) / (1 + e)
    return tl.where(z < 0, -t, t)


@triton.jit
def _sigmoid(z):
    e = tl.exp(-tl.abs(z))
    return tl.where(z < 0, e, 1.0) / (1 + e)


@triton.jit
def _mish_tanh(z):
    """tanh(softplus(z)) = (e² + 2e) / (e² + 2e + 2) with e = exp(z), which is 1 from z = 20 on."""
    e = tl.exp(tl.minimum(z, 20.0))
    return e * (e + 2) / (e * (e + 2) + 2)


@triton.jit
def _gelu_slope(z):
    return 0.7978845608028654 * (1 + 3 * 0.044715 * z * z)


@triton.jit
def value(z, NAME: tl.constexpr, a: tl.constexpr, b: tl.constexpr):
    """f(z), a block in the computing dtype; `a` and `b` are f's parameters, numbers, where it has any."""
    if NAME == "relu":
        z = tl.where(z <= 0, 0.0, z)  # and not maximum, which would hide a NaN
    elif NAME == "relu6":
        z = tl.where(z <= 0, 0.0, tl.where(z >= 6, 6.0, z))
    elif NAME == "leaky_relu":
        z = tl.where(z > 0, z, z * a)
    elif NAME == "elu":
        z = tl.where(z > 0, z, a * (tl.exp(tl.where(z > 0, 0.0, z)) - 1))
    elif NAME == "selu":
        below = 1.6732632423543772 * (tl.exp(tl.where(z > 0, 0.0, z)) - 1)
        z = 1.0507009873554805 * tl.where(z > 0, z, below)
    elif NAME == "celu":
        z = tl.where(z > 0, z, a * (tl.exp(tl.where(z > 0, 0.0, z) / a) - 1))
    elif NAME == "silu":
        z = z * _sigmoid(z)
    elif NAME == "gelu":
        z = 0.5 * z * (1 + tl.math.erf(z * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        z = 0.5 * z * (1 + _tanh(0.7978845608028654 * (z + 0.044715 * z * z * z)))
    elif NAME == "hardswish":
        z = tl.where(z <= -3, 0.0, tl.where(z >= 3, z, z * (z + 3) / 6))
    elif NAME == "hardsigmoid":
        z = tl.where(z <= -3, 0.0, tl.where(z >= 3, 1.0, (z + 3) / 6))
    elif NAME == "sigmoid":
        z = _sigmoid(z)
    elif NAME == "tanh":
        z = _tanh(z)
    elif NAME == "softplus":
        soft = (tl.where(z > 0, z * a, 0.0) + tl.log(1 + tl.exp(-tl.abs(z * a)))) / a
        z = tl.where(z * a > b, z, soft)
    elif NAME == "mish":
        z = z * _mish_tanh(z)
    return z


@triton.jit
def derivative(z, NAME: tl.constexpr, a: tl.constexpr, b: tl.constexpr):
    """f'(z), a block in the computing dtype, at a kink the value that torch's own backward uses."""
    one = z * 0 + 1
    if NAME == "relu":
        one = tl.where(z > 0, 1.0, 0.0)
    elif NAME == "relu6":
        one = tl.where((z > 0) & (z < 6), 1.0, 0.0)
    elif NAME == "leaky_relu":
        one = tl.where(z > 0, one, one * a)
    elif NAME == "elu":
        one = tl.where(z > 0, 1.0, a * tl.exp(tl.where(z > 0, 0.0, z)))
    elif NAME == "selu":
        one = 1.0507009873554805 * tl.where(z > 0, 1.0, 1.6732632423543772 * tl.exp(tl.where(z > 0, 0.0, z)))
    elif NAME == "celu":
        one = tl.where(z > 0, 1.0, tl.exp(tl.where(z > 0, 0.0, z) / a))
    elif NAME == "silu":
        s = _sigmoid(z)
        one = s * (1 + z * (1 - s))
    elif NAME == "gelu":
        bell = tl.exp(-0.5 * z * z) * 0.3989422804014327
        one = 0.5 * (1 + tl.math.erf(z * 0.7071067811865476)) + z * bell
    elif NAME == "gelu_tanh":
        t = _tanh(0.7978845608028654 * (z + 0.044715 * z * z * z))
        one = 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * _gelu_slope(z)
    elif NAME == "hardswish":
        one = tl.where(z <= -3, 0.0, tl.where(z >= 3, 1.0, z / 3 + 0.5))
    elif NAME == "hardsigmoid":
        one = tl.where((z > -3) & (z < 3), one / 6, 0.0)
    elif NAME == "sigmoid":
        s = _sigmoid(z)
        one = s * (1 - s)
    elif NAME == "tanh":
        t = _tanh(z)
        one = 1 - t * t
    elif NAME == "softplus":
        one = tl.where(z * a > b, 1.0, _sigmoid(z * a))
    elif NAME == "mish":
        t = _mish_tanh(z)
        one = t + z * _sigmoid(z) * (1 - t * t)
    return one
