"""batch_norm: check the arguments, then measure, normalize and commit."""

from torch import Tensor

from steadynorm.activations import ActivationLike, resolve
from steadynorm.errors import ArgumentError
from steadynorm.moments import Moments
from steadynorm.ops.commit import Running, commit
from steadynorm.ops.groups import GroupLike, resolve_group
from steadynorm.step import Masked, Settings, layout_of, refuse_single_value, run, warn_if

__all__ = ["batch_norm", "batch_norm_with_moments"]


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
    masked: Masked = "zero",
    channel_dim: int = 1,
    process_group: GroupLike | None = None,
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
        masked: What a masked position gets: `"zero"`, or `"pass"` for x itself (and the gradient likewise).
        channel_dim: The axis of the channels; -1 for channels last.
        process_group: While training, take the statistics over the batches of all ranks of this group of
            `torch.distributed` (gloo on the CPU included); `"world"` for all ranks. Every rank must call this, one
            without data with an empty batch.

    Returns:
        y, in x's shape, dtype and memory format.

    Raises:
        SingleValueError: While training, every channel holds a single value (on one process; never over ranks).
        ArgumentError: momentum, eps or another option is out of range, or running statistics are missing.
        ShapeError, DtypeError, DeviceError: The tensors do not go together.
        WeightError: A sample weight is negative or not finite.
        DistributedError: A rank has gone; the message names it.

    Source:
        Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
        Shift" (2015).

    Example:
        >>> import torch
        >>> x = torch.tensor([[3.0], [5.0], [8.0], [9.0], [11.0], [24.0]])
        >>> y = batch_norm(x, None, None, training=True)
        >>> [round(v, 2) for v in y.flatten().tolist()]
        [-1.03, -0.74, -0.29, -0.15, 0.15, 2.06]
    """
    if not 0 <= momentum <= 1:
        raise ArgumentError(f"momentum must lie in [0, 1], the share of the new batch; got {momentum}.")
    layout = layout_of(input, channel_dim)
    group = resolve_group(process_group)
    if training and layout.count == 1 and group is None:
        refuse_single_value(input)
    settings = Settings(eps, resolve(activation), group, masked=masked)
    y, statistics = run(
        input, running_mean, running_var, weight, bias, training, residual, mask, sample_weight, layout, settings
    )
    if statistics is not None and running_mean is not None and running_var is not None:
        weighted = sample_weight is not None
        warn_if(commit(Running(running_mean, running_var), statistics, momentum, weighted=weighted), "batch_norm")
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
    masked: Masked = "zero",
    channel_dim: int = 1,
    process_group: GroupLike | None = None,
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
        masked: As in `batch_norm`.
        channel_dim: As in `batch_norm`.
        process_group: As in `batch_norm`; the Moments are then those of all ranks together.

    Returns:
        y, and the Moments of x; both are differentiable with respect to x.

    Raises:
        ArgumentError, ShapeError, DtypeError, DeviceError, WeightError, DistributedError: As in `batch_norm`.

    Example:
        >>> import torch
        >>> y, m = batch_norm_with_moments(torch.tensor([[1.0], [3.0]]))
        >>> m.mean.item(), m.variance(unbiased=True).item()
        (2.0, 2.0)
    """
    settings = Settings(eps, resolve(activation), resolve_group(process_group), masked=masked)
    layout = layout_of(input, channel_dim)
    y, statistics = run(input, None, None, weight, bias, True, residual, mask, sample_weight, layout, settings)
    assert statistics is not None  # noqa: S101 (training=True always measures)
    return y, Moments(*statistics)
