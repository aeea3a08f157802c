"""Figures as a reader wants them: rounded to what matters, with their unit, and "–" for a missing one."""

import math
from collections.abc import Sequence

from steadynorm.report.schema import Claim, Ratio, Results

__all__ = [
    "BOUNDS",
    "MISSING",
    "accuracy_interval",
    "amount",
    "arm_labels",
    "bracketed",
    "claim_figure",
    "count",
    "duration",
    "interval",
    "number",
    "percent",
    "plural",
    "rate",
    "rate_range",
    "ratio_figure",
    "ratio_interval",
    "smallest_effect",
    "times",
]

MISSING = "–"
BOUNDS = ("at least", "at most")
"""The methods of a ratio that is only a bound."""


def number(value: float | None, digits: int = 3) -> str:
    """Round to significant digits, without exponents in the range that people read.

    Example:
        >>> number(1234.5), number(0.03162, 2), number(-0.000002), number(None)
        ('1,234', '0.032', '−2e-6', '–')
    """
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    sign, size = ("−" if value < 0 else ""), abs(value)
    exponent = math.floor(math.log10(float(f"{size:.{digits - 1}e}")))
    if exponent < -4 or exponent > 9:
        mantissa, _, power = f"{size:.{digits - 1}e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{sign}{mantissa}e{int(power)}"
    text = f"{size:,.{max(0, digits - 1 - exponent)}f}"
    return sign + (text.rstrip("0").rstrip(".") if "." in text else text)


def count(value: float | None) -> str:
    """A whole number with thousands separated.

    Example:
        >>> count(15100), count(None)
        ('15,100', '–')
    """
    return MISSING if value is None else f"{round(value):,}"


def percent(fraction: float | None, digits: int = 1) -> str:
    """A fraction in per cent.

    Example:
        >>> percent(0.9517)
        '95.2 %'
    """
    return MISSING if fraction is None else f"{100 * fraction:.{digits}f} %"


def times(ratio: float | None) -> str:
    """A ratio to two digits, three from ten on.

    Example:
        >>> times(3.31), times(12.83), times(128.3)
        ('3.3×', '12.8×', '128×')
    """
    return MISSING if ratio is None else f"{_times(ratio)}×"


def _times(ratio: float) -> str:
    return f"{ratio:.1f}" if 1 <= ratio < 99.95 else number(ratio, 2 if ratio < 1 else 3)


def rate(value: float) -> str:
    """A learning rate, in the two digits that half-decades need.

    Example:
        >>> rate(0.31623), rate(1.0), rate(3.1623e-05)
        ('0.32', '1', '3.2e-5')
    """
    return number(value, 2)


def duration(seconds: float | None) -> str:
    """Seconds in the unit that keeps the figure between 1 and 1000.

    Example:
        >>> duration(0.00041), duration(0.252), duration(75.2), duration(None)
        ('410 µs', '252 ms', '75.2 s', '–')
    """
    if seconds is None:
        return MISSING
    unit, scale = ("s", 1.0) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    return f"{number(seconds * scale)} {unit}"


def interval(
    bounds: Sequence[float | None] | None, scale: float = 1.0, digits: int = 3, decimals: int | None = None
) -> str:
    """The two ends of an interval, either of which may be open.

    Args:
        bounds: `[low, high]`, None for an end that is not known, or None for no interval.
        scale: what to multiply the ends by, 100 for per cent.
        digits: significant digits of each end.
        decimals: decimals of each end instead of significant digits.

    Example:
        >>> interval([0.941, 0.96], 100, decimals=1), interval([4.1, None]), interval([None, None])
        ('94.1 to 96.0', '4.1 or more', '–')
    """

    def end(value: float) -> str:
        if decimals is None:
            return number(scale * value, digits)
        return f"{scale * value:,.{decimals}f}".replace("-", "−")

    low, high = bounds if bounds else (None, None)
    if low is not None and high is not None:
        return f"{end(low)} to {end(high)}"
    if low is not None:
        return f"{end(low)} or more"
    return f"{end(high)} or less" if high is not None else MISSING


def accuracy_interval(bounds: Sequence[float | None] | None) -> str:
    """The interval of an accuracy in per cent, cut off where no accuracy can be.

    Example:
        >>> accuracy_interval([0.941, 1.002])
        '94.1 to 100.0'
    """
    inside = [None if end is None else min(1.0, max(0.0, end)) for end in bounds or ()]
    return interval(inside, 100, decimals=1)


def bracketed(text: str) -> str:
    """An interval to go behind its estimate: in brackets, or nothing where there is none.

    Example:
        >>> bracketed("2.7 to 3.9"), bracketed("–")
        (' (2.7 to 3.9)', '')
    """
    return "" if text == MISSING else f" ({text})"


def rate_range(bounds: Sequence[float] | None) -> str:
    """The learning rates that train.

    Example:
        >>> rate_range([0.0316, 1.0]), rate_range([1.0, 1.0]), rate_range(None)
        ('0.032 to 1', 'only 1', 'none of those tried')
    """
    if not bounds:
        return "none of those tried"
    low, high = (rate(end) for end in bounds)
    return f"only {low}" if low == high else f"{low} to {high}"


def ratio_interval(bounds: Sequence[float | None] | None) -> str:
    """The interval of a ratio, rounded as the ratio itself.

    Example:
        >>> ratio_interval([2.74, 12.91])
        '2.7 to 12.9'
    """
    low, high = bounds if bounds else (None, None)
    if low is not None and high is not None:
        return f"{_times(low)} to {_times(high)}"
    if low is not None:
        return f"{_times(low)} or more"
    return f"{_times(high)} or less" if high is not None else MISSING


def plural(n: int, word: str) -> str:
    """A count and its noun.

    Example:
        >>> plural(1, "seed"), plural(3, "seed")
        ('1 seed', '3 seeds')
    """
    return f"{n:,} {word}" if n == 1 else f"{n:,} {word}s"


def amount(value: float | None, unit: str) -> str:
    """A claim's figure with its unit.

    Example:
        >>> amount(3.31, "times"), amount(-1.4, "points"), amount(1.553, "decades")
        ('3.3×', '−1.4 points', '1.55 decades')
    """
    if value is None:
        return MISSING
    return times(value) if unit == "times" else f"{number(value)} {unit}"


def arm_labels(results: Results) -> dict[str, str]:
    """Arm ids and what to call them, with a capital, in the order of the experiment."""
    return {arm["id"]: arm["label"][:1].upper() + arm["label"][1:] for arm in results["arms"]}


def claim_figure(claim: Claim) -> str:
    """A claim's estimate with its interval, or "–"."""
    if claim["estimate"] is None:
        return MISSING
    ends = (ratio_interval if claim["unit"] == "times" else interval)(claim["interval"])
    return f"{amount(claim['estimate'], claim['unit'])}{bracketed(ends)}"


def smallest_effect(claim: Claim) -> str:
    """From where on a claim's effect matters, to the digit stated."""
    value = number(claim["smallest_effect"])
    return f"{value}×" if claim["unit"] == "times" else f"{value} {claim['unit']}"


def ratio_figure(ratio: Ratio) -> str:
    """A ratio with its interval, and "at least" or "at most" where too few runs arrived to say more."""
    if ratio["ratio"] is None:
        return MISSING
    bound = f"{ratio['method']} " if ratio["method"] in BOUNDS else ""
    return f"{bound}{times(ratio['ratio'])}{bracketed(ratio_interval(ratio['interval']))}"
