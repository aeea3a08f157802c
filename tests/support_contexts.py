"""Micro-batches, layers, and what these remember: shared by the tests of the contexts."""

import torch
from torch import Tensor, nn

import steadynorm as sn
from support import Stats, assert_close

NAN = float("nan")


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1).to(dtype)


def parts_of(*sizes: int, channels: int = 3) -> list[Tensor]:
    """Micro-batches whose means lie far apart: the variance between them is most of the whole."""
    return [rand(size, channels, seed=size + i) + 5 * i for i, size in enumerate(sizes)]


def layer_of(channels: int = 3, **options) -> sn.BatchNorm1d:
    return sn.BatchNorm1d(channels, dtype=torch.float64, **options)


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.named_buffers()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(t, before[name]) for name, t in model.named_buffers())


def assert_remembers(layer: sn.BatchNorm1d, measured: Stats, share: float = 0.1, commits: int = 1) -> None:
    """A layer that began at mean 0 and variance 1 has committed `measured` once."""
    assert_close(layer.running_mean, share * measured.mean, "statistic")
    assert_close(layer.running_var, (1 - share) + share * measured.unbiased, "variance")
    assert layer.num_batches_tracked.item() == commits
