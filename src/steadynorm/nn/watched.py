"""Which layers of a model can be watched, and what one example looks like at the input of each."""

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm  # pyright: ignore[reportPrivateUsage]

from steadynorm.errors import ArgumentError, ModelError
from steadynorm.nn.base import BatchNorm
from steadynorm.ops.layout import Layout, align

__all__ = [
    "ExampleMoments",
    "bn_layers",
    "channel_axis",
    "example_moments",
    "input_and_mask",
    "observing",
    "running_statistics",
]

BatchNormLayer = TorchBatchNorm
"""`torch.nn.BatchNorm1d`, `2d`, `3d`, `SyncBatchNorm` and steadynorm's layers, which are subclasses of torch's."""


class ExampleMoments(NamedTuple):
    """Mean and biased variance of each example and channel, over the example's positions.

    Attributes:
        mean: (N, C).
        var: (N, C), biased; None where an example has a single position, hence no variance of its own.
    """

    mean: Tensor
    var: Tensor | None


def bn_layers(model: nn.Module) -> list[tuple[str, BatchNormLayer]]:
    """The batch norms of a model that keep running statistics, with their names, each layer once.

    Raises:
        ArgumentError: `model` is not a module.
        ModelError: It has no such layer.

    Example:
        >>> [name for name, _ in bn_layers(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))]
        ['1']
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError(f"needs a torch.nn.Module, got {type(model).__name__}.")
    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, TorchBatchNorm)]
    found = [(name, layer) for name, layer in norms if layer.running_mean is not None and layer.running_var is not None]
    if found:
        return found
    instead = "its batch norms were built with track_running_stats=False" if norms else "it has no batch norm"
    raise ModelError(
        f"needs a model with batch norm layers that keep running statistics; of this {type(model).__name__}, {instead}."
    )


def channel_axis(layer: BatchNormLayer) -> int:
    """The axis of a layer's input that holds the channels: 1, or what a steadynorm layer was told."""
    return layer.channel_dim if isinstance(layer, BatchNorm) else 1


def running_statistics(layer: BatchNormLayer) -> tuple[Tensor, Tensor]:
    """The stored mean and (unbiased) variance, (C,) each: those of the domain in use, or of the first."""
    if isinstance(layer, BatchNorm) and layer.active_domain is not None:
        running = layer.running(layer.active_domain)
        return running.mean, running.var
    mean, var = layer.running_mean, layer.running_var
    if mean is None or var is None:
        raise ModelError(f"{layer} keeps no running statistics; build it with track_running_stats=True.")
    return mean, var


def example_moments(x: Tensor, channel_dim: int = 1, mask: Tensor | None = None) -> ExampleMoments:
    """Measures each example on its own, over its positions: the example is the independent unit, not the pixel.

        mean[i, c] = 1/P Σₚ x[i, c, p]        var[i, c] = 1/P Σₚ (x[i, c, p] - mean[i, c])²   (biased)

    Args:
        x: (N, C, *), floating; half precisions are read as float32.
        channel_dim: The axis of the channels; -1 for channels last.
        mask: Which positions count, (N, *) or broadcastable to it from the batch axis on; all by default. An example
            without any has NaN statistics.

    Returns:
        (N, C) each, in x's dtype (float32 at least), of their own storage.

    Raises:
        ShapeError: `x` has no such axis, or `mask` does not fit.

    Example:
        >>> mean, var = example_moments(torch.tensor([[[1.0, 3.0], [5.0, 5.0]]]))
        >>> mean.tolist(), var.tolist()
        ([[2.0, 5.0]], [[1.0, 0.0]])
    """
    layout = Layout.of(x, channel_dim)
    x = x.detach()
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    if mask is not None:
        weight = align(mask.detach(), x, layout, "mask").to(x.dtype)
        weight = weight.expand([1 if d == layout.dim else size for d, size in enumerate(x.shape)])
        by_position = [t.movedim(layout.dim, 1).reshape(t.shape[0], t.shape[layout.dim], -1) for t in (x, weight)]
        return _masked_moments(*by_position)
    positions = [d for d in layout.positions if d != 0]
    if all(x.shape[d] == 1 for d in positions):
        return ExampleMoments(x.reshape(x.shape[0], layout.channels).clone(), None)
    var, mean = torch.var_mean(x, positions, correction=0)
    return ExampleMoments(mean, var)


def _masked_moments(x: Tensor, weight: Tensor) -> ExampleMoments:
    """Of x (N, C, P) where weight (N, 1, P) is not 0; x may hold anything elsewhere."""
    total = weight.sum(2)
    x = torch.where(weight > 0, x, 0.0)
    mean = (weight * x).sum(2) / total
    if x.shape[2] == 1:
        return ExampleMoments(mean, None)
    return ExampleMoments(mean, (weight * (x - mean.unsqueeze(2)).square()).sum(2) / total)


def input_and_mask(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """What a layer was called with, by position or by name: its input, and which positions of it count."""
    x, mask = args[0] if args else kwargs.get("input"), kwargs.get("mask")
    return x if isinstance(x, Tensor) else None, mask if isinstance(mask, Tensor) else None


@contextmanager
def observing(
    layers: Sequence[tuple[str, BatchNormLayer]], see: Callable[[str, BatchNormLayer, Tensor, Tensor | None], None]
) -> Generator[None]:
    """Within it, `see(name, layer, input, mask)` is called before each forward of each layer, in this thread.

    Forwards that other threads run meanwhile on the same model (it may be serving) are none of its business. The hooks
    go with the block.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
        >>> with observing(bn_layers(model), lambda name, layer, x, mask: print(name, tuple(x.shape))):
        ...     _ = model(torch.randn(5, 3))
        1 (5, 4)
    """
    here = threading.get_ident()

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x, mask = input_and_mask(args, kwargs)
            if threading.get_ident() == here and isinstance(module, TorchBatchNorm) and x is not None:
                see(name, module, x, mask)

        return before

    handles = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
