"""What all kernels share: where a tile of positions x channels lies in memory, and one tile's arithmetic.

A tensor is N x C x S values: N rows of C channels of S adjacent positions each. Two ways to cut it into tiles of
BLOCK_P positions and BLOCK_C channels:

    columns   S = 1: BLOCK_P rows, BLOCK_C adjacent channels of each
    planes    one channel (BLOCK_C = 1): BLOCK_P / BLOCK_S rows, BLOCK_S adjacent positions of each

What lies adjacent is read 16 bytes at a time where UNIT, a power of two that divides C (columns) or S (planes), allows
it. Tiles are counted along the positions of a channel; `per_row` of them lie side by side in a row.
"""

# pyright: reportMissingImports=false
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportGeneralTypeIssues=false, reportConstantRedefinition=false
# pyright: reportReturnType=false

import triton
import triton.language as tl

from steadynorm.ops.gpu.elementary import derivative, value

__all__ = [
    "affine",
    "by_channel",
    "centre_of",
    "invstd_of",
    "kept",
    "loaded",
    "merged_sums",
    "place",
    "positions_before",
    "pre_activation",
    "slope_of",
    "weights_of",
    "z_of",
]


@triton.jit
def place(
    t, c0, N, S, C, per_row,
    COLUMNS: tl.constexpr, UNIT: tl.constexpr, LONG: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Where tile t of the channels from c0 on lies.

    Returns:
        The tile's first element, counted from the tensor's in 64 bits; its elements counted from there, (BLOCK_P,
        BLOCK_C), in 32 bits unless LONG; which of them are there; the number of each position, (BLOCK_P,), 64 bits.
    """
    i = tl.arange(0, BLOCK_P)
    if LONG:
        i = i.to(tl.int64)
    if COLUMNS:
        C = (C // UNIT) * UNIT  # what a compiler needs to be told
        c = tl.arange(0, BLOCK_C)
        first = t.to(tl.int64) * BLOCK_P
        p = first + i
        base = first * C + c0
        lane = i[:, None] * C + c[None, :]
        inside = (p < N)[:, None] & (c0 + c < C)[None, :]
    else:
        S = (S // UNIT) * UNIT
        row = (t // per_row) * (BLOCK_P // BLOCK_S)
        start = (t % per_row) * BLOCK_S
        r = i // BLOCK_S
        s = i % BLOCK_S
        p = (row + r).to(tl.int64) * S + start + s
        base = (row.to(tl.int64) * C + c0) * S + start
        lane = (r * C * S + s)[:, None]
        inside = ((row + r < N) & (start + s < S))[:, None]
    return base, lane, inside, p


@triton.jit
def loaded(pointer, lane, inside, WIDE: tl.constexpr, LAST: tl.constexpr):
    """A tile in the computing dtype, 0 outside of the tensor; LAST if nothing will read it again soon."""
    if LAST:
        tile = tl.load(pointer + lane, mask=inside, other=0.0, eviction_policy="evict_first")
    else:
        tile = tl.load(pointer + lane, mask=inside, other=0.0)
    return tile.to(WIDE)


@triton.jit
def weights_of(weight_ptr, p, inside, WIDE: tl.constexpr):
    """How much each element of a tile counts, 0 outside, and whether it does; `weight_ptr` (P,), or None for 1 each."""
    some = inside
    if weight_ptr is None:
        w = tl.where(inside, 1.0, 0.0).to(WIDE)
    else:
        w = tl.load(weight_ptr + p[:, None], mask=inside, other=0.0).to(WIDE)
        some = inside & (w > 0)
    return w, some


@triton.jit
def kept(valid_ptr, p, inside):
    """Which elements of a tile are there and valid; `valid_ptr` (P,) uint8, or None for all."""
    if valid_ptr is not None:
        inside = inside & (tl.load(valid_ptr + p[:, None], mask=inside, other=0) != 0)
    return inside


@triton.jit
def origin_of(tile, some):
    """A value of each channel that is finite, and a factor by which differences from it have squares that are finite.

    What is taken from such a value has few digits, and sums up without loss. Any value of the channel will do: this is
    the largest. (BLOCK_C,) each; 0 and 1 for a channel of which nothing counts; `some` says what does.
    """
    high = tl.max(tl.where(some, tile, float("-inf")), 0)
    low = tl.min(tl.where(some, tile, float("inf")), 0)
    origin = tl.where(tl.abs(high) < float("inf"), high, 0.0)
    large = tl.maximum(tl.abs(origin), tl.where(tl.abs(low) < float("inf"), tl.abs(low), 0.0))
    return origin, tl.where(large > 1e15, 2.0**-64, 1.0).to(tile.dtype)


@triton.jit
def centre_of(tile, w, some):
    """A number near the values of each channel in a tile: scale and shift, (BLOCK_C,), for x scale - shift.

    x scale - shift is (x - centre) scale, rounded once, as the scale is a power of two: it keeps squares finite.
    """
    origin, scale = origin_of(tile, some)
    near = tl.where(some, (tile - origin[None, :]) * scale[None, :], 0.0)
    n = tl.sum(w, 0)
    centre = origin * scale + tl.sum(w * near, 0) / tl.where(n > 0, n, 1.0)
    return scale, tl.where(tl.abs(centre) < float("inf"), centre, 0.0)


@triton.jit
def positions_before(t, N, S, per_row, COLUMNS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr):
    """How many positions of a channel lie in the tiles before tile t."""
    if COLUMNS:
        count = tl.minimum(t.to(tl.int64) * BLOCK_P, N)
    else:
        above = tl.minimum((t // per_row).to(tl.int64) * (BLOCK_P // BLOCK_S), N)
        beside = tl.minimum(N - above, BLOCK_P // BLOCK_S) * (t % per_row) * BLOCK_S
        count = above * S + beside
    return count


@triton.jit
def merged_sums(n, sum_1, sum_2, scale, shift):
    """Mean and m2, (BLOCK_C,) in float64, of n values x, from Σ (x scale - shift) and the sum of its squares."""
    back = 1 / scale.to(tl.float64)
    per_n = 1 / tl.where(n > 0, n, 1.0)
    sum_1 = sum_1.to(tl.float64)
    m2 = sum_2.to(tl.float64) - sum_1 * sum_1 * per_n
    mean = tl.where(n > 0, (shift.to(tl.float64) + sum_1 * per_n) * back, 0.0)
    return mean, tl.where(m2 < 0, 0.0, m2) * back * back


@triton.jit
def by_channel(count_ptr, mean_ptr, m2_ptr, c, C, eps, eps_low, WIDE: tl.constexpr):
    """μ in two parts that sum up to it, 1 / sqrt(σ² + ε) and 1 / n (0 for n = 0), each (BLOCK_C,).

    Each pointer (C,), of any dtype; `count_ptr` None for 1, so that m2 is the variance.
    """
    there = c < C
    mean = tl.load(mean_ptr + c, mask=there, other=0.0).to(tl.float64)
    variance = tl.load(m2_ptr + c, mask=there, other=0.0).to(tl.float64)
    per_n = tl.where(there, 1.0, 0.0).to(WIDE)
    if count_ptr is not None:
        n = tl.load(count_ptr + c, mask=there, other=0.0).to(WIDE)
        per_n = tl.where(n > 0, 1 / tl.where(n > 0, n, 1.0), 0.0)
        variance *= per_n.to(tl.float64)
    invstd = invstd_of(variance, eps, eps_low, WIDE)
    high = mean.to(WIDE)
    return high, (mean - high.to(tl.float64)).to(WIDE), invstd, per_n


@triton.jit
def invstd_of(variance, eps, eps_low, WIDE: tl.constexpr):
    """1 / sqrt(σ² + ε) of float64 numbers, rooted in WIDE: brought near 1 first where float32 cannot hold them.

    ε is the sum of two numbers, as one alone is rounded to float32.
    """
    variance += tl.full((1,), eps, tl.float64) + tl.full((1,), eps_low, tl.float64)
    if tl.float64 == WIDE:
        inverse = 1 / tl.sqrt(variance)
    else:
        up = tl.where(variance < 1e-30, 2.0**120, tl.where(variance > 1e30, 2.0**-120, 1.0))
        root = tl.where(variance < 1e-30, 2.0**60, tl.where(variance > 1e30, 2.0**-60, 1.0))
        rooted = tl.sqrt_rn((variance * up.to(tl.float64)).to(WIDE))
        inverse = tl.div_rn(root.to(WIDE), rooted)
    return inverse


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
def pre_activation(centred, scale, beta, residual_ptr, base, lane, inside, WIDE: tl.constexpr, LAST: tl.constexpr):
    """γ z + β + residual; `residual_ptr` laid out as x, or None."""
    y = centred * scale[None, :] + beta[None, :]
    if residual_ptr is not None:
        y += loaded(residual_ptr + base, lane, inside, WIDE, LAST)
    return y


@triton.jit
def z_of(y, NAME: tl.constexpr, a: tl.constexpr, b: tl.constexpr):
    """The activation's value, under a name that a kernel can tell from its derivative."""
    return value(y, NAME, a, b)


@triton.jit
def slope_of(y, NAME: tl.constexpr, a: tl.constexpr, b: tl.constexpr):
    """The activation's derivative."""
    return derivative(y, NAME, a, b)
