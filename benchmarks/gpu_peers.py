"""The contenders of one row: ours, the framework's in three ways, and a copy on the device."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import steadynorm as sn
from cpu_oracle import EPS, Problem
from cpu_peers import Peer
from gpu_rows import Row

__all__ = ["contenders", "copy_of", "problems"]

MODES = {"compiled": None, "tuned": "max-autotune-no-cudagraphs"}


def problems(row: Row, device: str, sets: int) -> list[Problem]:
    """Sets of random values such as a convolution puts out: means within ±1, deviations from 1/2 to 2 by channel."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, row.dtype)
    layout = torch.channels_last if row.layout == "channels_last" else torch.contiguous_format
    channels = row.shape[1]

    def normal() -> Tensor:
        return torch.randn(row.shape, generator=generator, device=device).to(memory_format=layout)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(channels, device=device).uniform_(low, high, generator=generator)

    weight, bias = uniform(0.5, 1.5), uniform(-0.5, 0.5)
    found = []
    for _ in range(sets):
        x = normal().mul_(uniform(0.5, 2.0).view(1, -1, 1, 1)).add_(uniform(-1.0, 1.0).view(1, -1, 1, 1)).to(dtype)
        residual = normal().to(dtype) if row.variant == "add_relu" else None
        found.append(Problem(x, residual, normal().to(dtype), weight, bias, True))
    return found


def contenders(given: list[Problem], compiled: bool) -> dict[str, list[Peer]]:
    """Of each contender, one layer bound to every set of values."""
    channels, device = given[0].x.shape[1], given[0].x.device

    def bound(norm: nn.Module, layer: Callable[..., Tensor]) -> list[Peer]:
        with torch.no_grad():
            norm.weight.copy_(given[0].weight)
            norm.bias.copy_(given[0].bias)
        leaves = [(_leaf(p.x), None if p.residual is None else _leaf(p.residual)) for p in given]
        return [Peer(layer, *pair, p.gradient, norm) for pair, p in zip(leaves, given, strict=True)]

    norm = sn.BatchNorm2d(channels, eps=EPS, activation="relu", device=device)
    found = {"ours": bound(norm, lambda x, r: norm(x) if r is None else norm(x, residual=r))}
    for name in ("eager", *(MODES if compiled else ())):
        theirs = nn.BatchNorm2d(channels, eps=EPS, device=device)
        layer = _framework(theirs)
        if name in MODES:
            torch._dynamo.reset()
            layer = torch.compile(layer, dynamic=False, fullgraph=True, mode=MODES[name])
        found[name] = bound(theirs, layer)
    return found


def _leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_()


def _framework(norm: nn.Module) -> Callable[[Tensor, Tensor | None], Tensor]:
    def layer(x: Tensor, residual: Tensor | None) -> Tensor:
        y = norm(x)
        if residual is not None:
            y = y + residual
        return nn.functional.relu(y)

    return layer


def copy_of(row: Row, device: str) -> tuple[Callable[[], object], int]:
    """A copy on the device of as many bytes as x has, and how many it reads and writes together."""
    # Random bits: memory may move faster where all values are alike.
    source = torch.randint(2**31 - 1, (-(-row.x_bytes // 4),), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * source.nbytes
