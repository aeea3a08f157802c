"""Commit on the CPU: `ops.commit` for buffers in memory, in one call instead of a dozen operations."""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false
# (Numba types its functions itself)

from functools import cache

import numpy as np
import torch
from numba import carray  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor

from steadynorm.ops.cpu.call import KINDS, Call, Kinds
from steadynorm.ops.cpu.kernel import Kernel
from steadynorm.ops.cpu.memory import array_at, narrow

__all__ = ["commit"]

_GREATEST = {torch.float32: torch.finfo(torch.float32).max, torch.float64: torch.finfo(torch.float64).max}


def _commit(pointer):  # pragma: no cover
    a = carray(pointer, 1)[0]
    channels = a.channels
    count = array_at(a.statistics, 3 * channels, np.float64(0))[:channels]
    means = array_at(a.statistics, 3 * channels, np.float64(0))[channels : 2 * channels]
    m2s = array_at(a.statistics, 3 * channels, np.float64(0))[2 * channels :]
    n = count[0] if channels > 0 else 0.0
    if n < 2:
        a.refused = 1 if a.weighted != 0 and n > 0 else 0
    else:
        fits = 0
        for c in range(channels):
            fits += (abs(means[c]) <= a.greatest) & (abs(m2s[c] / (n - 1)) <= a.greatest)
        a.refused = 0 if fits == channels else 1
        if a.refused == 0:
            mean = array_at(a.running_mean, channels, a.memory)
            var = array_at(a.running_var, channels, a.memory)
            tracked = array_at(a.tracked, 1, np.int64(0))
            share = a.momentum
            if share < 0:
                share = 1 / (tracked[0] + 1)
            kept = 1 - share
            for c in range(channels):
                mean[c] = narrow(a.memory, kept * mean[c] + share * means[c])
                var[c] = narrow(a.memory, kept * var[c] + share * (m2s[c] / (n - 1)))
            if a.tracked != 0:
                tracked[0] += 1
    if a.refused != 0 and a.rejected != 0:
        array_at(a.rejected, 1, np.int64(0))[0] += 1


_kernel = Kernel(_commit)


def commit(
    mean: Tensor,
    var: Tensor,
    tracked: Tensor | None,
    rejected: Tensor | None,
    table: Tensor,
    momentum: float | None,
    weighted: bool,
) -> bool:
    """Moves `mean` and `var` towards the statistics in `table` (3, C); whether they were refused. See `ops.commit`."""
    template, kinds = _template(mean.numel(), mean.dtype)
    call = Call.from_buffer_copy(template)
    call.statistics, call.running_mean, call.running_var = table.data_ptr(), mean.data_ptr(), var.data_ptr()
    if tracked is not None:
        call.tracked = tracked.data_ptr()
    if rejected is not None:
        call.rejected = rejected.data_ptr()
    if momentum is not None:
        call.momentum = momentum
    call.weighted = weighted
    _kernel(call, kinds, 1)
    if call.refused:
        return True
    if not mean.is_inference():
        torch._C._increment_version((mean, var))  # pyright: ignore
    return False


@cache
def _template(channels: int, dtype: torch.dtype) -> tuple[Call, Kinds]:
    return Call(channels=channels, momentum=-1.0, greatest=_GREATEST[dtype]), Kinds(KINDS[dtype])
