"""Kernels that keep all positions of a channel block on chip: x is read once, and what comes out is written once.

One program per channel block; pointers as in `split`.
"""

# pyright: reportMissingImports=false
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false

import triton
import triton.language as tl

from steadynorm.ops.gpu.tiles import (
    affine,
    by_channel,
    kept,
    loaded,
    offsets,
    pre_activation,
    slope_of,
    statistics_of,
    weights_of,
    z_of,
)

__all__ = ["backward", "forward"]


@triton.jit
def forward(
    x_ptr, residual_ptr, gamma_ptr, beta_ptr, weight_ptr, valid_ptr, table_ptr, y_ptr, P, S, C, eps,
    a: tl.constexpr, b: tl.constexpr, NAME: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Writes the statistics to table_ptr and y to y_ptr; BLOCK_P is at least P."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P).to(tl.int64)
    inside = (p < P)[:, None] & (c < C)[None, :]
    at = offsets(p, c, S, C, COLUMNS)
    w = weights_of(weight_ptr, p, P, WIDE)
    tile = loaded(x_ptr, at, inside, WIDE)
    origin = tl.max(tl.where((w > 0)[:, None], tile, float("-inf")), 0)
    origin = tl.where(tl.abs(origin) < float("inf"), origin, 0.0)
    n, mean, m2 = statistics_of(tile, w, origin)
    mean = tl.where(n > 0, mean, 0.0)
    per_n = tl.where(n > 0, 1 / tl.where(n > 0, n, 1.0), 0.0)
    tl.store(table_ptr + c, mean * 0 + n, mask=c < C)
    tl.store(table_ptr + C + c, mean, mask=c < C)
    tl.store(table_ptr + 2 * C + c, m2, mask=c < C)
    invstd = (1 / tl.sqrt(m2 * per_n + eps)).to(WIDE)
    gamma, beta = affine(gamma_ptr, beta_ptr, c, C, WIDE)
    there = kept(valid_ptr, p, P, inside)
    high = mean.to(WIDE)
    low = (mean - high.to(tl.float64)).to(WIDE)
    centred = (tile - high[None, :]) - low[None, :]
    y = z_of(pre_activation(centred, invstd * gamma, beta, residual_ptr, at, there, WIDE), NAME, a, b)
    tl.store(y_ptr + at, tl.where(there, y, 0.0).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward(
    x_ptr, grad_y_ptr, residual_ptr, gamma_ptr, beta_ptr, weight_ptr, valid_ptr, table_ptr, sums_ptr,
    grad_x_ptr, grad_residual_ptr, P, S, C, eps,
    a: tl.constexpr, b: tl.constexpr, NAME: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Writes Σ g and Σ g z to sums_ptr, and dL/dx and, where its pointer is there, dL/dresidual."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P).to(tl.int64)
    inside = (p < P)[:, None] & (c < C)[None, :]
    at = offsets(p, c, S, C, COLUMNS)
    there = kept(valid_ptr, p, P, inside)
    w = weights_of(weight_ptr, p, P, WIDE)[:, None]
    high, low, invstd, per_n = by_channel(table_ptr, c, C, eps, WIDE)
    gamma, beta = affine(gamma_ptr, beta_ptr, c, C, WIDE)
    z = tl.where(there, (loaded(x_ptr, at, there, WIDE) - high[None, :]) - low[None, :], 0.0)
    y = pre_activation(z, invstd * gamma, beta, residual_ptr, at, there, WIDE)
    z = z * invstd[None, :]
    g = loaded(grad_y_ptr, at, there, WIDE) * slope_of(y, NAME, a, b)
    g = tl.where(there, g, 0.0)
    sum_g = tl.sum(g, 0)
    sum_gz = tl.sum(g * z, 0)
    tl.store(sums_ptr + c, sum_g.to(tl.float64), mask=c < C)
    tl.store(sums_ptr + C + c, sum_gz.to(tl.float64), mask=c < C)
    if grad_residual_ptr is not None:
        tl.store(grad_residual_ptr + at, g.to(grad_residual_ptr.dtype.element_ty), mask=inside)
    pull = w * ((sum_g * per_n)[None, :] + z * (sum_gz * per_n)[None, :])
    dx = (g - tl.where(w > 0, pull, 0.0)) * (invstd * gamma)[None, :]
    tl.store(grad_x_ptr + at, tl.where(there, dx, 0.0).to(grad_x_ptr.dtype.element_ty), mask=inside)
