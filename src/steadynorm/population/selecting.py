"""Which layers of a model are recalibrated."""

from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.nn.parameter import is_lazy

from steadynorm.errors import ArgumentError, ModelError
from steadynorm.nn.base import BatchNorm

__all__ = ["Selection", "select"]


class Selection(NamedTuple):
    """The batch norms of a model.

    Attributes:
        measured: Those that are measured, in the order of the model.
        frozen: Names of those that `freeze_` holds.
        untracked: Names of those without running statistics.
    """

    measured: dict[str, TorchBatchNorm]
    frozen: tuple[str, ...]
    untracked: tuple[str, ...]


def select(model: nn.Module) -> Selection:
    """Which layers have running statistics that may be written.

    Raises:
        ArgumentError: `model` is no module.
        ModelError: There is none, or one that has no size yet.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError(f"recalibrate_ needs a torch.nn.Module, got {type(model).__name__}.")
    norms = {name: m for name, m in model.named_modules() if isinstance(m, TorchBatchNorm)}
    if not norms:
        raise ModelError(f"recalibrate_ needs a model with batch norms; this {type(model).__name__} has none.")
    for name, layer in norms.items():
        if layer.running_mean is not None and is_lazy(layer.running_mean):
            raise ModelError(f"{name} has no size before its first forward. Run one batch through the model first.")
    untracked = tuple(name for name, layer in norms.items() if layer.running_mean is None or layer.running_var is None)
    frozen = tuple(n for n, m in norms.items() if isinstance(m, BatchNorm) and m.frozen and n not in untracked)
    measured = {name: layer for name, layer in norms.items() if name not in {*untracked, *frozen}}
    if not measured:
        why = f"{len(frozen)} frozen, {len(untracked)} built with track_running_stats=False"
        raise ModelError(
            f"there is nothing to recalibrate: of this model's batch norms {why}. steadynorm.unfreeze_(model) frees "
            "frozen ones."
        )
    return Selection(measured, frozen, untracked)
