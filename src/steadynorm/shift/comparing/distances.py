"""The distances and p-values that drift reports know, each beside what chance alone would make of it at this n."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Distances", "benjamini_hochberg", "of_counts", "of_values"]

_Floats: TypeAlias = NDArray[np.float64]

BINS: Final = 10
FEWEST_EXPECTED: Final = 5.0
"""Expected counts below which the chi-square distribution fits badly; rarer categories are put together."""


@dataclass(frozen=True)
class Distances:
    """Of one feature. Each `*_bias` is the value to expect where nothing has shifted.

    Attributes:
        psi: Population stability index, Σ (q - p) ln(q / p), over tenths of the reference or over the categories.
        psi_bias: (B - 1) (1/n + 1/m) for B bins.
        js: Jensen-Shannon divergence over the same bins, in bits, 0 to 1.
        js_bias: (B - 1) (1/n + 1/m) / (8 ln 2).
        wasserstein: Area between the distribution functions, in reference standard deviations (unbiased variance);
            None for categories, or where the reference is constant.
        wasserstein_bias: sqrt(2/pi (1/n + 1/m)) times the area under sqrt(F (1 - F)).
        test: "Kolmogorov-Smirnov" or "chi-square".
        statistic: The test's.
        p: Its p-value, asymptotic.
    """

    psi: float
    psi_bias: float
    js: float
    js_bias: float
    wasserstein: float | None
    wasserstein_bias: float | None
    test: str
    statistic: float
    p: float

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def of_values(x: _Floats, y: _Floats) -> Distances:
    """The distances between two samples of numbers.

    Args:
        x: (n,) finite values of the reference, sorted, n >= 1.
        y: (m,) of the current data, sorted, m >= 1.

    Returns:
        The distances; the test is Kolmogorov and Smirnov's.

    Source: Siddiqi, Credit risk scorecards (2006), for the PSI; Lin, Divergence measures based on the Shannon entropy,
    IEEE Transactions on Information Theory 37 (1991).

    Example:
        >>> d = of_values(np.linspace(0, 1, 1000), np.linspace(0, 1, 1000) + 0.5)
        >>> print(f"{d.wasserstein:.2f} deviations, D = {d.statistic:.2f}")
        1.73 deviations, D = 0.50
    """
    from scipy.stats import kstwobign

    edges = np.unique(x[[-(-x.size * k // BINS) - 1 for k in range(1, BINS)]])
    p, q = (np.diff(np.concatenate([[0], np.searchsorted(s, edges, side="right"), [s.size]])) for s in (x, y))
    psi, js = _by_bins(p.astype(np.float64), q.astype(np.float64))
    each = 1 / x.size + 1 / y.size
    values = np.concatenate([x, y])
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    below_x, below_y = (np.searchsorted(s, ordered, side="right") / s.size for s in (x, y))
    gaps = np.abs(below_x - below_y)
    widths = np.diff(ordered)
    spread = float(x.std(ddof=1)) if x.size > 1 else 0.0
    area = area_bias = None
    if x[0] < x[-1] and spread > 0 and math.isfinite(spread):  # a constant's spread may be rounding above 0
        area = float((gaps[:-1] * widths).sum()) / spread
        share = (np.arange(1, values.size) / values.size).clip(0, 1)
        under = float((np.sqrt(share * (1 - share)) * widths).sum()) / spread
        area_bias = math.sqrt(2 / math.pi * each) * under
    d = float(gaps.max())
    return Distances(*psi, *js, area, area_bias, "Kolmogorov-Smirnov", d, float(kstwobign.sf(d / math.sqrt(each))))


def of_counts(counts: _Floats, current: _Floats) -> Distances:
    """The distances between two tables of counts.

    Args:
        counts: (K,) of the reference, their sum n >= 1.
        current: (K,) of the current data, their sum m >= 1.

    Returns:
        The distances; the test is the chi-square test of homogeneity, categories that are expected fewer than 5 times
        put together.

    Source: Pearson (1900); Cochran, Some methods for strengthening the common χ² tests, Biometrics 10 (1954).

    Example:
        >>> d = of_counts(np.array([50.0, 50.0]), np.array([40.0, 60.0]))
        >>> print(f"{d.test}: {d.statistic:.3f}, p = {d.p:.3f}")
        chi-square: 2.020, p = 0.155
    """
    from scipy.stats import chi2

    psi, js = _by_bins(counts, current)
    table = _frequent(np.stack([counts, current]))
    expected = np.outer(table.sum(1), table.sum(0)) / table.sum()
    statistic = float((np.square(table - expected) / expected).sum())
    freedom = table.shape[1] - 1
    p = float(chi2.sf(statistic, freedom)) if freedom else 1.0
    return Distances(*psi, *js, None, None, "chi-square", statistic if freedom else 0.0, p)


def _frequent(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """The table without empty columns, those of too small an expected count added up into one."""
    table = table[:, table.sum(0) > 0]
    smallest = table.sum(0) * float(table.sum(1).min()) / float(table.sum())
    rare = smallest < FEWEST_EXPECTED
    return np.column_stack([table[:, ~rare], table[:, rare].sum(1)]) if rare.any() else table


def _by_bins(counts: _Floats, current: _Floats) -> tuple[tuple[float, float], tuple[float, float]]:
    """PSI and Jensen-Shannon, each with its bias. Half a count is added to each bin, so that none is empty."""
    used = counts + current > 0
    bins, n, m = int(used.sum()), float(counts.sum()), float(current.sum())
    p = (counts[used] + 0.5) / (n + bins / 2)
    q = (current[used] + 0.5) / (m + bins / 2)
    psi = float(((q - p) * np.log(q / p)).sum())
    middle = (p + q) / 2
    js = float((p * np.log2(p / middle) + q * np.log2(q / middle)).sum()) / 2
    bias = (bins - 1) * (1 / n + 1 / m)
    return (psi, bias), (js, bias / (8 * math.log(2)))


def benjamini_hochberg(p: Sequence[float]) -> list[float]:
    """q-values: the least false discovery rate at which each hypothesis would be rejected.

        q_(i) = min over j >= i of  m p_(j) / j

    Args:
        p: m p-values.

    Returns:
        The q-values, in the same order.

    Source: Benjamini & Hochberg, Controlling the false discovery rate, JRSS B 57 (1995).

    Example:
        >>> benjamini_hochberg([0.01, 0.04, 0.03, 0.5])
        [0.04, 0.05333333333333334, 0.05333333333333334, 0.5]
    """
    values = np.asarray(p, np.float64)
    order = np.argsort(values, kind="stable")[::-1]
    ranks = np.arange(values.size, 0, -1)
    q = np.empty_like(values)
    q[order] = np.minimum.accumulate(values[order] * values.size / ranks).clip(max=1.0) if values.size else []
    return [float(value) for value in q]
