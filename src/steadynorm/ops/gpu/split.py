"""Kernels that split a channel's positions over programs: partial results first, which `gathering` puts together.

The grid has one axis: program = part * (number of channel blocks) + channel block. In every kernel x_ptr, residual_ptr,
y_ptr, grad_*_ptr of x's size lie as `tiles` says; weight_ptr and valid_ptr are (P,), gamma_ptr and beta_ptr (C,),
count_ptr, mean_ptr and m2_ptr (C,) of any dtype, partial_ptr (parts, 3 or 2, C) float64, sums_ptr (2, C) float64.

The kernels that read x a second time begin at its end: what was read last may still be in the cache.
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
    kept,
    loaded,
    merged_sums,
    place,
    positions_before,
    pre_activation,
    slope_of,
    weights_of,
    z_of,
)

__all__ = ["gradient", "measure", "normalize", "reduce"]

_ANY = ["N", "S", "C", "per_row", "steps", "eps", "eps_low"]  # of which no kernel is compiled for a value of its own


@triton.jit(do_not_specialize=_ANY)
def measure(
    x_ptr, weight_ptr, partial_ptr, N, S, C, per_row, steps,
    COLUMNS: tl.constexpr, UNIT: tl.constexpr, LONG: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Writes one part's count, mean and m2 to partial_ptr (parts, 3, C).

    Sums run over differences from the first tile's mean. That tile being one of `steps`, its mean lies within
    sqrt(steps) standard deviations of the part's, so that m2 loses few digits, whatever the data.
    """
    blocks = tl.cdiv(C, BLOCK_C)
    part = tl.program_id(0) // blocks
    c0 = (tl.program_id(0) % blocks) * BLOCK_C
    t = part * steps
    base, lane, inside, p = place(t, c0, N, S, C, per_row, COLUMNS, UNIT, LONG, BLOCK_P, BLOCK_S, BLOCK_C)
    w, some = weights_of(weight_ptr, p, inside, WIDE)
    tile = loaded(x_ptr + base, lane, some, WIDE, False)
    scale, shift = centre_of(tile, w, some)
    apart = tl.where(some, tile * scale[None, :] - shift[None, :], 0.0)
    n = w
    sum_1 = w * apart
    sum_2 = sum_1 * apart
    for step in tl.range(1, steps):
        base, lane, inside, p = place(t + step, c0, N, S, C, per_row, COLUMNS, UNIT, LONG, BLOCK_P, BLOCK_S, BLOCK_C)
        w, some = weights_of(weight_ptr, p, inside, WIDE)
        tile = loaded(x_ptr + base, lane, some, WIDE, False)
        if weight_ptr is None:
            apart = tl.where(some, tile * scale[None, :] - shift[None, :], 0.0)
            sum_1 += apart
            sum_2 += apart * apart
        else:
            # Nothing may have counted so far, so that only now there is a mean to be had.
            found = tl.sum(n, 0) > 0
            later_scale, later_shift = centre_of(tile, w, some)
            scale, shift = tl.where(found, scale, later_scale), tl.where(found, shift, later_shift)
            apart = tl.where(some, tile * scale[None, :] - shift[None, :], 0.0)
            n += w
            sum_1 += w * apart
            sum_2 += w * apart * apart
    if weight_ptr is None:
        count = positions_before(t + steps, N, S, per_row, COLUMNS, BLOCK_P, BLOCK_S)
        count -= positions_before(t, N, S, per_row, COLUMNS, BLOCK_P, BLOCK_S)
        n_all = tl.full((BLOCK_C,), count, tl.float64)
    else:
        n_all = tl.sum(n, 0).to(tl.float64)
    c = c0 + tl.arange(0, BLOCK_C)
    out = partial_ptr + part.to(tl.int64) * 3 * C + c
    mean, m2 = merged_sums(n_all, tl.sum(sum_1, 0), tl.sum(sum_2, 0), scale, shift)
    tl.store(out, n_all, mask=c < C)
    tl.store(out + C, mean, mask=c < C)
    tl.store(out + 2 * C, m2, mask=c < C)


@triton.jit(do_not_specialize=_ANY)
def normalize(
    x_ptr, residual_ptr, gamma_ptr, beta_ptr, valid_ptr, count_ptr, mean_ptr, m2_ptr, y_ptr,
    N, S, C, per_row, steps, eps, eps_low,
    a: tl.constexpr, b: tl.constexpr, NAME: tl.constexpr, COLUMNS: tl.constexpr, UNIT: tl.constexpr,
    LONG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y = f(γ (x - μ) / sqrt(σ² + ε) + β + residual), 0 where not valid."""
    blocks = tl.cdiv(C, BLOCK_C)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    c0 = (program % blocks) * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    high, low, invstd, _ = by_channel(count_ptr, mean_ptr, m2_ptr, c, C, eps, eps_low, WIDE)
    gamma, beta = affine(gamma_ptr, beta_ptr, c, C, WIDE)
    last = (program // blocks) * steps + steps - 1
    for step in tl.range(0, steps):
        base, lane, inside, p = place(last - step, c0, N, S, C, per_row, COLUMNS, UNIT, LONG, BLOCK_P, BLOCK_S, BLOCK_C)
        there = kept(valid_ptr, p, inside)
        centred = (loaded(x_ptr + base, lane, there, WIDE, True) - high[None, :]) - low[None, :]
        y = pre_activation(centred, invstd * gamma, beta, residual_ptr, base, lane, there, WIDE, True)
        y = z_of(y, NAME, a, b)
        if valid_ptr is not None:
            y = tl.where(there, y, 0.0)
        tl.store(y_ptr + base + lane, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_ANY)
def reduce(
    x_ptr, grad_y_ptr, residual_ptr, gamma_ptr, beta_ptr, valid_ptr, count_ptr, mean_ptr, m2_ptr,
    partial_ptr, grad_residual_ptr, N, S, C, per_row, steps, eps, eps_low,
    a: tl.constexpr, b: tl.constexpr, NAME: tl.constexpr, COLUMNS: tl.constexpr, UNIT: tl.constexpr,
    LONG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Writes one part's Σ g and Σ g z to partial_ptr (parts, 2, C), with g = dL/dy f'(γ z + β + residual).

    Where grad_residual_ptr is there, g is written to it, too: what comes next then needs neither f' nor the residual.
    """
    blocks = tl.cdiv(C, BLOCK_C)
    part = tl.program_id(0) // blocks
    c0 = (tl.program_id(0) % blocks) * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    high, low, invstd, _ = by_channel(count_ptr, mean_ptr, m2_ptr, c, C, eps, eps_low, WIDE)
    gamma, beta = affine(gamma_ptr, beta_ptr, c, C, WIDE)
    scale = invstd * gamma
    sum_g = tl.zeros((BLOCK_P, BLOCK_C), WIDE)
    sum_gx = tl.zeros((BLOCK_P, BLOCK_C), WIDE)
    for step in tl.range(0, steps):
        t = part * steps + step
        base, lane, inside, p = place(t, c0, N, S, C, per_row, COLUMNS, UNIT, LONG, BLOCK_P, BLOCK_S, BLOCK_C)
        there = kept(valid_ptr, p, inside)
        x = loaded(x_ptr + base, lane, there, WIDE, False)
        g = loaded(grad_y_ptr + base, lane, there, WIDE, False)  # 0 where nothing is, and so are both products
        centred = (x - high[None, :]) - low[None, :]
        y = pre_activation(centred, scale, beta, residual_ptr, base, lane, there, WIDE, False)
        g = g * slope_of(y, NAME, a, b)
        if grad_residual_ptr is not None:
            tl.store(grad_residual_ptr + base + lane, g.to(grad_residual_ptr.dtype.element_ty), mask=inside)
        sum_g += g
        sum_gx += g * centred
    out = partial_ptr + part.to(tl.int64) * 2 * C + c
    tl.store(out, tl.sum(sum_g, 0).to(tl.float64), mask=c < C)
    tl.store(out + C, (tl.sum(sum_gx, 0) * invstd).to(tl.float64), mask=c < C)


@triton.jit(do_not_specialize=_ANY)
def gradient(
    x_ptr, grad_y_ptr, residual_ptr, gamma_ptr, beta_ptr, weight_ptr, valid_ptr, count_ptr, mean_ptr, m2_ptr,
    sums_ptr, moments_ptr, grad_x_ptr, grad_residual_ptr, N, S, C, per_row, steps, eps, eps_low,
    a: tl.constexpr, b: tl.constexpr, NAME: tl.constexpr, COLUMNS: tl.constexpr, UNIT: tl.constexpr,
    LONG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dL/dx and, where its pointer is there, dL/dresidual = g.

    sums_ptr is None where the statistics are constants; moments_ptr (2, C) float64 holds dL/dμ and dL/dm2, or is None.
    """
    blocks = tl.cdiv(C, BLOCK_C)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    c0 = (program % blocks) * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    high, low, invstd, per_n = by_channel(count_ptr, mean_ptr, m2_ptr, c, C, eps, eps_low, WIDE)
    gamma, beta = affine(gamma_ptr, beta_ptr, c, C, WIDE)
    scale = invstd * gamma
    # dL/dx = scale g - w (level + slope (x - μ)), once all that is the same for a channel is put together.
    level, slope = gamma * 0, gamma * 0
    if sums_ptr is not None:
        level += scale * per_n * tl.load(sums_ptr + c, mask=c < C, other=0.0).to(WIDE)
        slope += scale * per_n * invstd * tl.load(sums_ptr + C + c, mask=c < C, other=0.0).to(WIDE)
    if moments_ptr is not None:
        level -= per_n * tl.load(moments_ptr + c, mask=c < C, other=0.0).to(WIDE)
        slope -= 2 * tl.load(moments_ptr + C + c, mask=c < C, other=0.0).to(WIDE)
    last = (program // blocks) * steps + steps - 1
    for step in tl.range(0, steps):
        base, lane, inside, p = place(last - step, c0, N, S, C, per_row, COLUMNS, UNIT, LONG, BLOCK_P, BLOCK_S, BLOCK_C)
        there = kept(valid_ptr, p, inside)
        x = loaded(x_ptr + base, lane, there, WIDE, True)
        g = loaded(grad_y_ptr + base, lane, there, WIDE, True)
        centred = (x - high[None, :]) - low[None, :]
        y = pre_activation(centred, scale, beta, residual_ptr, base, lane, there, WIDE, True)
        g = g * slope_of(y, NAME, a, b)
        if grad_residual_ptr is not None:
            tl.store(grad_residual_ptr + base + lane, g.to(grad_residual_ptr.dtype.element_ty), mask=inside)
        pull = level[None, :] + slope[None, :] * centred
        if weight_ptr is not None:
            w, some = weights_of(weight_ptr, p, inside, WIDE)
            pull = tl.where(some, w * pull, 0.0)
        dx = scale[None, :] * g - pull
        if valid_ptr is not None:
            dx = tl.where(there, dx, 0.0)
        tl.store(grad_x_ptr + base + lane, dx.to(grad_x_ptr.dtype.element_ty), mask=inside)
