"""The step under `batch_norm` and the layers: check the arguments, measure, normalize; committing is the caller's."""

import warnings
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from steadynorm.activations import Activation
from steadynorm.errors import (
    ArgumentError,
    DeviceError,
    DtypeError,
    RejectedBatchWarning,
    ShapeError,
    SingleValueError,
)
from steadynorm.moments import checked_weight
from steadynorm.ops import autograd, ghost
from steadynorm.ops.autograd import Correction
from steadynorm.ops.layout import Layout, align
from steadynorm.ops.reference import Operands, Statistics, Train

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Masked", "Settings", "check_fit", "layout_of", "refuse_single_value", "run", "warn_if"]

Masked = Literal["zero", "pass"]
_HALVES = (torch.float16, torch.bfloat16)


class Settings(NamedTuple):
    """What a step does besides the plain one.

    Attributes:
        eps: ε, added to the variance.
        activation: f, or None.
        group: The ranks whose batches count as one; None for this process alone.
        ghost_batch_size: Examples per chunk that is normalised by its own statistics; None for the batch as a whole.
        masked: What a masked position gets: `"zero"`, or `"pass"` for its input.
        correct: What makes another weight and bias of the batch's statistics (batch renorm); None for neither.
    """

    eps: float
    activation: Activation | None = None
    group: "ProcessGroup | None" = None
    ghost_batch_size: int | None = None
    masked: Masked = "zero"
    correct: Correction | None = None


def layout_of(x: Tensor, channel_dim: int) -> Layout:
    """Which axes of a floating-point input are which."""
    if not x.is_floating_point():
        raise DtypeError(f"expected a floating-point input, got {x.dtype}. Convert it first, e.g. with x.float().")
    return Layout.of(x, channel_dim)


def run(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    residual: Tensor | None,
    mask: Tensor | None,
    sample_weight: Tensor | None,
    layout: Layout,
    settings: Settings,
) -> tuple[Tensor, Statistics | None]:
    """Checks, measures (while training) and normalizes; commits nothing, which is left to the caller.

    Returns:
        y, and the batch's statistics (of all its chunks and ranks): None in evaluation.
    """
    check_fit(x, layout, running_mean, running_var, weight, bias, residual)
    if not settings.eps >= 0:
        raise ArgumentError(f"eps must be >= 0, got {settings.eps}.")
    if settings.masked not in get_args(Masked):
        raise ArgumentError(f"masked must be one of {get_args(Masked)}, got {settings.masked!r}.")
    spec = Train(layout, settings.eps, settings.activation, settings.group)
    valid = None if mask is None else _checked_mask(mask, x, layout)
    weights = None if sample_weight is None else checked_weight(sample_weight, x, layout, "sample_weight")
    statistics = None
    if not training:
        if running_mean is None or running_var is None:
            raise ArgumentError("evaluation needs running_mean and running_var; pass them, or training=True.")
        operands = Operands(x, weight, bias, residual, None, valid)
        y = autograd.normalize_by_constants(operands, running_mean, running_var, spec)
    else:
        position_weight = valid
        if weights is not None:
            position_weight = weights if valid is None else torch.where(valid, weights, 0)
        operands = Operands(x, weight, bias, residual, position_weight, valid)
        if settings.ghost_batch_size is None:
            y, statistics = autograd.train(operands, spec, settings.correct)
        else:
            y, statistics = ghost.train(operands, spec, settings.correct, settings.ghost_batch_size)
    if valid is not None and settings.masked == "pass":
        y = torch.where(valid, y, x)
    return y, statistics


def refuse_single_value(x: Tensor, what: str = "batch_norm", ways_out: str = "switch to evaluation") -> None:
    """Refuses a training batch of one value per channel: its variance is 0 whatever it holds."""
    raise SingleValueError(
        f"{what}: normalising by the batch needs more than one value per channel, got an input of shape "
        f"{tuple(x.shape)}. Use a larger batch (DataLoader(drop_last=True) drops a last batch of one), or "
        f"{ways_out}."
    )


def warn_if(refused: Tensor | bool, where: object, stacklevel: int = 3) -> None:
    """Says that a batch was kept out of the running statistics, where that can be read without waiting for a device."""
    if refused is True:
        warnings.warn(
            f"{where}: a batch with non-finite statistics (or a variance too large for the buffer's dtype, or sample "
            "weights that sum to less than 2) was not committed: the running statistics stay as they were. Look for "
            "inf or NaN in the layer's input, and scale sample weights to a mean of 1.",
            RejectedBatchWarning,
            stacklevel=stacklevel,
        )


def _checked_mask(mask: Tensor, x: Tensor, layout: Layout) -> Tensor:
    if not isinstance(mask, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError(f"mask must be a boolean tensor, got {type(mask).__name__}. Use torch.as_tensor.")
    if mask.dtype != torch.bool:
        raise DtypeError(f"mask must be boolean (True: take part), got {mask.dtype}. For weights use sample_weight=.")
    if mask.device != x.device:
        raise DeviceError(f"mask must be on the input's device {x.device}, got {mask.device}.")
    return align(mask, x, layout, "mask")


def check_fit(
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
