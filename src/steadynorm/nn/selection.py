"""Which layers of a model a function means."""

from collections.abc import Iterator

from torch import nn
from torch.optim.swa_utils import AveragedModel

from steadynorm.errors import ArgumentError, ModelError
from steadynorm.nn.base import BatchNorm

__all__ = ["layers_of", "required_layers", "unwrapped"]

_WRAPPERS = (AveragedModel, nn.DataParallel, nn.parallel.DistributedDataParallel)


def layers_of(model: nn.Module) -> Iterator[tuple[str, BatchNorm]]:
    """The steadynorm batch norms of a model with their names, each layer once."""
    for name, module in model.named_modules():
        if isinstance(module, BatchNorm):
            yield name, module


def required_layers(model: nn.Module, what: str) -> list[BatchNorm]:
    """The same where there must be some; says so, and what there is instead."""
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError(f"{what} needs a torch.nn.Module, got {type(model).__name__}.")
    found = [layer for _, layer in layers_of(model)]
    if found:
        return found
    others = sum(isinstance(m, nn.modules.batchnorm._NormBase) for m in model.modules())  # pyright: ignore
    instead = f"{others} of torch.nn, which know nothing of it" if others else "none of torch.nn either"
    raise ModelError(
        f"{what} needs steadynorm's batch norms (steadynorm.BatchNorm1d, 2d, 3d); this {type(model).__name__} has none "
        f"of them, and {instead}."
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, less what AveragedModel, DataParallel, DistributedDataParallel or torch.compile put around it.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> unwrapped(nn.DataParallel(layer)) is layer
        True
    """
    while True:
        inner = model.module if isinstance(model, _WRAPPERS) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner
