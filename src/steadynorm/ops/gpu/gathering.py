"""Kernels that put together what the parts of a channel have found; all sums in one fixed order."""

# pyright: reportMissingImports=false
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportGeneralTypeIssues=false, reportConstantRedefinition=false

import triton
import triton.language as tl

__all__ = ["gradients", "statistics"]


@triton.jit(do_not_specialize=["C", "parts"])
def statistics(partial_ptr, table_ptr, C, parts, PARTS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Merges partial_ptr (parts, 3, C) to table_ptr (3, C), both float64; PARTS is at least `parts`."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.arange(0, PARTS)
    there = (part < parts)[:, None] & (c < C)[None, :]
    at = partial_ptr + part[:, None] * (3 * C) + c[None, :]
    n = tl.load(at, mask=there, other=0.0)
    mean = tl.load(at + C, mask=there, other=0.0)  # 0 where nothing counts
    m2 = tl.load(at + 2 * C, mask=there, other=0.0)
    total = tl.sum(n, 0)
    centre = tl.sum(n * mean, 0) / tl.where(total > 0, total, 1.0)
    apart = mean - centre[None, :]
    tl.store(table_ptr + c, total, mask=c < C)
    tl.store(table_ptr + C + c, centre, mask=c < C)
    tl.store(table_ptr + 2 * C + c, tl.sum(m2 + n * apart * apart, 0), mask=c < C)


@triton.jit
def narrowed(number, dtype: tl.constexpr):
    """From float64 by way of float32: not every device has a shorter one."""
    if dtype != tl.float64:
        number = number.to(tl.float32)
    return number.to(dtype)


@triton.jit(do_not_specialize=["C", "parts"])
def gradients(
    partial_ptr, sums_ptr, grad_gamma_ptr, grad_beta_ptr, C, parts, PARTS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Adds partial_ptr (parts, 2, C) up to sums_ptr (2, C), float64, and to dL/dγ and dL/dβ where they are there."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.arange(0, PARTS)
    there = (part < parts)[:, None] & (c < C)[None, :]
    at = partial_ptr + part[:, None] * (2 * C) + c[None, :]
    sum_g = tl.sum(tl.load(at, mask=there, other=0.0), 0)
    sum_gz = tl.sum(tl.load(at + C, mask=there, other=0.0), 0)
    tl.store(sums_ptr + c, sum_g, mask=c < C)
    tl.store(sums_ptr + C + c, sum_gz, mask=c < C)
    if grad_gamma_ptr is not None:
        tl.store(grad_gamma_ptr + c, narrowed(sum_gz, grad_gamma_ptr.dtype.element_ty), mask=c < C)
    if grad_beta_ptr is not None:
        tl.store(grad_beta_ptr + c, narrowed(sum_g, grad_beta_ptr.dtype.element_ty), mask=c < C)
