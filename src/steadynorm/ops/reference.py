r"""The reference backend: batch norm in plain torch, straight from the definition, in float64.

    measure     n = Σ w,  μ = Σ w x / n,  m2 = Σ w (x - μ)²                   over the positions, per channel
    normalize   z = (x - μ) / sqrt(σ² + ε),  y = f(γ z + β + residual),  0 where masked
    backward    with g = dL/dy f'(γ z + β + residual):
                dβ = Σ g,  dγ = Σ g z,  d residual = g,
                dx = γ/sqrt(σ² + ε) (g - w/n (Σ g + z Σ g z)) + w/n dL/dμ + 2 w (x - μ) dL/dm2

The forward functions are composites of differentiable operations: derivatives of any order come out right, also under
`torch.func` and `torch.compile`. `backward` is the closed form of their first derivative, which needs x alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from steadynorm.activations import Activation
from steadynorm.ops.layout import Layout, accumulator_dtype

__all__ = ["Gradients", "Statistics", "Train", "backward", "measure", "normalize", "reciprocal_count", "train"]


class Statistics(NamedTuple):
    """What `measure` found, per channel: total weight n, mean μ and sum of squared deviations m2, each (C,)."""

    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    mean: Tensor
    m2: Tensor


def reciprocal_count(statistics: Statistics, position_weight: Tensor | None, layout: Layout) -> Tensor | float:
    """1 / n, and 0 for n = 0: a plain number where n is known from the shape alone."""
    if position_weight is None:
        return 1 / layout.count if layout.count else 0.0
    n = statistics.count
    return torch.where(n > 0, 1 / torch.where(n > 0, n, 1.0), 0.0)


class Train(NamedTuple):
    """The settings of one training normalisation that are no tensors."""

    layout: Layout
    eps: float
    activation: Activation | None


class Gradients(NamedTuple):
    """The first derivatives, as `backward` returns them."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None


def measure(x: Tensor, weight: Tensor | None, layout: Layout) -> Statistics:
    """Count, mean and sum of squared deviations of each channel of `x`.

    Args:
        x: Any floating dtype and strides.
        weight: Already aligned with x (see `layout.align`), >= 0; or None. Where it is 0, x may hold anything.
        layout: Which axes are which.
    """
    return _measure(x.to(accumulator_dtype(x.device)), weight, layout, x.dtype)[0]


def _measure(wide: Tensor, weight: Tensor | None, layout: Layout, given: torch.dtype) -> tuple[Statistics, Tensor]:
    """The statistics of `wide` (already in the accumulator's dtype), and x - μ, which normalising needs next."""
    dtype = wide.dtype
    if weight is None:
        count, w = torch.full((layout.channels,), layout.count, dtype=dtype, device=wide.device), None
        total, kept = max(layout.count, 1), wide
    else:
        w = weight.to(dtype)
        n = w.expand([1 if d == layout.dim else s for d, s in enumerate(wide.shape)]).sum()
        count = n.expand(layout.channels)
        total, kept = torch.where(n > 0, n, 1.0), torch.where(w > 0, wide, 0)
    mean = _sum(kept, w, layout) / total
    if given == dtype or w is not None:
        # The mean carries a rounding error of its own, which input of its own width can show: take it out (Chan 1983).
        mean = mean + _sum(kept - mean.view(layout.view), w, layout) / total
    centred = kept - mean.view(layout.view)
    return Statistics(count, mean, _sum(centred * centred, w, layout)), centred


def _sum(x: Tensor, weight: Tensor | None, layout: Layout) -> Tensor:
    return (x if weight is None else x * weight).sum(layout.positions)


def normalize(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    valid: Tensor | None,
    spec: Train,
) -> Tensor:
    """y = f(γ (x - μ) / sqrt(σ² + ε) + β + residual), 0 where not valid, computed in the statistics' dtype.

    Args:
        x: The input; y has its dtype and memory format.
        mean: μ, (C,); its dtype is the one computed in.
        variance: σ², (C,), biased where it comes from the batch itself.
        weight: γ, (C,), or None for 1.
        bias: β, (C,), or None for 0.
        residual: Added after the affine map, before the activation; x's shape.
        valid: Boolean, aligned with x; or None.
        spec: The settings.
    """
    wide = x.to(mean.dtype)
    if valid is not None:
        wide = torch.where(valid, wide, 0)  # padding may hold NaN, and 0 * NaN is NaN in backward too
    centred = wide - mean.view(spec.layout.view)
    return _finish(centred, torch.rsqrt(variance + spec.eps), weight, bias, residual, valid, spec).to(x.dtype)


def _before_activation(
    centred: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    valid: Tensor | None,
    spec: Train,
) -> Tensor:
    """γ z + β + residual."""
    view = spec.layout.view
    y = centred * (invstd if weight is None else invstd * weight).view(view)
    if bias is not None:
        y = y + bias.view(view)
    if residual is not None:
        y = y + (residual if valid is None else torch.where(valid, residual, 0))
    return y


def _finish(
    centred: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    valid: Tensor | None,
    spec: Train,
) -> Tensor:
    y = _before_activation(centred, invstd, weight, bias, residual, valid, spec)
    if spec.activation is not None:
        y = spec.activation(y)
    return y if valid is None else torch.where(valid, y, 0)


def train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    position_weight: Tensor | None,
    valid: Tensor | None,
    spec: Train,
) -> tuple[Tensor, Statistics]:
    """Measure the batch, normalize by that (biased variance): the training step's forward, differentiable."""
    layout, wide = spec.layout, x.to(accumulator_dtype(x.device))
    statistics, centred = _measure(wide, position_weight, layout, x.dtype)
    if position_weight is not None:  # positions of weight 0 were left out of `centred`, yet they get their output
        kept = wide if valid is None else torch.where(valid, wide, 0)
        centred = kept - statistics.mean.view(layout.view)
    invstd = torch.rsqrt(statistics.m2 * reciprocal_count(statistics, position_weight, layout) + spec.eps)
    return _finish(centred, invstd, weight, bias, residual, valid, spec).to(x.dtype), statistics


def backward(
    grad_y: Tensor | None,
    grad_mean: Tensor | None,
    grad_m2: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    position_weight: Tensor | None,
    valid: Tensor | None,
    statistics: Statistics,
    spec: Train,
) -> Gradients:
    """The closed form of `train`'s first derivative (the formula is at the top of this file), recomputing from x."""
    layout, dtype = spec.layout, statistics.mean.dtype
    view, positions = layout.view, layout.positions
    wide = x.to(dtype)
    centred = (wide if valid is None else torch.where(valid, wide, 0)) - statistics.mean.view(view)
    per_count = reciprocal_count(statistics, position_weight, layout)
    invstd = torch.rsqrt(statistics.m2 * per_count + spec.eps)
    dx, dweight, dbias, dresidual = None, None, None, None
    slope, offset = None, None
    if grad_y is not None:
        g = grad_y.to(dtype)
        if spec.activation is not None:
            g = g * spec.activation.derivative(_before_activation(centred, invstd, weight, bias, residual, valid, spec))
        if valid is not None:
            g = torch.where(valid, g, 0)
        dresidual = None if residual is None else g.to(residual.dtype)
        gamma = invstd if weight is None else invstd * weight
        sum_g, sum_gz = g.sum(positions), (g * centred).sum(positions) * invstd
        dweight = None if weight is None else sum_gz.to(weight.dtype)
        dbias = None if bias is None else sum_g.to(bias.dtype)
        dx = g * gamma.view(view)
        offset = gamma * sum_g * per_count
        slope = gamma * invstd * sum_gz * per_count
    if grad_mean is not None or grad_m2 is not None:
        offset, slope = _with_moments(offset, slope, grad_mean, grad_m2, per_count)
    if offset is None or slope is None:
        return Gradients(None, None, None, None)
    pull = centred * slope.view(view) + offset.view(view)
    if position_weight is not None:
        pull = pull * position_weight
    dx = -pull if dx is None else dx - pull
    return Gradients(dx.to(x.dtype), dweight, dbias, dresidual)


def _with_moments(
    offset: Tensor | None,
    slope: Tensor | None,
    grad_mean: Tensor | None,
    grad_m2: Tensor | None,
    per_count: Tensor | float,
) -> tuple[Tensor, Tensor]:
    """Adds what the returned statistics' own gradients contribute: dμ/dx = w / n and dm2/dx = 2 w (x - μ)."""
    like = next(t for t in (offset, grad_mean, grad_m2) if t is not None)
    offset = torch.zeros_like(like) if offset is None else offset
    slope = torch.zeros_like(like) if slope is None else slope
    return (
        offset if grad_mean is None else offset - grad_mean * per_count,
        slope if grad_m2 is None else slope - 2 * grad_m2,
    )
