"""p-values, e-values and the Shiryaev-Roberts procedure, against their own definitions and laws."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steadynorm.shift.watching.sequential import combined_p, e_value, p_value, shiryaev_roberts


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.integers(-1, 6))
def test_p_value_counts_ties_as_at_least_as_large(null, statistic):
    found = p_value(statistic, np.sort(np.array(null, dtype=float)))
    assert found == (1 + sum(v >= statistic for v in null)) / (len(null) + 1)


@pytest.mark.parametrize("draws", [9, 99, 4999])
def test_e_values_have_a_mean_of_at_most_one_under_the_null(draws):
    """An exchangeable statistic has p uniform on 1/(J+1), ..., 1: the mean is a finite sum, below the integral's 1."""
    p = np.arange(1, draws + 2) / (draws + 1)
    mean = math.fsum(e_value(p)) / (draws + 1)
    assert 1 - 1 / math.sqrt(draws) < mean <= 1


def test_the_expected_evidence_is_the_number_of_batches():
    """With e of mean 1, E[M_n] = Σ w exactly: enumerate all paths of a two-valued e."""
    e, weights = (0.5, 1.5), (1.0, 4.0, 0.25, 2.0)
    total = 0.0
    for path in np.ndindex(*(2,) * len(weights)):
        m = 0.0
        for choice, w in zip(path, weights, strict=True):
            m = float(shiryaev_roberts(m, e[choice], w))
        total += m / 2 ** len(weights)
    assert total == pytest.approx(sum(weights), rel=1e-12)


def test_the_mean_run_is_at_least_the_threshold_and_early_alarms_are_rare():
    rng, threshold, streams = np.random.default_rng(0), 50.0, 1500
    evidence, first = np.zeros(streams), np.full(streams, np.inf)
    for batch in range(1, 2500):
        evidence = shiryaev_roberts(evidence, e_value(rng.uniform(1e-9, 1, streams)))
        first[(evidence >= threshold) & np.isinf(first)] = batch
    run = np.minimum(first, 2500)
    assert run.mean() - 2 * run.std() / math.sqrt(streams) > threshold
    assert np.mean(first <= threshold / 10) <= 0.1


def test_evidence_stays_finite():
    m = 0.0
    for _ in range(400):
        m = float(shiryaev_roberts(m, 1e6))
    assert math.isfinite(m)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.sampled_from([0.1, 0.25, 1.0]))
def test_combined_p_is_small_where_a_share_of_them_is(p, share):
    k = max(1, math.ceil(share * len(p)))
    found = combined_p(p, share)
    assert found == pytest.approx(min(1.0, sorted(p)[k - 1] * len(p) / k))
    for level in (0.01, 0.1):
        assert (found <= level) == (sum(one <= level * k / len(p) * (1 + 1e-12) for one in p) >= k)


def test_combined_p_holds_its_level_however_the_tests_depend_on_each_other():
    """The worst case: whenever one of the four is small, the whole quarter is. Then the level is met exactly."""
    rng, level, tests = np.random.default_rng(0), 0.1, 8
    u = rng.uniform(size=(20_000, 4))
    groups = np.where(rng.permuted(np.tile(np.arange(4), (20_000, 1)), axis=1) == 0, u, 1.0)
    for p in (np.repeat(u[:, :1], tests, axis=1), rng.uniform(size=(20_000, tests)), np.repeat(groups, 2, axis=1)):
        rejected = np.mean([combined_p(row) <= level for row in p])
        assert rejected <= level + 3 * math.sqrt(level * (1 - level) / 20_000)
