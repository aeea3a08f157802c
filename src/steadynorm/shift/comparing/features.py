"""One feature of two tables: its effects, its distances, what is new in it, and a picture of both sides."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from steadynorm.shift.comparing.distances import Distances, of_counts, of_values
from steadynorm.shift.comparing.effects import Effect, composition, distance, location, missing, scale, winsorised
from steadynorm.shift.comparing.verdicts import SHARES, Verdict, judge, why
from steadynorm.shift.reading.sides import Column

__all__ = ["Feature", "Measured", "judged", "measure"]

_Floats: TypeAlias = NDArray[np.float64]

BINS: Final = 40
MOST_SHOWN: Final = 12  # categories in a picture; the others are one bar


@dataclass(frozen=True, eq=False)
class Measured:
    """What was measured of a feature, before it is judged beside the others.

    Attributes:
        reference: The facts of one side.
        current: And of the other.
        effects: With simultaneous intervals.
        distances: None where a side has no values.
        rows: How many values the smaller side's intervals rest on.
        picture: `edges` or `categories`, and the shares of `reference` and `current` in each.
    """

    reference: Column
    current: Column
    effects: tuple[Effect, ...]
    distances: Distances | None
    rows: int
    picture: Mapping[str, list[Any]]


@dataclass(frozen=True, eq=False)
class Feature:
    """A feature's shift.

    Attributes:
        name: The column's.
        kind: "numeric", "categorical", "boolean", "time" (in seconds) or "text" (its length).
        verdict: "shifted", "benign" (seen, but below the tolerance), "no shift", "cannot tell" or "not compared".
        reason: What was compared with what, in a sentence.
        effects: In reference deviations, with simultaneous intervals: what the verdict rests on.
        distances: What other drift reports show, and the test; None where a side has no values.
        q: The test's p after Benjamini and Hochberg's correction over all features.
        out_of_range: The share of the current side's finite values beyond the reference's smallest and largest.
        new: Categories that the reference does not have, with their counts.
        vanished: Categories that the current side does not have, with their counts in the reference.
        facts: Of either side: `rows`, `missing`, `infinite`, `mean`, `std` (unbiased), `minimum`, `maximum`, ...
        picture: `edges` or `categories`, and the shares of `reference` and `current` in each.
    """

    name: str
    kind: str
    verdict: Verdict
    reason: str
    effects: tuple[Effect, ...]
    distances: Distances | None
    q: float | None
    out_of_range: float | None
    new: Mapping[str, int]
    vanished: Mapping[str, int]
    facts: Mapping[str, Mapping[str, Any]]
    picture: Mapping[str, list[Any]]

    @property
    def size(self) -> tuple[float, float]:
        """What features are ranked by: how large the effect is at least, then as estimated."""
        return max(
            ((effect.low, abs(effect.estimate)) for effect in self.effects),
            default=(0.0, 0.0),
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain data, strict JSON."""
        return {
            "name": self.name,
            "kind": self.kind,
            "verdict": self.verdict,
            "reason": self.reason,
            "effects": [asdict(effect) for effect in self.effects],
            "distances": None if self.distances is None else self.distances.to_dict(),
            "q": self.q,
            "out_of_range": self.out_of_range,
            "new": dict(self.new),
            "vanished": dict(self.vanished),
            "facts": {side: dict(facts) for side, facts in self.facts.items()},
            "picture": dict(self.picture),
        }


def measure(reference: Column, current: Column, alpha: float) -> Measured:
    """Measures one feature.

    Args:
        reference: Its facts and sample on one side.
        current: And on the other, of the same kind.
        alpha: The chance that any of its intervals may miss.

    Returns:
        The effects, distances and picture.
    """
    gone = missing(reference.missing, reference.rows, current.missing, current.rows, alpha * SHARES["missing"])
    if reference.counts is not None and current.counts is not None:
        return _categories(reference, current, alpha, gone)
    x, y = (np.sort(column.values[~np.isnan(column.values)]) for column in (reference, current))
    if not (x.size and y.size):
        effects = (gone,) if x.size or y.size else ()  # where neither side has a value, there is nothing to compare
        return Measured(reference, current, effects, None, min(reference.rows, current.rows), {})
    effects = [distance(x, y, alpha * SHARES["distance"]), gone]
    finite_x, finite_y = x[np.isfinite(x)], y[np.isfinite(y)]
    distances, picture = None, {}
    if finite_x.size and finite_y.size:
        picture = _histogram(finite_x, finite_y)
        finite_x, finite_y = _within_reach(finite_x, finite_y)
        distances = of_values(finite_x, finite_y)
        clipped = winsorised(finite_x, finite_y)
        means = location(*clipped, alpha * SHARES["location"]), scale(*clipped, alpha * SHARES["scale"])
        effects = [*(effect for effect in means if effect is not None), *effects]
    return Measured(reference, current, tuple(effects), distances, min(x.size, y.size), picture)


def _within_reach(x: _Floats, y: _Floats) -> tuple[_Floats, _Floats]:
    """Both in a unit in which their squares neither overflow nor vanish; nothing here depends on the unit."""
    largest = max(abs(x[0]), abs(x[-1]), abs(y[0]), abs(y[-1]))
    return (x / largest, y / largest) if largest and not 1e-100 < largest < 1e100 else (x, y)


def _categories(reference: Column, current: Column, alpha: float, gone: Effect) -> Measured:
    counts = [np.array([*(side.counts or {}).values(), side.other], np.float64) for side in (reference, current)]
    if not (counts[0].sum() and counts[1].sum()):
        told = (gone,) if counts[0].sum() or counts[1].sum() else ()
        return Measured(reference, current, told, None, min(reference.rows, current.rows), {})
    used = counts[0] + counts[1] > 0
    p, q = counts[0][used], counts[1][used]
    effects = composition(p, q, alpha * SHARES["composition"]), gone
    everything: list[str] = [*(reference.counts or {}), "(others)"]
    names = [everything[i] for i in np.flatnonzero(used)]
    return Measured(reference, current, effects, of_counts(p, q), int(min(p.sum(), q.sum())), _bars(names, p, q))


def _histogram(x: _Floats, y: _Floats) -> dict[str, list[Any]]:
    """Shares in bins between the 0.5 % and 99.5 % points; the outermost bins hold what is beyond."""
    low = min(float(np.quantile(side, 0.005, method="inverted_cdf")) for side in (x, y))
    high = max(float(np.quantile(side, 0.995, method="inverted_cdf")) for side in (x, y))
    if not low < high:
        low, high = min(x[0], y[0]), max(x[-1], y[-1])
    if not (low < high and np.isfinite(high - low)):
        return {}
    edges = np.linspace(low, high, BINS + 1)
    shares = [np.histogram(np.clip(side, low, high), edges)[0] / side.size for side in (x, y)]
    return {"edges": edges.tolist(), "reference": shares[0].tolist(), "current": shares[1].tolist()}


def _bars(names: list[str], counts: _Floats, current: _Floats) -> dict[str, list[Any]]:
    p, q = counts / counts.sum(), current / current.sum()
    order = np.argsort(-(p + q), kind="stable")
    shown, rest = order[:MOST_SHOWN], order[MOST_SHOWN:]
    others = [] if not rest.size else ["(others)"]
    return {
        "categories": [names[i] for i in shown] + others,
        "reference": p[shown].tolist() + [float(p[rest].sum())] * len(others),
        "current": q[shown].tolist() + [float(q[rest].sum())] * len(others),
    }


def judged(measured: Measured, q: float | None, tolerance: float, level: float) -> Feature:
    """Judges a feature.

    Args:
        measured: What `measure` found.
        q: Its corrected p, None where it has no test.
        tolerance: In reference deviations.
        level: The q below which a difference counts as seen.

    Returns:
        The feature with its verdict.
    """
    reference, current, effects = measured.reference, measured.current, measured.effects
    verdict = judge(effects, tolerance, q, level)
    finite = current.rows - current.missing - current.infinite
    outside = None if current.counts is not None or finite <= 0 else (current.below + current.above) / finite
    new, vanished = _only(current, reference), _only(reference, current)
    return Feature(
        reference.name,
        reference.kind,
        verdict,
        why(verdict, effects, tolerance, measured.rows),
        effects,
        measured.distances,
        q,
        outside,
        new,
        vanished,
        {"reference": _facts(reference), "current": _facts(current)},
        measured.picture,
    )


def _only(these: Column, others: Column) -> dict[str, int]:
    """Categories of one side that the other has none of."""
    counts, absent = these.counts or {}, others.counts or {}
    return {name: count for name, count in counts.items() if count and not absent.get(name)}


def _facts(column: Column) -> dict[str, Any]:
    if column.counts is None:
        found = {"mean": column.mean, "std": column.std, "minimum": column.minimum, "maximum": column.maximum}
        numbers = {key: value if value is not None and math.isfinite(value) else None for key, value in found.items()}
        return {"rows": column.rows, "missing": column.missing, "infinite": column.infinite, **numbers}
    return {"rows": column.rows, "missing": column.missing, "distinct": column.distinct}
