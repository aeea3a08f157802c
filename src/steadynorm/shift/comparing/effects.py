"""How far apart two samples of one feature are, in standard units and with an interval that holds at any n.

Every effect is measured in *reference standard deviations*, or in what equals them: a distance between distributions is
given as the difference of means between two normal distributions (of variance 1) that are as far apart. So one
tolerance serves all of them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from steadynorm.shift.comparing.chance import chance_distance

__all__ = [
    "Effect",
    "EffectKind",
    "as_deviations",
    "composition",
    "distance",
    "location",
    "missing",
    "scale",
    "winsorised",
]

EffectKind: TypeAlias = Literal["location", "scale", "distance", "composition", "missing"]

_Floats: TypeAlias = NDArray[np.float64]

TRIM: Final = (0.01, 25, 0.1)
"""`winsorised` pulls in 1 % of the values at either end, but 25 values, unless that is more than 10 %."""

FEWEST_MOVING: Final = 30
"""Values of a side that must differ from the most frequent one before a mean's distribution is taken for normal."""

_KOLMOGOROV_MEAN: Final = 0.8687311606361592  # sqrt(pi/2) ln 2: the mean of the Kolmogorov distribution
_FAR: Final = 1 - 1e-15


@dataclass(frozen=True)
class Effect:
    """The size of one kind of difference.

    Attributes:
        kind: "location", "scale", "distance", "composition" or "missing".
        estimate: Signed for location (above 0: the current side is larger), scale (wider) and missing (more is);
            corrected for its bias at this n for the others, >= 0.
        low: The interval of the *size* |effect|, >= 0.
        high: Its upper end.
    """

    kind: EffectKind
    estimate: float
    low: float
    high: float


def winsorised(x: _Floats, y: _Floats) -> tuple[_Floats, _Floats]:
    """Both samples with their extremes pulled in to common limits, so that no single value decides.

    The limits are two quantiles of both taken together, each side having half of the weight: the 1 % and 99 % points,
    or, where the smaller side has fewer than 2,500 values, further in (25 / n, at most 10 %), so that the limits
    themselves are not those of a few values.

    Args:
        x: (n,) finite values of the reference, sorted.
        y: (m,) likewise of the current data.

    Returns:
        Both, clipped.

    Example:
        >>> x, y = winsorised(np.arange(101.0), np.append(np.arange(100.0), 1e9))
        >>> float(x.min()), float(y.max())
        (10.0, 90.0)
    """
    least, values, most = TRIM
    share = min(max(least, values / min(x.size, y.size)), most)
    low = _joint_quantile(x, y, share)
    high = -_joint_quantile(-x[::-1], -y[::-1], share)
    return np.clip(x, low, high), np.clip(y, low, high)


def _joint_quantile(x: _Floats, y: _Floats, share: float) -> float:
    """The least value with at least this share of the half-and-half mixture at or below it; both are sorted."""
    values = np.concatenate([x, y])
    weights = np.concatenate([np.full(x.size, 0.5 / x.size), np.full(y.size, 0.5 / y.size)])
    order = np.argsort(values, kind="stable")
    below = np.cumsum(weights[order])
    return float(values[order][min(int(np.searchsorted(below, share - 1e-12)), values.size - 1)])


def location(x: _Floats, y: _Floats, alpha: float) -> Effect | None:
    """The standardised mean difference of the winsorised samples, in reference standard deviations.

        d = (mean(y) - mean(x)) / s_x,    s_x² the unbiased variance of x

    with the interval d ± t se of the delta method: se² is the sum of the variances of d's influence functions.

    Args:
        x: (n,) winsorised values of the reference.
        y: (m,) of the current data.
        alpha: The chance that the interval may miss, in (0, 1).

    Returns:
        The effect, or None where a side has too few values besides its most frequent one, or a spread that float64
        does not hold beside the other's.

    Source: Glass's delta; Hampel, The influence curve and its role in robust estimation, JASA 69 (1974).

    Example:
        >>> x = np.linspace(-1, 1, 101)
        >>> effect = location(x, x + 0.3 * x.std(ddof=1), alpha=0.05)
        >>> print(f"{effect.estimate:.2f} from {effect.low:.2f} to {effect.high:.2f}")
        0.30 from 0.02 to 0.58
    """
    if not _moves(x, y) or not _have_spread(x, y):
        return None
    a, b, spread = x - x.mean(), y - y.mean(), float(x.std(ddof=1))
    d = float(y.mean() - x.mean()) / spread
    of_x = a / spread + d / 2 * (np.square(a / spread) - 1)
    return _signed("location", d, of_x, b / spread, alpha)


def scale(x: _Floats, y: _Floats, alpha: float) -> Effect | None:
    """The logarithm of the ratio of the winsorised samples' standard deviations.

        l = ln(s_y / s_x),    s² the unbiased variances

    0.1 stands for a spread that is about a tenth wider: in units of the reference's deviation, as `location` is. The
    interval is that of the delta method.

    Args:
        x: (n,) winsorised values of the reference.
        y: (m,) of the current data.
        alpha: The chance that the interval may miss, in (0, 1).

    Returns:
        The effect, or None where a side has too few values besides its most frequent one, or a spread that float64
        does not hold beside the other's.

    Example:
        >>> x = np.linspace(-1, 1, 101)
        >>> print(f"{scale(x, 2 * x, alpha=0.05).estimate:.4f}")
        0.6931
    """
    if not _moves(x, y) or not _have_spread(x, y):
        return None
    a, b = x - x.mean(), y - y.mean()
    of_x, of_y = ((np.square(c) / float(np.square(c).mean()) - 1) / 2 for c in (a, b))
    return _signed("scale", math.log(float(y.std(ddof=1)) / float(x.std(ddof=1))), of_x, of_y, alpha)


def distance(x: _Floats, y: _Floats, alpha: float) -> Effect:
    """The Kolmogorov-Smirnov distance of the two, as the difference of means of two normals that are as far apart.

        D = sup |F_x - F_y|,    d = 2 Phi^-1((1 + D) / 2)

    It sees every kind of difference, needs no variance, and its interval holds for any distribution: one value more or
    less moves D by at most 1 / n, so it strays from its mean by t with a chance of at most exp(-2 t² / (1/n + 1/m));
    and its mean lies above the true distance by at most what it is where there is none, 0.869 sqrt(1/n + 1/m).

    Args:
        x: (n,) values of the reference, sorted; infinite ones are values like others.
        y: (m,) of the current data, sorted.
        alpha: The chance that the interval may miss, in (0, 1).

    Returns:
        The effect, its estimate corrected for the bias.

    Source: McDiarmid, On the method of bounded differences (1989); Kolmogorov, Sulla determinazione empirica di una
    legge di distribuzione (1933).

    Example:
        >>> x = np.linspace(-1, 1, 10_001)
        >>> effect = distance(x, x + 0.2, alpha=0.05)
        >>> print(f"{effect.low:.2f} to {effect.high:.2f}")
        0.17 to 0.30
    """
    values = np.concatenate([x, y])
    gaps = np.searchsorted(x, values, side="right") / x.size - np.searchsorted(y, values, side="right") / y.size
    each = 1 / x.size + 1 / y.size
    return _bounded("distance", float(np.abs(gaps).max()), _KOLMOGOROV_MEAN * math.sqrt(each), each, alpha)


def composition(counts: _Floats, current: _Floats, alpha: float) -> Effect:
    """The total variation distance between two tables of counts, as a difference of means of two normals.

        TV = 1/2 Σ_k |p_k - q_k|,    d = 2 Phi^-1((1 + TV) / 2)

    The interval is made as that of `distance`, its bias the mean that chance alone gives (`chance_distance`); with two
    categories it is the exact one of a share, `missing`.

    Args:
        counts: (K,) how often each category occurs in the reference; their sum n >= 1.
        current: (K,) in the current data; their sum m >= 1.
        alpha: The chance that the interval may miss, in (0, 1).

    Returns:
        The effect, its estimate corrected for the bias.

    Source: McDiarmid (1989); Weissman et al., Inequalities for the L1 deviation of the empirical distribution (2003).

    Example:
        >>> effect = composition(np.array([500.0, 300, 200]), np.array([200.0, 300, 500]), alpha=0.05)
        >>> print(f"{effect.low:.2f} to {effect.high:.2f}")
        0.54 to 0.94
    """
    n, m = float(counts.sum()), float(current.sum())
    if counts.size <= 2:
        share = missing(int(counts[0]), int(n), int(current[0]), int(m), alpha)
        return Effect("composition", abs(share.estimate), share.low, share.high)
    seen = float(np.abs(counts / n - current / m).sum()) / 2
    return _bounded("composition", seen, chance_distance(counts + current, n), 1 / n + 1 / m, alpha)


def missing(reference: int, n: int, current: int, m: int, alpha: float) -> Effect:
    """The difference of two shares, as a difference of means of two normals: d = 2 Phi^-1((1 + |p - q|) / 2).

    Its interval is Newcombe's, of two Wilson scores: right at shares of 0 and 1 as well.

    Args:
        reference: Of `n` rows of the reference, how many.
        n: >= 1.
        current: Of `m` rows of the current data.
        m: >= 1.
        alpha: The chance that the interval may miss, in (0, 1).

    Returns:
        The effect, signed.

    Source: Newcombe, Interval estimation for the difference between independent proportions, Statistics in Medicine
    17 (1998), method 10.

    Example:
        >>> effect = missing(0, 1000, 100, 1000, alpha=0.05)
        >>> print(f"{effect.estimate:.2f} from {effect.low:.2f} to {effect.high:.2f}")
        0.25 from 0.21 to 0.30
    """
    z = _normal_point(1 - alpha / 2)
    p, q = reference / n, current / m
    (p_low, p_high), (q_low, q_high) = _wilson(p, n, z), _wilson(q, m, z)
    difference = q - p
    low = difference - math.hypot(q - q_low, p_high - p)
    high = difference + math.hypot(q_high - q, p - p_low)
    size = _size(low, high)
    sign = math.copysign(1.0, difference)
    return Effect("missing", sign * as_deviations(abs(difference)), as_deviations(size[0]), as_deviations(size[1]))


def as_deviations(gap: float) -> float:
    """The difference of means at which two normals of variance 1 are so far apart in total variation.

        d = 2 Phi^-1((1 + gap) / 2)

    Their Kolmogorov-Smirnov distance is the same number.

    Args:
        gap: In [0, 1]; what is outside counts as the nearer end.

    Example:
        >>> print(f"{as_deviations(0.03988):.3f}")
        0.100
    """
    return 2 * _normal_point((1 + min(max(gap, 0.0), _FAR)) / 2)


def _bounded(kind: EffectKind, seen: float, bias: float, each: float, alpha: float) -> Effect:
    stray = math.sqrt(math.log(2 / alpha) * each / 2)
    return Effect(
        kind, as_deviations(seen - bias), as_deviations(seen - bias - stray), as_deviations(min(seen + stray, 1.0))
    )


def _signed(kind: EffectKind, estimate: float, of_x: _Floats, of_y: _Floats, alpha: float) -> Effect:
    """An estimate with the interval that its influence functions give, by Welch's degrees of freedom."""
    from scipy.special import stdtrit

    u, v = float(of_x.var(ddof=1)) / of_x.size, float(of_y.var(ddof=1)) / of_y.size
    freedom = (u + v) ** 2 / (u**2 / (of_x.size - 1) + v**2 / (of_y.size - 1)) if u + v > 0 else 1.0
    half = float(stdtrit(freedom, 1 - alpha / 2)) * math.sqrt(u + v)
    return Effect(kind, estimate, *_size(estimate - half, estimate + half))


def _size(low: float, high: float) -> tuple[float, float]:
    """The interval of |effect| from that of the effect."""
    return max(low, -high, 0.0), max(abs(low), abs(high))


def _moves(x: _Floats, y: _Floats) -> bool:
    """Whether both samples have enough values besides their most frequent one for a mean to be nearly normal."""
    return all(side.size - _largest_tie(side) >= FEWEST_MOVING for side in (x, y))


def _have_spread(x: _Floats, y: _Floats) -> bool:
    """Whether squares of both are within reach of float64: one side's may vanish beside the other's."""
    return all(0 < float(side.std(ddof=1)) < math.inf for side in (x, y))


def _largest_tie(values: _Floats) -> int:
    """How often the most frequent value occurs; the values are sorted."""
    starts = np.flatnonzero(np.append(True, values[1:] != values[:-1]))
    return int(np.diff(np.append(starts, values.size)).max())


def _wilson(share: float, n: int, z: float) -> tuple[float, float]:
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max((middle - half) / (1 + z * z / n), 0.0), min((middle + half) / (1 + z * z / n), 1.0)


def _normal_point(probability: float) -> float:
    from scipy.special import ndtri

    point: Callable[[float], float] = ndtri
    return float(point(probability))
