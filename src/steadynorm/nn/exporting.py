"""What a layer that normalises by the batch becomes under `torch.export`: aten's batch norm, as torch.nn's own does.

A program is there for others: for quantizers that look for this very node, for runtimes that have a kernel of their own
for it. It computes what aten computes: statistics in aten's precision, remembered whether finite or not.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from steadynorm.nn.remembering import commit_now, never
from steadynorm.ops.commit import Running
from steadynorm.ops.layout import Layout
from steadynorm.ops.reference import Operands
from steadynorm.step import Settings, check_fit

if TYPE_CHECKING:
    from steadynorm.nn.base import BatchNorm

__all__ = ["aten_step"]

_HALVES = (torch.float16, torch.bfloat16)


def aten_step(
    layer: "BatchNorm", operands: Operands, running: Running | None, layout: Layout, settings: Settings
) -> Tensor | None:
    """A step by the batch, its commit included, as aten's batch norm, sum and activation.

    Args:
        layer: Whose step it is.
        operands: The tensors; of position weights and mask only whether there are any.
        running: The running statistics; None without any.
        layout: How x is read.
        settings: The step's.

    Returns:
        y, in x's dtype and shape; None where aten has no batch norm for it, and nothing has been done: the program then
        spells the step out.
    """
    x, weight, bias, residual, position_weight, valid = operands
    dtype = torch.float32 if x.dtype in _HALVES else x.dtype
    beyond_aten = (position_weight, valid, settings.group, settings.ghost_batch_size, settings.correct)
    if any(option is not None for option in beyond_aten) or layout.count < 2 or not settings.eps > 0:
        return None
    if running is not None and not _aten_writes(running, layer, dtype):
        return None
    mean, var, *_ = (None, None) if running is None else running
    check_fit(x, layout, mean, var, weight, bias, residual)
    if layer.remember is never:
        running = None
    # Beside half precision aten takes float32 alone.
    weight, bias = (t if t is None or t.dtype == dtype else t.to(dtype) for t in (weight, bias))
    y = x if layout.dim == 1 else x.movedim(layout.dim, 1)
    y = _batch_norm(y, running, weight, bias, layer.momentum, settings.eps)
    y = y if layout.dim == 1 else y.movedim(1, layout.dim)
    y = y if residual is None else y + residual
    y = y if settings.activation is None else settings.activation(y)
    return y if y.dtype == x.dtype else y.to(x.dtype)


def _aten_writes(running: Running, layer: "BatchNorm", dtype: torch.dtype) -> bool:
    """Whether what becomes of the statistics is for aten to do: it writes buffers of one dtype, or none."""
    counted = layer.momentum is not None or running.num_batches_tracked is not None
    return counted and running.mean.dtype == running.var.dtype == dtype and layer.remember in (commit_now, never)


def _batch_norm(
    x: Tensor, running: Running | None, weight: Tensor | None, bias: Tensor | None, momentum: float | None, eps: float
) -> Tensor:
    if running is None:
        return F.batch_norm(x, None, None, weight, bias, True, momentum or 0.0, eps)
    mean, var, tracked, _ = running
    if tracked is not None:
        tracked.add_(1)
    if momentum is not None or tracked is None:
        return F.batch_norm(x, mean, var, weight, bias, True, momentum or 0.0, eps)
    # aten takes a number, which a program cannot read off its counter: measure apart, then average.
    batch_mean, batch_var = torch.zeros_like(mean), torch.zeros_like(var)
    y = F.batch_norm(x, batch_mean, batch_var, weight, bias, True, 1.0, eps)
    share = tracked.to(mean.dtype).reciprocal()
    mean.lerp_(batch_mean, share)
    var.lerp_(batch_var, share)
    return y
