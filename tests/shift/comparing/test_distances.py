"""The distances of drift reports against their definitions and scipy's."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from steadynorm.shift.comparing.distances import benjamini_hochberg, of_counts, of_values


def both(n=400, m=300, shift=0.2):
    rng = np.random.default_rng(0)
    return np.sort(rng.normal(size=n)), np.sort(rng.normal(size=m) + shift)


def test_wasserstein_is_in_reference_deviations():
    x, y = both()
    assert of_values(x, y).wasserstein == pytest.approx(stats.wasserstein_distance(x, y) / x.std(ddof=1))


def test_the_test_is_kolmogorov_and_smirnov_s():
    x, y = both()
    expected = stats.ks_2samp(x, y, method="asymp")
    found = of_values(x, y)
    assert found.statistic == pytest.approx(expected.statistic)
    # scipy corrects the asymptotic p for small samples; this one is Kolmogorov's own.
    assert found.p == pytest.approx(stats.kstwobign.sf(found.statistic * math.sqrt(400 * 300 / 700)))
    assert found.p == pytest.approx(expected.pvalue, rel=0.15)


def test_psi_and_js_over_tenths_of_the_reference():
    x, y = both()
    edges = [sorted(x)[math.ceil(400 * k / 10) - 1] for k in range(1, 10)]
    bins = lambda s: np.bincount(np.searchsorted(edges, s, side="left"), minlength=10)  # noqa: E731
    p, q = ((bins(s) + 0.5) / (s.size + 5) for s in (x, y))
    found = of_values(x, y)
    assert found.psi == pytest.approx(sum((b - a) * math.log(b / a) for a, b in zip(p, q, strict=True)))
    m = (p + q) / 2
    assert found.js == pytest.approx((stats.entropy(p, m, 2) + stats.entropy(q, m, 2)) / 2)


def test_the_biases_are_what_chance_gives():
    rng = np.random.default_rng(1)
    found = [of_values(np.sort(rng.normal(size=500)), np.sort(rng.normal(size=400))) for _ in range(300)]
    for name in ("psi", "js", "wasserstein"):
        mean = np.mean([getattr(one, name) for one in found])
        bias = np.mean([getattr(one, f"{name}_bias") for one in found])
        assert mean == pytest.approx(bias, rel=0.1), name


def test_a_constant_reference_has_no_deviations():
    found = of_values(np.full(50, 3.0), np.sort(np.arange(50.0)))
    assert found.wasserstein is None
    assert math.isfinite(found.psi)
    assert found.statistic == pytest.approx(46 / 50)


def test_one_value_on_each_side():
    found = of_values(np.array([1.0]), np.array([2.0]))
    assert found.statistic == 1
    assert found.wasserstein is None


class TestCounts:
    def test_the_chi_square_test(self):
        p, q = np.array([50.0, 30, 20]), np.array([80.0, 60, 60])
        expected = stats.chi2_contingency([p, q], correction=False)
        found = of_counts(p, q)
        assert (found.statistic, found.p) == pytest.approx((expected.statistic, expected.pvalue))

    def test_rare_categories_are_put_together(self):
        p, q = np.array([500.0, 300, 1, 2, 0, 3]), np.array([450.0, 350, 0, 2, 4, 1])
        merged = stats.chi2_contingency([[500, 300, 6], [450, 350, 7]], correction=False)
        found = of_counts(p, q)
        assert (found.statistic, found.p) == pytest.approx((merged.statistic, merged.pvalue))

    def test_a_single_category_is_no_test(self):
        found = of_counts(np.array([10.0, 0]), np.array([20.0, 0]))
        assert (found.statistic, found.p, found.psi) == (0, 1, 0)


class TestBenjaminiHochberg:
    @given(st.lists(st.floats(0, 1), max_size=12))
    def test_by_the_definition(self, p):
        ordered = sorted(p)
        for one, q in zip(p, benjamini_hochberg(p), strict=True):
            least = min(len(p) * ordered[j] / (j + 1) for j in range(len(p)) if ordered[j] >= one)
            assert q == pytest.approx(min(least, 1))
