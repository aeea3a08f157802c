"""Memory for large results: pages of 2 MiB where the platform has them, since fresh pages are zeroed one by one."""

import ctypes
import sys
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

__all__ = ["empty_like", "is_large"]

_LARGE: Final = 1 << 22  # bytes: below it the allocator mostly has memory that was used before
_PAGE: Final = 1 << 21
_MADV_HUGEPAGE: Final = 14


@cache
def _madvise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise


def is_large(x: Tensor) -> bool:
    """Whether a result like `x` is worth asking for huge pages."""
    return x.numel() * x.element_size() >= _LARGE


def empty_like(x: Tensor) -> Tensor:
    """`torch.empty_like(x)`, in huge pages where it is large; merely advice, which the system need not follow."""
    fresh = torch.empty_like(x)
    size = fresh.numel() * fresh.element_size()
    if is_large(fresh):
        advise = _madvise()
        start = -(-fresh.data_ptr() // _PAGE) * _PAGE
        stop = (fresh.data_ptr() + size) // _PAGE * _PAGE
        if advise is not None and stop > start:
            advise(start, stop - start, _MADV_HUGEPAGE)
    return fresh
