"""Ghost batches: each chunk of the batch on its own statistics, the chunks' pooled ones to remember.

Source: Hoffer, Hubara, Soudry, "Train longer, generalize better: closing the generalization gap in large batch training
of neural networks" (2017).
"""

import torch
from torch import Tensor

from steadynorm.ops import autograd
from steadynorm.ops.autograd import Correction
from steadynorm.ops.layout import Layout
from steadynorm.ops.merging import merge_all
from steadynorm.ops.reference import Operands, Statistics, Train

__all__ = ["chunk_sizes", "smallest_chunk", "train"]


def chunk_sizes(batch_size: int, ghost_batch_size: int, values_per_example: int = 1) -> list[int]:
    """Chunks of `ghost_batch_size` examples, and one of the rest: joined to the last where it had a single value.

    Example:
        >>> chunk_sizes(10, 4), chunk_sizes(9, 4), chunk_sizes(9, 4, values_per_example=49)
        ([4, 4, 2], [4, 5], [4, 4, 1])
    """
    whole, rest = batch_size // ghost_batch_size, batch_size % ghost_batch_size  # torch.compile cannot trace divmod
    sizes = [ghost_batch_size] * whole
    if rest * values_per_example == 1 and sizes:
        sizes[-1] += rest
    elif rest or not sizes:
        sizes.append(rest)
    return sizes


def smallest_chunk(layout: Layout, batch_size: int, ghost_batch_size: int | None) -> int:
    """Values per channel in the smallest part of the batch that is normalised on its own."""
    if ghost_batch_size is None or batch_size == 0:
        return layout.count
    per_example = layout.count // batch_size
    return per_example * min(chunk_sizes(batch_size, ghost_batch_size, per_example))


def train(
    operands: Operands, spec: Train, correct: Correction | None, ghost_batch_size: int
) -> tuple[Tensor, Statistics]:
    """`autograd.train` of each chunk; see there for the arguments.

    Returns:
        y, and the Moments of all chunks pooled, those of the other ranks of `spec.group` included, without a gradient:
        they are there to be remembered. No chunk is normalised by another one, on this rank or elsewhere.
    """
    batch = len(operands.x)
    sizes = chunk_sizes(batch, ghost_batch_size, spec.layout.count // max(batch, 1))
    outputs: list[Tensor] = []
    measured: list[Statistics] = []
    per_example = (operands.x, operands.residual, operands.position_weight, operands.valid)
    for x, residual, weight, valid in zip(*(_split(t, batch, sizes) for t in per_example), strict=True):
        assert x is not None  # noqa: S101 (the split of a Tensor)
        chunk = operands._replace(x=x, residual=residual, position_weight=weight, valid=valid)
        y, statistics = autograd.train(chunk, spec._replace(layout=Layout.of(x, spec.layout.dim), group=None), correct)
        outputs.append(y)
        measured.append(Statistics(*(t.detach() for t in statistics)))
    pooled = merge_all(measured)
    return torch.cat(outputs), pooled if spec.group is None else autograd.over_ranks(pooled, spec.group)


def _split(t: Tensor | None, batch: int, sizes: list[int]) -> "list[Tensor | None]":
    """The chunks of `t`, each of them `t` itself where it is absent or holds for all examples alike."""
    if t is None or (len(t) == 1 and batch != 1):
        return [t] * len(sizes)
    return list(t.split(sizes))
