"""Commit: the one operation that writes running statistics."""

import math

import torch
from torch import Tensor

from steadynorm.errors import ArgumentError
from steadynorm.ops.reference import Statistics

__all__ = ["commit"]


def commit(
    running_mean: Tensor,
    running_var: Tensor,
    statistics: Statistics,
    momentum: float | None,
    num_batches_tracked: Tensor | None = None,
    rejected: Tensor | None = None,
    *,
    weighted: bool = False,
) -> Tensor | bool:
    """Moves the running statistics towards a batch's, in place: r <- (1 - momentum) r + momentum m.

    The variance committed is the unbiased one, m2 / (n - 1). A batch of n < 2 has none and changes nothing, nor does
    an empty one: weights are repetitions, and those that sum to about 1 would blow it up. A batch whose mean or
    variance is not finite, or not finite any more in the buffers' dtype, is rejected whole: the running statistics
    stay, and `rejected` counts it. Away from the CPU no value is read by the host.

    Args:
        running_mean: (C,), changed in place.
        running_var: (C,), changed in place.
        statistics: The batch's count, mean and m2.
        momentum: The share of the new batch in [0, 1]; None for the cumulative average, 1 / (number of batches).
        num_batches_tracked: Counts the committed batches, in place; needed where momentum is None.
        rejected: Counts the rejected batches, in place.
        weighted: n is a sum of sample weights: then 0 < n < 2 is a mistake, and rejected, not merely a small batch.

    Returns:
        Whether the batch was rejected: a bool where the host could look for free, else a boolean scalar on the device.
    """
    count = statistics.count
    # A FakeTensor, by which a run is rehearsed without data, says that it is on the CPU but has no values to look at.
    at_once = count.device.type == "cpu" and type(count) is Tensor and not torch.compiler.is_compiling()
    with torch.no_grad():
        now_or_queued = _commit_now if at_once else _commit_queued
        return now_or_queued(running_mean, running_var, statistics, momentum, num_batches_tracked, rejected, weighted)


def _commit_queued(
    running_mean: Tensor,
    running_var: Tensor,
    statistics: Statistics,
    momentum: float | None,
    num_batches_tracked: Tensor | None,
    rejected: Tensor | None,
    weighted: bool,
) -> Tensor | bool:
    """Without a branch on any value, for a device that runs behind the host and for a graph being compiled."""
    known = statistics.count >= 2
    mean = statistics.mean.to(running_mean.dtype)
    variance = (statistics.m2 / torch.where(known, statistics.count - 1, 1.0)).to(running_var.dtype)
    usable, finite = known.all(), (torch.isfinite(mean) & torch.isfinite(variance)).all()
    accepted, refused = usable & finite, usable & ~finite
    if weighted:
        refused = refused | (~usable & (statistics.count > 0).any())
    share = torch.full_like(usable, 1.0 if momentum is None else momentum, dtype=mean.dtype)
    if momentum is None:
        share = share / (_tracked(num_batches_tracked) + 1)
    for buffer, fresh in ((running_mean, mean), (running_var, variance)):
        buffer.copy_(torch.lerp(buffer, torch.where(accepted, fresh, buffer), share.to(buffer.dtype)))
    if num_batches_tracked is not None:
        num_batches_tracked.add_(accepted)
    if rejected is not None:
        rejected.add_(refused)
    return refused


def _commit_now(
    running_mean: Tensor,
    running_var: Tensor,
    statistics: Statistics,
    momentum: float | None,
    num_batches_tracked: Tensor | None,
    rejected: Tensor | None,
    weighted: bool,
) -> Tensor | bool:
    """The same where the host may look: on the CPU a branch costs less than computing both sides of it."""
    count = statistics.count[0].item() if statistics.count.numel() else 0.0  # weights are per position: all are equal
    if count < 2:
        if weighted and count > 0 and rejected is not None:
            rejected.add_(1)
        return weighted and count > 0
    variance = statistics.m2 / (count - 1)
    if not (_fits(variance, running_var.dtype) and _fits(statistics.mean, running_mean.dtype)):
        if rejected is not None:
            rejected.add_(1)
        return True
    share = momentum if momentum is not None else 1 / (int(_tracked(num_batches_tracked)) + 1)
    running_mean.lerp_(statistics.mean.to(running_mean.dtype), share)
    running_var.lerp_(variance.to(running_var.dtype), share)
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    return False


def _fits(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether all are finite (a NaN compares false) and stay so in `dtype`."""
    return torch.linalg.vector_norm(values, math.inf).item() <= torch.finfo(dtype).max


def _tracked(num_batches_tracked: Tensor | None) -> Tensor:
    if num_batches_tracked is None:
        raise ArgumentError("momentum=None is the average over all batches, which needs num_batches_tracked.")
    return num_batches_tracked
