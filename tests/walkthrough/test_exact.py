"""a + b sqrt(r): sign, rounding and notation, against many-digit arithmetic."""

from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from steadynorm.walkthrough import Exact

rationals = st.fractions(min_value=-(10**12), max_value=10**12, max_denominator=10**12)
roots = st.fractions(min_value=0, max_value=10**6, max_denominator=10**6)


def in_decimal(a, b, r):
    """a + b sqrt(r) to 200 digits."""
    with localcontext(prec=200):
        return (
            Decimal(a.numerator) / a.denominator
            + Decimal(b.numerator) / b.denominator * (Decimal(r.numerator) / r.denominator).sqrt()
        )


@given(rationals, rationals, roots, st.integers(1, 50))
@example(Fraction(577, 408), Fraction(-1), Fraction(2), 6)  # cancels to 2e-6
@example(Fraction(7), Fraction(-1), Fraction(49), 3)
@example(Fraction(1, 2), Fraction(0), Fraction(0), 1)
def test_text_is_right_to_half_a_unit_of_its_last_digit(a, b, r, digits):
    number, truth = Exact.of(a, b, r), in_decimal(a, b, r)
    text = number.text(digits)
    shown = Decimal(text)
    with localcontext(prec=200):
        plain = "e" not in text
        unit = Decimal(1).scaleb(-digits if plain else shown.adjusted() - digits + 1)
        error = abs(shown - truth)
        assert error <= unit / 2 * (1 + Decimal("1e-100")) + Decimal("1e-150")
        if number.shown_exactly(digits):
            assert error < Decimal("1e-150")
        else:
            assert len(text.split("e")[0].partition(".")[2]) == (digits if plain else digits - 1)
    assert text.strip("-0.") != "" or text == "0"
    assert number.sign == (0 if text == "0" else (-1 if text[0] == "-" else 1))
    assert float(number) == float(+truth) or abs(truth) < Decimal("1e-150")


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        ("0", 6, "0"),
        ("-0.0", 6, "0"),
        ("12.5", 6, "12.5"),
        ("0.125", 2, "0.12"),  # half to even
        ("0.375", 2, "0.38"),
        ("-2.5", 1, "-2.5"),
        ("0.00001", 6, "1e-5"),
        ("0.000123456789", 6, "0.000123"),
        ("-0.0000123456789", 6, "-1.23457e-5"),
        ("-0.09", 2, "-0.09"),
        ("0.0094", 2, "9.4e-3"),
        ("0.00123456789", 6, "0.001235"),
        ("0.9999999", 6, "1.000000"),
        ("0.000099999999", 6, "1.00000e-4"),
        ("9999999999999999", 6, "9999999999999999"),
        ("10000000000000000", 6, "1e16"),
        ("-123456789012345678", 6, "-1.23457e17"),
        ("9.9999999e20", 4, "1.000e21"),
    ],
)
def test_notation(value, digits, text):
    assert Exact.of(Fraction(value)).text(digits) == text


def test_a_number_that_almost_cancels_keeps_its_digits():
    # sqrt(10^40 + 1) - 10^20 = 5e-21 (1 - 2.5e-41 + ...)
    number = Exact.of(-(10**20), 1, 10**40 + 1)
    assert number.text(30) == "5." + "0" * 29 + "e-21"
    assert not number.shown_exactly(30)


def test_just_below_a_power_of_ten():
    number = Exact.of(Fraction(10**20 - 1, 10**50))
    assert number.text(22) == "9." + "9" * 19 + "e-31"
    assert number.text(19) == "1." + "0" * 18 + "e-30"


def test_very_small_and_very_large():
    assert Exact.of(0, Fraction(1, 10**150), 2).text(4) == "1.414e-150"
    assert Exact.of(0, 10**150, 2).text(4) == "1.414e150"
    assert float(Exact.of(0, Fraction(-1, 10**150), 2)) == -1.4142135623730950e-150
    assert float(Exact.of(10**400)) == float("inf")


def test_the_side_of_a_tie_is_found_however_near_it_is():
    tiny = 10**20, 10**40 + 1  # sqrt(10^40 + 1) - 10^20 = 5e-21
    above = Exact.of(Fraction(1, 4) - tiny[0], 1, tiny[1])
    below = Exact.of(Fraction(7, 20) + tiny[0], -1, tiny[1])
    assert above.text(1) == "0.3"  # the tie itself goes to the even 0.2
    assert below.text(1) == "0.3"  # and this one to 0.4
