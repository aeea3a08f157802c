"""What clean batches look like: from about a thousand unlabelled examples, the null that each test is held against.

Per layer, examples become a few scores (see `embedding`), and Hotelling's T² of a pool of n examples is

    T² = n ‖(s̄ - μ) W‖²,    W W' = (Σ + λI)⁻¹

with μ and the shrunk covariance Σ of the calibration. Its null comes from pools drawn from the calibration itself (in
blocks, where neighbours are alike). Such a null is too narrow, because a calibration of a thousand examples does not
have quite the population's mean and covariance. How much too narrow is measured by doing the calibration over, on
resamples of itself: the null is widened by the factor that would have kept the mean e-value of clean pools at most 1
for 95 % of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from steadynorm.errors import ArgumentError
from steadynorm.shift.watching.embedding import COMPONENTS, Projection, fit_projection
from steadynorm.shift.watching.resampling import block_length, draw, pseudo_means
from steadynorm.shift.watching.sequential import e_value, p_value

__all__ = [
    "WIDEST",
    "Calibration",
    "Gaussian",
    "LayerReference",
    "fit_calibration",
    "fit_gaussian",
    "t_squared",
    "widening",
]

Floats: TypeAlias = npt.NDArray[np.float64]

SHRINKAGE: Final = 0.01
CONFIDENCE: Final = 0.95
POOLS: Final = 4
POOL_BLOCKS: Final = 4
_NULL_DRAWS: Final = 4999
_REPEATS: Final = 60
_REPEAT_DRAWS: Final = 1000
WIDEST: Final = 16.0


class Gaussian(NamedTuple):
    """Mean (k,) and whitening matrix (k, k) of scores."""

    mean: Floats
    whiten: Floats


@dataclass(frozen=True)
class LayerReference:
    """What one layer sees of clean examples.

    Attributes:
        channels: C.
        projection: Features to scores.
        gaussian: Mean and whitening of the scores.
        null: T² of clean pools, ascending, widened.
        channel_mean: (C,), mean over the examples of the standardised per-example mean.
        channel_sd: (C,), its standard deviation from example to example (biased).
        channel_var: (C,), the variance of all values in the layer's own units, (σ²_seen + eps) / (σ² + eps) (biased).
    """

    channels: int
    projection: Projection
    gaussian: Gaussian
    null: Floats
    channel_mean: Floats
    channel_sd: Floats
    channel_var: Floats

    def p_value(self, values: Floats) -> float:
        """How often clean pools are at least as far out as the features (n, F) of this one."""
        statistic = t_squared(self.projection.scores(values).mean(axis=0), self.gaussian, len(values))
        return float(p_value(statistic, self.null))

    def e_value(self, values: Floats) -> float:
        """The evidence for a shift in the features (n, F) of one pool: at most 1 on average where there is none."""
        return float(e_value(self.p_value(values)))


@dataclass(frozen=True)
class Calibration:
    """The references of all layers, and how they were made.

    Attributes:
        layers: By the layer's name.
        pool: Examples per test.
        block: Length of the bootstrap's blocks; 1 for independent examples.
        examples: How many it was made from.
        widening: The factor on the null, >= 1; at `WIDEST` it may be too small for the rate stated.
    """

    layers: Mapping[str, LayerReference]
    pool: int
    block: int
    examples: int
    widening: float


def fit_gaussian(scores: Floats) -> Gaussian:
    """Mean and whitening of scores (m, k), their covariance (biased) shrunk towards the identity by `SHRINKAGE`.

    Example:
        >>> mean, whiten = fit_gaussian(np.random.default_rng(0).normal(size=(9999, 2)) * 2)
        >>> np.abs(np.round(whiten, 1)).tolist()
        [[0.5, 0.0], [0.0, 0.5]]
    """
    mean = scores.mean(axis=0)
    covariance = (scores - mean).T @ (scores - mean) / len(scores)
    shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * np.eye(len(mean))
    return Gaussian(mean, np.linalg.inv(np.linalg.cholesky(shrunk)).T)


def t_squared(means: Floats, gaussian: Gaussian, size: int) -> Floats:
    """Hotelling's T² of the means (..., k) of `size` examples: chi-square with k degrees for large calibrations.

    Source:
        Hotelling, "Multivariate quality control" (1947).

    Example:
        >>> t_squared(np.array([[0.5, 0.0]]), Gaussian(np.zeros(2), np.eye(2)), 64).tolist()
        [16.0]
    """
    return size * np.sum(((means - gaussian.mean) @ gaussian.whiten) ** 2, axis=-1)


def widening(scores: Sequence[Floats], pool: int, block: int, rng: np.random.Generator) -> float:
    """The factor on the null that keeps the rate for 95 % of calibrations like this one, by the bootstrap.

    Each repeat resamples the calibration, fits mean, whitening and null to it, and tests pools of the calibration
    itself, which stands in for the population. Its factor is the smallest that brings the mean e-value of these pools,
    averaged over the layers, down to 1.

    Args:
        scores: (m, k) of each layer, the same examples in the same order.
        pool: Examples per test.
        block: Length of the bootstrap's blocks.
        rng: The source of chance.

    Returns:
        The 95 % quantile of the repeats' factors, at least 1.
    """
    together, cuts = np.concatenate(scores, axis=1), np.cumsum([s.shape[1] for s in scores])[:-1]
    examples = len(together)
    clean = np.split(pseudo_means(together, draw(examples, pool, _REPEAT_DRAWS, block, rng)), cuts, axis=1)
    needed: list[float] = []
    for _ in range(_REPEATS):
        again = together[draw(examples, examples, 1, block, rng)[0]]
        pools = np.split(pseudo_means(again, draw(examples, pool, _REPEAT_DRAWS, block, rng)), cuts, axis=1)
        fits = [fit_gaussian(part) for part in np.split(again, cuts, axis=1)]
        nulls = [np.sort(t_squared(means, fit, pool)) for means, fit in zip(pools, fits, strict=True)]
        tests = [t_squared(means, fit, pool) for means, fit in zip(clean, fits, strict=True)]
        needed.append(_factor(tests, nulls))
    return max(1.0, float(np.quantile(needed, CONFIDENCE)))


def _factor(tests: Sequence[Floats], nulls: Sequence[Floats]) -> float:
    """By bisection, for the mean e-value falls as the factor grows."""
    low, high = 0.5, WIDEST
    for _ in range(14):
        middle = (low * high) ** 0.5
        mean = np.mean([e_value(p_value(t / middle, null)).mean() for t, null in zip(tests, nulls, strict=True)])
        low, high = (middle, high) if mean > 1 else (low, middle)
    return high


def fit_calibration(
    values: Mapping[str, Floats],
    channels: Mapping[str, int],
    *,
    pool: int = 64,
    block: int | None = None,
    seed: int = 0,
    components: int = COMPONENTS,
) -> Calibration:
    """Makes the reference of every layer.

    Args:
        values: (m, F) features of each layer by its name, of the same examples in the order of the stream.
        channels: C of each layer; the first C features are the per-example means.
        pool: Examples per test; raised to 4 blocks where that is more, so that one test says little of the next.
        block: Length of blocks of neighbouring examples that belong together; None estimates it from their order.
        seed: Of the bootstrap.
        components: Principal components per layer, at most.

    Raises:
        ArgumentError: The calibration holds fewer than 4 pools.
    """
    examples = len(next(iter(values.values())))
    if examples < POOLS * pool:
        raise ArgumentError(
            f"calibrating tests of {pool} examples needs at least {POOLS * pool} finite examples, about 1,000 are "
            f"recommended; got {examples}. Give more of them."
        )
    rng = np.random.default_rng(seed)
    projections = {name: fit_projection(v, components) for name, v in values.items()}
    scores = {name: projections[name].scores(v) for name, v in values.items()}
    length = max(block_length(s) for s in scores.values()) if block is None else block
    pool = max(pool, POOL_BLOCKS * length)
    if POOLS * pool > examples:
        raise ArgumentError(
            f"blocks of {length} alike neighbours need tests of {pool} examples and a calibration of {POOLS * pool}, "
            f"got {examples}. If the examples are only sorted (by label, say) and are served in another order, shuffle "
            "them or pass block=1; else calibrate on more of them, in the order of serving."
        )
    factor = widening(list(scores.values()), pool, length, rng)
    indices = draw(examples, pool, _NULL_DRAWS, length, rng)
    layers: dict[str, LayerReference] = {}
    for name, s in scores.items():
        gaussian, means = fit_gaussian(s), values[name][:, : channels[name]]
        spread = values[name][:, channels[name] :]
        null = factor * np.sort(t_squared(pseudo_means(s, indices), gaussian, pool))
        sd = means.std(axis=0)
        var = sd**2 + (np.exp(2 * spread).mean(axis=0) if spread.size else 0.0)
        layers[name] = LayerReference(channels[name], projections[name], gaussian, null, means.mean(axis=0), sd, var)
    return Calibration(layers, pool, length, examples, factor)
