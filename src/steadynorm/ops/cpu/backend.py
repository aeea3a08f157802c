"""Batch norm on the CPU: the reference backend's functions by kernels. Same arguments, same results to rounding."""

import ctypes
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Final, NamedTuple

import torch
from torch import Tensor

from steadynorm.activations import Activation
from steadynorm.ops import reference
from steadynorm.ops.backends import readable
from steadynorm.ops.cpu import column_kernels, plane_kernels
from steadynorm.ops.cpu.call import BENT, KINDS, RELU, SMOOTH, Call, Kinds
from steadynorm.ops.cpu.geometry import Geometry, dense, geometry, positions
from steadynorm.ops.cpu.kernel import Kernel, openmp, threads_for
from steadynorm.ops.cpu.memory import PHASES, THREADS
from steadynorm.ops.cpu.pages import empty_like
from steadynorm.ops.layout import Layout
from steadynorm.ops.reference import Gradients, Operands, Statistics, Train
from steadynorm.ops.tables import as_table

__all__ = [
    "backward",
    "backward_of",
    "computing_dtype",
    "forward_of",
    "measure",
    "normalize_by",
    "partial_size",
    "plan_for",
    "train",
    "way_of",
]

_UNCAPPED: Final = float("nan")
_COUNTERS: Final = 8 * (PHASES * THREADS + 1)
_FREQUENT: Final = (torch.float32, torch.bfloat16)


class Plan(NamedTuple):
    """What follows from shapes, dtypes and settings alone: how memory is read, what is compiled, and the numbers.

    Attributes:
        geometry: How x is read.
        kinds: What kernels are compiled for.
        threads: How many run.
        template: The struct with everything filled in but addresses and the count.
        at_once: Whether the phases of a step in parts can be one kernel's: its threads can wait for one another.
    """

    geometry: Geometry
    kinds: Kinds
    threads: int
    template: Call
    at_once: bool


def plan_for(operands: Operands, spec: Train) -> Plan:
    """How a step is computed. x must be dense, the residual in its dtype or the one that computes."""
    x, _, _, residual, position_weight, valid = operands
    dtypes = (
        x.dtype,
        None if residual is None else residual.dtype,
        None if position_weight is None else computing_dtype(x),
    )
    return _plan(x.shape, x.stride(), dtypes, valid is not None, spec._replace(group=None), threads_for(x.numel()))


def computing_dtype(x: Tensor) -> torch.dtype:
    """What kernels compute in: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@lru_cache(1024)
def _plan(
    shape: torch.Size,
    strides: tuple[int, ...],
    dtypes: tuple[torch.dtype | None, ...],
    masked: bool,
    spec: Train,
    threads: int,
) -> Plan:
    x = torch.empty_strided(shape, strides, dtype=dtypes[0], device="meta")
    memory, added, weights = ("" if dtype is None else KINDS[dtype] for dtype in dtypes)
    weighted = bool(weights) or masked
    read = geometry(x, spec.layout, threads, weighted)
    activation, numbers = way_of(spec.activation, x.dtype, weighted)
    template = Call(
        outer=read.outer,
        channels=spec.layout.channels,
        inner=read.inner,
        parts=read.parts,
        width=read.width,
        chunk=read.chunk,
        eps=spec.eps,
        count=spec.layout.count,
        **numbers,
    )
    at_once = threads == 1 or openmp() is not None
    return Plan(read, Kinds(memory, added, weights, "uint8" if masked else "", activation), threads, template, at_once)


def way_of(activation: Activation | None, dtype: torch.dtype, weighted: bool) -> tuple[str, dict[str, float]]:
    """How a kernel computes an activation: the kind it is compiled for, and its numbers.

    None and ReLU have kernels of their own only where they are frequent: it takes seconds to compile one.
    """
    frequent = dtype in _FREQUENT and not weighted
    if activation is None:
        return ("", {}) if frequent else (BENT, {"slope": 1.0, "cap": _UNCAPPED})
    match activation.name:
        case "relu":
            return (RELU, {}) if frequent else (BENT, {"slope": 0.0, "cap": _UNCAPPED})
        case "leaky_relu":
            return BENT, {"slope": activation.params[0], "cap": _UNCAPPED}
        case "relu6":
            return BENT, {"slope": 0.0, "cap": 6.0}
        case _:
            from steadynorm.ops.cpu.smooth import code_of

            code, p, q = code_of(activation)
            return SMOOTH, {"code": code, "p": p, "q": q}


def kernels_of(read: Geometry) -> ModuleType:
    """The module of kernels that read memory like this."""
    return column_kernels if read.columns else plane_kernels


def forward_of(read: Geometry) -> Kernel:
    """The kernel of a whole forward."""
    return kernels_of(read).forward if read.parts == 1 else kernels_of(read).forward_in_parts


def backward_of(read: Geometry) -> Kernel:
    """The kernel of a whole backward."""
    return kernels_of(read).backward if read.parts == 1 else kernels_of(read).backward_in_parts


def partial_size(read: Geometry, spec: Train, at_once: bool) -> int:
    """How many numbers a task leaves for another one; none where a task does all there is to a channel."""
    return 0 if at_once and read.parts == 1 else (2 * read.parts + 1) * spec.layout.channels


class _Step:
    """One step's operands as kernels want them, and the struct that says where they are."""

    def __init__(self, operands: Operands, spec: Train) -> None:
        x, weight, bias, residual, position_weight, valid = operands
        if not dense(x):
            x = x.clone()
        self.x, self.spec = x, spec
        self.weight, self.bias = (None if t is None else _readable_by_channel(t, x) for t in (weight, bias))
        self.residual = None if residual is None else like(addend(residual, x), x)
        self.plan = plan_for(operands._replace(x=x, residual=self.residual), spec)
        order, dim = self.plan.geometry.order, spec.layout.dim
        self.call = call = Call.from_buffer_copy(self.plan.template)
        call.x = x.data_ptr()
        if self.weight is not None:
            call.weight = self.weight.data_ptr()
        if self.bias is not None:
            call.bias = self.bias.data_ptr()
        if self.residual is not None:
            call.residual = self.residual.data_ptr()
        if position_weight is not None:
            wide = positions(position_weight, x, order, dim, torch.float64)
            call.count = wide.sum().item()
            self.position_weight = wide.to(computing_dtype(x))
            call.position_weight = self.position_weight.data_ptr()
        if valid is not None:
            self.valid = positions(valid, x, order, dim, torch.bool)
            call.valid = self.valid.data_ptr()

    def run(self, kernel: Kernel, tasks: int) -> None:
        ctypes.memset(ctypes.addressof(self.call), 0, _COUNTERS)
        self.call.tasks = tasks
        kernel(self.call, self.plan.kinds, self.plan.threads)

    def gather(self, kernel: Kernel) -> None:
        """Adds up the parts of each channel."""
        ctypes.memset(ctypes.addressof(self.call), 0, _COUNTERS)
        channels, kinds = self.spec.layout.channels, self.plan.kinds
        self.call.tasks = channels
        kernel(self.call, kinds, threads_for(2 * channels * self.call.parts))

    def measure(self, table: Tensor) -> None:
        """Writes the statistics to `table`."""
        read = self.plan.geometry
        partial = torch.empty(partial_size(read, self.spec, at_once=False), dtype=torch.float64, device="cpu")
        self.call.partial, self.call.statistics = partial.data_ptr(), table.data_ptr()
        self.run(kernels_of(read).measure, read.chunks * read.parts)
        self.gather(plane_kernels.gathered_statistics)

    def normalize(self, table: Tensor) -> Tensor:
        """y by the statistics in `table`."""
        read, y = self.plan.geometry, empty_like(self.x)
        self.call.statistics, self.call.y = table.data_ptr(), y.data_ptr()
        self.run(kernels_of(read).normalize, read.chunks * read.parts)
        return y

    def forward(self, table: Tensor) -> Tensor:
        """Both."""
        read = self.plan.geometry
        if read.parts > 1 and not self.plan.at_once:
            self.measure(table)
            return self.normalize(table)
        y = empty_like(self.x)
        self.call.statistics, self.call.y = table.data_ptr(), y.data_ptr()
        partial = torch.empty(partial_size(read, self.spec, at_once=True), dtype=torch.float64, device="cpu")
        self.call.partial = partial.data_ptr()
        self.run(forward_of(read), read.chunks * read.parts)
        return y


def like(t: Tensor, x: Tensor) -> Tensor:
    """`t` behind the strides of `x`, with which a kernel reads them side by side."""
    if t.stride() == x.stride():
        return t
    return torch.empty_like(x, dtype=t.dtype).copy_(t)


def addend(residual: Tensor, x: Tensor) -> Tensor:
    """`residual` in a dtype that kernels read beside x: the same, or the one that computes, to which it is rounded."""
    return residual if residual.dtype == x.dtype else residual.to(computing_dtype(x))


def _readable_by_channel(t: Tensor, x: Tensor) -> Tensor:
    """γ or β as kernels read them."""
    return t.detach().to(computing_dtype(x)).contiguous()


def measure(x: Tensor, weight: Tensor | None, layout: Layout) -> Statistics:
    """As `reference.measure`."""
    table = torch.empty((3, layout.channels), dtype=torch.float64, device="cpu")
    _Step(Operands(x, position_weight=weight), Train(layout, 0.0, None)).measure(table)
    return Statistics(*table.unbind())


def train(operands: Operands, spec: Train) -> tuple[Tensor, Statistics]:
    """As `reference.train`."""
    table = torch.empty((3, spec.layout.channels), dtype=torch.float64, device="cpu")
    y = _Step(operands, spec).forward(table)
    return y, Statistics(*table.unbind())


def normalize_by(statistics: Statistics, operands: Operands, spec: Train) -> Tensor:
    """As `reference.normalize_by`."""
    return _Step(operands, spec).normalize(as_table(statistics))


def normalize_by_constants(mean: Tensor, variance: Tensor, operands: Operands, spec: Train) -> Tensor:
    """As `reference.normalize_by_constants`."""
    table = torch.stack([torch.ones_like(mean), mean, variance]).double()
    return _Step(operands, spec).normalize(table)


def backward(
    grad_y: Tensor | None,
    grad_mean: Tensor | None,
    grad_m2: Tensor | None,
    operands: Operands,
    statistics: Statistics,
    spec: Train,
    over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Gradients:
    """As `reference.backward`."""
    if grad_y is None or not readable(grad_y):
        return reference.backward(grad_y, grad_mean, grad_m2, operands, statistics, spec, over_ranks)
    step = _Step(operands, spec)
    read, call, channels = step.plan.geometry, step.call, spec.layout.channels
    table = as_table(statistics)
    grad_y = like(grad_y.to(step.x.dtype), step.x)
    grad_x = empty_like(step.x)
    sums = torch.empty((2, channels), dtype=torch.float64, device="cpu")
    call.statistics, call.sums = table.data_ptr(), sums.data_ptr()
    call.grad_y, call.grad_x = grad_y.data_ptr(), grad_x.data_ptr()
    grad_weight = None if step.weight is None else torch.empty_like(step.weight)
    grad_bias = None if step.bias is None else torch.empty_like(step.bias)
    grad_residual = None if step.residual is None else empty_like(step.residual)
    if grad_weight is not None:
        call.grad_weight = grad_weight.data_ptr()
    if grad_bias is not None:
        call.grad_bias = grad_bias.data_ptr()
    if grad_residual is not None:
        call.grad_residual = grad_residual.data_ptr()
    kernels = kernels_of(read)
    at_once = over_ranks is None and not spec.constant and (read.parts == 1 or step.plan.at_once)
    partial = torch.empty(partial_size(read, spec, at_once), dtype=torch.float64, device="cpu")
    call.partial = partial.data_ptr()
    if at_once:
        step.run(backward_of(read), read.chunks * read.parts)
    else:
        step.run(kernels.reduce, read.chunks * read.parts)
        step.gather(plane_kernels.gathered_gradients)
        if spec.constant:
            call.sums = 0  # nothing pulls at constants
        elif over_ranks is not None:
            sums, grad_mean, grad_m2 = _summed(over_ranks, sums, grad_mean, grad_m2, statistics, spec)
            call.sums = sums.data_ptr()
        step.run(kernels.gradient, read.chunks * read.parts)
    if grad_mean is not None or grad_m2 is not None:  # rare enough for a pass of its own
        grad_x += _through_moments(grad_mean, grad_m2, operands, statistics, spec)
    return Gradients(
        grad_x,
        None if grad_weight is None or operands.weight is None else grad_weight.to(operands.weight.dtype),
        None if grad_bias is None or operands.bias is None else grad_bias.to(operands.bias.dtype),
        None if grad_residual is None or operands.residual is None else grad_residual.to(operands.residual.dtype),
    )


def _through_moments(
    grad_mean: Tensor | None, grad_m2: Tensor | None, operands: Operands, statistics: Statistics, spec: Train
) -> Tensor | float:
    x, position_weight, layout = operands.x, operands.position_weight, spec.layout
    if position_weight is not None:  # where it is 0, x may hold anything
        x = torch.where(position_weight > 0, x, 0)
    centred = x.double() - layout.line_up(statistics.mean)
    per_count = reference.reciprocal_count(statistics, position_weight, spec)
    return reference.through_moments(grad_mean, grad_m2, centred, position_weight, per_count, layout)


def _summed(
    over_ranks: Callable[[Tensor], Tensor],
    sums: Tensor,
    grad_mean: Tensor | None,
    grad_m2: Tensor | None,
    statistics: Statistics,
    spec: Train,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Σ g, Σ g (x - μ), dL/dμ and dL/dm2 over all ranks, which may run other backends: those exchange Σ g z."""
    variance = statistics.m2 / torch.where(statistics.count > 0, statistics.count, 1.0)
    std = torch.sqrt(variance + spec.eps)
    zero = torch.zeros_like(sums[0])
    own = [sums[0], sums[1] / std, *(zero if t is None else t for t in (grad_mean, grad_m2))]
    pull_mean, pull_m2, grad_mean, grad_m2 = over_ranks(torch.stack(own)).unbind()
    sums = torch.stack([pull_mean, pull_m2 * std])
    return sums, grad_mean if grad_mean.any() else None, grad_m2 if grad_m2.any() else None
