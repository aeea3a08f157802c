"""May a model be adapted to this stream? What the order of the examples and the predictions say about it."""

import math
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Guard",
    "autocorrelation",
    "balanced_classes",
    "drift_guard",
    "effective_classes",
    "entropy",
    "leading_component",
    "order_guard",
    "runs_z",
    "size_guard",
    "skew_guard",
]

Floats: TypeAlias = NDArray[np.float64]

LEAST: Final = 64
"""Examples that a mix asks for; below, what is seen is mostly the chance of the draw."""
LEAST_PURE: Final = 256
"""Examples that batch statistics alone ask for."""
PURE: Final = 0.05
"""Where the stored statistics keep less than this share, what is left are batch statistics."""
BALANCE: Final = 0.8
"""Share of the diversity of an unskewed stream that is asked for."""
RUNS: Final = 4.5
"""Standard errors that chance may explain: one stream in 300,000."""
LEAST_CORRELATION: Final = 0.1
"""Correlations below do no harm, however sure it is that they are there."""
_DRAWS: Final = 200


@dataclass(frozen=True)
class Guard:
    """One check of whether the stream may be adapted to.

    Attributes:
        name: Which one.
        seen: What was seen; None where it could not be computed.
        limit: What it is held against.
        passed: Whether it lets the adaptation through.
        meaning: What was compared, in words.
    """

    name: str
    seen: float | None
    limit: float
    passed: bool
    meaning: str


def entropy(probabilities: Floats) -> Floats:
    """How unsure each prediction is: -Σ p log p / log K, 0 (sure) to 1 (all K classes alike).

    Args:
        probabilities: (N, K), K >= 2.

    Example:
        >>> entropy(np.array([[0.5, 0.5], [1.0, 0.0]])).tolist()
        [1.0, 0.0]
    """
    terms = np.where(probabilities > 0, probabilities * np.log(np.where(probabilities > 0, probabilities, 1.0)), 0.0)
    return np.abs(terms.sum(1)) / math.log(probabilities.shape[1])


def effective_classes(labels: NDArray[np.int64]) -> float:
    """How many classes of equal size would be as diverse: exp(-Σ p log p) of the shares of the labels.

    Example:
        >>> round(effective_classes(np.array([0, 0, 1, 1])), 6), effective_classes(np.array([7, 7, 7]))
        (2.0, 1.0)
    """
    _, counts = np.unique(labels, return_counts=True)
    shares = counts / counts.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def runs_z(labels: NDArray[np.int64]) -> float:
    """Wald-Wolfowitz runs test for several classes: how many standard errors too few changes the order has.

        E[R] = n + 1 - Σ nᵢ² / n
        Var[R] = (Σ nᵢ² (Σ nᵢ² + n (n + 1)) - 2 n Σ nᵢ³ - n³) / (n² (n - 1))        z = (E[R] - R) / sd

    Positive where equal labels come together; 0 where all are equal, which have no order.

    Source:
        Mood, "The distribution theory of runs" (1940); Barton & David, "Multiple runs" (1957).

    Example:
        >>> round(runs_z(np.repeat([0, 1], 10)), 2), round(runs_z(np.tile([0, 1], 10)), 2)
        (4.14, -4.14)
    """
    n = len(labels)
    _, found = np.unique(labels, return_counts=True)
    counts = found.astype(np.float64)
    squares, cubes = float((counts**2).sum()), float((counts**3).sum())
    if n < 2 or len(counts) < 2:
        return 0.0
    variance = (squares * (squares + n * (n + 1)) - 2 * n * cubes - n**3) / (n**2 * (n - 1))
    if variance <= 0:
        return 0.0
    runs = 1 + int((labels[1:] != labels[:-1]).sum())
    return (n + 1 - squares / n - runs) / math.sqrt(variance)


def leading_component(features: Floats) -> Floats:
    """(N,) scores of the examples on the first principal component of their standardised features (N, F)."""
    spread = features.std(0)
    varying = spread > 1e-12 * (1 + np.abs(features).max(0))
    if not varying.any():
        return np.zeros(len(features))
    standard = (features[:, varying] - features[:, varying].mean(0)) / spread[varying]
    left, scale, _ = np.linalg.svd(standard, full_matrices=False)
    return left[:, 0] * scale[0]


def autocorrelation(values: Floats) -> float:
    """r₁ = Σ (xᵢ - x̄)(xᵢ₊₁ - x̄) / Σ (xᵢ - x̄)²: of independent examples about N(-1/n, 1/n); 0 for constant ones.

    Example:
        >>> autocorrelation(np.array([1.0, 2.0, 3.0, 4.0]))
        0.25
    """
    centred = values - values.mean()
    total = float((centred**2).sum())
    return float((centred[1:] * centred[:-1]).sum()) / total if total > 0 else 0.0


def balanced_classes(n: int, shares: Floats) -> float:
    """The mean of `effective_classes` over draws of n labels from these shares: what an unskewed stream shows.

    Args:
        n: Examples.
        shares: (K,), of sum 1.

    Example:
        >>> round(balanced_classes(64, np.full(10, 0.1)), 1), round(balanced_classes(10_000, np.full(10, 0.1)), 1)
        (9.3, 10.0)
    """
    counts = np.random.default_rng(0).multinomial(n, shares, size=_DRAWS)
    p = counts / n
    return float(np.exp(-(p * np.log(np.where(p > 0, p, 1.0))).sum(1)).mean())


def size_guard(n: int, kept: float) -> Guard:
    """Enough examples: 64, or 256 where the stored statistics keep less than 5 % of the say."""
    least = LEAST_PURE if kept < PURE else LEAST
    meaning = f"number of examples; at least {least}" + (", since hardly any of the stored is kept" * (kept < PURE))
    return Guard("examples", n, least, n >= least, meaning)


def skew_guard(labels: NDArray[np.int64], shares: Floats) -> Guard:
    """Classes as diverse as training's: at least 80 % of the effective classes of an unskewed stream of this length."""
    limit = BALANCE * balanced_classes(len(labels), shares)
    found = effective_classes(labels)
    return Guard(
        "classes", found, limit, found >= limit, f"predicted classes are as diverse as so many; >= {limit:.2f}"
    )


def order_guard(labels: NDArray[np.int64]) -> Guard:
    """No runs of equal predictions: the runs test's z up to 4.5."""
    found = runs_z(labels)
    return Guard("order", found, RUNS, found <= RUNS, f"standard errors of too few changes of class; <= {RUNS}")


def drift_guard(features: Floats) -> Guard:
    """No drift along the order: the lag-1 autocorrelation of the inputs up to 4.5 standard errors, or 0.1 if more."""
    found = autocorrelation(leading_component(features))
    limit = max(LEAST_CORRELATION, RUNS / math.sqrt(len(features)))
    return Guard("neighbours", found, limit, found <= limit, f"correlation of neighbouring inputs; <= {limit:.2f}")
