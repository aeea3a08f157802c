r"""The reference backend: batch norm in plain torch, straight from the definition, in float64.

    measure     n = Σ w,  μ = Σ w x / n,  m2 = Σ w (x - μ)²                   over the positions, per channel
    normalize   z = (x - μ) / sqrt(σ² + ε),  y = f(γ z + β + residual),  0 where masked
    backward    with g = dL/dy f'(γ z + β + residual):
                dβ = Σ g,  dγ = Σ g z,  d residual = g,
                dx = γ/sqrt(σ² + ε) (g - w/n (Σ g + z Σ g z)) + w/n dL/dμ + 2 w (x - μ) dL/dm2

The forward functions are composites of differentiable operations: derivatives of any order come out right, also under
`torch.func` and `torch.compile`. `backward` is the closed form of their first derivative, which needs x alone.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from steadynorm.activations import Activation
from steadynorm.ops.layout import Layout, accumulator_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "Gradients",
    "Operands",
    "Statistics",
    "Train",
    "backward",
    "measure",
    "normalize",
    "normalize_by",
    "normalize_by_constants",
    "reciprocal_count",
    "through_moments",
    "train",
]


class Statistics(NamedTuple):
    """What `measure` found, per channel: total weight n, mean μ and sum of squared deviations m2, each (C,)."""

    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    mean: Tensor
    m2: Tensor


def reciprocal_count(statistics: Statistics, position_weight: Tensor | None, spec: "Train") -> Tensor | float:
    """1 / n, and 0 for n = 0: a plain number where n is known from the shape alone."""
    if position_weight is None and spec.group is None and not spec.constant:
        return 1 / spec.layout.count if spec.layout.count else 0.0
    n = statistics.count
    return torch.where(n > 0, 1 / torch.where(n > 0, n, 1.0), 0.0)


class Train(NamedTuple):
    """The settings of one training normalisation that are no tensors.

    Attributes:
        layout: Which axes are channels and which are positions.
        eps: ε, added to the biased variance.
        activation: f, or None for the identity.
        group: The ranks whose batches count as one; None for this process alone.
        constant: Whether the statistics are given and no functions of x, so that no gradient flows through them.
    """

    layout: Layout
    eps: float
    activation: Activation | None
    group: "ProcessGroup | None" = None
    constant: bool = False


class Operands(NamedTuple):
    """The tensors of one normalisation, in the order of the functions' arguments.

    Attributes:
        x: The input.
        weight: γ, (C,), or None for 1.
        bias: β, (C,), or None for 0.
        residual: Added after the affine map, before the activation; x's shape; or None.
        position_weight: How much each position counts in the statistics, aligned with x (see `layout.align`); or None.
        valid: Boolean, aligned with x: which positions get an output; or None for all.
    """

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    position_weight: Tensor | None = None
    valid: Tensor | None = None


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
    if weight is None:
        count = torch.full((layout.channels,), layout.count, dtype=wide.dtype, device=wide.device)
        if layout.count == 0:
            nothing = wide.sum(layout.positions)  # 0, and on autograd's graph: other ranks wait for this one's backward
            return Statistics(count, nothing, nothing.clone()), wide
        mean = wide.mean(layout.positions)
        centred = wide - layout.line_up(mean)
        if given == wide.dtype:
            # The mean carries a rounding error, which input as wide as itself can show: take it out (Chan 1983).
            mean = mean + centred.mean(layout.positions)
            centred = wide - layout.line_up(mean)
        return Statistics(count, mean, (centred * centred).sum(layout.positions)), centred
    w = weight.to(wide.dtype)
    total = w.expand([1 if d == layout.dim else s for d, s in enumerate(wide.shape)]).sum()
    some = torch.where(total > 0, total, 1.0)
    kept = torch.where(w > 0, wide, 0)
    mean = (kept * w).sum(layout.positions) / some
    mean = mean + ((kept - layout.line_up(mean)) * w).sum(layout.positions) / some
    centred = kept - layout.line_up(mean)
    return Statistics(total.expand(layout.channels), mean, (centred * centred * w).sum(layout.positions)), centred


def normalize(operands: Operands, mean: Tensor, variance: Tensor, spec: Train) -> Tensor:
    """y = f(γ (x - μ) / sqrt(σ² + ε) + β + residual), 0 where not valid, computed in the statistics' dtype.

    Args:
        operands: What is normalised; y has the dtype and memory format of x.
        mean: μ, (C,); its dtype is the one computed in.
        variance: σ², (C,), biased where it comes from the batch itself.
        spec: The settings.
    """
    # Padding may hold NaN, and 0 * NaN is NaN in backward too.
    centred = _kept(operands, operands.x.to(mean.dtype)) - spec.layout.line_up(mean)
    return _finish(operands, centred, torch.rsqrt(variance + spec.eps), spec)


def _kept(operands: Operands, values: Tensor) -> Tensor:
    return values if operands.valid is None else torch.where(operands.valid, values, 0)


def _before_activation(operands: Operands, centred: Tensor, invstd: Tensor, spec: Train) -> Tensor:
    """γ z + β + residual."""
    _, weight, bias, residual, *_ = operands
    y = centred * spec.layout.line_up(invstd if weight is None else invstd * weight)
    if bias is not None:
        y = y + spec.layout.line_up(bias)
    return y if residual is None else y + _kept(operands, residual)


def _finish(operands: Operands, centred: Tensor, invstd: Tensor, spec: Train) -> Tensor:
    y = _before_activation(operands, centred, invstd, spec)
    if spec.activation is not None:
        y = spec.activation(y)
    return _kept(operands, y).to(operands.x.dtype)


def normalize_by(statistics: Statistics, operands: Operands, spec: Train) -> Tensor:
    """`normalize` by a batch's statistics, whose variance is the biased one."""
    biased = statistics.m2 * reciprocal_count(statistics, operands.position_weight, spec)
    return normalize(operands, statistics.mean, biased, spec)


def normalize_by_constants(mean: Tensor, variance: Tensor, operands: Operands, spec: Train) -> Tensor:
    """`normalize` by numbers that are no functions of x: in float64 where they or x are of that, else in float32."""
    # (Not `torch.promote_types`, which an exported program would hold as an operation.)
    dtype = torch.float64 if torch.float64 in (operands.x.dtype, mean.dtype) else torch.float32
    return normalize(operands, mean.to(dtype), variance.to(dtype), spec)


def train(operands: Operands, spec: Train) -> tuple[Tensor, Statistics]:
    """Measure the batch, normalize by that (biased variance): the training step's forward, differentiable."""
    x, position_weight, layout = operands.x, operands.position_weight, spec.layout
    wide = x.to(accumulator_dtype(x.device))
    statistics, centred = _measure(wide, position_weight, layout, x.dtype)
    if position_weight is not None:  # positions of weight 0 were left out of `centred`, yet they get their output
        centred = _kept(operands, wide) - layout.line_up(statistics.mean)
    invstd = torch.rsqrt(statistics.m2 * reciprocal_count(statistics, position_weight, spec) + spec.eps)
    return _finish(operands, centred, invstd, spec), statistics


def backward(
    grad_y: Tensor | None,
    grad_mean: Tensor | None,
    grad_m2: Tensor | None,
    operands: Operands,
    statistics: Statistics,
    spec: Train,
    over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Gradients:
    """The closed form of `train`'s first derivative (the formula is at the top of this file), recomputing from x.

    Where the statistics are those of several ranks, `over_ranks` adds up what each of them pulls at the statistics
    with; the gradients of weight and bias stay this rank's own, as those of any other parameter do.
    """
    x, weight, bias, residual, position_weight, _ = operands
    layout, wide = spec.layout, x.to(statistics.mean.dtype)
    centred = _kept(operands, wide) - layout.line_up(statistics.mean)
    per_count = reciprocal_count(statistics, position_weight, spec)
    invstd = torch.rsqrt(statistics.m2 * per_count + spec.eps)
    g = torch.zeros_like(wide) if grad_y is None else grad_y.to(wide.dtype)
    if spec.activation is not None:
        g = g * spec.activation.derivative(_before_activation(operands, centred, invstd, spec))
    g = _kept(operands, g)
    sum_g = g.sum(layout.positions)
    sum_gz = (g * centred).sum(layout.positions) * invstd
    pull_mean, pull_m2 = sum_g, sum_gz
    if over_ranks is not None:
        zero = torch.zeros_like(sum_g)
        to_moments = [zero if t is None else t for t in (grad_mean, grad_m2)]
        pull_mean, pull_m2, grad_mean, grad_m2 = over_ranks(torch.stack([sum_g, sum_gz, *to_moments])).unbind()
    if spec.constant:
        dx = g * layout.line_up(invstd if weight is None else invstd * weight)
    else:
        pull = centred * layout.line_up(pull_m2 * invstd * per_count) + layout.line_up(pull_mean * per_count)
        if position_weight is not None:
            pull = pull * position_weight
        dx = (g - pull) * layout.line_up(invstd if weight is None else invstd * weight)
    dx = dx + through_moments(grad_mean, grad_m2, centred, position_weight, per_count, layout)
    return Gradients(
        _kept(operands, dx).to(x.dtype),  # 0 where not valid, also where the sums are not finite
        None if weight is None else sum_gz.to(weight.dtype),
        None if bias is None else sum_g.to(bias.dtype),
        None if residual is None else g.to(residual.dtype),
    )


def through_moments(
    grad_mean: Tensor | None,
    grad_m2: Tensor | None,
    centred: Tensor,
    position_weight: Tensor | None,
    per_count: Tensor | float,
    layout: Layout,
) -> Tensor | float:
    """What the gradients of the returned statistics themselves add to dx: w (dL/dμ / n + 2 (x - μ) dL/dm2)."""
    if grad_mean is None and grad_m2 is None:
        return 0.0
    dx = torch.zeros_like(centred)
    if grad_mean is not None:
        dx = dx + layout.line_up(grad_mean * per_count)
    if grad_m2 is not None:
        dx = dx + centred * layout.line_up(2 * grad_m2)
    return dx if position_weight is None else dx * position_weight
