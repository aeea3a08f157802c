"""What all kernels share: where a tile of positions x channels lies in memory, and one tile's arithmetic."""

# pyright: reportMissingImports=false
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportReturnType=false

import triton
import triton.language as tl

from steadynorm.ops.gpu.elementary import derivative, value

__all__ = [
    "affine",
    "by_channel",
    "kept",
    "loaded",
    "offsets",
    "pre_activation",
    "slope_of",
    "statistics_of",
    "weights_of",
    "z_of",
]


@triton.jit
def offsets(p, c, S, C, COLUMNS: tl.constexpr):
    """Elements from the start to position p of channel c, (BLOCK_P, BLOCK_C), in 64 bits.

    Columns are (P, C) with the channels fastest; planes are (P / S, C, S).
    """
    if COLUMNS:  # noqa: SIM108 (only one of the two is compiled)
        at = p[:, None] * C + c[None, :]
    else:
        at = ((p // S) * S * C + p % S)[:, None] + (c.to(tl.int64) * S)[None, :]
    return at


@triton.jit
def loaded(pointer, at, inside, WIDE: tl.constexpr):
    """A tile in the computing dtype, 0 outside of the tensor."""
    return tl.load(pointer + at, mask=inside, other=0.0).to(WIDE)


@triton.jit
def weights_of(weight_ptr, p, P, WIDE: tl.constexpr):
    """How much each position counts, (BLOCK_P,); `weight_ptr` (P,) or None for 1 each; 0 outside."""
    if weight_ptr is None:
        w = tl.where(p < P, 1.0, 0.0).to(WIDE)
    else:
        w = tl.load(weight_ptr + p, mask=p < P, other=0.0).to(WIDE)
    return w


@triton.jit
def kept(valid_ptr, p, P, inside):
    """Which elements of the tile are there and valid; `valid_ptr` (P,) uint8, or None for all."""
    if valid_ptr is not None:
        inside = inside & (tl.load(valid_ptr + p, mask=p < P, other=0) != 0)[:, None]
    return inside


@triton.jit
def statistics_of(tile, w, origin):
    """One tile's total weight n, a scalar, mean and m2, (BLOCK_C,), in float64, by two passes over values near 0.

    `origin` (BLOCK_C,) is any value of the channel: what is taken from it has few digits, and sums up without loss.
    """
    some = w[:, None] > 0
    near = tl.where(some, tile - origin[None, :], 0.0)
    n = tl.sum(w, 0)
    per_n = 1 / tl.where(n > 0, n, 1.0)
    mean = tl.sum(near * w[:, None], 0) * per_n
    centred = tl.where(some, near - mean[None, :], 0.0)
    mean_left = tl.sum(centred * w[:, None], 0)  # the rounding of the mean (Chan 1983)
    m2 = tl.sum(centred * centred * w[:, None], 0) - mean_left * mean_left * per_n
    mean64 = origin.to(tl.float64) + mean.to(tl.float64) + (mean_left * per_n).to(tl.float64)
    return n.to(tl.float64), mean64, m2.to(tl.float64)


@triton.jit
def by_channel(table_ptr, c, C, eps, WIDE: tl.constexpr):
    """μ in two parts that sum up to it, 1 / sqrt(σ² + ε) and 1 / n (0 for n = 0), each (BLOCK_C,).

    `table_ptr` (3, C) float64: count, mean, m2.
    """
    there = c < C
    n = tl.load(table_ptr + c, mask=there, other=0.0)
    mean = tl.load(table_ptr + C + c, mask=there, other=0.0)
    m2 = tl.load(table_ptr + 2 * C + c, mask=there, other=0.0)
    per_n = tl.where(n > 0, 1 / tl.where(n > 0, n, 1.0), 0.0)
    invstd = 1 / tl.sqrt(m2 * per_n + eps)
    high = mean.to(WIDE)
    return high, (mean - high.to(tl.float64)).to(WIDE), invstd.to(WIDE), per_n.to(WIDE)


@triton.jit
def affine(gamma_ptr, beta_ptr, c, C, WIDE: tl.constexpr):
    """γ and β, (BLOCK_C,); each pointer (C,) or None."""
    gamma = tl.where(c < C, 1.0, 0.0).to(WIDE)
    beta = gamma * 0
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(WIDE)
    if beta_ptr is not None:
        beta = tl.load(beta_ptr + c, mask=c < C, other=0.0).to(WIDE)
    return gamma, beta


@triton.jit
def pre_activation(centred, scale, beta, residual_ptr, at, inside, WIDE: tl.constexpr):
    """γ z + β + residual; `residual_ptr` laid out as x, or None."""
    y = centred * scale[None, :] + beta[None, :]
    if residual_ptr is not None:
        y += loaded(residual_ptr, at, inside, WIDE)
    return y


@triton.jit
def z_of(y, NAME: tl.constexpr, a: tl.constexpr, b: tl.constexpr):
    """The activation's value, under a name that a kernel can tell from its derivative."""
    return value(y, NAME, a, b)


@triton.jit
def slope_of(y, NAME: tl.constexpr, a: tl.constexpr, b: tl.constexpr):
    """The activation's derivative."""
    return derivative(y, NAME, a, b)
