import pytest

from steadynorm.report import wording


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.0, 3, "0"),
        (0.031623, 2, "0.032"),
        (0.1, 2, "0.1"),
        (1234.5, 3, "1,234"),
        (99.96, 3, "100"),  # rounding up gains a digit
        (0.0009996, 3, "0.001"),
        (-1.4, 3, "−1.4"),
        (0.0001, 2, "0.0001"),
        (3.1623e-05, 2, "3.2e-5"),
        (1e-5, 3, "1e-5"),
        (2.5e12, 2, "2.5e12"),
        (1e9, 3, "1,000,000,000"),
        (None, 3, "–"),
    ],
)
def test_number_rounds_to_significant_digits(value: float | None, digits: int, text: str) -> None:
    assert wording.number(value, digits) == text


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(1.0, "1.0×"), (3.34, "3.3×"), (12.83, "12.8×"), (128.3, "128×"), (0.456, "0.46×"), (99.96, "100×"), (None, "–")],
)
def test_a_ratio_has_one_decimal_in_the_range_that_matters(ratio: float | None, text: str) -> None:
    assert wording.times(ratio) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (75.2, "75.2 s"),
        (1.0, "1 s"),
        (0.25, "250 ms"),
        (0.001, "1 ms"),
        (0.00041, "410 µs"),
        (2e-7, "0.2 µs"),
        (None, "–"),
    ],
)
def test_durations_pick_their_unit(seconds: float | None, text: str) -> None:
    assert wording.duration(seconds) == text


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        ([0.941, 0.96], "94.1 to 96.0"),
        ([0.941, None], "94.1 or more"),
        ([None, 0.96], "96.0 or less"),
        ([None, None], "–"),
        (None, "–"),
    ],
)
def test_an_interval_may_be_open_at_either_end(bounds: list[float | None] | None, text: str) -> None:
    assert wording.interval(bounds, 100, decimals=1) == text


@pytest.mark.parametrize(
    ("bounds", "text"),
    [([2.74, 3.94], "2.7 to 3.9"), ([4.1, None], "4.1 or more"), ([None, 0.5], "0.5 or less"), (None, "–")],
)
def test_the_interval_of_a_ratio_is_rounded_like_the_ratio(bounds: list[float | None] | None, text: str) -> None:
    assert wording.ratio_interval(bounds) == text


def test_minus_signs_are_minus_signs() -> None:
    assert wording.interval([-0.021, -0.007], 100, decimals=1) == "−2.1 to −0.7"


def test_percentages_and_counts() -> None:
    assert (wording.percent(0.9517), wording.percent(None)) == ("95.2 %", "–")
    assert (wording.count(15100.4), wording.count(None)) == ("15,100", "–")


def test_a_bound_is_called_one() -> None:
    row = {"ratio": 4.1, "interval": [2.2, None], "method": "at least"}
    assert wording.ratio_figure(row) == "at least 4.1× (2.2 or more)"
    assert wording.ratio_figure(row | {"ratio": None}) == "–"
    assert wording.ratio_figure(row | {"method": "Kaplan-Meier medians, bootstrap"}) == "4.1× (2.2 or more)"


def test_the_smallest_effect_keeps_the_digits_it_was_stated_with() -> None:
    assert wording.smallest_effect({"unit": "times", "smallest_effect": 1.25}) == "1.25×"
    assert wording.smallest_effect({"unit": "points", "smallest_effect": 0.5}) == "0.5 points"


def test_a_claim_without_an_estimate_has_no_figure() -> None:
    assert wording.claim_figure({"estimate": None, "unit": "times", "interval": None}) == "–"
    assert (
        wording.claim_figure({"estimate": 1.5, "unit": "decades", "interval": [1.2, 1.8]}) == "1.5 decades (1.2 to 1.8)"
    )
