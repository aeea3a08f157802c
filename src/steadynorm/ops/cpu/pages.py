"""Memory for large results, which is kept and used again.

The system zeroes each page that it hands out, and the C library gives large blocks back to it as soon as they are free.
A training step whose outputs are large would have all of its pages taken away and zeroed anew, which takes several
times as long as the batch norm that fills them. So a block whose tensor has died stays here for the next one, as on a
GPU. Blocks ask for pages of 2 MiB where the platform has them.
"""

import mmap
import os
import weakref
from collections import OrderedDict
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

__all__ = ["LIMIT_NAME", "Pool", "empty_like", "is_large"]

LIMIT_NAME: Final = "STEADYNORM_KEPT_MB"
"""The environment variable for the MiB of free blocks that are kept at most; unset, an eighth of memory; 0 for none."""

_LARGE: Final = 1 << 22  # bytes: below it the C library mostly has memory that was used before
_SHARE: Final = 8
_PAGE: Final = 4096
_CGROUP: Final = Path("/sys/fs/cgroup/memory.max")


class _Lent(weakref.ref[memoryview]):
    """Notices that a tensor over a block has died."""

    __slots__ = ("block",)
    block: mmap.mmap


class Pool:
    """Blocks of memory by size, lent to tensors.

    Tensors may die in any thread and at any moment, in the middle of these methods too: what is shared is changed by
    single operations of lists and dicts alone, and looked through in copies.

    Args:
        limit: How many bytes of free blocks are kept; what is beyond goes back to the system, the size least recently
            used first.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._free: OrderedDict[int, list[mmap.mmap]] = OrderedDict()
        self._lent: dict[int, _Lent] = {}

    def empty(self, size: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A dense tensor of any values."""
        count = size.numel()
        view = memoryview(self._block(_rounded(count * dtype.itemsize)))
        lent = _Lent(view, self._take_back)
        lent.block = view.obj  # pyright: ignore[reportAttributeAccessIssue]
        self._lent[id(lent)] = lent
        storage = torch.frombuffer(view, dtype=dtype, count=count).untyped_storage()
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, size, stride)

    def kept(self) -> int:
        """Bytes of free blocks."""
        return sum([size * len(blocks) for size, blocks in self._free.copy().items()])

    def _block(self, size: int) -> mmap.mmap:
        try:
            block = self._free[size].pop()
        except (KeyError, IndexError):
            block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with suppress(OSError):  # merely advice, and the system was built without
                    block.madvise(mmap.MADV_HUGEPAGE)
        return block

    def _take_back(self, lent: weakref.ref[memoryview]) -> None:
        block = self._lent.pop(id(lent)).block
        size = len(block)
        self._free.setdefault(size, []).append(block)
        self._free.move_to_end(size)
        while self.kept() > self.limit:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        for blocks in self._free.copy().values():
            try:
                blocks.pop(0)
            except IndexError:
                continue
            return


def _rounded(size: int) -> int:
    """Up to an eighth more, so that batches of about one size share their blocks."""
    step = max(_PAGE, 1 << (size.bit_length() - 4))
    return -(-size // step) * step


def _limit() -> int:
    named = os.environ.get(LIMIT_NAME, "")
    if named.isdecimal():
        return int(named) << 20
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if _CGROUP.is_file() and (text := _CGROUP.read_text().strip()).isdecimal():
        memory = min(memory, int(text))
    return memory // _SHARE


@cache
def _pool() -> Pool | None:
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return None
    limit = _limit()
    return Pool(limit) if limit else None


def is_large(x: Tensor) -> bool:
    """Whether a result like `x` gets memory that is kept."""
    return x.numel() * x.element_size() >= _LARGE


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`torch.empty_like(x, dtype=dtype)` of a dense tensor, in memory that is kept where x is large."""
    pool = _pool() if is_large(x) else None
    return torch.empty_like(x, dtype=dtype) if pool is None else pool.empty(x.shape, x.stride(), dtype or x.dtype)
