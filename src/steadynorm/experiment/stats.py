"""Estimates and 95 % intervals from a handful of seeds: means, medians, paired ratios of steps that may be censored.

A bound is a float, or None where there is none: an interval that too few values leave undefined is `[None, None]`, and
one that reaches beyond the last step of a run is open on that side. So every interval here is strict JSON.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from steadynorm.errors import ArgumentError

__all__ = ["Bounds", "PairedRatio", "km_median", "mean_interval", "median_interval", "paired_ratio", "steps_to_target"]

Bounds: TypeAlias = list[float | None]
"""`[low, high]`; None where that side has no bound."""

GEOMETRIC_MEAN: Final = "paired geometric mean, t-interval on logs"
KM_MEDIANS: Final = "Kaplan-Meier medians, bootstrap"
AT_LEAST: Final = "at least"
AT_MOST: Final = "at most"
NO_RATIO: Final = "none"

_Floats: TypeAlias = npt.NDArray[np.float64]


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, Bounds]:
    """The mean and Student's t-interval around it.

        mean ± t(n - 1, (1 + level) / 2) * s / sqrt(n),    s² the unbiased variance

    Args:
        values: One figure per seed, n >= 1, all finite.
        level: Coverage of the interval, in (0, 1).

    Returns:
        The mean and `[low, high]`; `[None, None]` for a single value, whose spread is unknown.

    Raises:
        ArgumentError: No values, a value that is not finite, or a level outside (0, 1).

    Source: Student, The probable error of a mean, Biometrika 6 (1908).

    Example:
        >>> mean, (low, high) = mean_interval([1.0, 2.0, 3.0])
        >>> print(f"{mean:.3f} from {low:.3f} to {high:.3f}")
        2.000 from -0.484 to 4.484
    """
    from scipy.special import stdtrit

    x = _finite(values)
    if not 0 < level < 1:
        raise ArgumentError(f"level must lie between 0 and 1, got {level!r}. Give 0.95 for a 95 % interval.")
    mean = float(x.mean())
    if x.size == 1:
        return mean, [None, None]
    half = float(stdtrit(x.size - 1, (1 + level) / 2)) * float(x.std(ddof=1)) / math.sqrt(x.size)
    return mean, [mean - half, mean + half]


def median_interval(values: Sequence[float]) -> tuple[float, Bounds]:
    """The median and its exact 95 % interval, whatever the distribution: two order statistics.

    The r-th smallest and the r-th largest value, with the greatest r for which P(Binomial(n, 1/2) < r) <= 2.5 %.

    Args:
        values: The figures, n >= 1, all finite.

    Returns:
        The median (the mean of the middle two where n is even) and `[low, high]`; `[None, None]` for n < 6, where no
        two order statistics reach 95 %.

    Raises:
        ArgumentError: No values, or a value that is not finite.

    Source: Thompson, On confidence ranges for the median, Annals of Mathematical Statistics 7 (1936).

    Example:
        >>> median_interval([5.0, 1.0, 4.0, 2.0, 6.0, 3.0])
        (3.5, [1.0, 6.0])
    """
    x = np.sort(_finite(values))
    return float(np.median(x)), _order_bounds(x)


def km_median(steps: Sequence[int | None], horizon: int) -> tuple[float | None, Bounds]:
    """The Kaplan-Meier median of steps to a target that some runs never reached, with its exact 95 % interval.

    The estimate is the first step at which at most half of the runs are still on their way. Every run is followed to
    the same horizon (one that diverges will not arrive either), so the product-limit estimate is the share of runs
    not there yet, and the interval of Brookmeyer and Crowley, which inverts the sign test, is a pair of order
    statistics with exact binomial coverage.

    Args:
        steps: One per seed, in steps; None for a run that did not arrive within `horizon`. An arrival before step 1
            counts as step 1.
        horizon: Steps that each run was given.

    Returns:
        The median in steps, None where fewer than half of the runs arrived; and `[low, high]`, a bound None where it
        lies beyond the horizon, both None for n < 6 (see `median_interval`).

    Raises:
        ArgumentError: A horizon under 1, or an arrival after it.

    Source: Kaplan & Meier, JASA 53 (1958); Brookmeyer & Crowley, A confidence interval for the median survival time,
    Biometrics 38 (1982).

    Example:
        >>> km_median([120, 80, None, 100, 90, 110, None, 70], horizon=200)
        (100.0, [70.0, None])
    """
    x = np.sort(_arrivals(steps, horizon))
    if x.size == 0:
        return None, [None, None]
    return _bound(float(x[_median_rank(x.size)])), _order_bounds(x)


@dataclass(frozen=True)
class PairedRatio:
    """Steps of one arm over steps of another on paired seeds; the fields are those of `report.schema.Ratio`.

    Attributes:
        ratio: The estimate; above 1 means that the second arm needs fewer steps. None where neither arm arrives.
        interval: 95 %; None for a side without a bound.
        method: How it was estimated; with "at least" and "at most" the estimate itself is only a bound.
        reached_plain: Seeds of the first arm that arrived.
        reached_arm: Seeds of the second arm that arrived.
        seeds: Pairs of seeds.
    """

    ratio: float | None
    interval: Bounds
    method: str
    reached_plain: int
    reached_arm: int
    seeds: int


def paired_ratio(
    plain_steps: Sequence[int | None],
    arm_steps: Sequence[int | None],
    horizon: int,
    *,
    draws: int = 10_000,
    seed: int = 0,
) -> PairedRatio:
    """How many times the steps of an arm the plain one needs to the same target, seed by seed.

    - All arrived: the geometric mean of plain / arm over the pairs, with a t-interval on the logs.
    - Some did not: the ratio of the Kaplan-Meier medians, with a percentile bootstrap that draws pairs of seeds. A draw
      in which the plain arm has no median counts as the horizon for the low bound and as infinity for the high one
      (the other arm the other way round), so censoring can only widen the interval.
    - Only the arm has a median: "at least" horizon / its median, interval `[low, None]`. Only the plain one: "at most".
    - Neither has: "none".

    Under 6 pairs a median has no 95 % interval (see `median_interval`), nor then has the ratio of two: `[None, None]`.

    Args:
        plain_steps: Steps to the target, one per seed; None for a run that did not arrive within `horizon`. An arrival
            before step 1 counts as step 1.
        arm_steps: The same for the other arm, the same seeds in the same order.
        horizon: Steps that each run was given.
        draws: Bootstrap draws.
        seed: Of the bootstrap's generator: the same runs give the same interval.

    Returns:
        The ratio, its interval and how many runs it rests on.

    Raises:
        ArgumentError: Lists of different length, a horizon under 1, or an arrival after it.

    Source: Kaplan & Meier, JASA 53 (1958); Efron & Tibshirani, An introduction to the bootstrap (1993), ch. 13.

    Example:
        >>> found = paired_ratio([400, 300, 500], [100, 100, 125], horizon=1000)
        >>> print(f"{found.ratio:.2f} times, {found.method}")
        3.63 times, paired geometric mean, t-interval on logs
        >>> found = paired_ratio([None] * 6, [100, 125, 100, 80, 100, 125], horizon=1000)
        >>> print(found.method, found.ratio, found.interval)
        at least 10.0 [8.0, None]
    """
    if len(plain_steps) != len(arm_steps):
        raise ArgumentError(
            f"paired steps need one figure per seed in each arm, got {len(plain_steps)} and {len(arm_steps)}. "
            "Give None for a run that did not arrive."
        )
    plain, arm = _arrivals(plain_steps, horizon), _arrivals(arm_steps, horizon)
    reached = int(np.isfinite(plain).sum()), int(np.isfinite(arm).sum()), plain.size
    if min(reached) == reached[2] > 0:
        centre, bounds = mean_interval(np.log(plain / arm).tolist())
        around: Bounds = [None if b is None else math.exp(b) for b in bounds]
        return PairedRatio(math.exp(centre), around, GEOMETRIC_MEAN, *reached)
    if max(reached[:2]) * 2 < reached[2] or reached[2] == 0:
        return PairedRatio(None, [None, None], NO_RATIO, *reached)

    low, high = (float(bound[0]) for bound in _ratios(plain, arm, np.arange(plain.size)[None, :], horizon))
    method = KM_MEDIANS if low == high else AT_LEAST if math.isinf(high) else AT_MOST
    ratio = high if method == AT_MOST else low
    if _order_rank(plain.size) is None:
        return PairedRatio(ratio, [None, None], method, *reached)
    picks = np.random.default_rng(seed).integers(plain.size, size=(draws, plain.size))
    lows, highs = _ratios(plain, arm, picks, horizon)
    # Order statistics on the outside of 2.5 % and 97.5 %: interpolating between infinite draws has no value.
    bottom = float(np.quantile(lows, 0.025, method="lower"))
    top = float(np.quantile(highs, 0.975, method="higher"))
    return PairedRatio(ratio, [bottom or None, _bound(top)], method, *reached)


def steps_to_target(steps: Sequence[int], accuracies: Sequence[float], target: float, window: int = 3) -> int | None:
    """The first evaluation at which the mean of `window` successive evaluations is at least the target.

    The mean keeps one lucky evaluation from counting as an arrival. The step is that of the window's last evaluation.

    Args:
        steps: The steps at which accuracy was evaluated, ascending.
        accuracies: Accuracy there, as fractions; NaN never arrives.
        target: The accuracy to reach, in the same unit.
        window: Evaluations averaged, >= 1.

    Returns:
        The step, or None if no window reaches the target.

    Raises:
        ArgumentError: Lists of different length, or a window under 1.

    Example:
        >>> steps_to_target([10, 20, 30, 40, 50], [0.5, 0.95, 0.85, 0.9, 0.92], target=0.9)
        40
    """
    if len(steps) != len(accuracies) or window < 1:
        raise ArgumentError(
            "steps_to_target needs one accuracy per step and a window of at least 1, "
            f"got {len(steps)} steps, {len(accuracies)} accuracies and window={window}."
        )
    for last in range(window - 1, len(steps)):
        mean = math.fsum(accuracies[last - window + 1 : last + 1]) / window
        if mean >= target - 1e-12:  # a mean of equal decimals may round below them
            return steps[last]
    return None


def _finite(values: Sequence[float]) -> _Floats:
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0 or not np.isfinite(x).all():
        raise ArgumentError(f"an interval needs at least one value and finite ones only, got {list(values)!r}.")
    return x


def _arrivals(steps: Sequence[int | None], horizon: int) -> _Floats:
    """Steps as floats, at least 1; infinity for a run that did not arrive."""
    late = [s for s in steps if s is not None and s > horizon]
    if horizon < 1 or late:
        raise ArgumentError(
            f"each arrival must lie within a horizon of at least 1 step, got horizon={horizon} and arrivals {late!r}."
        )
    return np.array([math.inf if s is None else max(s, 1) for s in steps], dtype=np.float64)


def _median_rank(n: int) -> int:
    """Index of the order statistic at which the survival curve falls to one half or below."""
    return (n + 1) // 2 - 1


def _order_rank(n: int) -> int | None:
    """Greatest index r with P(Binomial(n, 1/2) <= r) <= 2.5 %; None where even r = 0 is likelier."""
    tails = np.cumsum([math.comb(n, r) / 2**n for r in range(n)])
    return int((tails <= 0.025).sum()) - 1 if n and tails[0] <= 0.025 else None


def _order_bounds(x: _Floats) -> Bounds:
    """`x` sorted, infinity for what lies beyond observation."""
    rank = _order_rank(x.size)
    return [None, None] if rank is None else [_bound(float(x[rank])), _bound(float(x[-1 - rank]))]


def _bound(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _ratios(plain: _Floats, arm: _Floats, picks: npt.NDArray[np.int64], horizon: int) -> tuple[_Floats, _Floats]:
    """What each row of `picks` says about the ratio of the medians, plain / arm: a lower and an upper bound.

    They are equal unless a median lies beyond the horizon.
    """
    rank = _median_rank(plain.size)
    of_plain = np.partition(plain[picks], rank, axis=1)[:, rank]
    of_arm = np.partition(arm[picks], rank, axis=1)[:, rank]
    return np.minimum(of_plain, horizon) / of_arm, of_plain / np.minimum(of_arm, horizon)
