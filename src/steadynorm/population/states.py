"""What one batch norm stores, wherever it was read: from a module or from a file."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steadynorm.errors import ArgumentError
from steadynorm.nn.base import BatchNorm
from steadynorm.nn.watched import BatchNormLayer

__all__ = ["LayerState", "states_of"]


@dataclass(frozen=True)
class LayerState:
    """The tensors and settings of one batch norm, on the CPU.

    Attributes:
        name: The layer's name in the model or file.
        mean: Running mean, (C,), in its own dtype.
        var: Running variance (unbiased), (C,).
        gamma: γ, (C,), or None.
        beta: β, (C,), or None.
        tracked: How many batches were committed; None where the file does not say.
        eps: ε; None where the file does not say.
        momentum: The share of the new batch; None for a cumulative average, or where `settings_known` is False.
        settings_known: Whether eps and momentum are the layer's own.
    """

    name: str
    mean: Tensor
    var: Tensor
    gamma: Tensor | None = None
    beta: Tensor | None = None
    tracked: int | None = None
    eps: float | None = None
    momentum: float | None = None
    settings_known: bool = False

    @property
    def channels(self) -> int:
        """C."""
        return self.var.numel()


def states_of(model: nn.Module) -> list[LayerState]:
    """The state of each batch norm that keeps running statistics; one for each of its domains.

    Example:
        >>> [state.name for state in states_of(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))]
        ['1']
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError(f"diagnose needs a torch.nn.Module, got {type(model).__name__}.")
    found: list[LayerState] = []
    for name, layer in model.named_modules():
        if isinstance(layer, BatchNormLayer):
            found += _of(name, layer)
    return found


def _of(name: str, layer: BatchNormLayer) -> list[LayerState]:
    if layer.running_mean is None or layer.running_var is None:
        return []
    gamma, beta = _copied(layer.weight), _copied(layer.bias)
    if isinstance(layer, BatchNorm) and layer.domains:
        states: list[LayerState] = []
        for domain in layer.domains:
            running = layer.running(domain)
            weight, bias = layer.affine_of(domain)
            counter = running.num_batches_tracked
            tracked = None if counter is None else int(counter)
            states.append(
                LayerState(f"{name}[{domain}]", running.mean.detach().cpu(), running.var.detach().cpu(),
                           _copied(weight), _copied(bias), tracked, layer.eps, layer.momentum, True)
            )  # fmt: skip
        return states
    tracked = None if layer.num_batches_tracked is None else int(layer.num_batches_tracked)
    mean, var = layer.running_mean.detach().cpu(), layer.running_var.detach().cpu()
    return [LayerState(name, mean, var, gamma, beta, tracked, layer.eps, layer.momentum, True)]


def _copied(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().to("cpu", torch.float64)
