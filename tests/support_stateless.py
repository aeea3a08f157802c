"""Layers as functions of their tensors, and what they remember: shared by the tests of transforms."""

import numpy as np
import torch
from torch import Tensor, nn

import steadynorm as sn
from support import Array, Stats, assert_close

NAN = float("nan")


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1


X, UPSTREAM = rand(4, 2), rand(4, 2, seed=1)


def layer_of(channels: int = 2, **options) -> sn.BatchNorm1d:
    layer = sn.BatchNorm1d(channels, dtype=torch.float64, **options)
    for seed, parameter in enumerate(layer.parameters()):
        nn.init.trunc_normal_(parameter, mean=1.0, generator=torch.Generator().manual_seed(seed))
    return layer


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 2), sn.BatchNorm1d(2, activation="tanh"), nn.Linear(2, 1)).double()


def state_of(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters and buffers; the latter are not copied: what is written to them shows."""
    return {name: p.detach() for name, p in module.named_parameters()}, dict(module.named_buffers())


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in [*module.named_parameters(), *module.named_buffers()]}


def assert_untouched(module: nn.Module, before: dict[str, Tensor]) -> None:
    for name, t in [*module.named_parameters(), *module.named_buffers()]:
        assert type(t) in (Tensor, nn.Parameter), f"{name} is a {type(t)}"
        assert torch.equal(t, before[name]), name


def remembered(*batches: Stats, before: tuple[Array, Array] | None = None, share: float = 0.1) -> tuple[Array, Array]:
    """Running mean and variance after these batches."""
    mean, variance = before or (np.zeros_like(batches[0].mean), np.ones_like(batches[0].mean))
    for one in batches:
        mean, variance = (1 - share) * mean + share * one.mean, (1 - share) * variance + share * one.unbiased
    return mean, variance


def assert_buffers(buffers: dict[str, Tensor], *batches: Stats, prefix: str = "") -> None:
    """The buffers of a layer that began at mean 0 and variance 1 and has seen these batches."""
    mean, variance = remembered(*batches)
    assert_close(buffers[prefix + "running_mean"], mean, "statistic")
    assert_close(buffers[prefix + "running_var"], variance, "variance")
    assert buffers[prefix + "num_batches_tracked"].item() == len(batches)
