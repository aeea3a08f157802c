"""Which buffers a kernel can commit to."""

import torch
from torch import Tensor

__all__ = ["committable"]

_DTYPES = frozenset({torch.float32, torch.float64})


def committable(
    mean: Tensor,
    var: Tensor,
    tracked: Tensor | None,
    rejected: Tensor | None,
    table: Tensor,
    momentum: float | None,
) -> bool:
    """Whether buffers and statistics are memory of one device, which a kernel can write and read.

    Args:
        mean, var, tracked, rejected, momentum: As in `commit.commit`.
        table: Statistics (3, C), or one of its rows.
    """
    device = mean.device
    return (
        (tracked is not None if momentum is None else momentum >= 0)
        and mean.dtype in _DTYPES
        and mean.dtype == var.dtype
        and type(mean) is Tensor
        and type(var) is Tensor
        and var.device == device
        and table.device == device
        and mean.numel() == var.numel() == table.shape[-1]
        and mean.is_contiguous()
        and var.is_contiguous()
        and not (mean.is_neg() or var.is_neg())
        and (torch.is_inference_mode_enabled() or not (mean.is_inference() or var.is_inference()))
        and (tracked is None or _is_counter(tracked, device))
        and (rejected is None or _is_counter(rejected, device))
    )


def _is_counter(t: Tensor, device: torch.device) -> bool:
    return t.dtype == torch.int64 and t.device == device and t.numel() == 1 and type(t) is Tensor
