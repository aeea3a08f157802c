"""Which backend computes: the kernels of the device that the tensors are on, or else the reference.

A backend is a module with the functions of `reference` that take no part in any graph: `train`, `measure`,
`normalize_by`, `backward`. It is chosen by what the tensors are, never by timing, so that the same call gives the same
bits each time.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from steadynorm.ops import reference
from steadynorm.ops.layout import Layout
from steadynorm.ops.reference import Gradients, Operands, Statistics, Train

__all__ = ["Backend", "backend_for", "reference_only"]


class Backend(Protocol):
    """What each backend can do; see `reference` for the meaning."""

    def train(self, operands: Operands, spec: Train) -> tuple[Tensor, Statistics]: ...  # noqa: D102

    def measure(self, x: Tensor, weight: Tensor | None, layout: Layout) -> Statistics: ...  # noqa: D102

    def normalize_by(self, statistics: Statistics, operands: Operands, spec: Train) -> Tensor: ...  # noqa: D102

    def backward(  # noqa: D102
        self,
        grad_y: Tensor | None,
        grad_mean: Tensor | None,
        grad_m2: Tensor | None,
        operands: Operands,
        statistics: Statistics,
        spec: Train,
        over_ranks: Callable[[Tensor], Tensor] | None = None,
    ) -> Gradients: ...


_PLAIN = frozenset({Tensor, torch.nn.Parameter})  # a subclass, or a fake, may have no memory to read
_CPU_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
_only_reference = False


@cache
def _cpu() -> Backend:
    from steadynorm.ops.cpu import backend  # on first use: it brings Numba

    return backend


def backend_for(operands: Operands) -> Backend:
    """The backend for these tensors."""
    x, _, _, residual, _, _ = operands
    if _only_reference or x.device.type != "cpu" or x.dtype not in _CPU_DTYPES or not x.numel():
        return reference
    if residual is not None and residual.dtype not in _CPU_DTYPES:
        return reference
    for t in operands:
        if t is not None and (type(t) not in _PLAIN or t.layout is not torch.strided):
            return reference
    return _cpu()


@contextmanager
def reference_only() -> Generator[None]:
    """Within this block the reference computes everything, in all threads: to tell whether a backend is at fault."""
    global _only_reference
    before, _only_reference = _only_reference, True
    try:
        yield
    finally:
        _only_reference = before
