"""The domain classifier: can a model tell which of the two tables a row is from? It sees what no column shows alone."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from steadynorm.shift.reading.sides import Side

__all__ = ["Domain", "Rows", "Weights", "classify", "weigh"]

_Floats: TypeAlias = NDArray[np.float64]
_Integers: TypeAlias = NDArray[np.int64]

FOLDS: Final = 5
PERMUTATIONS: Final = 999
MOST_CATEGORIES: Final = 250  # the booster takes 255
IMPORTANT: Final = 10
SMALLEST_SIDE: Final = 50
_LOOKED_AT: Final = 1000  # rows that importances are taken over
_WORTH_THREADS: Final = 1_000_000  # values
_SMALL: Final = 0.001  # a loss of AUC that is not worth a line
_FEW: Final = 0.1
"""The share of its rows that an effective sample size should not fall below."""


@dataclass(frozen=True, eq=False)
class Rows:
    """The two tables as numbers.

    Attributes:
        reference: (n, F), NaN where missing; categories as indices from 0.
        current: (m, F).
        names: (F,) of the features.
        categories: (F,) which of them are categories.
    """

    reference: _Floats
    current: _Floats
    names: tuple[str, ...]
    categories: tuple[bool, ...]

    @classmethod
    def drawn(cls, reference: Side, current: Side, most: tuple[int | None, int | None], seed: int) -> "Rows":
        """Of each side's sample so many rows at random, in a random order; None for all, in theirs."""
        rng = np.random.default_rng(seed)
        names = tuple(reference.columns)

        def matrix(side: Side, limit: int | None) -> _Floats:
            chosen = slice(None) if limit is None else rng.permutation(side.sampled)[:limit]
            values = [side.columns[name].values[chosen] for name in names]
            return np.column_stack(values) if values else np.empty((side.sampled, 0))

        categories = tuple(reference.columns[name].counts is not None for name in names)
        return cls(matrix(reference, most[0]), matrix(current, most[1]), names, categories)


@dataclass(frozen=True, eq=False)
class Weights:
    """Importance weights for the reference's rows: train with them, and the reference counts as the current data does.

        w(x) = p(current | x) / p(reference | x) * n / m

    by the domain classifier, each row by a model that has not seen it. Their mean is 1.

    Attributes:
        values: (n,) one for each sampled row of the reference: `sample_weight`.
        rows: (n,) which rows these are, counted from 0; None where the engine does not say.
        effective: (Σ w)² / Σ w², the effective sample size.
        warning: What stands against using them, or None.

    Source: Bickel, Brückner, Scheffer, Discriminative learning under covariate shift, JMLR 10 (2009); Kish, Survey
    sampling (1965).
    """

    values: _Floats
    rows: _Integers | None
    effective: float
    warning: str | None


@dataclass(frozen=True)
class Domain:
    """What the domain classifier found.

    Attributes:
        rows: Of each side that it was trained and tested on.
        auc: Area under the ROC curve, the mean over folds, each scored by a model of those before it; 0.5 is guessing.
        effect: The same as a difference of means of two normals, sqrt(2) Phi^-1(auc), in deviations; 0 below 0.5.
        low: Its one-sided lower bound.
        p: P(AUC this high by chance), from 999 permutations of the labels within folds, (1 + #) / 1000.
        features: The features it used, with how much the AUC falls when each is shuffled; the largest first. Empty
            where it found nothing.
    """

    rows: int
    auc: float
    effect: float
    low: float
    p: float
    features: tuple[tuple[str, float], ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self) | {"features": [{"feature": name, "loss": loss} for name, loss in self.features]}


def classify(table: Rows, *, alpha: float, seed: int) -> Domain | None:
    """Trains gradient-boosted trees to tell the two sides apart, and tests them on rows that they have not seen.

    The folds are in an order: each is scored by a model of those *before* it. Every pair of rows then counts once, and
    where the sides are alike, each fold's ranks are those of a random permutation whatever came before: the
    permutation test is exact. (In plain cross-validation two rows help each other both ways, and the AUC strays by up
    to sqrt(2) times as much as its standard error says.)

    Args:
        table: The two sides, each in a random order.
        alpha: The chance that the lower bound of the AUC may miss.
        seed: Of the trees and the permutations.

    Returns:
        What it found; None where a side has fewer than 50 rows, or there are no features.

    Source: Lopez-Paz & Oquab, Revisiting classifier two-sample tests (2017); Dawid, The prequential approach, JRSS A
    147 (1984); DeLong, DeLong, Clarke-Pearson, Comparing the areas under correlated ROC curves, Biometrics 44 (1988);
    Phipson & Smyth, Permutation p-values should never be zero (2010).

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x = rng.normal(size=(400, 2))
        >>> y = np.stack([x[:, 0], 0.8 * x[:, 0] + 0.6 * x[:, 1]], 1)  # the same columns, now correlated
        >>> found = classify(Rows(x, y, ("a", "b"), (False, False)), alpha=0.01, seed=0)
        >>> found.auc > 0.6, found.p, [name for name, _ in found.features]
        (True, 0.001, ['a', 'b'])
    """
    if min(len(table.reference), len(table.current)) < SMALLEST_SIDE or not table.names:
        return None
    rng = np.random.default_rng(seed)
    x, y, folds = _stacked(table)
    tested = range(1, FOLDS)
    scores, model = np.full(len(x), np.nan), None
    for k in tested:
        model = _trained(x[folds < k], y[folds < k], table.categories, seed)
        scores[folds == k] = model.predict_proba(x[folds == k])[:, 1]
    parts = [(scores[folds == k], y[folds == k]) for k in tested]
    areas = [_area(*part) for part in parts]
    auc = float(np.mean([area for area, _ in areas]))
    error = math.sqrt(sum(variance for _, variance in areas)) / len(areas)
    p = _permutation_p(parts, auc, rng)
    last = folds == FOLDS - 1
    important = _important(model, x[last], y[last], table.names, rng) if p <= 0.05 else ()
    low = auc - _point(1 - alpha) * error
    return Domain(min(int((y == 0).sum()), int((y == 1).sum())), auc, _effect(auc), _effect(low), p, important)


def weigh(table: Rows, *, rows: int, seed: int, numbers: _Integers | None = None) -> Weights:
    """Importance weights by ratios of densities: the domain classifier's odds, each row's by a model blind to it.

    Args:
        table: The two sides, at least 50 rows each; the current one in a random order.
        rows: How many rows of each side to train on, at most; all of the reference's are weighed.
        seed: Of the choice of rows and of the trees.
        numbers: (n,) the rows of the source that the reference's are.

    Returns:
        The weights.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x, y = rng.normal(size=(1000, 1)), rng.normal(0.5, size=(1000, 1))
        >>> found = weigh(Rows(x, y, ("a",), (False,)), rows=1000, seed=0)
        >>> print(f"mean {np.average(x[:, 0], weights=found.values):.1f}")
        mean 0.5
    """
    taken = np.random.default_rng(seed).permutation(len(table.reference))[:rows]
    x, y, folds = _stacked(replace(table, reference=table.reference[taken], current=table.current[:rows]))
    models = [_trained(x[folds != k], y[folds != k], table.categories, seed) for k in range(FOLDS)]
    everything = _bounded(table.reference, table.categories)
    odds = np.mean([_odds(model, everything) for model in models], axis=0)
    for k, model in enumerate(models):
        mine = taken[folds[: len(taken)] == k]
        odds[mine] = _odds(model, everything[mine])
    values = odds / odds.mean()
    effective = float(values.sum() ** 2 / np.square(values).sum())
    warning = None
    if effective < _FEW * values.size:
        warning = (
            f"the weights make {values.size:,} rows worth {effective:,.0f}: a few rows would decide what is learnt. "
            "The two sides hardly overlap; new labels are needed."
        )
    return Weights(values, numbers, effective, warning)


def _stacked(table: Rows) -> tuple[_Floats, _Integers, _Integers]:
    """The rows of both sides, the reference's first; which side, and which fold, each is of."""
    sizes = [len(table.reference), len(table.current)]
    folds = np.concatenate([np.arange(size) % FOLDS for size in sizes])
    x = _bounded(np.concatenate([table.reference, table.current]), table.categories)
    return x, np.repeat([0, 1], sizes), folds


def _bounded(values: _Floats, categories: Sequence[bool]) -> _Floats:
    """What the booster takes: no infinities, and few enough categories (the rest are one)."""
    greatest = float(np.finfo(np.float32).max)
    bounded = np.clip(values, -greatest, greatest)
    few = np.asarray(categories, bool)
    bounded[:, few] = np.minimum(bounded[:, few], MOST_CATEGORIES)
    return bounded


def _trained(x: _Floats, y: _Integers, categories: Sequence[bool], seed: int) -> Any:
    from sklearn.ensemble import HistGradientBoostingClassifier
    from threadpoolctl import threadpool_limits

    booster: Any = HistGradientBoostingClassifier
    model = booster(
        max_iter=60,
        max_leaf_nodes=15,
        min_samples_leaf=max(5, min(20, len(x) // 40)),
        l2_regularization=1.0,
        early_stopping=False,
        categorical_features=list(categories),
        random_state=seed,
    )
    x = np.where(np.isnan(x).all(0), 0.0, x)  # the booster cannot bin a column without a value
    # On little data threads take longer to meet than to work, by far where cores are shared.
    with threadpool_limits(1 if x.size < _WORTH_THREADS else None, user_api="openmp"):
        return model.fit(x, y)


def _area(scores: _Floats, y: _Integers) -> tuple[float, float]:
    """The AUC and DeLong's variance of it, from the placements of each side's scores among the other's."""
    x, z = np.sort(scores[y == 0]), np.sort(scores[y == 1])
    above = 1 - (np.searchsorted(z, x, side="left") + np.searchsorted(z, x, side="right")) / (2 * z.size)
    below = (np.searchsorted(x, z, side="left") + np.searchsorted(x, z, side="right")) / (2 * x.size)
    return float(below.mean()), float(above.var(ddof=1)) / x.size + float(below.var(ddof=1)) / z.size


def _permutation_p(parts: Sequence[tuple[_Floats, _Integers]], auc: float, rng: np.random.Generator) -> float:
    """(1 + how many permutations reach this AUC) / (1 + permutations): an AUC is a sum of ranks."""
    from scipy.stats import rankdata

    total = np.zeros(PERMUTATIONS)
    for scores, y in parts:
        ranks, ours = rankdata(scores), int(y.sum())
        drawn = np.array([rng.permutation(ranks)[:ours].sum() for _ in range(PERMUTATIONS)])
        total += (drawn - ours * (ours + 1) / 2) / (ours * (ranks.size - ours))
    return (1 + int((total / len(parts) >= auc - 1e-12).sum())) / (1 + PERMUTATIONS)


def _important(
    model: Any, x: _Floats, y: _Integers, names: Sequence[str], rng: np.random.Generator
) -> tuple[tuple[str, float], ...]:
    """How much the AUC on unseen rows falls as each feature is shuffled."""
    few = rng.permutation(len(x))[:_LOOKED_AT]
    x, y = x[few], y[few]

    def area(values: _Floats) -> float:
        return _area(model.predict_proba(values)[:, 1], y)[0]

    whole = area(x)
    losses: dict[str, float] = {}
    for j, name in enumerate(names):
        shuffled = x.copy()
        shuffled[:, j] = rng.permutation(shuffled[:, j])
        losses[name] = whole - area(shuffled)
    ranked = sorted(losses.items(), key=lambda item: -item[1])[:IMPORTANT]
    return tuple((name, loss) for name, loss in ranked if loss >= _SMALL)


def _odds(model: Any, x: _Floats) -> _Floats:
    p = np.clip(model.predict_proba(x)[:, 1], 1e-6, 1 - 1e-6)
    return p / (1 - p)


def _effect(auc: float) -> float:
    return math.sqrt(2) * max(_point(min(auc, 1 - 1e-15)), 0.0) if auc > 0 else 0.0


def _point(probability: float) -> float:
    from scipy.special import ndtri

    return float(ndtri(probability))
