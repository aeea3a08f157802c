"""From effects to a verdict: an interval against a tolerance, so that more rows change the doubt and not the answer."""

import math
from collections.abc import Mapping, Sequence
from typing import Final, Literal, TypeAlias

from steadynorm.shift.comparing.effects import Effect, EffectKind

__all__ = ["SHARES", "Verdict", "judge", "rows_needed", "table_verdict", "why"]

Verdict: TypeAlias = Literal["shifted", "benign", "no shift", "cannot tell", "not compared"]

SHARES: Final[Mapping[EffectKind, float]] = {
    "location": 0.6,
    "scale": 0.15,
    "distance": 0.15,
    "composition": 0.9,
    "missing": 0.1,
}
"""How much of a feature's chance of error each of its intervals gets: numbers have location, scale, distance and
missing; categories composition and missing. The means get most, as most shifts are found there."""

MANY: Final = 10**9


def judge(effects: Sequence[Effect], tolerance: float, q: float | None, level: float) -> Verdict:
    """The verdict on one feature.

    *shifted* if one effect's lower end is above the tolerance; *no shift* if every upper end is below it, or *benign*
    where a test tells the two apart all the same; else *cannot tell*.

    Args:
        effects: All of the feature's, with simultaneous intervals.
        tolerance: In reference standard deviations.
        q: The feature's q-value, None where it has no test.
        level: The q below which a difference counts as seen.

    Returns:
        The verdict.

    Example:
        >>> judge([Effect("location", 0.04, 0.03, 0.05)], tolerance=0.1, q=1e-9, level=0.05)
        'benign'
        >>> judge([Effect("location", 0.04, 0.0, 0.4)], tolerance=0.1, q=0.5, level=0.05)
        'cannot tell'
    """
    if not effects:
        return "not compared"
    if any(effect.low > tolerance for effect in effects):
        return "shifted"
    if all(effect.high < tolerance for effect in effects):
        return "benign" if q is not None and q < level else "no shift"
    return "cannot tell"


def rows_needed(effects: Sequence[Effect], tolerance: float, rows: int) -> int | None:
    """About how many rows per side would settle the question, if the estimates stay as they are.

    An interval shrinks with 1 / sqrt(n): one of half-width h settles an effect e at n (h / |e - tolerance|)².

    Args:
        effects: Those of a feature of which one cannot tell.
        tolerance: In reference standard deviations.
        rows: n, of the smaller side.

    Returns:
        The number, None where it is beyond 10^9: the effect is as large as the tolerance.

    Example:
        >>> rows_needed([Effect("location", 0.02, 0.0, 0.18)], tolerance=0.1, rows=1000)
        4000
    """
    worst = _deciding(effects, tolerance, rows)[1] if effects else 0.0
    return None if worst > MANY else math.ceil(worst)


def _deciding(effects: Sequence[Effect], tolerance: float, rows: int) -> tuple[Effect, float]:
    """The effect that would decide first, and the rows it would take: one above the tolerance, else the slowest."""
    needed = [(effect, _needed(effect, tolerance, rows)) for effect in effects]
    beyond = [pair for pair in needed if abs(pair[0].estimate) > tolerance]
    return min(beyond, key=lambda pair: pair[1]) if beyond else max(needed, key=lambda pair: pair[1])


def _needed(effect: Effect, tolerance: float, rows: int) -> float:
    size = abs(effect.estimate)
    half = max(size - effect.low, effect.high - size)  # the lower end may have been cut off at 0
    gap = abs(size - tolerance)
    return rows * (half / gap) ** 2 if gap > 0 else math.inf


def why(verdict: Verdict, effects: Sequence[Effect], tolerance: float, rows: int) -> str:
    """What was compared with what, in one sentence.

    Args:
        verdict: As `judge` gave it.
        effects: Those it was given.
        tolerance: In reference standard deviations.
        rows: Of the smaller side.

    Returns:
        The sentence, without a full stop.

    Example:
        >>> why("shifted", [Effect("location", 0.31, 0.2, 0.42)], 0.1, 2000)
        'the mean is higher by 0.31 (0.20 to 0.42) reference deviations, more than 0.1'
    """
    if not effects:
        return "no values to compare"
    leading = max(effects, key=lambda effect: (effect.low, abs(effect.estimate)))
    if verdict == "shifted":
        return f"{_said(leading)}, more than {tolerance:g}"
    widest = max(effects, key=lambda effect: effect.high)
    if verdict in ("benign", "no shift"):
        seen = "a difference is seen, but " if verdict == "benign" else ""
        return f"{seen}no effect can be above {widest.high:.2f} deviations ({widest.kind}), less than {tolerance:g}"
    slowest, needed = _deciding(effects, tolerance, rows)
    more = "more than a billion rows" if needed > MANY else f"about {math.ceil(needed):,} rows"
    span = f"{slowest.low:.2f} to {slowest.high:.2f}"
    return f"the {slowest.kind} may differ by {span} around {tolerance:g}; {more} a side would tell"


def _said(effect: Effect) -> str:
    size = f"{abs(effect.estimate):.2f} ({effect.low:.2f} to {effect.high:.2f})"
    up = effect.estimate > 0
    if effect.kind == "location":
        return f"the mean is {'higher' if up else 'lower'} by {size} reference deviations"
    if effect.kind == "scale":
        ratio = f"{math.exp(effect.estimate):.2f}"
        return f"the spread is {ratio} times the reference's, ln {size}"
    if effect.kind == "missing":
        return f"{'more' if up else 'fewer'} values are missing, by as much as {size} deviations"
    what = "distributions" if effect.kind == "distance" else "shares of the categories"
    return f"the {what} are as far apart as means {size} deviations apart"


def table_verdict(features: Sequence[Verdict], joint: float | None, tolerance: float) -> Verdict:
    """The verdict on the whole table: its features', and that of the classifier that looks at all of them at once.

    Args:
        features: The verdict on each.
        joint: The lower end of the classifier's effect in reference deviations, None where there is none. One-sided: a
            classifier that finds nothing proves nothing.
        tolerance: In reference standard deviations.

    Returns:
        *shifted* if any part is; else *cannot tell* if any part is; else *benign* or *no shift*.

    Example:
        >>> table_verdict(["no shift", "benign"], joint=0.0, tolerance=0.1)
        'benign'
    """
    if "shifted" in features or (joint is not None and joint > tolerance):
        return "shifted"
    compared = [verdict for verdict in features if verdict != "not compared"]
    if not compared:
        return "not compared"
    for verdict in ("cannot tell", "benign"):
        if verdict in compared:
            return verdict
    return "no shift"
