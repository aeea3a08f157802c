"""Effects and their intervals, against the definition and against how often they must hold."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from steadynorm.shift.comparing.chance import chance_distance
from steadynorm.shift.comparing.effects import (
    FEWEST_MOVING,
    as_deviations,
    composition,
    distance,
    location,
    missing,
    scale,
    winsorised,
)


def drawn(seed, n=200, family="normal"):
    rng = np.random.default_rng(seed)
    return np.sort({"normal": rng.normal, "lognormal": rng.lognormal, "uniform": rng.random}[family](size=n))


def covers(effect, size):
    return effect.low <= size <= effect.high


def binomial_range(n, p):
    """Where a count must lie unless something of probability 1e-6 has happened."""
    return stats.binom.ppf(5e-7, n, p), stats.binom.ppf(1 - 5e-7, n, p)


class TestDeviations:
    @pytest.mark.parametrize("d", [0.05, 0.1, 0.8, 3.0])
    def test_it_is_the_distance_of_two_normals(self, d):
        grid = np.linspace(-12, 15, 200_001)
        gap = np.abs(stats.norm.pdf(grid) - stats.norm.pdf(grid - d)).sum() / 2 * (grid[1] - grid[0])
        assert as_deviations(gap) == pytest.approx(d, rel=1e-5)

    def test_no_gap_and_the_widest(self):
        assert as_deviations(0.0) == 0
        assert as_deviations(-0.2) == 0
        assert 10 < as_deviations(1.0) < math.inf


class TestWinsorised:
    def test_the_limits_are_quantiles_of_the_mixture(self):
        x, y = drawn(0, 5000), drawn(1, 2600) + 4
        clipped = winsorised(x, y)
        both = np.concatenate([x, y])
        weights = np.concatenate([np.full(5000, 0.5 / 5000), np.full(2600, 0.5 / 2600)])
        low = min(v for v in both if weights[both <= v].sum() >= 0.01 - 1e-12)
        high = max(v for v in both if weights[both >= v].sum() >= 0.01 - 1e-12)
        np.testing.assert_array_equal(clipped[0], np.clip(x, low, high))
        np.testing.assert_array_equal(clipped[1], np.clip(y, low, high))

    def test_one_value_decides_nothing(self):
        x, y = drawn(0), drawn(1)
        far = y.copy()
        far[-1] = 1e300
        np.testing.assert_array_equal(winsorised(x, far)[0], winsorised(x, np.append(y[:-1], 50.0))[0])


class TestLocation:
    def test_by_the_definition(self):
        x, y = drawn(0), 1.3 * drawn(1) + 0.4
        assert location(x, y, 0.05).estimate == pytest.approx((y.mean() - x.mean()) / x.std(ddof=1))

    @pytest.mark.parametrize("family", ["normal", "lognormal"])
    @pytest.mark.parametrize("shift", [0.0, 1.0])
    def test_the_interval_holds_as_often_as_it_says(self, family, shift):
        held, n = 0, 500
        many = np.sort(np.random.default_rng(99).permutation(drawn(98, 400_000, family)))
        limits = np.quantile(np.concatenate([many, many + shift]), [0.05, 0.95])
        a, b = np.clip(many, *limits), np.clip(many + shift, *limits)
        true = (b.mean() - a.mean()) / a.std()
        for seed in range(n):
            x, y = (np.clip(s, *limits) for s in (drawn(seed, 300, family), drawn(seed + n, 200, family) + shift))
            held += covers(location(x, y, 0.1), true)
        low, high = binomial_range(n, 0.9)
        # Where there is no shift the size of the effect, 0, is covered just when the signed interval holds.
        assert low <= held <= high

    @given(
        st.integers(0, 1000),
        st.floats(-100, 100),
        st.floats(0.01, 100),
    )
    @settings(max_examples=25, deadline=None)
    def test_units_do_not_matter(self, seed, add, times):
        x, y = drawn(seed), drawn(seed + 1) + 0.3
        one, other = location(x, y, 0.05), location(times * x + add, times * y + add, 0.05)
        assert (other.estimate, other.low, other.high) == pytest.approx((one.estimate, one.low, one.high), rel=1e-6)

    def test_mirrored_data_mirror_it(self):
        x, y = drawn(0), drawn(1) + 0.3
        one, other = location(x, y, 0.05), location(-x[::-1], -y[::-1], 0.05)
        assert other.estimate == pytest.approx(-one.estimate)
        assert (other.low, other.high) == pytest.approx((one.low, one.high))

    @pytest.mark.parametrize("effect", [location, scale])
    def test_too_few_values_beside_the_most_frequent_one(self, effect):
        x = np.sort(np.append(np.zeros(1000), np.arange(1.0, FEWEST_MOVING)))
        assert effect(x, drawn(0), 0.05) is None
        assert effect(drawn(0), x, 0.05) is None
        assert effect(np.append(x, 99.0), drawn(0), 0.05) is not None


class TestScale:
    def test_by_the_definition(self):
        x, y = drawn(0), 1.3 * drawn(1) + 0.4
        assert scale(x, y, 0.05).estimate == pytest.approx(0.5 * math.log(y.var(ddof=1) / x.var(ddof=1)))

    def test_the_interval_holds_as_often_as_it_says(self):
        held, n = 0, 500
        for seed in range(n):
            held += covers(scale(drawn(seed, 300), 2 * drawn(seed + n, 200), 0.1), math.log(2))
        low, high = binomial_range(n, 0.9)
        assert low - 0.01 * n <= held <= high


class TestDistance:
    @pytest.mark.parametrize("y", [drawn(1) + 0.2, np.round(drawn(1), 1), np.sort(np.append(drawn(1), [np.inf] * 30))])
    def test_by_the_definition(self, y):
        x = np.round(drawn(0), 1)
        gap = max(abs((x <= v).mean() - (y <= v).mean()) for v in np.concatenate([x, y]))
        each = 1 / x.size + 1 / y.size
        stray = math.sqrt(each * math.log(2 / 0.05) / 2)
        effect = distance(x, y, 0.05)
        assert effect.estimate == pytest.approx(as_deviations(gap - 0.8687311606 * math.sqrt(each)))
        assert effect.low == pytest.approx(as_deviations(gap - 0.8687311606 * math.sqrt(each) - stray))
        assert effect.high == pytest.approx(as_deviations(gap + stray))

    def test_a_shift_of_normals_is_itself(self):
        p = (np.arange(100_000) + 0.5) / 100_000
        x = stats.norm.ppf(p)
        assert distance(x, x + 0.5, 0.05).estimate == pytest.approx(0.5, abs=0.02)

    def test_it_holds(self):
        missed = sum(not covers(distance(drawn(s), drawn(s + 300) + 0.5, 0.1), 0.5) for s in range(300))
        assert missed <= binomial_range(300, 0.1)[1]


class TestComposition:
    def test_by_the_definition(self):
        p, q = np.array([50.0, 30, 20, 0]), np.array([100.0, 60, 20, 20])
        gap = np.abs(p / 100 - q / 200).sum() / 2
        each, bias = 1 / 100 + 1 / 200, 0.0
        for total in p + q:
            here = np.arange(0, min(total, 100) + 1)
            bias += np.abs(here / 100 - (total - here) / 200) @ stats.hypergeom.pmf(here, 300, total, 100) / 2
        stray = math.sqrt(each * math.log(2 / 0.05) / 2)
        effect = composition(p, q, 0.05)
        assert effect.estimate == pytest.approx(as_deviations(gap - bias))
        assert effect.low == pytest.approx(as_deviations(gap - bias - stray))
        assert effect.high == pytest.approx(as_deviations(gap + stray))

    def test_the_bias_is_what_chance_gives(self):
        rng = np.random.default_rng(0)
        shares = rng.dirichlet(np.ones(40))
        gaps = []
        for _ in range(400):
            p, q = rng.multinomial(2000, shares), rng.multinomial(1000, shares)
            gaps.append(np.abs(p / 2000 - q / 1000).sum() / 2)
        assert np.mean(gaps) == pytest.approx(chance_distance(np.round(3000 * shares), 2000), rel=0.03)

    @pytest.mark.parametrize(("n", "m"), [(6, 4), (1, 9), (500, 500)])
    def test_chance_is_the_mean_over_all_ways_to_deal(self, n, m):
        """Few rows: all of them, one by one. Many: totals on both sides of where they are taken for normal."""
        rng = np.random.default_rng(0)
        totals = np.array([5, 3, 1, 1]) if n + m == 10 else np.array([400, 200, 201, 190, 9])
        rows = np.repeat(np.arange(totals.size), totals)
        some = (rng.permutation(n + m)[:n] for _ in range(4000))
        deals = itertools.combinations(range(n + m), n) if n + m == 10 else some
        gaps = []
        for deal in deals:
            here = np.bincount(rows[list(deal)], minlength=totals.size)
            gaps.append(np.abs(here / n - (totals - here) / m).sum() / 2)
        exact = 1e-9 if n + m == 10 else 0.02
        assert chance_distance(totals.astype(float), n) == pytest.approx(np.mean(gaps), rel=exact)

    def test_two_categories_are_a_share(self):
        two, share = composition(np.array([90.0, 10]), np.array([60.0, 40]), 0.05), missing(10, 100, 40, 100, 0.05)
        assert (two.estimate, two.low, two.high) == pytest.approx((share.estimate, share.low, share.high))

    def test_one_category_is_no_difference(self):
        assert composition(np.array([90.0]), np.array([60.0]), 0.05).estimate == 0


class TestMissing:
    def test_newcombe_s_own_example(self):
        # 56 of 70 against 48 of 80: 0.2, from 0.0524 to 0.3339 by method 10.
        effect = missing(48, 80, 56, 70, 0.05)
        assert effect.estimate == pytest.approx(as_deviations(0.2))
        assert effect.low == pytest.approx(as_deviations(0.0524), abs=2e-4)
        assert effect.high == pytest.approx(as_deviations(0.3339), abs=2e-4)
        assert missing(56, 70, 48, 80, 0.05).estimate == pytest.approx(-as_deviations(0.2))

    def test_none_on_either_side_is_known_well(self):
        effect = missing(0, 1000, 0, 1000, 0.05)
        assert effect.estimate == effect.low == 0
        assert 0 < effect.high < 0.02
