"""The six verdicts, each from figures worked by hand, and the rule that gives them."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steadynorm.experiment.claims import STATEMENTS, DropoutAccuracies, Evidence, judge, verdict

T9 = 2.2621571628  # Student's t, 9 degrees of freedom, 97.5 %: tables print 2.262
T2 = 4.3026527297  # 2 degrees of freedom

bounds = st.one_of(st.none(), st.floats(-10, 10))
margins = st.floats(0.01, 5)


def ratio(low, high, estimate=None, arm="before", init="tuned", method="paired geometric mean, t-interval on logs"):
    if estimate is None:
        estimate = math.sqrt(low * high)
    return {
        "arm": arm, "init": init, "target": 0.96, "ratio": estimate, "interval": [low, high], "method": method,
        "reached_plain": 10, "reached_arm": 9, "seeds": 10,
    }  # fmt: skip


def timing(low, high, estimate, arm="before"):
    return {
        "arm": arm, "seconds_per_step": 2e-3, "p20": 1e-3, "p80": 3e-3,
        "ratio_to_plain": estimate, "ratio_interval": [low, high],
    }  # fmt: skip


def run(arm, seed, test_accuracy, purpose="accuracy"):
    return {
        "arm": arm, "purpose": purpose, "init": "default", "lr": 0.1, "seed": seed, "steps_to_target": 10,
        "final_accuracy": 0.9, "best_accuracy": 0.9, "test_accuracy": test_accuracy, "train_accuracy": 1.0,
        "diverged_at": None,
    }  # fmt: skip


def claim(name, **evidence):
    return next(c for c in judge(Evidence(**evidence)) if c["id"] == name)


# --- the rule -------------------------------------------------------------------------------------------------------


@given(bounds, bounds, margins)
def test_the_four_verdicts_partition_all_intervals(low, high, m):
    if low is not None and high is not None and low > high:
        low, high = high, low
    above = low is not None and low >= m
    below = high is not None and high <= -m
    within = low is not None and high is not None and -m < low and high < m
    found = verdict([low, high], m)
    assert [found == "supported", found == "contradicted", found == "no material difference"] == [above, below, within]
    assert (found == "cannot tell") == (not (above or below or within))


@given(st.floats(-10, 10), st.floats(-10, 10), margins)
def test_turning_the_sign_swaps_supported_and_contradicted(one, other, m):
    low, high = sorted((one, other))
    swapped = {"supported": "contradicted", "contradicted": "supported"}
    found = verdict([low, high], m)
    assert verdict([-high, -low], m) == swapped.get(found, found)


@given(bounds, margins)
def test_an_open_side_never_gives_no_material_difference(bound, m):
    assert verdict([bound, None], m) in ("supported", "cannot tell")
    assert verdict([None, bound], m) in ("contradicted", "cannot tell")
    assert verdict([None, None], m) == "cannot tell"


def test_the_statements_are_fixed():
    assert [(s.id, s.unit, s.smallest_effect) for s in STATEMENTS] == [
        ("gradients", "decades", 0.3),
        ("steps", "times", 1.25),
        ("accuracy", "points", 0.5),
        ("standardisation", "points", 1.0),
        ("regularisation", "points", 0.5),
        ("time", "times", 1.25),
    ]


# --- what was not measured ------------------------------------------------------------------------------------------


def test_nothing_measured_still_lists_all_six():
    found = judge(Evidence())
    assert [c["id"] for c in found] == [s.id for s in STATEMENTS]
    for c in found:
        assert (c["verdict"], c["estimate"], c["interval"], c["details"]) == ("cannot tell", None, None, {})
        assert c["explanation"].startswith("Not measured")


def test_everything_is_strict_json():
    evidence = Evidence(
        ratios=[ratio(None, None, estimate=4.0, method="at least"), ratio(None, None, estimate=1, arm="after")],
        runs=[run(a, s, 0.9) for a in ("plain", "before", "after") for s in (1,)],
        timing=[timing(None, None, 1.2), timing(1.1, 1.3, 1.2, arm="after")],
        gradient_spreads={"plain": [math.inf, None], "before": [0.1, math.nan], "after": [0.2, 0.3]},
        gradient_counts={"plain": {"vanishing": 1, "exploding": 0, "diverged": 1}},
        standardization={"plain, standardised": [0.9], "batch norm as first layer, raw": [0.9], "plain, raw": [0.5]},
        dropout={a: DropoutAccuracies([0.9], [0.91]) for a in ("plain", "before", "after")},
    )
    found = judge(evidence)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert all(c["estimate"] is not None for c in found)


# --- gradients ------------------------------------------------------------------------------------------------------


def test_gradients_compare_the_spread_seed_by_seed():
    found = claim(
        "gradients",
        gradient_spreads={"plain": [1.0, 1.5, 2.0], "before": [0.5, 0.5, 0.5]},
        gradient_counts={"plain": {"vanishing": 2}, "before": {"vanishing": 0}},
    )
    half = T2 * 0.5 / math.sqrt(3)  # the differences are 0.5, 1, 1.5: s = 0.5
    assert found["estimate"] == pytest.approx(1.0)
    assert found["interval"] == pytest.approx([1 - half, 1 + half])
    assert found["verdict"] == "cannot tell"
    assert found["details"]["counts"] == {"plain": {"vanishing": 2}, "before": {"vanishing": 0}}
    assert "1.50 decades without and 0.50 with batch norm" in found["explanation"]


def test_a_run_beyond_measure_counts_as_twelve_decades():
    spreads = {"plain": [None, math.inf, math.nan, 15.0], "before": [1.0, 1.0, 1.0, 1.0]}
    found = claim("gradients", gradient_spreads=spreads)
    assert (found["estimate"], found["interval"], found["verdict"]) == (11.0, [11.0, 11.0], "supported")


# --- steps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.25, 4.0, "supported"),
        (1.24, 4.0, "cannot tell"),
        (0.81, 1.24, "no material difference"),
        (0.2, 0.79, "contradicted"),
        (0.2, 0.81, "cannot tell"),
    ],
)
def test_steps_are_judged_on_logs(low, high, expected):
    found = claim("steps", ratios=[ratio(low, high)])
    assert (found["verdict"], found["interval"]) == (expected, [low, high])
    assert "10 and 9 of 10 seeds arrived" in found["explanation"]


def test_steps_take_the_tuned_row_and_put_the_other_arm_in_the_details():
    found = claim(
        "steps",
        ratios=[
            ratio(1, 1.1, init="default"),
            ratio(3, 12),
            ratio(1, 1.21, arm="after"),
            ratio(1, 2, init="corrected"),
        ],
    )
    assert (found["estimate"], found["verdict"]) == (6, "supported")
    assert found["details"]["after"]["estimate"] == pytest.approx(1.1)
    assert found["details"]["after"]["verdict"] == "no material difference"
    assert set(found["details"]) == {"after", "method", "target"}


def test_a_plain_arm_that_never_arrives():
    found = claim("steps", ratios=[ratio(4.0, None, estimate=5.0, method="at least")])
    assert found["verdict"] == "supported"
    assert "at least 5.00 times the steps" in found["explanation"]
    assert "95 % interval from 4.00 up" in found["explanation"]
    few = claim("steps", ratios=[ratio(None, None, estimate=5.0, method="at least")])
    assert few["verdict"] == "cannot tell"
    assert "no 95 % interval" in few["explanation"]


def test_a_batch_normalised_arm_that_never_arrives():
    found = claim("steps", ratios=[ratio(None, 0.5, estimate=0.4, method="at most")])
    assert found["verdict"] == "contradicted"
    assert "at most 0.40 times the steps" in found["explanation"]
    assert "95 % interval up to 0.50" in found["explanation"]


def test_neither_arrives():
    row = ratio(None, None, estimate=1.0, method="none") | {"ratio": None}
    found = judge(Evidence(ratios=[row], timing=[timing(1.1, 1.3, 1.2)]))
    for name in ("steps", "time"):
        c = next(c for c in found if c["id"] == name)
        assert (c["estimate"], c["interval"], c["verdict"]) == (None, [None, None], "cannot tell")
        assert "Too few runs of either network reached 96.0 %" in c["explanation"]


# --- accuracy -------------------------------------------------------------------------------------------------------


def test_accuracy_pairs_by_seed_in_points():
    plain = {1: 0.90, 2: 0.92, 3: 0.94}
    before = {3: 0.95, 1: 0.93, 2: 0.94}  # +3, +2, +1 points, listed in another order
    runs = [run("plain", s, a) for s, a in plain.items()] + [run("before", s, a) for s, a in before.items()]
    runs += [run("before", 1, 0.1, purpose="speed"), run("plain", 9, 0.1), run("after", 1, 0.5)]
    found = claim("accuracy", runs=runs)
    half = T2 / math.sqrt(3)
    assert found["estimate"] == pytest.approx(2)
    assert found["interval"] == pytest.approx([2 - half, 2 + half])
    assert "92.00 % without and 94.00 % with" in found["explanation"]
    assert "3 paired seeds" in found["explanation"]
    assert found["details"]["after"]["estimate"] == pytest.approx(-40)


def test_accuracy_leaves_out_pairs_without_a_test_figure_and_counts_them():
    runs = [run("plain", s, 0.9) for s in range(3)] + [run("before", s, None if s == 0 else 0.9) for s in range(3)]
    found = claim("accuracy", runs=runs)
    assert (found["details"]["left_out"], found["verdict"]) == (1, "no material difference")
    assert "2 paired seeds" in found["explanation"]


# --- standardisation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "expected"), [(0.95, "supported"), (0.945, "supported"), (0.90, "contradicted"), (0.99, "supported")]
)
def test_standardisation_asks_for_as_good_within_the_margin(first, expected):
    found = claim(
        "standardisation",
        standardization={
            "plain, standardised": [0.95] * 3,
            "batch norm as first layer, raw": [first] * 3,
            "plain, raw": [0.25] * 3,
            "batch norm in the hidden layers, raw": [0.75] * 3,
        },
    )
    assert (found["verdict"], found["estimate"]) == (expected, pytest.approx(100 * (first - 0.95)))
    assert found["details"]["plain, raw"]["difference"] == pytest.approx(-70)
    assert found["details"]["batch norm in the hidden layers, raw"]["difference"] == pytest.approx(-20)


def test_standardisation_too_noisy_to_tell():
    conditions = {"plain, standardised": [0.95, 0.95], "batch norm as first layer, raw": [0.93, 0.97]}
    assert claim("standardisation", standardization=conditions)["verdict"] == "cannot tell"


# --- regularisation -------------------------------------------------------------------------------------------------


def test_regularisation_is_a_difference_of_gains():
    found = claim(
        "regularisation",
        dropout={
            "plain": DropoutAccuracies([0.90, 0.91, 0.92], [0.93, 0.94, 0.95]),  # +3 each
            "before": DropoutAccuracies([0.95, 0.95, 0.95], [0.95, 0.96, 0.97]),  # 0, +1, +2
        },
    )
    half = T2 / math.sqrt(3)
    assert found["estimate"] == pytest.approx(2)
    assert found["interval"] == pytest.approx([2 - half, 2 + half])
    assert (found["details"]["gain_plain"], found["details"]["gain"]) == (pytest.approx(3), pytest.approx(1))


@pytest.mark.parametrize(
    ("gains_plain", "gains", "expected"),
    [
        ((2.0, 2.1, 2.2), (0.0, 0.1, 0.2), "supported"),
        ((0.0, 0.1, 0.2), (2.0, 2.1, 2.2), "contradicted"),
        ((2.0, 2.1, 2.2), (2.1, 2.2, 2.3), "no material difference"),
        ((-1.0, -1.1, -1.2), (-9.0, -9.1, -9.2), "no material difference"),  # harm on both sides is no need
        ((-9.0, -9.1, -9.2), (-1.0, -1.1, -1.2), "no material difference"),
        ((-1.0, 1.0, 3.0), (-9.0, -7.0, -5.0), "cannot tell"),  # 8 points apart, yet perhaps nothing gained
        ((-9.0, -7.0, -5.0), (-1.0, 1.0, 3.0), "cannot tell"),
    ],
)
def test_regularisation_asks_whether_there_was_a_need(gains_plain, gains, expected):
    def accuracies(points):
        return DropoutAccuracies([0.9] * 3, [0.9 + p / 100 for p in points])

    dropout = {"plain": accuracies(gains_plain), "before": accuracies(gains)}
    found = claim("regularisation", dropout=dropout)
    assert found["verdict"] == expected
    harm = gains_plain[0] < 0 and gains[0] < 0
    assert ("neither gains 0.5 points" in found["explanation"]) == (harm and expected != "cannot tell")
    assert ("not clear" in found["explanation"]) == (expected == "cannot tell")


# --- time -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("per_step", "steps", "expected"),
    [
        # Seconds per step are 1.2 times as many: steps of the geometric mean r give r / 1.2 in seconds.
        ((1.06, 1.4), (2.0, 4.0), "supported"),  # seconds from 1.61
        ((1.05, 1.4), (2.0, 4.0), "cannot tell"),  # 5 % slower is the boundary, not beyond it
        ((0.9, 1.05), (2.0, 4.0), "contradicted"),  # not slower per step
        ((1.06, 1.4), (0.5, 0.6), "contradicted"),  # slower to learn: seconds up to 0.53
        ((1.06, 1.4), (1.15, 1.25), "no material difference"),  # seconds 0.85 to 1.13
        ((1.04, 1.4), (1.15, 1.25), "no material difference"),
        ((1.06, 1.4), (1.25, 4.0), "cannot tell"),  # enough in steps, not in seconds: from 1.02
        ((None, None), (2.0, 4.0), "cannot tell"),
    ],
)
def test_time_needs_both_halves(per_step, steps, expected):
    found = claim("time", ratios=[ratio(*steps)], timing=[timing(*per_step, 1.2)])
    assert found["verdict"] == expected
    halves = (found["details"]["seconds_per_step"]["verdict"], found["details"]["seconds_to_target"]["verdict"])
    assert f'"slower per step": {halves[0]}' in found["explanation"]
    assert f'"faster to learn": {halves[1]}' in found["explanation"]


def test_time_combines_both_intervals_on_logs():
    # Distances from the estimates, in units of log 2: steps 3 below and 12 above, seconds 5 below and 4 above.
    # A slow step makes the figure small: below hypot(3, 4) = 5, above hypot(12, 5) = 13.
    per_step = timing(2.0**-4, 2.0**5, 2.0)
    found = claim("time", ratios=[ratio(2.0**3, 2.0**18, 2.0**6)], timing=[per_step])
    assert found["estimate"] == pytest.approx(2.0**5)
    assert found["interval"] == pytest.approx([1, 2.0**18])
    one_sided = claim("time", ratios=[ratio(2.0**3, None, 2.0**6)], timing=[per_step])
    assert one_sided["interval"] == [pytest.approx(1), None]


def test_time_needs_both_measurements():
    assert claim("time", ratios=[ratio(2, 3)])["estimate"] is None
    assert claim("time", timing=[timing(1.1, 1.3, 1.2)])["estimate"] is None


# --- the arm that is judged -----------------------------------------------------------------------------------------


def test_another_primary_arm():
    rows = [ratio(3, 12), ratio(1.0, 1.21, arm="norm")]
    found = claim("steps", ratios=rows, primary="norm")
    assert found["estimate"] == pytest.approx(1.1)
    assert found["details"]["before"]["estimate"] == 6


def test_a_plain_arm_of_another_name():
    found = claim(
        "accuracy", runs=[run(a, s, x) for a, x in (("bare", 0.8), ("before", 0.9)) for s in (1, 2)], plain="bare"
    )
    assert (found["estimate"], found["details"]["left_out"]) == (pytest.approx(10), 0)
    assert "bare" not in found["details"]


def test_ten_seeds_use_nine_degrees_of_freedom():
    other = [0.1 * k for k in range(10)]
    found = claim("gradients", gradient_spreads={"plain": [1.0] * 10, "before": other})
    half = T9 * math.sqrt(sum((x - 0.45) ** 2 for x in other) / 9 / 10)
    assert found["interval"] == pytest.approx([0.55 - half, 0.55 + half])
