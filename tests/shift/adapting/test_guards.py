"""Each guard triggers where it should and is silent where it should, and its figures are the textbook's."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from steadynorm.shift.adapting.guards import (
    autocorrelation,
    balanced_classes,
    drift_guard,
    effective_classes,
    entropy,
    leading_component,
    order_guard,
    runs_z,
    size_guard,
    skew_guard,
)

EQUAL = np.full(10, 0.1)


@given(st.lists(st.integers(0, 2), min_size=3, max_size=6))
@settings(max_examples=30, deadline=None)
def test_the_runs_test_agrees_with_all_permutations(labels: list[int]):
    runs = np.array([1 + sum(a != b for a, b in itertools.pairwise(p)) for p in itertools.permutations(labels)])
    own = 1 + sum(a != b for a, b in itertools.pairwise(labels))
    want = (runs.mean() - own) / runs.std() if runs.std() > 0 else 0.0
    assert runs_z(np.array(labels)) == pytest.approx(want, abs=1e-9)


def test_one_class_has_no_order():
    assert runs_z(np.zeros(50, dtype=np.int64)) == 0.0
    assert runs_z(np.array([1])) == 0.0


def test_entropy_is_scipys():
    p = np.random.default_rng(0).dirichlet(np.ones(7), size=20)
    np.testing.assert_allclose(entropy(p), stats.entropy(p, axis=1) / math.log(7), rtol=1e-12)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=50))
@settings(max_examples=50, deadline=None)
def test_effective_classes_are_the_exponential_of_scipys_entropy(labels: list[int]):
    want = math.exp(stats.entropy(np.unique(labels, return_counts=True)[1]))
    assert effective_classes(np.array(labels)) == pytest.approx(want)


def test_balanced_classes_against_the_exact_mean():
    exact = 0.0
    for a, b in itertools.product(range(7), repeat=2):
        if a + b <= 6:
            chance = stats.multinomial.pmf([a, b, 6 - a - b], 6, [0.5, 0.3, 0.2])
            exact += chance * math.exp(stats.entropy([a, b, 6 - a - b]))
    assert balanced_classes(6, np.array([0.5, 0.3, 0.2])) == pytest.approx(exact, abs=4 * 0.6 / 200**0.5)
    assert balanced_classes(100, np.array([1.0, 0.0])) == 1.0


@pytest.mark.parametrize(
    ("n", "kept", "passed"), [(64, 0.2, True), (63, 0.2, False), (255, 0.0, False), (256, 0.0, True)]
)
def test_size(n: int, kept: float, passed: bool):
    assert size_guard(n, kept).passed is passed


def test_skew():
    rng = np.random.default_rng(0)
    assert all(skew_guard(rng.integers(0, 10, n), EQUAL).passed for n in (64, 256) for _ in range(200))
    assert not skew_guard(rng.integers(0, 5, 256), EQUAL).passed
    assert not skew_guard(np.zeros(64, dtype=np.int64), EQUAL).passed
    rare = np.array([0.9, 0.1])
    assert skew_guard((rng.random(256) < 0.1).astype(np.int64), rare).passed


def test_order():
    rng = np.random.default_rng(0)
    assert all(order_guard(rng.integers(0, 10, 128)).passed for _ in range(300))
    assert not order_guard(np.sort(rng.integers(0, 10, 128))).passed
    assert order_guard(np.tile(np.arange(10), 20)).passed  # shuffled without replacement within blocks


def test_drift():
    rng = np.random.default_rng(0)
    assert all(drift_guard(rng.standard_normal((64, 5))).passed for _ in range(300))
    walk = np.cumsum(rng.standard_normal((128, 1)), axis=0)
    assert not drift_guard(walk + 0.1 * rng.standard_normal((128, 5))).passed
    long = rng.standard_normal((20_000, 1))
    assert drift_guard(long[1:] + 0.06 * long[:-1]).passed  # sure to be there, and harmless


def test_autocorrelation_from_the_definition():
    x = np.random.default_rng(0).standard_normal(50)
    centred = x - x.mean()
    assert autocorrelation(x) == pytest.approx(sum(a * b for a, b in itertools.pairwise(centred)) / sum(centred**2))
    assert autocorrelation(np.ones(5)) == 0.0


def test_the_leading_component_is_the_largest_eigenvectors():
    x = np.random.default_rng(0).standard_normal((40, 3)) @ np.array([[1, 2, 0], [0, 1, 1], [0, 0, 1.0]])
    x = np.concatenate([x, np.full((40, 1), 3.0)], axis=1)  # a constant feature says nothing
    standard = stats.zscore(x[:, :3])
    vector = np.linalg.eigh(standard.T @ standard)[1][:, -1]
    assert abs(leading_component(x)) == pytest.approx(abs(standard @ vector))
    assert (leading_component(np.ones((5, 2))) == 0).all()
