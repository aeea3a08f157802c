"""Intervals and censored ratios against closed forms, hand-worked product limits and the algebra they must obey."""

import itertools
import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from steadynorm.errors import ArgumentError
from steadynorm.experiment.stats import (
    AT_LEAST,
    AT_MOST,
    GEOMETRIC_MEAN,
    KM_MEDIANS,
    NO_RATIO,
    km_median,
    mean_interval,
    median_interval,
    paired_ratio,
    steps_to_target,
)

HORIZON = 1000
arrivals = st.integers(1, HORIZON)
runs = st.one_of(st.none(), arrivals)
pairs = st.lists(st.tuples(runs, runs), min_size=1, max_size=12)


# --- the mean and Student's t ---------------------------------------------------------------------------------------


def test_two_values_have_the_cauchy_quantile():
    # t with 1 degree of freedom is Cauchy: its 97.5 % quantile is tan(0.475 pi); s / sqrt(2) of (0, 2) is 1.
    assert mean_interval([0.0, 2.0]) == (
        1.0,
        pytest.approx([1 - math.tan(0.475 * math.pi), 1 + math.tan(0.475 * math.pi)]),
    )


def test_three_values_have_the_closed_form_of_two_degrees_of_freedom():
    half = 0.95 * math.sqrt(2 / (4 * 0.975 * 0.025)) / math.sqrt(3)  # s = 1
    assert mean_interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx([2 - half, 2 + half], rel=1e-12))


@given(st.lists(st.floats(-100, 100), min_size=4, max_size=15), st.sampled_from([0.8, 0.95, 0.99]))
def test_interval_encloses_the_stated_probability(values, level):
    mean, (low, high) = mean_interval(values, level)
    n, exact = len(values), [Fraction(v) for v in values]
    variance = sum((v - sum(exact) / n) ** 2 for v in exact) / (n - 1)  # unbiased
    assert mean == pytest.approx(float(sum(exact) / n), abs=1e-12)
    assert mean - low == pytest.approx(high - mean, abs=1e-9)
    if variance > 1e-6:
        t2 = mpmath.mpf(high - mean) ** 2 * n / mpmath.mpf(float(variance))
        inside = mpmath.betainc(0.5, (n - 1) / 2, 0, t2 / (t2 + n - 1), regularized=True)  # P(|T| <= t)
        assert float(inside) == pytest.approx(level, abs=1e-6)


def test_one_value_has_no_interval_and_bad_input_says_so():
    assert mean_interval([3.5]) == (3.5, [None, None])
    for bad in ([], [1.0, math.nan], [math.inf, 1.0]):
        with pytest.raises(ArgumentError, match="finite"):
            mean_interval(bad)
    with pytest.raises(ArgumentError, match="level"):
        mean_interval([1.0, 2.0], 95)


# --- medians --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "low", "high"),
    # Order statistics of the sign test's 95 % interval, as tabulated (Dixon & Massey, table A-25; Conover).
    [(6, 1, 6), (8, 1, 8), (9, 2, 8), (10, 2, 9), (15, 4, 12), (20, 6, 15), (25, 8, 18)],
)
def test_median_interval_takes_the_tabulated_order_statistics(n, low, high):
    values = [float(v) for v in np.random.default_rng(n).permutation(np.arange(1, n + 1))]
    assert median_interval(values) == ((n + 1) / 2, [low, high])


@pytest.mark.parametrize("n", [1, 2, 5])
def test_five_values_are_too_few_for_a_median_interval(n):
    assert median_interval([1.0] * n) == (1.0, [None, None])
    assert km_median([7] * n, HORIZON) == (7, [None, None])


def test_kaplan_meier_worked_by_hand():
    # S(3) = 6/7; S(5) = 6/7 * 4/6 = 4/7, two at once; S(8) = 4/7 * 3/4 = 3/7, the first at or below one half.
    median, _ = km_median([5, None, 8, 3, None, 5, None], 10)
    assert median == 8


def test_half_arrived_is_just_enough_for_a_median():
    assert km_median([10, 20, None, None], 50)[0] == 20
    assert km_median([10, 20, None, None, None], 50) == (None, [None, None])
    assert km_median([], 50) == (None, [None, None])


@given(st.lists(runs, min_size=1, max_size=25))
def test_median_is_where_the_product_limit_falls_to_one_half(steps):
    """The product limit from its definition, in fractions, and scipy's as a second witness."""
    survival, expected = Fraction(1), None
    for t in sorted({s for s in steps if s is not None}):
        at_risk = sum(s is None or s >= t for s in steps)
        survival *= 1 - Fraction(sum(s == t for s in steps), at_risk)
        if survival <= Fraction(1, 2):
            expected = t
            break
    found, (low, high) = km_median(steps, HORIZON)
    assert found == expected
    curve = scipy.stats.ecdf(
        scipy.stats.CensoredData.right_censored(
            [HORIZON + 1 if s is None else s for s in steps], [s is None for s in steps]
        )
    ).sf
    below = curve.quantiles[(curve.probabilities <= 0.5 + 1e-12) & (curve.quantiles <= HORIZON)]
    assert found == (below[0] if below.size else None)
    assert low is None or found is None or low <= found
    assert high is None or (found is not None and found <= high)


def test_bound_beyond_the_horizon_is_open():
    assert km_median([10, 20, 30, 40, 50, 60, 70, None, None, None], 100) == (50, [20, None])
    assert km_median([None] * 9 + [10], 100) == (None, [None, None])
    assert km_median([None] * 6 + [10, 20, 30], 100) == (None, [20, None])


# --- paired ratios --------------------------------------------------------------------------------------------------


def test_all_arrived_is_the_geometric_mean_with_a_t_interval_on_logs():
    found = paired_ratio([200, 800], [100, 100], HORIZON)  # logs of 2 and 8: mean log 4, s = log(4) / sqrt(2)
    half = math.tan(0.475 * math.pi) * math.log(4) / 2
    assert found.ratio == pytest.approx(4)
    assert found.interval == pytest.approx([4 * math.exp(-half), 4 * math.exp(half)])
    assert (found.method, found.reached_plain, found.reached_arm, found.seeds) == (GEOMETRIC_MEAN, 2, 2, 2)


def test_one_pair_gives_a_ratio_without_interval():
    assert paired_ratio([300], [100], HORIZON).ratio == pytest.approx(3)
    assert paired_ratio([300], [100], HORIZON).interval == [None, None]


def test_some_censored_gives_the_ratio_of_medians():
    found = paired_ratio([600, None, 500, 700, 600, None, 600, 550], [100, 120, 100, 90, 100, 110, 100, 100], HORIZON)
    assert (found.method, found.ratio) == (KM_MEDIANS, 6)
    assert (found.reached_plain, found.reached_arm) == (6, 8)


def test_bootstrap_enumerated():
    """Six pairs, of which one is late: the 6^6 draws can be counted one by one."""
    plain, arm = [300, 400, 500, 600, 700, None], [100, 110, 90, 120, 100, 95]
    p, a = [s or math.inf for s in plain], arm
    draws = []
    for pick in itertools.product(range(6), repeat=6):
        of_plain, of_arm = sorted(p[i] for i in pick)[2], sorted(a[i] for i in pick)[2]
        draws.append((min(of_plain, HORIZON) / of_arm, of_plain / of_arm))
    lows, highs = (np.sort(side) for side in zip(*draws, strict=True))
    found = paired_ratio(plain, arm, HORIZON, draws=40_000)
    assert found.ratio == 500 / 100
    low, high = found.interval
    assert (lows < low).mean() < 0.03
    assert (lows <= low).mean() > 0.02
    assert (highs > high).mean() < 0.03
    assert (highs >= high).mean() > 0.02


def test_the_bootstrap_keeps_pairs_together():
    """With four times the steps on every seed, so has every draw: only an unpaired one would spread."""
    arm = [10, 50, 90, 130, 170, 210, 240, 300]
    found = paired_ratio([4 * s if 4 * s <= HORIZON else None for s in arm], arm, HORIZON)
    assert (found.reached_plain, found.ratio, found.interval) == (7, 4, [4, 4])


def test_plain_that_never_arrives_gives_at_least():
    arm = [100, 110, 90, 120, 100, 95]
    found = paired_ratio([None] * 6, arm, HORIZON)
    assert (found.method, found.ratio) == (AT_LEAST, HORIZON / 100)  # the median is the third of six
    low, high = found.interval
    assert HORIZON / 120 <= low <= found.ratio
    assert high is None
    half = paired_ratio([None] * 8, [100] * 4 + [None] * 4, HORIZON)
    assert (half.method, half.ratio) == (AT_LEAST, 10)
    few = paired_ratio([None] * 3, [100, 50, 200], HORIZON)
    assert (few.method, few.ratio, few.interval) == (AT_LEAST, 10, [None, None])


def test_neither_arrives_gives_none():
    for plain, arm in ([[None] * 8] * 2, ([None, None, 10], [20, None, None]), ([], [])):
        found = paired_ratio(plain, arm, HORIZON)
        assert (found.ratio, found.interval, found.method) == (None, [None, None], NO_RATIO)
        assert found.seeds == len(plain)


def test_arrival_at_step_zero_counts_as_step_one():
    assert paired_ratio([10], [0], HORIZON).ratio == pytest.approx(10)
    assert km_median([0], HORIZON)[0] == 1


def test_unusable_steps_say_what_is_wrong():
    with pytest.raises(ArgumentError, match="got 2 and 1"):
        paired_ratio([1, 2], [1], HORIZON)
    with pytest.raises(ArgumentError, match=r"horizon=50 and arrivals \[51\]"):
        km_median([10, 51], 50)
    with pytest.raises(ArgumentError, match="horizon"):
        paired_ratio([None], [None], 0)


@given(pairs)
def test_swapping_the_arms_inverts_everything(both):
    plain, arm = (list(side) for side in zip(*both, strict=True))
    there, back = paired_ratio(plain, arm, HORIZON, draws=500), paired_ratio(arm, plain, HORIZON, draws=500)
    mirrored = {AT_LEAST: AT_MOST, AT_MOST: AT_LEAST}
    assert back.method == mirrored.get(there.method, there.method)
    assert (back.reached_plain, back.reached_arm) == (there.reached_arm, there.reached_plain)
    for one, other in [(there.ratio, back.ratio), *zip(there.interval, back.interval[::-1], strict=True)]:
        assert (one is None) == (other is None)
        assert one is None or one * other == pytest.approx(1)


@given(pairs, st.integers(2, 7))
def test_evaluating_in_other_units_changes_nothing(both, factor):
    plain, arm = (list(side) for side in zip(*both, strict=True))
    scaled = [[None if s is None else s * factor for s in side] for side in (plain, arm)]
    one, other = paired_ratio(plain, arm, HORIZON, draws=500), paired_ratio(*scaled, HORIZON * factor, draws=500)
    assert other.method == one.method
    for mine, theirs in [(one.ratio, other.ratio), *zip(one.interval, other.interval, strict=True)]:
        assert (mine is None) == (theirs is None)
        assert mine is None or theirs == pytest.approx(mine)


@given(pairs)
def test_interval_holds_the_ratio_and_repeats_itself(both):
    plain, arm = (list(side) for side in zip(*both, strict=True))
    found = paired_ratio(plain, arm, HORIZON, draws=500)
    assert found == paired_ratio(plain, arm, HORIZON, draws=500)
    low, high = found.interval
    assert low is None or low <= found.ratio * (1 + 1e-12)
    assert high is None or found.ratio <= high * (1 + 1e-12)
    assert not (found.method == AT_LEAST and high is not None)
    assert not (found.method == AT_MOST and low is not None)


def test_censored_interval_covers_the_true_ratio():
    """Log-normal steps with a seed effect in common, ratio 3, a third of the plain runs beyond the horizon."""
    rng, hits, repeats = np.random.default_rng(7), 0, 300
    for _ in range(repeats):
        seed_effect = rng.normal(0, 0.2, 10)
        plain = 600 * np.exp(seed_effect + rng.normal(0, 0.3, 10))
        arm = 200 * np.exp(seed_effect + rng.normal(0, 0.3, 10))
        censored = [[None if s > 700 else round(s) for s in side] for side in (plain, arm)]
        low, high = paired_ratio(*censored, 700, draws=400).interval
        hits += (low is None or low <= 3) and (high is None or high >= 3)
    assert hits / repeats > 0.93


# --- steps to the target --------------------------------------------------------------------------------------------


def test_arrival_is_the_end_of_the_first_window_at_the_target():
    steps = [10, 20, 30, 40, 50, 60]
    assert steps_to_target(steps, [0.2, 0.97, 0.8, 0.9, 0.9, 0.9], 0.9) == 60
    assert steps_to_target(steps, [0.2, 0.97, 0.8, 0.9, 0.9, 0.9], 0.9, window=1) == 20
    assert steps_to_target(steps, [0.2, 0.97, 0.8, 0.9, 0.9, 0.9], 0.95) is None
    assert steps_to_target(steps[:2], [1.0, 1.0], 0.5) is None


@given(st.integers(1, 999), st.integers(3, 9))
def test_holding_the_target_exactly_is_an_arrival(thousandths, n):
    assert steps_to_target(range(n), [thousandths / 1000] * n, thousandths / 1000) == 2


def test_a_diverged_run_never_arrives():
    assert steps_to_target([1, 2, 3, 4], [0.9, math.nan, math.nan, math.nan], 0.1) is None


def test_unmatched_curves_say_so():
    with pytest.raises(ArgumentError, match="2 steps, 1 accuracies"):
        steps_to_target([1, 2], [0.5], 0.5)
    with pytest.raises(ArgumentError, match="window=0"):
        steps_to_target([1], [0.5], 0.5, window=0)
