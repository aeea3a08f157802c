"""The domain classifier: exact where nothing has moved, and it finds what no column shows alone."""

import math

import numpy as np
import pytest
from scipy import stats

from steadynorm.shift.comparing import domain
from steadynorm.shift.comparing.domain import FOLDS, MOST_CATEGORIES, Rows, classify, weigh


def rows(x, y, categories=None):
    names = tuple("abcdefgh"[: x.shape[1]])
    return Rows(x, y, names, categories or (False,) * len(names))


def normal(seed, n=300, f=3):
    return np.random.default_rng(seed).normal(size=(n, f))


def test_the_area_and_its_variance_by_the_definition():
    rng = np.random.default_rng(0)
    scores, y = np.round(rng.normal(size=60), 1), np.repeat([0, 1], [25, 35])
    scores[y == 1] += 0.5
    wins = np.array([[1.0 if b > a else 0.5 if b == a else 0.0 for b in scores[y == 1]] for a in scores[y == 0]])
    area, variance = domain._area(scores, y)
    assert area == pytest.approx(wins.mean())
    # DeLong: the variances of the means over either side.
    assert variance == pytest.approx(wins.mean(1).var(ddof=1) / 25 + wins.mean(0).var(ddof=1) / 35)


def test_alike_sides_give_uniform_p():
    found = [classify(rows(normal(2 * s, 60, 2), normal(2 * s + 1, 60, 2)), alpha=0.01, seed=s) for s in range(40)]
    p = [one.p for one in found]
    assert stats.kstest(p, "uniform").pvalue > 1e-4
    assert abs(np.mean([one.auc for one in found]) - 0.5) < 0.03
    assert sum(one.low > 0.1 for one in found) <= 1


def test_a_correlation_that_flips_while_the_marginals_stay():
    x, y = normal(0, 1000, 2), normal(1, 1000, 2)
    x[:, 1] = 0.7 * x[:, 0] + math.sqrt(1 - 0.49) * x[:, 1]
    y[:, 1] = -0.7 * y[:, 0] + math.sqrt(1 - 0.49) * y[:, 1]
    extra = [normal(2, 1000, 2), normal(3, 1000, 2)]
    found = classify(rows(np.hstack([x, extra[0]]), np.hstack([y, extra[1]])), alpha=0.01, seed=0)
    assert found.p == 0.001
    assert found.low > 0.1
    assert found.effect == pytest.approx(math.sqrt(2) * stats.norm.ppf(found.auc))
    assert {name for name, _ in found.features[:2]} == {"a", "b"}


def test_an_effect_of_one_deviation():
    # A shift of d in one normal column: no classifier can have a larger AUC than Phi(d / sqrt(2)).
    found = classify(rows(normal(0, 2000, 1), normal(1, 2000, 1) + 1), alpha=0.01, seed=0)
    assert 0.85 < found.effect < 1.1
    assert found.low < found.effect


def test_infinite_missing_and_many_categories():
    x, y = normal(0), normal(1)
    x[::7, 0], y[::5, 0] = np.nan, np.inf
    x[:, 1], y[:, 1] = np.arange(300) % 30, MOST_CATEGORIES + np.arange(300)  # all of the latter are one
    found = classify(rows(x, y, (False, True, False)), alpha=0.01, seed=0)
    assert found.auc > 0.9


@pytest.mark.parametrize("small", [rows(normal(0, 49), normal(1)), rows(normal(0, 300, 0), normal(1, 300, 0))])
def test_too_few_rows_or_no_features(small):
    assert classify(small, alpha=0.01, seed=0) is None


class TestWeights:
    def test_weighted_the_reference_is_the_current_data(self):
        x, y = normal(0, 4000, 2), normal(1, 4000, 2)
        y[:, 0] = 0.5 + 0.8 * y[:, 0]
        found = weigh(rows(x, y), rows=4000, seed=0)
        assert found.values.mean() == pytest.approx(1)
        assert np.average(x[:, 0], weights=found.values) == pytest.approx(0.5, abs=0.1)
        assert np.average(x[:, 1], weights=found.values) == pytest.approx(0.0, abs=0.1)
        true = np.exp(stats.norm.logpdf(x[:, 0], 0.5, 0.8) - stats.norm.logpdf(x[:, 0]))
        assert np.corrcoef(np.log(found.values), np.log(true))[0, 1] > 0.7
        assert found.effective == pytest.approx(found.values.sum() ** 2 / (found.values**2).sum())
        assert found.warning is None

    def test_all_rows_are_weighed_those_seen_by_models_blind_to_them(self, monkeypatch):
        seen = []
        train = domain._trained

        def watched(x, y, *rest):
            model = train(x, y, *rest)
            seen.append((model, {tuple(row) for row in x}))
            return model

        blind = []
        odds = domain._odds

        def asked(model, x):
            known = next(rows for one, rows in seen if one is model)
            blind.append((len(x), not any(tuple(row) in known for row in x)))
            return odds(model, x)

        monkeypatch.setattr(domain, "_trained", watched)
        monkeypatch.setattr(domain, "_odds", asked)
        found = weigh(rows(normal(0, 500), normal(1, 200)), rows=100, seed=0, numbers=np.arange(500) * 2)
        assert found.values.shape == (500,)
        assert blind[FOLDS:] == [(20, True)] * FOLDS
        assert found.rows is not None
        assert found.rows[-1] == 998

    def test_no_overlap_is_said(self):
        found = weigh(rows(normal(0, 500, 1), normal(1, 500, 1) + 3), rows=500, seed=0)
        assert found.effective < 50
        assert "new labels are needed" in found.warning
