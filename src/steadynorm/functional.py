"""batch_norm: check the arguments, then measure, normalize and commit."""

import warnings

import torch
from torch import Tensor

from steadynorm.activations import ActivationLike, resolve
from steadynorm.errors import (
    ArgumentError,
    DeviceError,
    DtypeError,
    RejectedBatchWarning,
    ShapeError,
    SingleValueError,
)
from steadynorm.moments import Moments, checked_weight
from steadynorm.ops import autograd, reference
from steadynorm.ops.commit import commit
from steadynorm.ops.layout import Layout, align
from steadynorm.ops.reference import Statistics, Train

__all__ = ["batch_norm", "batch_norm_with_moments"]

_HALVES = (torch.float16, torch.bfloat16)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: ActivationLike = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    channel_dim: int = 1,
) -> Tensor:
    """Batch normalization, with `torch.nn.functional.batch_norm`'s positional arguments and meaning.

        y = f(γ (x - μ) / sqrt(σ² + ε) + β + residual)

    While training, μ and σ² are the batch's mean and biased variance per channel, and the running statistics (where
    given) are moved towards the batch's mean and unbiased variance, in place. Otherwise μ and σ² are the running ones.
    A batch whose statistics are not finite, or do not fit the buffers' dtype, leaves the running ones as they were.

    Args:
        input: x, (N, C, *), floating.
        running_mean: (C,), or None (then `training` must be true).
        running_var: (C,), or None.
        weight: γ, (C,), or None for 1.
        bias: β, (C,), or None for 0.
        training: Normalise by the batch's own statistics and commit them.
        momentum: The share of the new batch in the running statistics: r <- (1 - momentum) r + momentum m.
        eps: ε >= 0, added to the variance; with 0 a constant channel gives NaN.
        activation: f, by name or as a `torch.nn` module (see `steadynorm.activations`); None for the identity.
        residual: Added before the activation; x's shape.
        mask: Boolean, broadcastable to the positions (N, *) from the batch axis on. Where False the position takes no
            part in the statistics, its output is 0 and no gradient flows through it; x may hold NaN there.
        sample_weight: Weights >= 0, broadcastable likewise: how often each position counts in the statistics; every
            position gets its output. Weights are repetitions, so a batch whose weights sum to less than 2 has no usable
            unbiased variance and is not committed: scale them to a mean of 1. No gradient flows to them.
        channel_dim: The axis of the channels; -1 for channels last.

    Returns:
        y, in x's shape, dtype and memory format.

    Raises:
        SingleValueError: While training, every channel holds a single value.
        ShapeError, DtypeError, DeviceError: The tensors do not go together.
        WeightError: A sample weight is negative or not finite.

    Source:
        Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
        Shift" (2015).

    Example:
        >>> x = torch.tensor([[3.0], [5.0], [8.0], [9.0], [11.0], [24.0]])
        >>> y = batch_norm(x, None, None, training=True)
        >>> [round(v, 2) for v in y.flatten().tolist()]
        [-1.03, -0.74, -0.29, -0.15, 0.15, 2.06]
    """
    y, statistics = run(
        input, running_mean, running_var, weight, bias, training, eps, activation=activation, residual=residual,
        mask=mask, sample_weight=sample_weight, channel_dim=channel_dim, several_values=True,
    )  # fmt: skip
    if statistics is not None and running_mean is not None and running_var is not None:
        weighted = sample_weight is not None
        warn_if(commit(running_mean, running_var, statistics, momentum, weighted=weighted), "batch_norm")
    return y


def batch_norm_with_moments(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: ActivationLike = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    channel_dim: int = 1,
) -> tuple[Tensor, Moments]:
    """The training step without its side effect: normalises by the batch and returns the batch's Moments.

    Writes nothing, so it can be run under `torch.func` transforms, again by a checkpoint, or as often as one likes;
    what to remember, and when, is the caller's. A single value per channel is normalised to 0: y = f(β + residual).

    Args:
        input: x, (N, C, *), floating.
        weight: γ, (C,), or None for 1.
        bias: β, (C,), or None for 0.
        eps: ε >= 0, added to the biased variance; with 0 a constant channel gives NaN.
        activation: As in `batch_norm`.
        residual: As in `batch_norm`.
        mask: As in `batch_norm`.
        sample_weight: As in `batch_norm`.
        channel_dim: As in `batch_norm`.

    Returns:
        y, and the Moments of x; both are differentiable with respect to x.

    Raises:
        ShapeError, DtypeError, DeviceError, WeightError: As in `batch_norm`.

    Example:
        >>> y, m = batch_norm_with_moments(torch.tensor([[1.0], [3.0]]))
        >>> m.mean.item(), m.variance(unbiased=True).item()
        (2.0, 2.0)
    """
    y, statistics = run(
        input, None, None, weight, bias, True, eps, activation=activation, residual=residual, mask=mask,
        sample_weight=sample_weight, channel_dim=channel_dim,
    )  # fmt: skip
    assert statistics is not None  # noqa: S101 (training=True always measures)
    return y, Moments(*statistics)


def run(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    *,
    activation: ActivationLike,
    residual: Tensor | None,
    mask: Tensor | None,
    sample_weight: Tensor | None,
    channel_dim: int = 1,
    layout: Layout | None = None,
    several_values: bool = False,
) -> tuple[Tensor, Statistics | None]:
    """Checks, measures (while training) and normalizes; commits nothing, which is left to the caller.

    Returns:
        y, and the batch's statistics: None in evaluation.
    """
    if not x.is_floating_point():
        raise DtypeError(f"expected a floating-point input, got {x.dtype}. Convert it first, e.g. with x.float().")
    layout = layout or Layout.of(x, channel_dim)
    _check_fit(x, layout, running_mean, running_var, weight, bias, residual)
    if not eps >= 0:
        raise ArgumentError(f"eps must be >= 0, got {eps}.")
    spec = Train(layout, eps, resolve(activation))
    valid = None if mask is None else _checked_mask(mask, x, spec.layout)
    weights = None if sample_weight is None else checked_weight(sample_weight, x, spec.layout, "sample_weight")
    if not training:
        if running_mean is None or running_var is None:
            raise ArgumentError("evaluation needs running_mean and running_var; pass them, or training=True.")
        return _normalize_by_running(x, running_mean, running_var, weight, bias, residual, valid, spec), None
    if several_values:
        require_several_values(x, spec.layout)
    position_weight = valid
    if weights is not None:
        position_weight = weights if valid is None else torch.where(valid, weights, 0)
    return autograd.train(x, weight, bias, residual, position_weight, valid, spec)


def require_several_values(
    x: Tensor, layout: Layout, what: str = "batch_norm", ways_out: str = "switch to evaluation"
) -> None:
    """Refuses a training batch of one value per channel: its variance is 0 whatever it holds."""
    if layout.count == 1:
        raise SingleValueError(
            f"{what}: normalising by the batch needs more than one value per channel, got an input of shape "
            f"{tuple(x.shape)}. Use a larger batch (DataLoader(drop_last=True) drops a last batch of one), or "
            f"{ways_out}."
        )


def warn_if(refused: Tensor | bool, where: object) -> None:
    """Says that a batch was kept out of the running statistics, where that can be read without waiting for a device."""
    if refused is True:
        warnings.warn(
            f"{where}: a batch with non-finite statistics (or a variance too large for the buffer's dtype, or sample "
            "weights that sum to less than 2) was not committed: the running statistics stay as they were. Look for "
            "inf or NaN in the layer's input, and scale sample weights to a mean of 1.",
            RejectedBatchWarning,
            stacklevel=3,
        )


def _normalize_by_running(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    valid: Tensor | None,
    spec: Train,
) -> Tensor:
    # Elementwise with constants per channel: an example gets the same result alone as in any batch.
    dtype = torch.promote_types(torch.promote_types(x.dtype, mean.dtype), torch.float32)
    return reference.normalize(x, mean.to(dtype), variance.to(dtype), weight, bias, residual, valid, spec)


def _checked_mask(mask: Tensor, x: Tensor, layout: Layout) -> Tensor:
    if mask.dtype != torch.bool:
        raise DtypeError(f"mask must be boolean (True: take part), got {mask.dtype}. For weights use sample_weight=.")
    if mask.device != x.device:
        raise DeviceError(f"mask must be on the input's device {x.device}, got {mask.device}.")
    return align(mask, x, layout, "mask")


def _check_fit(
    x: Tensor,
    layout: Layout,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> None:
    """The boundary: every tensor must fit x, or an error says which does not."""
    if (running_mean is None) != (running_var is None):
        raise ArgumentError("running_mean and running_var belong together: pass both or neither.")
    per_channel = (("running_mean", running_mean), ("running_var", running_var), ("weight", weight), ("bias", bias))
    for name, t in per_channel:
        if t is None:
            continue
        if t.shape != (layout.channels,):
            raise ShapeError(
                f"{name} must have one value per channel, shape ({layout.channels},) for an input of shape "
                f"{tuple(x.shape)} with its channels in dimension {layout.dim}; got {tuple(t.shape)}."
            )
        if t.device != x.device:
            raise DeviceError(f"{name} must be on the input's device {x.device}, got {t.device}. Move one with .to().")
        if t.dtype != x.dtype and name in ("weight", "bias") and (x.dtype not in _HALVES or t.dtype != torch.float32):
            raise DtypeError(
                f"{name} must have the input's dtype {x.dtype} (or float32 beside a half-precision input), got "
                f"{t.dtype}. Convert the input or the layer with .to(dtype)."
            )
    if residual is not None:
        if residual.shape != x.shape:
            raise ShapeError(f"residual must have the input's shape {tuple(x.shape)}, got {tuple(residual.shape)}.")
        if residual.device != x.device:
            raise DeviceError(f"residual must be on the input's device {x.device}, got {residual.device}.")
        if not residual.is_floating_point():
            raise DtypeError(f"residual must be floating-point like the input ({x.dtype}), got {residual.dtype}.")
