"""Statistics as one tensor, as kernels read and write them."""

import torch
from torch import Tensor

from steadynorm.ops.reference import Statistics

__all__ = ["as_table"]


def as_table(statistics: Statistics) -> Tensor:
    """Count, mean and m2, (3, C) of float64: without a copy where they are the rows of such a table, one by one."""
    count, mean, m2 = statistics
    if type(count) is not Tensor:  # it stands for one: there is no memory to be read
        return torch.stack([count.double(), mean.double(), m2.double()])
    channels, start, memory = count.numel(), count.storage_offset(), count.untyped_storage().data_ptr()
    if all(
        type(t) is Tensor
        and t.dtype == torch.float64
        and t.is_contiguous()
        and t.storage_offset() == start + row * channels
        and t.untyped_storage().data_ptr() == memory
        for row, t in enumerate(statistics)
    ):
        return count.detach().as_strided((3, channels), (channels, 1))
    return torch.stack([count.double(), mean.double(), m2.double()])
