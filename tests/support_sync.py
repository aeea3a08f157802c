"""Batches, and layers for them: shared by the tests of statistics over ranks."""

from typing import Any

import torch
from torch import Tensor

import steadynorm as sn

Batch = dict[str, Tensor]


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1).to(dtype)


def layer_of(x: Tensor, **options: Any) -> sn.BatchNorm1d:
    """A layer for x, with γ, β and running statistics away from where they start."""
    layer = sn.BatchNorm1d(x.shape[1], dtype=x.dtype, **options)
    with torch.no_grad():
        for seed, t in enumerate((layer.weight, layer.bias, layer.running_mean)):
            t.copy_(rand(len(t), seed=50 + seed))
        layer.running_var.fill_(2.25)
    return layer


def part(batch: Batch, sizes: tuple[int, ...], rank: int) -> Batch:
    return {name: t.split(sizes)[rank].clone() for name, t in batch.items()}
