"""How far apart two tables of counts come out by chance alone."""

import math
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["chance_distance"]

_Floats: TypeAlias = NDArray[np.float64]

_EXACT: Final = 200
"""Totals beyond this are taken for normal."""


def chance_distance(totals: _Floats, n: float) -> float:
    """The mean total variation distance where rows are dealt to the two sides at random.

        E TV = 1/2 Σ_k E |a_k / n - (t_k - a_k) / m|,    a_k ~ Hypergeometric(N, t_k, n),    m = N - n

    Exact for any shares, rare categories included: what the shares themselves would give by sqrt(p (1 - p)) is far too
    small where most categories occur once.

    Args:
        totals: (K,) t, how often each category occurs on both sides together.
        n: Rows of the one side; the others are the other's.

    Returns:
        The mean, in [0, 1].

    Source: Fisher, The Design of Experiments (1935), on permutations.

    Example:
        >>> print(f"{chance_distance(np.ones(1000), 500):.3f}")
        1.000
    """
    from scipy.special import gammaln

    rows = float(totals.sum())
    m, found = rows - n, 0.0

    def log_choose(of: float, take: _Floats) -> _Floats:
        return gammaln(of + 1) - gammaln(take + 1) - gammaln(of - take + 1)

    for total, times in zip(*np.unique(totals, return_counts=True), strict=True):
        if total <= _EXACT:
            here = np.arange(max(0.0, total - m), min(total, n) + 1)
            log_share = log_choose(total, here) + log_choose(rows - total, n - here) - log_choose(rows, np.array([n]))
            gap = float((np.abs(here / n - (total - here) / m) * np.exp(log_share)).sum())
        else:
            deviation = math.sqrt(total * (n / rows) * (m / rows) * (rows - total) / max(rows - 1, 1.0))
            gap = math.sqrt(2 / math.pi) * deviation * (1 / n + 1 / m)
        found += float(times) * gap
    return found / 2
