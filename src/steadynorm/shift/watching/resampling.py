"""Bootstrap of a stream: blocks of neighbouring examples stay together, as long as neighbours are alike."""

import math
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["block_length", "draw", "pseudo_means"]

Floats: TypeAlias = npt.NDArray[np.float64]
Integers: TypeAlias = npt.NDArray[np.int64]

_CHUNK = 512


def draw(examples: int, size: int, repeats: int, block: int, rng: np.random.Generator) -> Integers:
    """Bootstrap samples in blocks of the circular stream.

    Args:
        examples: How many there are to draw from.
        size: How many each sample holds.
        repeats: How many samples.
        block: Length of the blocks, 1 for independent examples.
        rng: The source of chance.

    Returns:
        (repeats, size) indices.

    Source:
        Politis & Romano, "A circular block-resampling procedure for stationary data" (1992).

    Example:
        >>> draw(5, 4, 1, 2, np.random.default_rng(0)).tolist()
        [[4, 0, 3, 4]]
    """
    starts = rng.integers(examples, size=(repeats, math.ceil(size / block)))
    runs = (starts[:, :, None] + np.arange(block)) % examples
    return runs.reshape(repeats, -1)[:, :size]


def pseudo_means(scores: Floats, indices: Integers) -> Floats:
    """The mean of each sample, (repeats, k), of scores (m, k) at indices (repeats, size)."""
    examples, size = len(scores), indices.shape[1]
    means = np.empty((len(indices), scores.shape[1]))
    for start in range(0, len(indices), _CHUNK):
        part = indices[start : start + _CHUNK]
        rows = part + examples * np.arange(len(part))[:, None]
        counts = np.bincount(rows.ravel(), minlength=examples * len(part)).reshape(len(part), examples)
        means[start : start + _CHUNK] = counts @ scores / size
    return means


def block_length(scores: Floats) -> int:
    """How long blocks must be for a stream whose neighbours are alike; 1 where they are not.

        b = (2 G² / D)^(1/3) m^(1/3),    G = Σ λ(k/M) |k| R(k),    D = 4/3 (Σ λ(k/M) R(k))²

    with R the mean autocorrelation of the columns, λ the flat-top window, and M twice the lag after which five
    autocorrelations in a row are no larger than chance makes them.

    Args:
        scores: (m, k) in the order of the stream.

    Source:
        Politis & White, "Automatic block-length selection for the dependent bootstrap" (2004); Patton, Politis & White
        (2009) for the constant.

    Example:
        >>> noise = np.random.default_rng(0).normal(size=(1000, 8))
        >>> block_length(noise), block_length(np.repeat(noise[:100], 10, axis=0)) > 10
        (1, True)
    """
    examples = len(scores)
    longest = max(1, min(examples // 3, math.ceil(math.sqrt(examples)) + 5))
    correlation = _autocorrelation(scores, longest)
    chance = 2 * math.sqrt(math.log10(examples) / examples)
    significant = np.flatnonzero(np.abs(correlation[1:]) > chance) + 1
    quiet = next((lag for lag in range(longest) if not np.any((significant > lag) & (significant <= lag + 5))), longest)
    if quiet == 0:
        return 1
    lags = np.arange(1, min(2 * quiet, longest) + 1)
    window = np.clip(2 * (1 - lags / (2 * quiet)), 0, 1)
    tapered = window * correlation[lags]
    g, d = 2 * float(np.sum(lags * tapered)), 4 / 3 * float(1 + 2 * np.sum(tapered)) ** 2
    return max(1, math.ceil((2 * g**2 / max(d, 1e-12) * examples) ** (1 / 3)))


def _autocorrelation(scores: Floats, longest: int) -> Floats:
    """(longest + 1,), the mean over the columns, from the biased autocovariances."""
    centred = scores - scores.mean(axis=0)
    power = np.sum(centred**2, axis=0)
    used = centred[:, power > 0]
    if used.shape[1] == 0:
        return np.concatenate([[1.0], np.zeros(longest)])
    lagged = [np.sum(used[: len(used) - lag] * used[lag:], axis=0) for lag in range(longest + 1)]
    return np.mean(np.stack(lagged) / power[power > 0], axis=1)
