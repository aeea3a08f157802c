"""What `compare` found, as an object that shows itself: in a terminal, as a page, as JSON."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from steadynorm.errors import DataError
from steadynorm.shift.comparing.domain import SMALLEST_SIDE, Domain, Rows, Weights, weigh
from steadynorm.shift.comparing.features import Feature
from steadynorm.shift.comparing.verdicts import Verdict
from steadynorm.shift.reading.sides import Schema, Side

__all__ = ["CAVEAT", "SCHEMA_VERSION", "ShiftReport"]

SCHEMA_VERSION: Final = 1

CAVEAT: Final = (
    "A moved P(x) is not yet a lost accuracy: label some of the new rows and measure, before retraining, adapting or "
    "weighting."
)


@dataclass(frozen=True, eq=False)
class ShiftReport:
    """The shift between two data sets.

    Attributes:
        verdict: On the whole: "shifted" if any feature is, or the features together; "cannot tell"; "benign"; or
            "no shift".
        features: Each feature with its verdict, the most shifted first.
        domain: What the domain classifier found; None where it was not asked, or a side has fewer than 50 rows.
        schema: Columns that only one side has, and the like: said, not compared.
        sides: The facts and samples of the reference and of the current data.
        settings: `tolerance`, `confidence`, `sample`, `classifier_rows`, `seed`.

    Example:
        >>> import steadynorm as sn
        >>> report = sn.shift.compare({"a": list(range(1000))}, {"a": list(range(500, 1500))})
        >>> report.verdict, report.shifted
        ('shifted', ('a',))
        >>> 0 < report.weights.effective < 1000
        True
    """

    verdict: Verdict
    features: tuple[Feature, ...]
    domain: Domain | None
    schema: Schema
    sides: tuple[Side, Side]
    settings: Mapping[str, Any]

    @property
    def shifted(self) -> tuple[str, ...]:
        """The features that are shifted, the most shifted first."""
        return tuple(feature.name for feature in self.features if feature.verdict == "shifted")

    @property
    def reason(self) -> str:
        """Why the verdict is what it is, in a sentence or two."""
        joint = self.domain is not None and self.domain.low > self.settings["tolerance"]
        compared = sum(feature.verdict != "not compared" for feature in self.features)
        if self.shifted:
            return f"{_some(self.shifted)} ({len(self.shifted)} of {compared} features)"
        if joint and self.domain is not None:
            names = [name for name, _ in self.domain.features]
            by = f", by {_some(names)}" if names else ""
            return (
                "no feature is shifted by itself, but together they tell the two apart "
                f"(AUC {self.domain.auc:.3f}{by}): how they go together has changed"
            )
        undecided = [feature.name for feature in self.features if feature.verdict == "cannot tell"]
        if undecided:
            return f"{len(undecided)} of {compared} features may be shifted or not: {_some(undecided)}"
        if not compared:
            return "there is nothing that could be compared"
        return f"no effect in any of {compared} features can be as large as {self.settings['tolerance']:g} deviations"

    @cached_property
    def weights(self) -> Weights:
        """Importance weights for the reference's sampled rows, computed when first asked for.

        Raises:
            DataError: A side has fewer than 50 rows, or there are no features.
        """
        reference, current = self.sides
        if min(reference.sampled, current.sampled) < SMALLEST_SIDE or not reference.columns:
            raise DataError(
                f"weights need at least {SMALLEST_SIDE} rows a side and a feature, got {reference.sampled} and "
                f"{current.sampled} rows, {len(reference.columns)} features."
            )
        rows, seed = self.settings["classifier_rows"] or 5_000, self.settings["seed"]
        table = Rows.drawn(reference, current, (None, rows), seed)
        return weigh(table, rows=rows, seed=seed, numbers=reference.row_numbers)

    def to_dict(self) -> dict[str, Any]:
        """As plain data under a versioned schema; strict JSON, no NaN."""
        import steadynorm

        sides = zip(("reference", "current"), self.sides, strict=True)
        return {
            "schema": SCHEMA_VERSION,
            "version": steadynorm.__version__,
            "kind": "covariate shift",
            "verdict": self.verdict,
            "reason": self.reason,
            "caveat": CAVEAT,
            "settings": dict(self.settings),
            "sides": {which: {"name": side.name, "rows": side.rows, "sampled": side.sampled} for which, side in sides},
            "schema_changes": asdict(self.schema),
            "domain": None if self.domain is None else self.domain.to_dict(),
            "features": [feature.to_dict() for feature in self.features],
        }

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        from steadynorm.report.serialize import strict_json

        return strict_json(self.to_dict())

    def write_html(self, path: str | os.PathLike[str]) -> Path:
        """Writes the report as one HTML file that loads nothing from anywhere; returns its path.

        Args:
            path: Where to; folders are made as needed. Written aside and renamed, never half.
        """
        from steadynorm.report.shift import write_shift_html

        return write_shift_html(self.to_dict(), path)

    def __str__(self) -> str:
        from steadynorm.report.shift import shift_text

        return shift_text(self.to_dict())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from steadynorm.report.shift import shift_fragment

        return shift_fragment(self.to_dict())


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
