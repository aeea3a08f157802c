"""A layer with statistics to keep, and the affine map that it is when frozen: shared by the tests of freezing."""

import numpy as np
import torch
from torch import Tensor, nn

import steadynorm as sn
from support import normalized, wide


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2 + 1).to(dtype)


def settled(channels: int = 3, dtype: torch.dtype = torch.float64, **options) -> sn.BatchNorm1d:
    """A layer whose statistics, γ and β are those of no fresh layer, nor of any batch below."""
    layer = sn.BatchNorm1d(channels, dtype=dtype, **options)
    by_channel = torch.arange(1.0, channels + 1)
    with torch.no_grad():
        layer.running_mean.copy_(by_channel / 4)
        layer.running_var.copy_(by_channel * 1.5)
        layer.num_batches_tracked.fill_(7)
        if layer.affine:
            layer.weight.copy_(by_channel - 1.5)
            layer.bias.copy_(by_channel / 8)
    return layer


def affine_map(layer: sn.BatchNorm1d, x, **options) -> np.ndarray:
    """f(γ (x - μ) / sqrt(σ² + ε) + β) with the running statistics, from the definition."""
    gamma, beta = (None if t is None else wide(t) for t in (layer.weight, layer.bias))
    return normalized(x, wide(layer.running_mean), wide(layer.running_var), gamma, beta, **options)


def snapshot(layer: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in (*layer.state_dict().items(), *layer.named_buffers())}


def assert_same(layer: nn.Module, before: dict[str, Tensor]):
    assert {name for name, t in snapshot(layer).items() if not torch.equal(t, before[name])} == set()
