"""Kernels that split a channel's positions over programs: partial results first, gathered by a second kernel.

The grid has one axis: program = part * (number of channel blocks) + channel block. In every kernel x_ptr, residual_ptr,
y_ptr, grad_*_ptr of x's size lie as `tiles.offsets` says; weight_ptr and valid_ptr are (P,), gamma_ptr and beta_ptr
(C,), table_ptr (3, C) float64, partial_ptr (parts, 3 or 2, C) float64, sums_ptr (2, C) float64.
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

__all__ = ["gather_gradients", "gather_statistics", "gradient", "measure", "normalize", "reduce"]


@triton.jit
def measure(
    x_ptr, weight_ptr, partial_ptr, P, S, C, steps,
    COLUMNS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Writes one part's count, mean and m2 to partial_ptr (parts, 3, C)."""
    blocks = tl.cdiv(C, BLOCK_C)
    part = tl.program_id(0) // blocks
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.zeros((BLOCK_C,), tl.float64)
    mean = tl.zeros((BLOCK_C,), tl.float64)
    m2 = tl.zeros((BLOCK_C,), tl.float64)
    for step in range(0, steps):
        p = (part.to(tl.int64) * steps + step) * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = (p < P)[:, None] & (c < C)[None, :]
        at = offsets(p, c, S, C, COLUMNS)
        w = weights_of(weight_ptr, p, P, WIDE)
        tile = loaded(x_ptr, at, inside & (w > 0)[:, None], WIDE)
        # The largest value that counts: any one will do, as long as it is finite.
        origin = tl.max(tl.where((w > 0)[:, None], tile, float("-inf")), 0)
        origin = tl.where(tl.abs(origin) < float("inf"), origin, 0.0)
        n_tile, mean_tile, m2_tile = statistics_of(tile, w, origin)
        total = n + n_tile
        share = n_tile / tl.where(total > 0, total, 1.0)
        apart = tl.where(n_tile > 0, mean_tile - mean, 0.0)
        mean += apart * share
        m2 += m2_tile + apart * apart * share * n
        n = total
    out = partial_ptr + part.to(tl.int64) * 3 * C + c
    tl.store(out, n, mask=c < C)
    tl.store(out + C, mean, mask=c < C)
    tl.store(out + 2 * C, m2, mask=c < C)


@triton.jit
def gather_statistics(partial_ptr, table_ptr, C, parts, BLOCK_C: tl.constexpr):
    """Merges partial_ptr (parts, 3, C) to table_ptr (3, C), part by part in their order."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    there = c < C
    n = tl.zeros((BLOCK_C,), tl.float64)
    mean = tl.zeros((BLOCK_C,), tl.float64)
    m2 = tl.zeros((BLOCK_C,), tl.float64)
    for part in range(0, parts):
        at = partial_ptr + part * 3 * C + c
        n_part = tl.load(at, mask=there, other=0.0)
        apart = tl.where(n_part > 0, tl.load(at + C, mask=there, other=0.0) - mean, 0.0)
        total = n + n_part
        share = n_part / tl.where(total > 0, total, 1.0)
        mean += apart * share
        m2 += tl.load(at + 2 * C, mask=there, other=0.0) + apart * apart * share * n
        n = total
    tl.store(table_ptr + c, n, mask=there)
    tl.store(table_ptr + C + c, mean, mask=there)
    tl.store(table_ptr + 2 * C + c, m2, mask=there)


@triton.jit
def normalize(
    x_ptr, residual_ptr, gamma_ptr, beta_ptr, valid_ptr, table_ptr, y_ptr, P, S, C, eps,
    a: tl.constexpr, b: tl.constexpr, NAME: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """y = f(γ (x - μ) / sqrt(σ² + ε) + β + residual), 0 where not valid."""
    blocks = tl.cdiv(C, BLOCK_C)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (p < P)[:, None] & (c < C)[None, :]
    at = offsets(p, c, S, C, COLUMNS)
    there = kept(valid_ptr, p, P, inside)
    high, low, invstd, _ = by_channel(table_ptr, c, C, eps, WIDE)
    gamma, beta = affine(gamma_ptr, beta_ptr, c, C, WIDE)
    centred = (loaded(x_ptr, at, there, WIDE) - high[None, :]) - low[None, :]
    y = z_of(pre_activation(centred, invstd * gamma, beta, residual_ptr, at, there, WIDE), NAME, a, b)
    tl.store(y_ptr + at, tl.where(there, y, 0.0).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def reduce(
    x_ptr, grad_y_ptr, residual_ptr, gamma_ptr, beta_ptr, valid_ptr, table_ptr, partial_ptr, P, S, C, steps, eps,
    a: tl.constexpr, b: tl.constexpr, NAME: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Writes one part's Σ g and Σ g z to partial_ptr (parts, 2, C), with g = dL/dy f'(γ z + β + residual)."""
    blocks = tl.cdiv(C, BLOCK_C)
    part = tl.program_id(0) // blocks
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    high, low, invstd, _ = by_channel(table_ptr, c, C, eps, WIDE)
    gamma, beta = affine(gamma_ptr, beta_ptr, c, C, WIDE)
    sum_g = tl.zeros((BLOCK_C,), tl.float64)
    sum_gz = tl.zeros((BLOCK_C,), tl.float64)
    for step in range(0, steps):
        p = (part.to(tl.int64) * steps + step) * BLOCK_P + tl.arange(0, BLOCK_P)
        there = kept(valid_ptr, p, P, (p < P)[:, None] & (c < C)[None, :])
        at = offsets(p, c, S, C, COLUMNS)
        centred = tl.where(there, (loaded(x_ptr, at, there, WIDE) - high[None, :]) - low[None, :], 0.0)
        g = loaded(grad_y_ptr, at, there, WIDE)
        y = pre_activation(centred, invstd * gamma, beta, residual_ptr, at, there, WIDE)
        g = tl.where(there, g * slope_of(y, NAME, a, b), 0.0)
        sum_g += tl.sum(g, 0).to(tl.float64)
        sum_gz += tl.sum(g * centred * invstd[None, :], 0).to(tl.float64)
    out = partial_ptr + part.to(tl.int64) * 2 * C + c
    tl.store(out, sum_g, mask=c < C)
    tl.store(out + C, sum_gz, mask=c < C)


@triton.jit
def gather_gradients(partial_ptr, sums_ptr, C, parts, BLOCK_C: tl.constexpr):
    """Adds partial_ptr (parts, 2, C) up to sums_ptr (2, C), part by part in their order."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    there = c < C
    sum_g = tl.zeros((BLOCK_C,), tl.float64)
    sum_gz = tl.zeros((BLOCK_C,), tl.float64)
    for part in range(0, parts):
        at = partial_ptr + part * 2 * C + c
        sum_g += tl.load(at, mask=there, other=0.0)
        sum_gz += tl.load(at + C, mask=there, other=0.0)
    tl.store(sums_ptr + c, sum_g, mask=there)
    tl.store(sums_ptr + C + c, sum_gz, mask=there)


@triton.jit
def gradient(
    x_ptr, grad_y_ptr, residual_ptr, gamma_ptr, beta_ptr, weight_ptr, valid_ptr, table_ptr, sums_ptr, moments_ptr,
    grad_x_ptr, grad_residual_ptr, P, S, C, eps,
    a: tl.constexpr, b: tl.constexpr, NAME: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """dL/dx and, where its pointer is there, dL/dresidual = g.

    sums_ptr is None where the statistics are constants; moments_ptr (2, C) float64 holds dL/dμ and dL/dm2, or is None.
    """
    blocks = tl.cdiv(C, BLOCK_C)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (p < P)[:, None] & (c < C)[None, :]
    at = offsets(p, c, S, C, COLUMNS)
    there = kept(valid_ptr, p, P, inside)
    w = weights_of(weight_ptr, p, P, WIDE)[:, None]
    high, low, invstd, per_n = by_channel(table_ptr, c, C, eps, WIDE)
    gamma, beta = affine(gamma_ptr, beta_ptr, c, C, WIDE)
    scale = invstd * gamma
    centred = (loaded(x_ptr, at, there, WIDE) - high[None, :]) - low[None, :]
    y = pre_activation(centred, scale, beta, residual_ptr, at, there, WIDE)
    g = loaded(grad_y_ptr, at, there, WIDE) * slope_of(y, NAME, a, b)
    if grad_residual_ptr is not None:
        to_residual = tl.where(there, g, 0.0).to(grad_residual_ptr.dtype.element_ty)
        tl.store(grad_residual_ptr + at, to_residual, mask=inside)
    dx = g
    if sums_ptr is not None:
        sum_g = tl.load(sums_ptr + c, mask=c < C, other=0.0).to(WIDE) * per_n
        sum_gz = tl.load(sums_ptr + C + c, mask=c < C, other=0.0).to(WIDE) * per_n
        dx -= tl.where(w > 0, w * (sum_g[None, :] + centred * (invstd * sum_gz)[None, :]), 0.0)
    dx = dx * scale[None, :]
    if moments_ptr is not None:
        to_mean = tl.load(moments_ptr + c, mask=c < C, other=0.0).to(WIDE) * per_n
        to_m2 = tl.load(moments_ptr + C + c, mask=c < C, other=0.0).to(WIDE) * 2
        dx += tl.where(w > 0, w * (to_mean[None, :] + centred * to_m2[None, :]), 0.0)
    tl.store(grad_x_ptr + at, tl.where(there, dx, 0.0).to(grad_x_ptr.dtype.element_ty), mask=inside)
