"""`compare`: two tables in, a report on their shift out."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from steadynorm.errors import ArgumentError, DataError
from steadynorm.progress import tracked
from steadynorm.shift.comparing.distances import benjamini_hochberg
from steadynorm.shift.comparing.domain import SMALLEST_SIDE, Rows, classify
from steadynorm.shift.comparing.features import judged, measure
from steadynorm.shift.comparing.report import ShiftReport
from steadynorm.shift.comparing.verdicts import table_verdict
from steadynorm.shift.reading.scan import scan
from steadynorm.shift.reading.sides import Kind, Schema, Side
from steadynorm.shift.reading.sources import Source

__all__ = ["compare", "judge_sides"]

FEATURES_SHARE: Final = 0.8
"""Of the chance of error: the features'. The rest is the classifier's."""


def compare(
    reference: Source,
    current: Source,
    *,
    tolerance: float = 0.1,
    confidence: float = 0.95,
    types: Mapping[str, Kind] | None = None,
    columns: Sequence[str] | None = None,
    sample: int = 200_000,
    classifier_rows: int = 5_000,
    seed: int = 0,
    progress: bool = False,
) -> ShiftReport:
    """Compares the distribution of two data sets, feature by feature and as a whole.

    Every feature gets effects in *reference standard deviations*, each with an interval; all intervals together hold
    with the given confidence (Bonferroni). A feature is *shifted* where an interval lies above the tolerance, not where
    a p-value is small: with more rows the intervals shrink, the answer stays.

    | effect | of | interval |
    | --- | --- | --- |
    | location | numbers, times, lengths of texts | (mean - mean) / s, winsorised at 1 %; delta method |
    | scale | the same | ln of the ratio of (unbiased) standard deviations, winsorised; delta method |
    | distance | the same | Kolmogorov-Smirnov, as a difference of normal means; McDiarmid |
    | composition | categories, booleans | total variation, as a difference of normal means; McDiarmid or Newcombe |
    | missing | all | difference of the shares of missing values, likewise; Newcombe |

    A domain classifier looks at all features together and so finds what no feature shows alone, such as a correlation
    that flips. Its AUC counts one-sided: what it does not find may still be there.

    A moved P(x) is not yet a lost accuracy: that takes labels.

    Args:
        reference: What the model was trained on: a path or glob of CSV, TSV, Parquet, JSON lines or Arrow files, a
            folder of images, an .npy or .npz file, a pandas, polars, Arrow or Ibis table, arrays, tensors, a mapping
            of columns, or a `torch.utils.data.Dataset`.
        current: What it meets now, any of the same.
        tolerance: The effect that does not matter yet, in reference standard deviations, > 0.
        confidence: That all intervals together hold, in (0, 1).
        types: Kinds by column name: "numeric", "categorical", "boolean", "time" or "text"; others are guessed.
        columns: The columns to compare; by default all that both have.
        sample: Rows a side that ranks, distances and the classifier are computed on, at most; facts such as the
            mean, the range and counts are of all rows.
        classifier_rows: Rows a side for the domain classifier, at most; 0 for none.
        seed: Of the sample, the classifier and its permutations: the same seed gives the same report, where the
            engine's samples can be repeated.
        progress: Whether to show a progress bar on the standard error.

    Returns:
        The report: `verdict`, `features` (the most shifted first), `domain`, `weights`, `write_html`, `to_json`.

    Raises:
        ArgumentError: A setting out of range, or a column that is not there.
        DataError: A source that cannot be read, holds no rows, or shares no column with the other.
        MissingDependencyError: A table, without the extra `tables`.

    Source: Rabanser, Günnemann, Lipton, Failing loudly, NeurIPS 2019; Austin, Balance diagnostics for comparing the
    distribution of baseline covariates, Statistics in Medicine 28 (2009), for the tolerance of 0.1.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> before = {"age": rng.normal(40, 10, 4000), "city": rng.choice(["Rome", "Oslo"], 4000)}
        >>> after = {"age": rng.normal(44, 10, 4000), "city": rng.choice(["Rome", "Oslo"], 4000)}
        >>> report = compare(before, after)
        >>> report.verdict, [feature.name for feature in report.features if feature.verdict == "shifted"]
        ('shifted', ['age'])
        >>> print(report.features[0].reason)
        the mean is higher by 0.44 (0.38 to 0.50) reference deviations, more than 0.1
    """
    _check("tolerance", tolerance, _is_number(tolerance) and 1e-6 <= tolerance < 10, "a number from 1e-6 to 10")
    _check("confidence", confidence, _is_number(confidence) and 0 < confidence <= 1 - 1e-9, "above 0 and below 1")
    _check("sample", sample, _is_whole(sample) and sample >= 2, "a whole number, at least 2 rows")
    fits = _is_whole(classifier_rows) and (classifier_rows == 0 or classifier_rows >= SMALLEST_SIDE)
    _check("classifier_rows", classifier_rows, fits, f"0 for no classifier, or at least {SMALLEST_SIDE} rows")
    _check("seed", seed, _is_whole(seed) and 0 <= seed < 2**32, "a whole number from 0 to 4294967295")
    settings: dict[str, Any] = {
        "tolerance": tolerance,
        "confidence": confidence,
        "sample": sample,
        "classifier_rows": classifier_rows,
        "seed": seed,
    }
    sides = scan(reference, current, types=types, columns=columns, sample=sample, seed=seed, progress=progress)
    return judge_sides(*sides, settings, progress=progress)


def judge_sides(
    before: Side, after: Side, schema: Schema, settings: Mapping[str, Any], *, progress: bool = False
) -> ShiftReport:
    """Compares two sides that have been read: the second half of `compare`.

    Args:
        before: The reference's facts and sample.
        after: The current data's, of the same columns.
        schema: What differs between their columns.
        settings: `tolerance`, `confidence`, `sample`, `classifier_rows`, `seed`.
        progress: Whether to show a progress bar.

    Returns:
        The report.

    Raises:
        DataError: A side holds no rows.
    """
    for side in (before, after):
        if not side.rows:
            raise DataError(f"{side.name}: a table with rows is required, got none. Check the file or the query.")
    tolerance, seed = settings["tolerance"], settings["seed"]
    alpha, names = 1 - settings["confidence"], list(before.columns)
    each = alpha * FEATURES_SHARE / max(len(names), 1)
    measured = [
        measure(before.columns[name], after.columns[name], each) for name in tracked(names, "features", show=progress)
    ]
    corrected = iter(benjamini_hochberg([one.distances.p for one in measured if one.distances]))
    features = [judged(one, next(corrected) if one.distances else None, tolerance, alpha) for one in measured]
    domain = None
    if settings["classifier_rows"]:
        table = Rows.drawn(before, after, (settings["classifier_rows"], settings["classifier_rows"]), seed)
        domain = classify(table, alpha=alpha * (1 - FEATURES_SHARE), seed=seed)
    return ShiftReport(
        verdict=table_verdict([feature.verdict for feature in features], domain and domain.low, tolerance),
        features=tuple(sorted(features, key=lambda feature: feature.size, reverse=True)),
        domain=domain,
        schema=schema,
        sides=(before, after),
        settings=settings,
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and type(value) is not bool


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and type(value) is not bool


def _check(name: str, value: object, holds: bool, wanted: str) -> None:
    if not holds:
        raise ArgumentError(f"{name} must be {wanted}, got {value!r}.")
