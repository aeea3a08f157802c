"""Commit on the device: the running statistics move towards a batch's, and the host waits for nothing."""

# What is fixed while a kernel is compiled is typed `constexpr`, and given as plain numbers.
# pyright: reportMissingImports=false
# pyright: reportArgumentType=false, reportUnnecessaryComparison=false, reportAttributeAccessIssue=false

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from steadynorm.ops.gpu.launching import launch, on_its_device, two_parts

__all__ = ["commit"]

_BLOCK = 1024


@triton.jit(do_not_specialize=["C", "momentum", "momentum_low"])
def _commit(
    mean_ptr, var_ptr, tracked_ptr, rejected_ptr, table_ptr, refused_ptr, C, momentum, momentum_low,
    CUMULATIVE: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program. mean_ptr, var_ptr (C,); tracked_ptr, rejected_ptr one int64 each or None; table_ptr (3, C) float64.

    refused_ptr is one uint8: whether the batch was rejected. A first pass judges all channels, a second one writes.
    The counters are read before the sums of the first pass, at which all warps meet: none reads what another wrote.
    """
    tracked = tl.full((), 0, tl.int64)
    rejected = tl.full((), 0, tl.int64)
    if tracked_ptr is not None:
        tracked += tl.load(tracked_ptr)
    if rejected_ptr is not None:
        rejected += tl.load(rejected_ptr)
    small = 0
    some = 0
    not_finite = 0
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        there = c < C
        n = tl.load(table_ptr + c, mask=there, other=2.0)
        mean = tl.load(table_ptr + C + c, mask=there, other=0.0).to(mean_ptr.dtype.element_ty).to(tl.float64)
        m2 = tl.load(table_ptr + 2 * C + c, mask=there, other=0.0)
        var = (m2 / tl.where(n >= 2, n - 1, 1.0)).to(var_ptr.dtype.element_ty).to(tl.float64)
        finite = (tl.abs(mean) < float("inf")) & (tl.abs(var) < float("inf"))
        small += tl.sum((there & ~(n >= 2)).to(tl.int32), 0)
        some += tl.sum((there & (n > 0)).to(tl.int32), 0)
        not_finite += tl.sum((there & ~finite).to(tl.int32), 0)
    accepted = (small == 0) & (not_finite == 0)
    refused = (small == 0) & (not_finite != 0)
    if WEIGHTED:
        refused = refused | ((small != 0) & (some != 0))
    if CUMULATIVE:
        share = tl.full((1,), 1.0, tl.float64) / (tracked + 1)
    else:
        share = tl.full((1,), momentum, tl.float64) + tl.full((1,), momentum_low, tl.float64)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        write = (c < C) & accepted
        n = tl.load(table_ptr + c, mask=write, other=2.0)
        for_mean = tl.load(table_ptr + C + c, mask=write, other=0.0)
        for_var = tl.load(table_ptr + 2 * C + c, mask=write, other=0.0) / (n - 1)
        old_mean = tl.load(mean_ptr + c, mask=write, other=0.0).to(tl.float64)
        old_var = tl.load(var_ptr + c, mask=write, other=0.0).to(tl.float64)
        # By both shares, not by the difference: momentum 1 is then the batch's own, whatever was there.
        new_mean = (1 - share) * old_mean + share * for_mean
        new_var = (1 - share) * old_var + share * for_var
        tl.store(mean_ptr + c, new_mean.to(mean_ptr.dtype.element_ty), mask=write)
        tl.store(var_ptr + c, new_var.to(var_ptr.dtype.element_ty), mask=write)
    if tracked_ptr is not None:
        tl.store(tracked_ptr, tracked + accepted.to(tl.int64))
    if rejected_ptr is not None:
        tl.store(rejected_ptr, rejected + refused.to(tl.int64))
    tl.store(refused_ptr, refused.to(tl.uint8))


def commit(
    mean: Tensor,
    var: Tensor,
    tracked: Tensor | None,
    rejected: Tensor | None,
    table: Tensor,
    momentum: float | None,
    weighted: bool,
) -> Tensor:
    """As `ops.commit.commit`, by one kernel; returns whether the batch was rejected, a boolean on the device.

    Args:
        mean: (C,), contiguous; changed in place.
        var: (C,), contiguous, unbiased; changed in place.
        tracked: The number of batches committed, int64, changed in place; needed where momentum is None.
        rejected: The number of batches rejected, int64, changed in place.
        table: Count, mean and m2 of the batch, (3, C) float64.
        momentum: The share of the batch, or None for 1 / (number of batches).
        weighted: Whether 0 < n < 2 is a batch to reject, and not merely too small.
    """
    refused = torch.empty((), dtype=torch.uint8, device=mean.device)
    with on_its_device(mean):
        launch(
            _commit, 1, mean, var, tracked, rejected, table, refused, mean.numel(), *two_parts(momentum or 0.0),
            CUMULATIVE=momentum is None, WEIGHTED=weighted, BLOCK=_BLOCK,
        )  # fmt: skip
    if not mean.is_inference():
        torch._C._increment_version((mean, var))  # pyright: ignore
    return refused.view(torch.bool)
