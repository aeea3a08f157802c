"""What the examples look like where they enter the first batch norm: in which order, of how many kinds, how padded."""

from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Order", "Split", "order_of", "padded_share", "split_of"]

Floats = NDArray[np.float64]
_CHANNELS: Final = 64  # of wide layers, evenly spaced: permuting all of them takes minutes
_PERMUTATIONS: Final = 299


class Order(NamedTuple):
    """How much more the batches' means differ than those of random batches do.

    Attributes:
        ratio: Variance of the batch means over what independent examples give, 1 for random batches.
        p: The share of random orders with as large a ratio.
    """

    ratio: float
    p: float


class Split(NamedTuple):
    """The examples in two groups along the direction in which they vary most.

    Attributes:
        separation: Ashman's D, √2 |μ₁ - μ₂| / √(σ₁² + σ₂²): two halves of one Gaussian have 2.65, of a uniform 3.46.
        share: Of the smaller group.
        second: (N,), which examples are in the second group.
    """

    separation: float
    share: float
    second: NDArray[np.bool_]


def order_of(features: Floats, sizes: list[int]) -> Order | None:
    """Whether batches are drawn independently: one-way analysis of variance, against permutations of the examples.

        ratio = mean over channels of [Σ_b n_b (x̄_b - x̄)² / (B - 1)] / [Σ_i (x_i - x̄)² / (N - 1)]

    Args:
        features: (N, C), one row an example, in the loader's order.
        sizes: Examples in each batch.

    Returns:
        None with fewer than 3 batches.

    Example:
        >>> rows = np.repeat([[0.0], [1.0], [2.0], [3.0]], 5, axis=0) + np.linspace(0, 0.1, 20)[:, None]
        >>> found = order_of(rows, [5, 5, 5, 5])
        >>> found.ratio > 5, found.p < 0.01
        (True, True)
    """
    if len(sizes) < 3 or max(sizes) < 2:
        return None
    spread = features.var(0)
    x = features[:, spread > 1e-12 * max(float(spread.max()), 1e-300)]
    if not x.shape[1]:
        return None
    x = x[:, np.linspace(0, x.shape[1] - 1, min(x.shape[1], _CHANNELS)).astype(int)]
    x = (x - x.mean(0)) / x.std(0, ddof=1)
    starts = np.cumsum([0, *sizes[:-1]])
    counts = np.asarray(sizes, np.float64)[:, None]

    def ratio(rows: Floats) -> float:
        return float((np.add.reduceat(rows, starts) ** 2 / counts).sum(0).mean() / (len(sizes) - 1))

    rng = np.random.default_rng(0)
    seen = ratio(x)
    by_chance = sum(ratio(x[rng.permutation(len(x))]) >= seen for _ in range(_PERMUTATIONS))
    return Order(seen, (1 + by_chance) / (1 + _PERMUTATIONS))


def split_of(features: Floats) -> Split | None:
    """Splits examples in two along their first principal component, where the variance within is least.

    Args:
        features: (N, C), one row an example.

    Returns:
        None for fewer than 20 examples, or where all are alike.

    Example:
        >>> rows = np.concatenate([np.linspace(0, 1, 50), np.linspace(9, 10, 50)])[:, None]
        >>> found = split_of(rows)
        >>> round(found.share, 2), found.separation > 20
        (0.5, True)
    """
    if len(features) < 20:
        return None
    centred = features - features.mean(0)
    _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    if sizes[0] <= 1e-9 * max(float(np.abs(features).max()), 1e-300):
        return None
    along = centred @ axes[0]
    order = np.sort(along)
    n, k = len(order), np.arange(1, len(order))
    total, squares = np.cumsum(order)[:-1], np.cumsum(order**2)[:-1]
    all_sum, all_squares = float(order.sum()), float((order**2).sum())
    within = squares - total**2 / k + (all_squares - squares) - (all_sum - total) ** 2 / (n - k)
    cut = int(within.argmin())
    second = along > (order[cut] + order[cut + 1]) / 2
    low, high = along[~second], along[second]
    if len(low) < 2 or len(high) < 2:
        return None
    deviation = float(np.sqrt((low.var() + high.var()) / 2))
    separation = float(high.mean() - low.mean()) / max(deviation, 1e-12)
    return Split(separation, min(len(low), len(high)) / n, second)


def padded_share(x: Tensor, channel_dim: int) -> float:
    """The share of positions that are padding: at the end of each example, all alike in every channel.

    For sequences the run of equal positions at the end; for images, of equal rows or columns at the edges below and
    right, whichever is more. 0 without positions (N, C), where equal rows may be equal examples.

    Args:
        x: The input of a batch norm, (N, C, *).
        channel_dim: The axis of the channels.

    Returns:
        A share in [0, 1].

    Example:
        >>> x = torch.arange(24.0).reshape(2, 2, 6); x[:, :, 3:] = 0.5
        >>> padded_share(x, 1)
        0.5
    """
    x = x.detach().movedim(channel_dim, 1)
    if x.dim() == 2:
        return 0.0
    shares: list[float] = []
    for axis in range(2, x.dim()):
        lines = x.movedim(axis, -1).reshape(len(x), -1, x.shape[axis])
        last = x.flatten(2)[:, :, -1:]
        corner = last.reshape(len(x), x.shape[1], *([1] * (x.dim() - 2))).expand_as(x)
        corners = corner.movedim(axis, -1).reshape(lines.shape)
        equal = (lines == corners).all(1).flip(-1)
        run = equal.long().cumprod(-1).sum(-1)
        shares.append(float(torch.where(run > 1, run, 0).double().mean() / x.shape[axis]))
    return max(shares)
