"""One example at one layer as a short vector: standardised by the running statistics, projected to a few components."""

from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from steadynorm.nn.watched import BatchNormLayer, ExampleMoments, running_statistics

__all__ = ["CLIP", "COMPONENTS", "Projection", "features", "fit_projection"]

Floats: TypeAlias = npt.NDArray[np.float64]

COMPONENTS: Final = 12
"""Principal components kept per layer: fewer overlook subtle shifts, more need a larger calibration for no gain."""

CLIP: Final = 3.0
"""Scores are limited to this many standard deviations, so that no single example decides a test."""


def features(seen: ExampleMoments, layer: BatchNormLayer) -> Floats:
    """What the layer's buffers make of each example: its mean and its spread, in the units the layer normalises by.

        (mean - μ) / √(σ² + eps)        ½ log((var + eps) / (σ² + eps))

    with μ and σ² the layer's running mean and (unbiased) variance, `var` the biased variance over the positions.

    Args:
        seen: (N, C) each, from `example_moments`.
        layer: The layer they were measured at.

    Returns:
        (N, 2C) in float64; (N, C), the means alone, where an example has one position.
    """
    running_mean, running_var = (t.detach().to("cpu", torch.float64) for t in running_statistics(layer))
    scale = (running_var + layer.eps).sqrt()
    standard = (seen.mean.to("cpu", torch.float64) - running_mean) / scale
    if seen.var is None:
        return standard.numpy()
    spread = 0.5 * torch.log((seen.var.to("cpu", torch.float64) + layer.eps) / scale.square())
    return torch.cat([standard, spread], dim=1).numpy()


@dataclass(frozen=True)
class Projection:
    """Principal components of standardised features.

    Attributes:
        centre: (F,), mean of each feature over the calibration.
        weight: (F, k): a feature's share in each component, its own scale and the component's included.
    """

    centre: Floats
    weight: Floats

    def scores(self, values: Floats) -> Floats:
        """(N, F) features to (N, k) scores: mean 0 and variance 1 over the calibration, then limited to ±`CLIP`."""
        return np.clip((values - self.centre) @ self.weight, -CLIP, CLIP)


def fit_projection(values: Floats, components: int = COMPONENTS) -> Projection:
    """The leading principal components of features that are first brought to mean 0 and variance 1 (biased) each.

    Args:
        values: (m, F) features of the calibration's examples.
        components: k, at most; fewer where the features do not span as many.

    Returns:
        The projection. A feature that does not vary (a dead channel) has no part in it.

    Source:
        Jackson, "Quality control methods for several related variables", Technometrics 1 (1959).

    Example:
        >>> x = np.random.default_rng(0).normal(size=(500, 6)) @ np.diag([5.0, 1, 1, 1, 1, 0])
        >>> scores = fit_projection(x, 3).scores(x)
        >>> scores.shape, bool(np.allclose(scores.std(axis=0), 1, atol=0.05))
        ((500, 3), True)
    """
    centre, scale = values.mean(axis=0), values.std(axis=0)
    varies = scale > 1e-9
    inverse = np.where(varies, 1 / np.where(varies, scale, 1.0), 0.0)
    standard = (values - centre) * inverse
    count, wide = len(values), values.shape[1] > len(values)
    # The smaller of the two Gram matrices has the same spectrum.
    gram = (standard @ standard.T if wide else standard.T @ standard) / count
    spectrum, vectors = np.linalg.eigh(gram)
    leading = np.argsort(spectrum)[::-1][:components]
    leading = leading[spectrum[leading] > 1e-6 * max(float(spectrum[-1]), 1e-12)]
    root = np.sqrt(spectrum[leading])
    axes = standard.T @ vectors[:, leading] / (root * np.sqrt(count)) if wide else vectors[:, leading]
    return Projection(centre, inverse[:, None] * axes / root)
