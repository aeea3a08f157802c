"""Kernels that keep all positions of a channel block on chip: x is read once, and what comes out is written once.

One program per channel block, whose tile 0 holds all positions; pointers as in `split`; table_ptr (3, C) float64.
"""

# pyright: reportMissingImports=false
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportGeneralTypeIssues=false, reportConstantRedefinition=false

import triton
import triton.language as tl

from steadynorm.ops.gpu.tiles import (
    affine,
    by_channel,
    centre_of,
    invstd_of,
    kept,
    loaded,
    merged_sums,
    place,
    pre_activation,
    slope_of,
    weights_of,
    z_of,
)

__all__ = ["backward", "forward"]

_ANY = ["N", "S", "C", "per_row", "eps", "eps_low"]


@triton.jit(do_not_specialize=_ANY)
def forward(
    x_ptr, residual_ptr, gamma_ptr, beta_ptr, weight_ptr, valid_ptr, table_ptr, y_ptr,
    N, S, C, per_row, eps, eps_low,
    a: tl.constexpr, b: tl.constexpr, NAME: tl.constexpr, COLUMNS: tl.constexpr, UNIT: tl.constexpr,
    LONG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Writes the statistics to table_ptr and y to y_ptr."""
    c0 = tl.program_id(0) * BLOCK_C
    t = tl.full((), 0, tl.int32)
    base, lane, inside, p = place(t, c0, N, S, C, per_row, COLUMNS, UNIT, LONG, BLOCK_P, BLOCK_S, BLOCK_C)
    w, some = weights_of(weight_ptr, p, inside, WIDE)
    x = loaded(x_ptr + base, lane, inside, WIDE, True)
    scale, shift = centre_of(x, w, some)
    apart = tl.where(some, x * scale[None, :] - shift[None, :], 0.0)
    if weight_ptr is None:  # noqa: SIM108 (only one of the two is compiled)
        n = tl.full((BLOCK_C,), N, tl.float64) * S
    else:
        n = tl.sum(w, 0).to(tl.float64)
    mean, m2 = merged_sums(n, tl.sum(w * apart, 0), tl.sum(w * apart * apart, 0), scale, shift)
    c = c0 + tl.arange(0, BLOCK_C)
    tl.store(table_ptr + c, n, mask=c < C)
    tl.store(table_ptr + C + c, mean, mask=c < C)
    tl.store(table_ptr + 2 * C + c, m2, mask=c < C)
    per_n = tl.where(n > 0, 1 / tl.where(n > 0, n, 1.0), 0.0)
    invstd = invstd_of(m2 * per_n, eps, eps_low, WIDE)
    gamma, beta = affine(gamma_ptr, beta_ptr, c, C, WIDE)
    there = kept(valid_ptr, p, inside)
    high = mean.to(WIDE)
    low = (mean - high.to(tl.float64)).to(WIDE)
    centred = (x - high[None, :]) - low[None, :]
    y = pre_activation(centred, invstd * gamma, beta, residual_ptr, base, lane, there, WIDE, True)
    y = tl.where(there, z_of(y, NAME, a, b), 0.0)
    tl.store(y_ptr + base + lane, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_ANY)
def backward(
    x_ptr, grad_y_ptr, residual_ptr, gamma_ptr, beta_ptr, weight_ptr, valid_ptr,
    count_ptr, mean_ptr, m2_ptr, grad_gamma_ptr, grad_beta_ptr, grad_x_ptr, grad_residual_ptr,
    N, S, C, per_row, eps, eps_low,
    a: tl.constexpr, b: tl.constexpr, NAME: tl.constexpr, COLUMNS: tl.constexpr, UNIT: tl.constexpr,
    LONG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Writes dL/dx and, each where its pointer is there, dL/dγ, dL/dβ and dL/dresidual."""
    c0 = tl.program_id(0) * BLOCK_C
    t = tl.full((), 0, tl.int32)
    base, lane, inside, p = place(t, c0, N, S, C, per_row, COLUMNS, UNIT, LONG, BLOCK_P, BLOCK_S, BLOCK_C)
    there = kept(valid_ptr, p, inside)
    x = loaded(x_ptr + base, lane, there, WIDE, True)
    g = loaded(grad_y_ptr + base, lane, there, WIDE, True)
    w, some = weights_of(weight_ptr, p, inside, WIDE)
    c = c0 + tl.arange(0, BLOCK_C)
    high, low, invstd, per_n = by_channel(count_ptr, mean_ptr, m2_ptr, c, C, eps, eps_low, WIDE)
    gamma, beta = affine(gamma_ptr, beta_ptr, c, C, WIDE)
    centred = (x - high[None, :]) - low[None, :]
    y = pre_activation(centred, invstd * gamma, beta, residual_ptr, base, lane, there, WIDE, True)
    z = centred * invstd[None, :]
    g = g * slope_of(y, NAME, a, b)  # 0 where nothing is, as in both sums
    sum_g = tl.sum(g, 0)
    sum_gz = tl.sum(g * z, 0)
    if grad_gamma_ptr is not None:
        tl.store(grad_gamma_ptr + c, sum_gz.to(grad_gamma_ptr.dtype.element_ty), mask=c < C)
    if grad_beta_ptr is not None:
        tl.store(grad_beta_ptr + c, sum_g.to(grad_beta_ptr.dtype.element_ty), mask=c < C)
    if grad_residual_ptr is not None:
        tl.store(grad_residual_ptr + base + lane, g.to(grad_residual_ptr.dtype.element_ty), mask=inside)
    pull = w * ((sum_g * per_n)[None, :] + z * (sum_gz * per_n)[None, :])
    dx = (g - tl.where(some, pull, 0.0)) * (invstd * gamma)[None, :]
    tl.store(grad_x_ptr + base + lane, tl.where(there, dx, 0.0).to(grad_x_ptr.dtype.element_ty), mask=inside)
