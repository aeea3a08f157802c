"""The statistics of several batches, or of every rank's, as one: merged by count."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from steadynorm.ops.reference import Statistics

__all__ = ["merge", "merge_all", "merge_stacked", "merged"]


def merge(a: Statistics, b: Statistics) -> Statistics:
    """Those of both data sets together, see `Moments.merge`."""
    count = a.count + b.count
    share = b.count / torch.where(count > 0, count, 1.0)
    delta = b.mean - a.mean
    return Statistics(count, a.mean + delta * share, a.m2 + b.m2 + delta * delta * a.count * share)


def merge_all(parts: Sequence[Statistics]) -> Statistics:
    """Those of all data sets together, see `Moments.merge_all`."""
    return merge_stacked(Statistics(*(torch.stack(part) for part in zip(*parts, strict=True))))


def merge_stacked(parts: Statistics) -> Statistics:
    """The same of parts that lie in one tensor for each of count, mean and m2: (parts, C)."""
    counts, means, m2s = parts
    total = counts.sum(0)
    share = counts / torch.where(total > 0, total, 1.0)
    # Means are summed relative to one of them, so that a large common offset costs no digits.
    origin = torch.gather(means, 0, counts.argmax(0, keepdim=True)).squeeze(0)
    mean = origin + (share * (means - origin)).sum(0)
    m2 = m2s.sum(0) + (counts * (means - mean) ** 2).sum(0)
    return Statistics(total, mean, m2)


def merged(local: Statistics, total: Callable[[Tensor], Tensor]) -> Statistics:
    """Merges each rank's statistics into those of all the batches together, by the law of total variance.

        n = Σ n_r      μ = Σ n_r μ_r / n      m2 = Σ m2_r + n_r (μ_r - μ)²

    Two sums over the ranks, of 2 C and of C numbers in float64: counts are exact to 2^53, an empty rank adds nothing,
    and m2 loses no digit to a large mean since deviations are taken from the common one.

    Args:
        local: This rank's.
        total: The sum of a tensor over the ranks, of the same shape on each.
    """
    count, weighted = total(torch.stack([local.count, local.count * local.mean])).unbind()
    mean = weighted / torch.where(count > 0, count, 1.0)
    apart = local.mean - mean
    return Statistics(count, mean, total(local.m2 + local.count * apart * apart))
