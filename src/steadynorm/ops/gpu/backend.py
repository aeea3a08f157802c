"""The functions of `reference` on tensors of a GPU: what is launched, with what memory.

No value is read by the host, so that a CUDA graph can hold all of it.
"""

# What is fixed while a kernel is compiled is typed `constexpr`, and given as plain numbers.
# pyright: reportArgumentType=false, reportUnnecessaryComparison=false, reportAttributeAccessIssue=false
# pyright: reportMissingImports=false, reportIndexIssue=false

import copy
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from steadynorm.ops import reference
from steadynorm.ops.accelerator import writing_a_graph
from steadynorm.ops.backends import readable
from steadynorm.ops.gpu import gathering, resident, split
from steadynorm.ops.gpu.blocks import Blocks, cut
from steadynorm.ops.gpu.launching import launch, on_its_device, two_parts
from steadynorm.ops.layout import Layout
from steadynorm.ops.reference import Gradients, Operands, Statistics, Train

__all__ = ["backward", "measure", "normalize_by", "normalize_by_constants", "train"]


def _like(t: Tensor, x: Tensor) -> Tensor:
    """`t` behind the strides of `x`."""
    return t if t.stride() == x.stride() else torch.empty_like(x, dtype=t.dtype).copy_(t)


def _by_position(t: Tensor | None, x: Tensor, layout: Layout) -> Tensor | None:
    """A weight or mask, lined up with x, as (P,)."""
    if t is None:
        return None
    sizes = [1 if d == layout.dim else size for d, size in enumerate(x.shape)]
    flat = t.detach().expand(sizes).reshape(-1)
    return flat.view(torch.uint8) if flat.dtype == torch.bool else flat


class _Step:
    """One call: its operands as the kernels read them."""

    def __init__(self, operands: Operands, spec: Train) -> None:
        layout, given = spec.layout, operands.x.detach()
        self.given, self.spec, self.operands = given, spec, operands
        self.x, self.blocks = cut(given, layout)
        self.whole = self.blocks.resident
        residual = operands.residual
        self.residual = None if residual is None else _like(residual.detach(), self.x)
        self.gamma, self.beta = (None if t is None else t.detach().contiguous() for t in (operands[1], operands[2]))
        self.weight = _by_position(operands.position_weight, given, layout)
        self.valid = _by_position(operands.valid, given, layout)

    @cached_property
    def wide(self) -> Any:
        """The dtype that is computed in."""
        return tl.float64 if self.x.dtype == torch.float64 else tl.float32

    @cached_property
    def eps(self) -> tuple[float, float]:
        """ε, in two parts."""
        return two_parts(self.spec.eps)

    def options(self, blocks: Blocks) -> dict[str, Any]:
        """What a kernel that only measures is compiled for."""
        return {**blocks.constants, "WIDE": self.wide}

    def fused(self, blocks: Blocks) -> dict[str, Any]:
        """The same with the activation."""
        f = self.spec.activation
        a, b = (*(f.params if f is not None else ()), 0.0, 0.0)[:2]
        return {"a": a, "b": b, "NAME": "" if f is None else f.name, **self.options(blocks)}

    def new(self, *sizes: int) -> Tensor:
        """Memory for float64 numbers."""
        return self.x.new_empty(sizes, dtype=torch.float64)

    def returned(self, t: Tensor) -> Tensor:
        """`t` behind the strides that an elementwise function of the given x has."""
        return t if self.x is self.given else torch.empty_like(self.given, dtype=t.dtype).copy_(t)

    def forward(self) -> tuple[Tensor, Statistics]:
        """y, and the statistics."""
        cut = self.whole
        if cut is None:
            found = self.measure()
            return self.normalize(*found), found
        table, y = self.new(3, cut.channels), torch.empty_like(self.x)
        operands = (self.x, self.residual, self.gamma, self.beta, self.weight, self.valid, table, y)
        launch(resident.forward, cut.across, *operands, *cut.sizes, *self.eps, **self.fused(cut))
        return self.returned(y), Statistics(*table.unbind())

    def measure(self) -> Statistics:
        """The statistics."""
        cut = self.blocks
        partial = self.new(cut.parts, 3, cut.channels)
        operands = (self.x, self.weight, partial)
        launch(split.measure, cut.splitting, *operands, *cut.sizes, cut.steps, **self.options(cut))
        if cut.parts == 1:
            return Statistics(*partial[0].unbind())
        table = self.new(3, cut.channels)
        programs, size = cut.gathering
        launch(gathering.statistics, programs, partial, table, cut.channels, cut.parts, **size)
        return Statistics(*table.unbind())

    def normalize(self, count: Tensor | None, mean: Tensor, m2: Tensor) -> Tensor:
        """y by these statistics; m2 is the variance where there is no count."""
        cut, y = self.blocks, torch.empty_like(self.x)
        operands = (self.x, self.residual, self.gamma, self.beta, self.valid, count, mean, m2, y)
        launch(split.normalize, cut.elementwise, *operands, *cut.sizes, cut.runs, *self.eps, **self.fused(cut))
        return self.returned(y)

    def for_affine(self) -> list[Tensor | None]:
        """Memory for dL/dγ and dL/dβ, where they are there."""
        return [None if t is None else torch.empty_like(t) for t in (self.gamma, self.beta)]

    def at_once(self, grad_y: Tensor, given: Statistics, cut: Blocks) -> Gradients:
        """All gradients, where all positions of a channel fit on chip."""
        grad_x, (grad_gamma, grad_beta) = torch.empty_like(self.x), self.for_affine()
        to_residual = None if self.residual is None else torch.empty_like(self.residual)
        operands = (self.x, grad_y, self.residual, self.gamma, self.beta, self.weight, self.valid, *given)
        found = (grad_gamma, grad_beta, grad_x, to_residual)
        launch(resident.backward, cut.across, *operands, *found, *cut.sizes, *self.eps, **self.fused(cut))
        to_residual = None if to_residual is None else self.returned(to_residual)
        return Gradients(self.returned(grad_x), grad_gamma, grad_beta, to_residual)

    def sums(self, grad_y: Tensor, given: Statistics, to_residual: Tensor | None) -> tuple[Tensor, list[Tensor | None]]:
        """Σ g and Σ g z, (2, C), and dL/dγ and dL/dβ; writes dL/dresidual = g."""
        cut, affine = self.blocks, self.for_affine()
        partial, sums = self.new(cut.parts, 2, cut.channels), self.new(2, cut.channels)
        operands = (self.x, grad_y, self.residual, self.gamma, self.beta, self.valid, *given, partial, to_residual)
        launch(split.reduce, cut.splitting, *operands, *cut.sizes, cut.steps, *self.eps, **self.fused(cut))
        programs, size = cut.gathering
        launch(gathering.gradients, programs, partial, sums, *affine, cut.channels, cut.parts, **size)
        return sums, affine

    def gradient(
        self, g: Tensor, given: Statistics, sums: Tensor | None, moments: Tensor | None, to_residual: Tensor | None
    ) -> Tensor:
        """dL/dx from dL/dy; writes dL/dresidual. From the latter, of a step without its activation and residual."""
        cut, grad_x = self.blocks, torch.empty_like(self.x)
        operands = (self.x, g, self.residual, self.gamma, self.beta, self.weight, self.valid, *given)
        operands = (*operands, sums, moments, grad_x, to_residual)
        launch(split.gradient, cut.elementwise, *operands, *cut.sizes, cut.runs, *self.eps, **self.fused(cut))
        return self.returned(grad_x)

    def plain(self) -> "_Step":
        """The same step without its activation and residual."""
        found = copy.copy(self)
        found.spec, found.residual = self.spec._replace(activation=None), None
        return found


def measure(x: Tensor, weight: Tensor | None, layout: Layout) -> Statistics:
    """As `reference.measure`."""
    with on_its_device(x):
        return _Step(Operands(x, position_weight=weight), Train(layout, 0.0, None)).measure()


def train(operands: Operands, spec: Train) -> tuple[Tensor, Statistics]:
    """As `reference.train`."""
    with on_its_device(operands.x):
        return _Step(operands, spec).forward()


def normalize_by(statistics: Statistics, operands: Operands, spec: Train) -> Tensor:
    """As `reference.normalize_by`."""
    with on_its_device(operands.x):
        return _Step(operands, spec).normalize(*(t.contiguous() for t in statistics))


def normalize_by_constants(mean: Tensor, variance: Tensor, operands: Operands, spec: Train) -> Tensor:
    """As `reference.normalize_by_constants`: one launch, by the running statistics as they lie."""
    with on_its_device(operands.x):
        return _Step(operands, spec).normalize(None, mean.contiguous(), variance.contiguous())


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
    if grad_y is None or not (writing_a_graph() or readable(grad_y)):
        return reference.backward(grad_y, grad_mean, grad_m2, operands, statistics, spec, over_ranks)
    with on_its_device(operands.x):
        return _backward(grad_y, (grad_mean, grad_m2), operands, statistics, spec, over_ranks)


def _backward(
    grad_y: Tensor,
    grad_moments: tuple[Tensor | None, Tensor | None],
    operands: Operands,
    statistics: Statistics,
    spec: Train,
    over_ranks: Callable[[Tensor], Tensor] | None,
) -> Gradients:
    step = _Step(operands, spec)
    given, grad_y = Statistics(*(t.contiguous() for t in statistics)), _like(grad_y, step.x)
    by_moments = over_ranks is not None or any(t is not None for t in grad_moments)
    if step.whole is not None and not spec.constant and not by_moments:
        return step.at_once(grad_y, given, step.whole)
    to_residual = None if step.residual is None else torch.empty_like(step.residual)
    if spec.constant and step.gamma is None and step.beta is None and not by_moments:
        pulls, (grad_gamma, grad_beta) = None, (None, None)
    elif to_residual is not None and to_residual.dtype == step.x.dtype:  # in a narrower one it could not stand for g
        pulls, (grad_gamma, grad_beta) = step.sums(grad_y, given, to_residual)
        step, grad_y = step.plain(), to_residual
    else:
        pulls, (grad_gamma, grad_beta) = step.sums(grad_y, given, None)
    moments = None
    if by_moments and pulls is not None:
        zero = torch.zeros_like(given.mean, dtype=torch.float64)
        moments = torch.stack([zero if t is None else t.double() for t in grad_moments])
        if over_ranks is not None:
            pulls, moments = over_ranks(torch.cat([pulls, moments])).split(2)
    written = to_residual if step.residual is not None else None
    grad_x = step.gradient(grad_y, given, None if spec.constant else pulls, moments, written)
    return Gradients(grad_x, grad_gamma, grad_beta, None if to_residual is None else step.returned(to_residual))
