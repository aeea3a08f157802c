"""Data that is there in part, and layers for it: shared by the tests of masks."""

import torch
from torch import Tensor, nn

import steadynorm as sn

NAN = float("nan")


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1).to(dtype)


def layer_of(x: Tensor, **options) -> sn.BatchNorm1d | sn.BatchNorm2d | sn.BatchNorm3d:
    """A layer for x, with γ, β and running statistics away from where they start."""
    kind = {2: sn.BatchNorm1d, 3: sn.BatchNorm1d, 4: sn.BatchNorm2d, 5: sn.BatchNorm3d}[x.dim()]
    layer = kind(x.shape[options.get("channel_dim", 1)], dtype=x.dtype, **options)
    for seed, t in enumerate((*layer.parameters(), layer.running_mean)):
        nn.init.trunc_normal_(t, generator=torch.Generator().manual_seed(seed + 50))
    layer.running_var.fill_(2.25)
    return layer


def lengths(*each: int, longest: int) -> Tensor:
    """Which positions of padded sequences are real."""
    return torch.arange(longest) < torch.tensor(each)[:, None]


def sizes(*each: tuple[int, int], within: tuple[int, int]) -> Tensor:
    """Which pixels of padded images are real."""
    return torch.stack([lengths(h, longest=within[0]).T & lengths(w, longest=within[1]) for h, w in each])


def at_positions(mask: Tensor, x: Tensor, channel_dim: int = 1) -> Tensor:
    """The mask in x's shape."""
    full = mask.reshape(*mask.shape, *(1,) * (x.dim() - 1 - mask.dim()))
    return full.unsqueeze(channel_dim).expand_as(x)


def unchanged(layer: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(t, before[name]) for name, t in layer.named_buffers())


def buffers(layer: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in layer.named_buffers()}


RENORM = sn.Renorm(1.5, 0.5, warmup=0, ramp=0)
