"""freeze_ and unfreeze_: batch norms that stay as they are, whatever is called on the model around them."""

from typing import TypeVar

from torch import nn

from steadynorm.errors import ModelError
from steadynorm.nn.selection import required_layers

__all__ = ["freeze_", "unfreeze_"]

Model = TypeVar("Model", bound=nn.Module)


def freeze_(model: Model, affine: bool = True) -> Model:
    """Freezes the running statistics of a model's batch norms, and by default their γ and β.

        y = f(γ (x - μ) / sqrt(σ² + ε) + β + residual)      μ, σ²: the running ones, in training as in evaluation

    A frozen layer is an affine map of its input, for which backward keeps nothing of the input's size (a fused f keeps
    what it needs itself, and so does a γ that goes on learning). It stays frozen through `model.train()`,
    `requires_grad_(True)` on the model (γ and β are detached in forward), `copy.deepcopy`, pickling, and
    `load_state_dict` into it, which changes its numbers and not its being frozen. The state_dict has no key of it, so
    that it goes on loading into `torch.nn`'s layers: a new model is frozen anew. `reset_running_stats`, which torch's
    `update_bn` calls on every batch norm, leaves it alone.

    Args:
        model: Its steadynorm batch norms are frozen, in place.
        affine: Freeze γ and β as well: no gradient reaches them, the one they have is dropped, and `requires_grad` is
            turned off, so that optimisers (weight decay included) and DDP leave them out. With False they go on
            learning.

    Returns:
        The model.

    Raises:
        ModelError: The model has no steadynorm batch norm, or one without running statistics.

    Example:
        >>> import torch
        >>> from steadynorm import BatchNorm1d
        >>> layer = freeze_(BatchNorm1d(2)).train()
        >>> y = layer(torch.randn(8, 2))
        >>> layer.num_batches_tracked.item(), layer.weight.requires_grad
        (0, False)
    """
    layers = required_layers(model, "freeze_")
    for layer in layers:
        if not layer.tracks:
            raise ModelError(
                f"{layer} has no running statistics to be frozen at; build it with track_running_stats=True."
            )
    for layer in layers:
        if layer.frozen_affine and not affine:
            unfreeze_(layer)
        if affine:
            if not layer.frozen_affine:  # the flags of before the first freeze_ are the ones to go back to
                layer.unfrozen_grad = {name: p.requires_grad for name, p in layer.named_parameters(recurse=False)}
            for parameter in layer.parameters(recurse=False):
                parameter.requires_grad_(False).grad = None  # an optimiser moves what has a gradient, be it an old one
        layer.frozen, layer.frozen_affine = True, affine
    return model


def unfreeze_(model: Model) -> Model:
    """Undoes `freeze_`: batch statistics normalise again in training, and γ and β learn again if they did before.

    Args:
        model: Its steadynorm batch norms, frozen or not.

    Returns:
        The model.

    Raises:
        ModelError: The model has no steadynorm batch norm.

    Example:
        >>> from steadynorm import BatchNorm1d
        >>> unfreeze_(freeze_(BatchNorm1d(2))).weight.requires_grad
        True
    """
    for layer in required_layers(model, "unfreeze_"):
        if layer.frozen_affine:
            for name, parameter in layer.named_parameters(recurse=False):
                parameter.requires_grad_(layer.unfrozen_grad.get(name, True))
        layer.frozen, layer.frozen_affine = False, False
    return model
