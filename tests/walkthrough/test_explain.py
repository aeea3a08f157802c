"""The steps of a mini-batch, against 50-digit (and wider) arithmetic from the definitions."""

import json
from decimal import Decimal
from fractions import Fraction

import mpmath as mp
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from steadynorm.errors import ArgumentError, ShapeError, SingleValueError
from steadynorm.walkthrough import explain

PRINTED = [3, 5, 8, 9, 11, 24]


def definition(x, gamma, beta, eps, momentum):
    """Every step by its formula, in mpmath's current precision."""
    n = len(x)
    mean = sum(x) / n
    differences = [v - mean for v in x]
    squares = [d**2 for d in differences]
    variance, unbiased = sum(squares) / n, sum(squares) / (n - 1)
    divisor = mp.sqrt(variance + eps)
    x_hat = [d / divisor for d in differences]
    running_mean, running_variance = momentum * mean, (1 - momentum) + momentum * unbiased
    return {
        "values": x,
        "total": sum(x),
        "mean": mean,
        "differences": differences,
        "squares": squares,
        "total_square": sum(squares),
        "variance": variance,
        "deviation": mp.sqrt(variance),
        "divisor": divisor,
        "x_hat": x_hat,
        "x_hat_shortfall": 1 - mp.sqrt(sum(h**2 for h in x_hat) / n),
        "y": [gamma * h + beta for h in x_hat],
        "unbiased_variance": unbiased,
        "running_mean": running_mean,
        "running_variance": running_variance,
        "inference": [gamma * (v - running_mean) / mp.sqrt(running_variance + eps) + beta for v in x],
    }


def assert_every_digit(shown, truth, digits):
    """`shown` is `truth` rounded: off by at most half a unit of the last digit that there was room for."""
    number = mp.mpf(shown)
    unit = mp.mpf(10) ** (-digits if "e" not in shown else int(shown.split("e")[1]) - digits + 1)
    assert abs(number - truth) <= unit / 2 * (1 + mp.mpf(10) ** -30), (shown, mp.nstr(truth, 60))
    places = len(shown.split("e")[0].partition(".")[2])
    if places < (digits if "e" not in shown else digits - 1):  # zeros were dropped: it claims to be exact
        assert abs(number - truth) <= abs(truth) * mp.mpf(10) ** -60 + mp.mpf(10) ** -120, (shown, mp.nstr(truth, 60))


numbers = st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: float(f"{x:.6g}"))
offsets = st.sampled_from([0.0, 1e3, 1e9, -1e15])
spreads = st.sampled_from([1.0, 1e-3, 1e-9, 1e6])
batches = st.builds(
    lambda xs, offset, spread: [
        repr(Decimal(repr(offset)) + Decimal(repr(x)) * Decimal(repr(spread)))[9:-2] for x in xs
    ],
    st.lists(numbers, min_size=2, max_size=9),
    offsets,
    spreads,
)


@settings(max_examples=80, deadline=None)
@given(
    batches,
    numbers,
    numbers,
    st.sampled_from([1e-5, 1e-3, 1e-12]),
    st.sampled_from([0.1, 0.01, 1.0]),
    st.integers(1, 50),
)
@example(["7", "7", "7"], 2.0, -1.5, 1e-5, 0.1, 6)  # a constant batch
@example(["1e-300", "2e-300"], 1.0, 0.0, 1e-5, 0.1, 6)
@example(["-0.0", "0.0"], -1.0, 0.0, 1e-5, 0.1, 6)  # no negative zero
@example(["1e300", "-1e300", "1"], 1.0, 1.0, 1e-5, 0.1, 12)
@example(["1", "1." + "0" * 60 + "1"], 1.0, 0.0, 1e-5, 0.1, 6)
def test_every_digit_shown_is_right(batch, gamma, beta, eps, momentum, digits):
    (shown,) = (
        f["shown"] for f in explain(batch, gamma, beta, eps, momentum=momentum, digits=digits).to_dict()["features"]
    )
    with mp.workdps(1400 if any("e" in x for x in batch) else 250):
        exact = [mp.mpf(t) for t in map(repr, (gamma, beta, eps, momentum))]
        for step, truth in definition([mp.mpf(x) for x in batch], *exact).items():
            pairs = zip(shown[step], truth, strict=True) if isinstance(truth, list) else [(shown[step], truth)]
            for text, value in pairs:
                assert_every_digit(text, value, digits)
                assert text not in ("-0", "-0.0")


def test_the_worked_example_by_hand():
    feature = explain(PRINTED, gamma=2, beta="0.5").to_dict()["features"][0]["shown"]
    assert feature["total"] == "60"
    assert feature["mean"] == "10"
    assert feature["differences"] == ["-7", "-5", "-2", "-1", "1", "14"]
    assert feature["squares"] == ["49", "25", "4", "1", "1", "196"]
    assert feature["total_square"] == "276"
    assert feature["variance"] == "46"
    assert feature["deviation"] == "6.782330"
    assert feature["divisor"] == "6.782331"
    assert feature["x_hat"] == ["-1.032094", "-0.737210", "-0.294884", "-0.147442", "0.147442", "2.064187"]
    assert feature["x_hat_shortfall"] == "1.08696e-7"  # 1 - sqrt(46 / 46.00001), not the 0.998 of rounded values
    assert feature["y"][0] == "-1.564187"  # 0.5 - 2 * 7 / sqrt(46.00001)
    assert feature["unbiased_variance"] == "55.2"
    assert feature["running_mean"] == "1"
    assert feature["running_variance"] == "6.42"


def test_it_is_what_torch_computes_in_float64():
    x = torch.tensor(PRINTED, dtype=torch.float64)[:, None]
    layer = torch.nn.BatchNorm1d(1, dtype=torch.float64)
    trained = layer(x)
    (feature,) = explain(PRINTED).to_dict()["features"]
    torch.testing.assert_close(torch.tensor(feature["y"], dtype=torch.float64), trained.detach()[:, 0])
    assert feature["running_variance"] == pytest.approx(float(layer.running_var))
    alone = [float(layer.eval()(row[None]).detach()) for row in x]
    assert feature["inference"] == pytest.approx(alone)


def test_several_features_each_with_its_own_scale_and_shift():
    rows = [[1, 10.5], [2, 10.5], [6, 13.5]]
    both = explain(rows, gamma=[1, 2], beta=(0, "1"), names=["a", "b"]).to_dict()["features"]
    assert both[0] == explain([1, 2, 6], names=["a"]).to_dict()["features"][0]
    assert both[1] == explain([10.5, 10.5, 13.5], 2, 1, names=["b"]).to_dict()["features"][0]
    assert [f.name for f in explain(rows).features] == ["feature 1", "feature 2"]


@pytest.mark.parametrize(
    "values",
    [
        np.array(PRINTED, dtype=np.float32),
        torch.tensor(PRINTED),
        [torch.tensor(v) for v in PRINTED],
        [np.float64(v) for v in PRINTED],
        [str(v) for v in PRINTED],
        [Decimal(v) for v in PRINTED],
        [[v] for v in PRINTED],
        np.array(PRINTED)[:, None],
        (float(v) for v in PRINTED),
    ],
    ids=lambda v: type(v).__name__,
)
def test_ways_of_writing_the_same_batch(values):
    assert explain(values).to_dict() == explain(PRINTED).to_dict()


def test_a_float_is_the_decimal_that_it_prints_as():
    assert explain([0.1, 0.2]).features[0].mean.a == Fraction(15, 100)
    assert explain(np.array([0.1, 0.2])).features[0].variance.a == Fraction(25, 10000)


def test_momentum_none_takes_the_first_batch_whole():
    feature = explain(PRINTED, momentum=None).features[0]
    assert (feature.running_mean.text(6), feature.running_variance.text(6)) == ("10", "55.2")


def test_the_text_shows_each_formula_with_its_numbers():
    text = str(explain(PRINTED))
    for line in (
        "6 values, gamma = 1, beta = 0, eps = 1e-5 (~: rounded)",
        "= (3 + 5 + 8 + 9 + 11 + 24) / 6 = 10",
        "= (49 + 25 + 4 + 1 + 1 + 196) / 6 = 46   (biased: divided by n = 6)",
        "= sqrt(46) ~ 6.782330",
        "= sqrt(46 + 1e-5) = sqrt(46.00001) ~ 6.782331",
        "~ (x - 10) / 6.782331   (mean 0, deviation 1 - 1.08696e-7, on account of eps)",
        "= 276 / (6 - 1) = 55.2",
        "= 0.9 * 0 + 0.1 * 10 = 1",
        "= 0.9 * 1 + 0.1 * 55.2 = 6.42",
        "= gamma (x - 1) / sqrt(6.42 + 1e-5) + beta",
        "  24        14           196   2.064187   2.064187        9.077369",
    ):
        assert line in text
    assert text.isascii()


def test_the_text_of_special_batches():
    assert "all values are equal: x_hat is 0 and y is beta" in str(explain([2, 2]))
    assert "(mean 0, deviation 1)" in str(explain([1, 3], eps=0))
    assert "((-1) + 3) / 2 = 1" in str(explain([-1, 3]))
    long = str(explain(range(100)))
    assert "(0 + 1 + 2 + ... + 99) / 100" in long
    assert len(long.splitlines()) < 70
    assert "tall: 2 values" in str(explain([[1, 2], [3, 4]], names=["tall", "wide"]))


def test_html_escapes_names_and_shows_the_table():
    html = explain([[1], [3]], names=["<script>&"])._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;&amp;: 2 values" in html
    assert html.count("<tr>") == 6 + 1 + 2 + 4


def test_data_is_strict_json_also_beyond_the_range_of_doubles():
    feature = json.loads(json.dumps(explain(["1e300", "-1e300"]).to_dict(), allow_nan=False))["features"][0]
    assert feature["variance"] is None
    assert feature["shown"]["variance"] == "1e600"
    assert feature["x_hat"] == [1.0, -1.0]


@pytest.mark.parametrize(
    ("values", "options", "error", "message"),
    [
        ([], {}, SingleValueError, "got 0"),
        ([3], {}, SingleValueError, "variance 0.*[Rr]unning statistics"),
        ([[1, 2]], {}, SingleValueError, "at least 2"),
        ([1, "two"], {}, ArgumentError, "value 2 must be a number, got 'two'"),
        ([1, None], {}, ArgumentError, "must be a number"),
        ([1, float("nan")], {}, ArgumentError, "finite"),
        ([1, "-inf"], {}, ArgumentError, "finite"),
        ([1, "1e999999999"], {}, ArgumentError, "1e400"),
        ([1, "0." + "1" * 2000], {}, ArgumentError, "in size"),
        ([[1, 2], [3]], {}, ShapeError, "row 1 has 2, row 2 has 1"),
        ([[1, 2], 3], {}, ArgumentError, "row 2"),
        ([[], []], {}, ShapeError, "empty"),
        ([[[1]], [[2]]], {}, ArgumentError, "row 1, feature 1"),
        ("12", {}, ArgumentError, "list of numbers"),
        (7, {}, ArgumentError, "list of numbers"),
        ([1, 2], {"eps": -1e-5}, ArgumentError, "eps"),
        ([2, 2], {"eps": 0}, ArgumentError, "eps must be positive"),
        ([1, 2], {"momentum": 1.5}, ArgumentError, "momentum"),
        ([1, 2], {"momentum": -0.1}, ArgumentError, "momentum"),
        ([1, 2], {"gamma": "x"}, ArgumentError, "gamma"),
        ([1, 2], {"gamma": [1, 2]}, ShapeError, "1 features, 2 given"),
        ([[1, 2], [3, 4]], {"beta": [1]}, ShapeError, "beta"),
        ([1, 2], {"names": ["a", "b"]}, ShapeError, "names"),
        ([1, 2], {"digits": 0}, ArgumentError, "digits"),
        ([1, 2], {"digits": 51}, ArgumentError, "digits"),
        ([1, 2], {"digits": 2.0}, ArgumentError, "digits"),
    ],
)
def test_errors(values, options, error, message):
    with pytest.raises(error, match=message):
        explain(values, **options)
