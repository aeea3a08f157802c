"""`compare` on whole tables: what must be found, what must not, and what each bad input is answered with."""

import numpy as np
import pytest

import steadynorm as sn
from steadynorm.errors import ArgumentError, DataError
from steadynorm.shift.reading.sides import Schema

FEW = {"classifier_rows": 500, "seed": 0}


def table(seed, n=3000, **others):
    rng = np.random.default_rng(seed)
    made = {
        "size": rng.normal(10, 2, n),
        "price": rng.lognormal(size=n),
        "count": rng.poisson(0.3, n),
        "colour": rng.choice(["red", "green", "blue"], n, p=[0.5, 0.3, 0.2]),
        "flag": rng.random(n) < 0.2,
    }
    return made | others


def verdicts(report):
    return {feature.name: feature.verdict for feature in report.features}


def test_alike_tables_are_never_shifted():
    reports = [sn.shift.compare(table(2 * s, 1000), table(2 * s + 1, 1000), classifier_rows=0) for s in range(20)]
    assert {report.verdict for report in reports} == {"cannot tell"}
    assert all("rows a side would tell" in report.features[0].reason for report in reports)


def test_with_enough_rows_no_shift_is_a_finding():
    report = sn.shift.compare(table(0, 60_000), table(1, 60_000), classifier_rows=0)
    assert report.verdict in ("no shift", "benign")
    assert "can be as large as 0.1 deviations" in report.reason


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("size", lambda t: t["size"] + 0.3 * 2),
        ("size", lambda t: 10 + 1.4 * (t["size"] - 10)),
        ("price", lambda t: 1.4 * t["price"]),
        ("count", lambda t: t["count"] + (np.arange(3000) % 4 == 0)),
        ("colour", lambda t: np.where(np.arange(3000) % 4 == 0, "blue", t["colour"])),
        ("colour", lambda t: np.where(np.arange(3000) % 4 == 0, "violet", t["colour"])),
        ("flag", lambda t: t["flag"] | (np.arange(3000) % 4 == 0)),
        ("size", lambda t: np.where(np.arange(3000) % 4 == 0, np.nan, t["size"])),
        ("size", lambda t: np.where(np.arange(3000) % 4 == 0, np.inf, t["size"])),
        ("size", lambda t: np.abs(t["size"] - 10) * 1.65 * (np.arange(3000) % 2 * 2 - 1) / 1.65 + 10),
    ],
    ids=["mean", "spread", "scale", "count", "shares", "new category", "share", "missing", "infinite", "alike"],
)
def test_one_feature_has_moved(name, change, request):
    reference, current = table(0), table(1)
    report = sn.shift.compare(reference, current | {name: change(current)}, classifier_rows=0)
    if request.node.callspec.id == "alike":  # the same distribution, made another way
        assert report.verdict == "cannot tell"
    else:
        assert report.shifted == (name,)
        assert report.features[0].name == name
        assert name in report.reason


def test_a_shift_below_the_tolerance_is_benign():
    reference, current = table(0, 60_000), table(1, 60_000)
    report = sn.shift.compare(reference, current | {"size": current["size"] + 0.05 * 2}, classifier_rows=0)
    assert verdicts(report)["size"] == "benign"
    assert "a difference is seen" in next(f for f in report.features if f.name == "size").reason


def test_the_tolerance_decides():
    reference, current = table(0), table(1)
    moved = current | {"size": current["size"] + 0.6}
    assert sn.shift.compare(reference, moved, tolerance=0.5, classifier_rows=0).shifted == ()


def test_together_but_not_one_by_one():
    rng = np.random.default_rng(0)
    a, b, c, d = rng.normal(size=(4, 3000))
    report = sn.shift.compare({"a": a, "b": 0.8 * a + 0.6 * b}, {"a": c, "b": 0.6 * d - 0.8 * c}, **FEW)
    assert report.shifted == ()
    assert report.verdict == "shifted"
    assert "how they go together has changed" in report.reason
    assert report.domain.low > 0.1


def test_what_is_new_and_what_has_vanished():
    report = sn.shift.compare(
        {"c": ["a", "b"] * 50, "x": np.arange(100.0)},
        {"c": ["b", "z"] * 50, "x": np.arange(100.0) + 90},
        classifier_rows=0,
    )
    of = {feature.name: feature for feature in report.features}
    assert (of["c"].new, of["c"].vanished) == ({"z": 50}, {"a": 50})
    assert of["x"].out_of_range == pytest.approx(0.9)
    assert of["c"].out_of_range is None


def test_q_values_are_corrected_over_features():
    report = sn.shift.compare(table(0), table(1), classifier_rows=0)
    p = sorted(feature.distances.p for feature in report.features)
    q = sorted(feature.q for feature in report.features)
    assert q[-1] == pytest.approx(p[-1])
    assert q[0] == pytest.approx(min(len(p) * p[i] / (i + 1) for i in range(len(p))))


class TestOddColumns:
    def test_constant_all_missing_and_too_short(self):
        n = 200
        reference = {"same": np.zeros(n), "gone": np.full(n, np.nan), "lost": np.arange(n * 1.0), "moved": np.zeros(n)}
        current = {"same": np.zeros(n), "gone": np.full(n, np.nan), "lost": np.full(n, np.nan), "moved": np.ones(n)}
        report = sn.shift.compare(reference, current, classifier_rows=100)
        assert verdicts(report) == {
            "lost": "shifted",
            "moved": "shifted",
            "same": "cannot tell",
            "gone": "not compared",
        }
        assert report.to_json()

    @pytest.mark.parametrize("n", [1, 2, 3, 30])
    def test_a_handful_of_rows(self, n):
        report = sn.shift.compare(table(0, n), table(1, n))
        assert set(verdicts(report).values()) <= {"cannot tell"}
        assert report.domain is None
        with pytest.raises(DataError, match="at least 50 rows a side"):
            _ = report.weights

    def test_other_schemas_are_said(self):
        reference, current = table(0, 300), table(1, 300)
        del current["price"]
        report = sn.shift.compare(reference, current | {"extra": np.arange(300)}, classifier_rows=0)
        assert report.schema == Schema(("price",), ("extra",), (), ())
        assert "price" not in verdicts(report)
        assert "Only the reference has: price." in str(report)

    def test_the_largest_numbers(self):
        big = np.array([1e308, -1e308] * 100)
        assert sn.shift.compare({"x": big}, {"x": big / 2}, classifier_rows=100).to_json()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tolerance": 0}, "tolerance must be a number from 1e-6"),
        ({"tolerance": 1e-300}, "tolerance must be"),
        ({"tolerance": "0.1"}, "tolerance must be"),
        ({"tolerance": float("nan")}, "tolerance must be"),
        ({"confidence": 1}, "confidence must be above 0 and below 1"),
        ({"confidence": 0.9999999999999999}, "confidence must be"),
        ({"sample": 1}, "sample must be a whole number, at least 2 rows"),
        ({"sample": 1e2}, "sample must be"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**32}, "seed must be"),
        ({"classifier_rows": 49}, "at least 50 rows"),
        ({"classifier_rows": -1}, "classifier_rows must be 0"),
        ({"types": {"nope": "numeric"}}, "nope"),
        ({"columns": ["nope"]}, "nope"),
    ],
)
def test_bad_settings(options, words):
    with pytest.raises(ArgumentError, match=words):
        sn.shift.compare(table(0, 10), table(1, 10), **options)


def test_the_same_seed_gives_the_same_report():
    one, other = (sn.shift.compare(table(0, 400), table(1, 400), **FEW).to_json() for _ in range(2))
    assert one == other


def test_a_sample_of_many_rows():
    report = sn.shift.compare(table(0), table(1), sample=500, classifier_rows=0)
    assert report.sides[0].sampled <= 500
    assert report.to_dict()["sides"]["reference"]["rows"] == 3000
    size = next(f for f in report.features if f.name == "size")
    assert size.facts["reference"]["mean"] == pytest.approx(np.mean(table(0)["size"]))


CROWDS = {"uniform": lambda rng, n: rng.integers(40_000, size=n), "zipf": lambda rng, n: rng.zipf(1.1, n) % 40_000}


@pytest.mark.parametrize(("n", "m"), [(500, 500), (300, 3000), (2000, 20_000)])
@pytest.mark.parametrize("crowd", CROWDS)
def test_a_crowd_of_rare_categories_is_no_shift(crowd, n, m):
    """Most occur once: their shares differ on every draw, by more than sqrt(p (1 - p)) lets them."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        sides = ({"zip": CROWDS[crowd](rng, size).astype(str)} for size in (n, m))
        report = sn.shift.compare(*sides, types={"zip": "categorical"}, classifier_rows=0)
        assert report.verdict != "shifted"
        assert max(effect.low for effect in report.features[0].effects) == 0


@pytest.mark.parametrize("unit", [1e-200, 1e200])
def test_units_that_are_worlds_apart_are_a_shift_and_no_error(unit):
    x, y = (np.random.default_rng(seed).normal(size=500) for seed in range(2))
    for sides in (({"x": x * unit}, {"x": y}), ({"x": x}, {"x": y * unit})):
        assert sn.shift.compare(*sides, classifier_rows=0).verdict == "shifted"


def test_a_constant_reference_has_no_deviations_to_measure_by():
    report = sn.shift.compare({"x": np.full(1000, 0.1)}, {"x": np.full(1000, 0.2)}, classifier_rows=0)
    assert report.features[0].distances.wasserstein is None


@pytest.mark.parametrize("nothing", [[None] * 500, [float("nan")] * 500])
def test_a_column_without_values_on_either_side_is_not_compared(nothing):
    x = np.random.default_rng(0).normal(size=500)
    report = sn.shift.compare({"x": x, "empty": nothing}, {"x": x, "empty": nothing}, classifier_rows=0)
    empty = next(feature for feature in report.features if feature.name == "empty")
    assert (empty.verdict, empty.reason) == ("not compared", "no values to compare")
    assert report.to_json()
