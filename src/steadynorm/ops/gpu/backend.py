"""The functions of `reference` on tensors of a GPU: what is launched, on which blocks, with what memory.

No value is read by the host, and nothing depends on timing: blocks follow from the shape alone.
"""

# What is fixed while a kernel is compiled is typed `constexpr`, and given as plain numbers.
# pyright: reportArgumentType=false, reportUnnecessaryComparison=false, reportAttributeAccessIssue=false
# pyright: reportMissingImports=false, reportIndexIssue=false

from collections.abc import Callable
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from steadynorm.ops import reference
from steadynorm.ops.gpu import resident, split
from steadynorm.ops.layout import Layout
from steadynorm.ops.reference import Gradients, Operands, Statistics, Train

__all__ = ["backward", "measure", "normalize_by", "train"]

_TILE = 2048  # values per program and step
_LONGEST = 128  # positions of a tile of columns: more would be too many for one sum in float32
_RESIDENT = 8192  # values of one channel, or of a block of channels, that a program keeps on chip
_PARTS = 256  # as many programs as can share a channel; a second kernel gathers what they found
_GATHERED = 128  # channels per program of such a kernel


def _blocks(n: int, block: int) -> int:
    """How many blocks hold n."""
    return -(-n // block)


def _power_of_two(n: int) -> int:
    """The least one that is not below n."""
    return 1 << max(0, n - 1).bit_length()


class _Blocks(NamedTuple):
    """How a tensor of P positions (S of them adjacent) and C channels is cut up."""

    positions: int
    adjacent: int
    channels: int
    columns: bool
    block_p: int
    block_c: int

    @property
    def across(self) -> int:
        """Blocks of channels."""
        return _blocks(self.channels, self.block_c)

    @property
    def along(self) -> int:
        """Blocks of positions."""
        return _blocks(self.positions, self.block_p)

    @property
    def steps(self) -> int:
        """Blocks of positions that one program of a splitting kernel goes through."""
        return max(1, _blocks(self.along, _PARTS))

    @property
    def parts(self) -> int:
        """Programs that share a channel."""
        return _blocks(self.along, self.steps)


def _cut(x: Tensor, layout: Layout) -> tuple[Tensor, _Blocks]:
    """`x`, dense in one of the two layouts, and its blocks."""
    columns = x.movedim(layout.dim, -1).is_contiguous() and not x.is_contiguous()
    if not columns:
        x = x.contiguous()
    adjacent = prod(x.shape[layout.dim + 1 :])
    columns = columns or adjacent == 1
    block_c = min(64, _power_of_two(layout.channels)) if columns else 1
    longest = min(_TILE // block_c, _LONGEST) if columns else _TILE
    block_p = min(longest, max(16, _power_of_two(layout.count)))
    return x, _Blocks(layout.count, adjacent, layout.channels, columns, block_p, block_c)


def _like(t: Tensor, x: Tensor) -> Tensor:
    """`t` behind the strides of `x`."""
    return t if t.stride() == x.stride() else torch.empty_like(x, dtype=t.dtype).copy_(t)


def _by_position(t: Tensor | None, x: Tensor, layout: Layout) -> Tensor | None:
    """A weight or mask, lined up with x, as (P,)."""
    if t is None:
        return None
    sizes = [1 if d == layout.dim else size for d, size in enumerate(x.shape)]
    return t.detach().expand(sizes).reshape(-1)


def _fits(read: _Blocks) -> int:
    """The power of two that holds all positions, where a program can keep them on chip; else 0."""
    whole = max(16, _power_of_two(read.positions))
    longest = min(_LONGEST, _RESIDENT // read.block_c) if read.columns else _RESIDENT
    return whole if whole <= longest else 0


class _Step:
    """One call: its operands as the kernels read them."""

    def __init__(self, operands: Operands, spec: Train) -> None:
        layout, given = spec.layout, operands.x.detach()
        self.given, self.spec = given, spec
        self.x, self.blocks = _cut(given, layout)
        residual = operands.residual
        self.residual = None if residual is None else _like(residual.detach(), self.x)
        self.gamma, self.beta = (None if t is None else t.detach().contiguous() for t in (operands[1], operands[2]))
        self.weight = _by_position(operands.position_weight, given, layout)
        valid = _by_position(operands.valid, given, layout)
        self.valid = None if valid is None else valid.to(torch.uint8)

    @cached_property
    def sizes(self) -> tuple[int, int, int]:
        """P, S and C."""
        return self.blocks[:3]

    @cached_property
    def common(self) -> dict[str, Any]:
        """What every kernel over tiles is compiled for."""
        wide: Any = tl.float64 if self.x.dtype == torch.float64 else tl.float32
        read = self.blocks
        return {"COLUMNS": read.columns, "BLOCK_P": read.block_p, "BLOCK_C": read.block_c, "WIDE": wide}

    @cached_property
    def fused(self) -> dict[str, Any]:
        """The activation, and `common`."""
        f = self.spec.activation
        a, b = (*(f.params if f is not None else ()), 0.0, 0.0)[:2]
        return {"eps": self.spec.eps, "a": a, "b": b, "NAME": "" if f is None else f.name, **self.common}

    def new(self, *sizes: int) -> Tensor:
        """Memory for float64 numbers."""
        return self.x.new_empty(sizes, dtype=torch.float64)

    def forward(self) -> tuple[Tensor, Tensor]:
        """y, and the statistics, (3, C)."""
        read, whole = self.blocks, _fits(self.blocks)
        if not whole:
            table = self.measure()
            return self.normalize(table), table
        table, y = self.new(3, read.channels), torch.empty_like(self.x)
        operands = (self.x, self.residual, self.gamma, self.beta, self.weight, self.valid, table, y)
        resident.forward[(read.across,)](*operands, *self.sizes, **{**self.fused, "BLOCK_P": whole})
        return self.returned(y), table

    def at_once(self, grad_y: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Σ g and Σ g z, (2, C), dL/dx and dL/dresidual, where all positions of a channel fit on chip."""
        read, sums, grad_x = self.blocks, self.new(2, self.blocks.channels), torch.empty_like(self.x)
        to_residual = None if self.residual is None else torch.empty_like(self.residual)
        operands = (self.x, grad_y, self.residual, self.gamma, self.beta, self.weight, self.valid, table, sums)
        fused = {**self.fused, "BLOCK_P": _fits(read)}
        resident.backward[(read.across,)](*operands, grad_x, to_residual, *self.sizes, **fused)
        return sums, self.returned(grad_x), None if to_residual is None else self.returned(to_residual)

    def measure(self) -> Tensor:
        """The statistics, (3, C)."""
        read = self.blocks
        partial, table = self.new(read.parts, 3, read.channels), self.new(3, read.channels)
        grid = (read.parts * read.across,)
        split.measure[grid](self.x, self.weight, partial, *self.sizes, read.steps, **self.common)
        gather = (_blocks(read.channels, _GATHERED),)
        split.gather_statistics[gather](partial, table, read.channels, read.parts, BLOCK_C=_GATHERED)
        return table

    def normalize(self, table: Tensor) -> Tensor:
        """y by the statistics in `table`."""
        read, y = self.blocks, torch.empty_like(self.x)
        operands = (self.x, self.residual, self.gamma, self.beta, self.valid, table, y)
        split.normalize[(read.along * read.across,)](*operands, *self.sizes, **self.fused)
        return self.returned(y)

    def returned(self, t: Tensor) -> Tensor:
        """`t` behind the strides that an elementwise function of the given x has."""
        return t if self.x is self.given else torch.empty_like(self.given, dtype=t.dtype).copy_(t)

    def sums(self, grad_y: Tensor, table: Tensor) -> Tensor:
        """Σ g and Σ g z, (2, C)."""
        read = self.blocks
        partial, sums = self.new(read.parts, 2, read.channels), self.new(2, read.channels)
        operands = (self.x, grad_y, self.residual, self.gamma, self.beta, self.valid, table, partial)
        split.reduce[(read.parts * read.across,)](*operands, *self.sizes, read.steps, **self.fused)
        gather = (_blocks(read.channels, _GATHERED),)
        split.gather_gradients[gather](partial, sums, read.channels, read.parts, BLOCK_C=_GATHERED)
        return sums

    def gradients(
        self, grad_y: Tensor, table: Tensor, sums: Tensor | None, moments: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """dL/dx and dL/dresidual."""
        read, grad_x = self.blocks, torch.empty_like(self.x)
        to_residual = None if self.residual is None else torch.empty_like(self.residual)
        operands = (self.x, grad_y, self.residual, self.gamma, self.beta, self.weight, self.valid, table, sums, moments)
        grid = (read.along * read.across,)
        split.gradient[grid](*operands, grad_x, to_residual, *self.sizes, **self.fused)
        return self.returned(grad_x), None if to_residual is None else self.returned(to_residual)


def measure(x: Tensor, weight: Tensor | None, layout: Layout) -> Statistics:
    """As `reference.measure`."""
    return Statistics(*_Step(Operands(x, position_weight=weight), Train(layout, 0.0, None)).measure().unbind())


def train(operands: Operands, spec: Train) -> tuple[Tensor, Statistics]:
    """As `reference.train`."""
    y, table = _Step(operands, spec).forward()
    return y, Statistics(*table.unbind())


def normalize_by(statistics: Statistics, operands: Operands, spec: Train) -> Tensor:
    """As `reference.normalize_by`."""
    return _Step(operands, spec).normalize(torch.stack(statistics).double())


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
    if grad_y is None or type(grad_y) is not Tensor or not torch._C._has_storage(grad_y):  # pyright: ignore
        return reference.backward(grad_y, grad_mean, grad_m2, operands, statistics, spec, over_ranks)
    step = _Step(operands, spec)
    table, grad_y = torch.stack(statistics).double(), _like(grad_y, step.x)
    moments = None
    if _fits(step.blocks) and not spec.constant and grad_mean is None and grad_m2 is None and over_ranks is None:
        own, grad_x, grad_residual = step.at_once(grad_y, table)
    else:
        own = pulls = step.sums(grad_y, table)
        if grad_mean is not None or grad_m2 is not None or over_ranks is not None:
            zero = torch.zeros_like(own[0])
            moments = torch.stack([zero if t is None else t.double() for t in (grad_mean, grad_m2)])
        if over_ranks is not None and moments is not None:
            pulls, moments = over_ranks(torch.cat([own, moments])).split(2)
        grad_x, grad_residual = step.gradients(grad_y, table, None if spec.constant else pulls, moments)
    return Gradients(
        grad_x,
        None if operands.weight is None else own[1].to(operands.weight.dtype),
        None if operands.bias is None else own[0].to(operands.bias.dtype),
        grad_residual,
    )
