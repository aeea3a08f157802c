"""Verdicts follow from intervals and a tolerance alone."""

import pytest

from steadynorm.shift.comparing.effects import Effect
from steadynorm.shift.comparing.verdicts import SHARES, judge, rows_needed, table_verdict, why


def effect(low, high, estimate=None, kind="location"):
    return Effect(kind, (low + high) / 2 if estimate is None else estimate, low, high)


@pytest.mark.parametrize(
    ("effects", "q", "verdict"),
    [
        ([effect(0.11, 0.5), effect(0, 0.01)], 0.9, "shifted"),
        ([effect(0, 0.09), effect(0, 0.05)], 0.9, "no shift"),
        ([effect(0.02, 0.09)], 0.001, "benign"),
        ([effect(0.02, 0.09)], None, "no shift"),
        ([effect(0.02, 0.11), effect(0, 0.01)], 0.001, "cannot tell"),
        ([effect(0.1, 0.5)], 0.001, "cannot tell"),  # above the tolerance, not on it
        ([], None, "not compared"),
    ],
)
def test_judged(effects, q, verdict):
    assert judge(effects, 0.1, q, 0.05) == verdict


def test_more_rows_change_the_doubt_and_not_the_answer():
    def seen(size, n):
        half = 3.5 * (2 / n) ** 0.5
        return judge([effect(max(size - half, 0), size + half, size)], 0.1, 1e-30, 0.05)

    assert [seen(0.05, n) for n in (100, 10**4, 10**6, 10**8)] == ["cannot tell", "benign", "benign", "benign"]
    assert [seen(0.3, n) for n in (100, 10**4, 10**6, 10**8)] == ["cannot tell", "shifted", "shifted", "shifted"]


def test_the_shares_of_a_feature_s_error():
    for kinds in (("location", "scale", "distance", "missing"), ("composition", "missing")):
        assert sum(SHARES[kind] for kind in kinds) == pytest.approx(1)


class TestRowsNeeded:
    def test_an_interval_shrinks_with_the_root(self):
        # Half-width 0.3 at 1,000 rows; 0.2 above the tolerance: settled where it has shrunk to 0.2.
        assert rows_needed([effect(0.0, 0.6, 0.3)], 0.1, 1000) == 2250

    def test_the_nearest_effect_above_the_tolerance_settles_it(self):
        one, other = effect(0.0, 0.6, 0.3), effect(0, 0.5, 0.05)
        assert rows_needed([one, other], 0.1, 1000) == rows_needed([one], 0.1, 1000)

    def test_all_must_be_below_otherwise(self):
        one, other = effect(0.0, 0.12, 0.02), effect(0, 0.3, 0.05)
        assert rows_needed([one, other], 0.1, 1000) == rows_needed([other], 0.1, 1000) == 25000

    def test_on_the_tolerance_no_number_would_do(self):
        assert rows_needed([effect(0.0, 0.2, 0.1)], 0.1, 1000) is None
        assert rows_needed([effect(0.0, 0.2, 0.1001)], 0.1, 10**6) is None


class TestWhy:
    @pytest.mark.parametrize(
        ("kind", "estimate", "words"),
        [
            ("location", -0.5, "the mean is lower by 0.50"),
            ("scale", 0.693, "the spread is 2.00 times"),
            ("missing", 0.5, "more values are missing"),
            ("missing", -0.5, "fewer values are missing"),
            ("distance", 0.5, "the distributions are as far apart"),
            ("composition", 0.5, "the shares of the categories are as far apart"),
        ],
    )
    def test_shifted(self, kind, estimate, words):
        assert words in why("shifted", [effect(0.4, 0.6, estimate, kind)], 0.1, 100)

    def test_the_others(self):
        assert "no effect can be above 0.09" in why("no shift", [effect(0, 0.09)], 0.1, 100)
        assert "a difference is seen" in why("benign", [effect(0.01, 0.09)], 0.1, 100)
        assert "about 225 rows a side would tell" in why("cannot tell", [effect(0, 0.6, 0.3)], 0.1, 100)
        # The lower end was cut off at 0: the interval is as wide as its other half.
        assert "about 400 rows a side would tell" in why("cannot tell", [effect(0, 0.7, 0.3)], 0.1, 100)
        both = [effect(0, 0.12, 0.05, "scale"), effect(0, 0.6, 0.3, "location")]
        assert why("cannot tell", both, 0.1, 100).startswith("the location may differ by 0.00 to 0.60")
        assert "more than a billion rows" in why("cannot tell", [effect(0, 0.2, 0.1)], 0.1, 100)
        assert why("not compared", [], 0.1, 100) == "no values to compare"


@pytest.mark.parametrize(
    ("features", "joint", "verdict"),
    [
        (["no shift", "shifted", "cannot tell"], None, "shifted"),
        (["no shift", "no shift"], 0.11, "shifted"),
        (["no shift", "cannot tell", "benign"], 0.0, "cannot tell"),
        (["no shift", "benign"], 0.1, "benign"),
        (["no shift", "not compared"], None, "no shift"),
        (["not compared"], None, "not compared"),
        ([], None, "not compared"),
    ],
)
def test_the_whole_table(features, joint, verdict):
    assert table_verdict(features, joint, 0.1) == verdict
