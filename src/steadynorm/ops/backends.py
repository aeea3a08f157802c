"""Which backend computes: the kernels of the device that the tensors are on, or else the reference.

A backend is a module with the functions of `reference` that take no part in any graph: `train`, `measure`,
`normalize_by`, `normalize_by_constants`, `backward`. It is chosen by what the tensors are, never by timing, so that the
same call gives the same bits each time.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from steadynorm.ops import reference
from steadynorm.ops.accelerator import has_kernels, kernels
from steadynorm.ops.layout import Layout
from steadynorm.ops.reference import Gradients, Operands, Statistics, Train

__all__ = [
    "Backend",
    "backend_for",
    "committing",
    "cpu_committing",
    "may_have_kernels",
    "only_reference",
    "readable",
    "reference_only",
]


class Backend(Protocol):
    """What each backend can do; see `reference` for the meaning."""

    def train(self, operands: Operands, spec: Train) -> tuple[Tensor, Statistics]: ...  # noqa: D102

    def measure(self, x: Tensor, weight: Tensor | None, layout: Layout) -> Statistics: ...  # noqa: D102

    def normalize_by(self, statistics: Statistics, operands: Operands, spec: Train) -> Tensor: ...  # noqa: D102

    def normalize_by_constants(  # noqa: D102
        self, mean: Tensor, variance: Tensor, operands: Operands, spec: Train
    ) -> Tensor: ...

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
_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
_STANDING_FOR_PLAIN = _PLAIN | {FakeTensor, FunctionalTensor}
_only_reference = False


@cache
def _cpu() -> Backend:
    from steadynorm.ops.cpu import backend  # on first use: it brings Numba

    return backend


def committing(device: str) -> ModuleType | None:
    """A kind of device's way to commit by a kernel, or None where torch's operations do it."""
    if device == "cpu":
        return cpu_committing()
    if kernels(device) is not None:
        from steadynorm.ops.gpu import committing

        return committing
    return None


@cache
def cpu_committing() -> ModuleType:
    """The CPU's way to commit."""
    from steadynorm.ops.cpu import committing

    return committing


def backend_for(operands: Operands) -> Backend:
    """The backend for these tensors."""
    x, _, _, residual, _, _ = operands
    if _only_reference or x.dtype not in _DTYPES or not x.numel():
        return reference
    if residual is not None and residual.dtype not in _DTYPES:
        return reference
    if torch._C._len_torch_dispatch_stack():  # pyright: ignore (a mode looks on, and cannot see what kernels do)
        return reference
    if not all(t is None or _is_memory(t) for t in operands):
        return reference
    return _cpu() if x.device.type == "cpu" else kernels(x.device.type) or reference


def _is_memory(t: Tensor) -> bool:
    return (
        type(t) in _PLAIN and t.layout is torch.strided and not t.is_neg() and not t._is_zerotensor()  # pyright: ignore
    )


def readable(gradient: Tensor) -> bool:
    """Whether an upstream gradient is memory: no subclass, no symbol of zeros, no batch that vmap runs over.

    Nor one whose memory holds the negated values, as the imaginary part of a conjugate does.
    """
    return _is_memory(gradient) and torch._C._has_storage(gradient)  # pyright: ignore


def may_have_kernels(operands: Operands) -> bool:
    """Whether tensors such as these, of whatever size, are for kernels once they have memory: asked while tracing."""
    x = operands.x
    if x.dtype not in _DTYPES or (x.device.type != "cpu" and not has_kernels(x.device.type)):
        return False
    return all(t is None or (type(t) in _STANDING_FOR_PLAIN and t.layout is torch.strided) for t in operands)


def only_reference() -> bool:
    """Whether a `reference_only` block is around."""
    return _only_reference


@contextmanager
def reference_only() -> Generator[None]:
    """Within this block the reference computes everything, in all threads: to tell whether a backend is at fault."""
    global _only_reference
    before, _only_reference = _only_reference, True
    try:
        yield
    finally:
        _only_reference = before
