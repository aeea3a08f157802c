"""Batch renormalization from its definition: shared by the tests of renorm."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import steadynorm as sn
from support import Array, Wide, normalized, stats, wide

NAN = float("nan")
EPS = Wide(1e-5)
AT_ONCE = {"warmup": 0, "ramp": 0}
TIGHT = sn.Renorm(1.2, 0.3, **AT_ONCE)  # binds in some channels of these tests, and not in others
LOOSE = sn.Renorm(1e4, 1e4, **AT_ONCE)  # binds nowhere


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1).to(dtype)


def layer_of(x: Tensor, renorm: sn.Renorm = TIGHT, counted: int = 1, **options) -> sn.BatchNorm1d | sn.BatchNorm2d:
    """A layer of three channels for x, with running statistics that some batches are near to and others are not."""
    kind = sn.BatchNorm2d if x.dim() == 4 else sn.BatchNorm1d
    layer = kind(3, dtype=x.dtype, renorm=renorm, **options)
    for seed, t in enumerate(layer.parameters()):
        nn.init.trunc_normal_(t, generator=torch.Generator().manual_seed(seed + 50))
    layer.running_mean.copy_(torch.tensor([1.0, -2.0, 0.75]))
    layer.running_var.copy_(torch.tensor([4.0, 0.5, 30.0]))
    layer.num_batches_tracked.fill_(counted)
    return layer


class Running(NamedTuple):
    """The running statistics of a layer, as they were before a batch."""

    mean: Array
    var: Array

    @classmethod
    def of(cls, layer: nn.Module) -> "Running":
        return cls(wide(layer.running_mean).copy(), wide(layer.running_var).copy())


def corrections(x: Array, running: Running, renorm: sn.Renorm, weight: Array | None = None) -> tuple[Array, Array]:
    """r and d of Ioffe 2017, section 3, at the schedule's end, with ε within both roots."""
    batch = stats(x, weight=weight)
    sigma = np.sqrt(running.var + EPS)
    r = np.sqrt(batch.m2 / np.maximum(batch.count, 1) + EPS) / sigma
    d = (batch.mean - running.mean) / sigma
    return np.clip(r, 1 / Wide(renorm.r_max), renorm.r_max), np.clip(d, -renorm.d_max, renorm.d_max)


def renormed(x: Array, gamma: Array, beta: Array, r: Array, d: Array, weight: Array | None = None, **options) -> Array:
    """f(γ (z r + d) + β + residual), z by the batch, 0 where masked."""
    batch = stats(x, weight=weight)
    biased = batch.m2 / np.maximum(batch.count, 1)
    gamma, beta = wide(gamma), wide(beta)
    return normalized(x, batch.mean, biased, gamma * r, gamma * d + beta, **options)


def plain_numbers(*tensors: Tensor) -> list[Array]:
    return [t.detach().double().numpy().copy() for t in tensors]
