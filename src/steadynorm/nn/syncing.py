"""sync_: batch statistics over all ranks, for a whole model."""

import warnings
from typing import TypeVar

from torch import nn

from steadynorm.errors import SteadynormWarning
from steadynorm.nn.selection import required_layers
from steadynorm.ops.groups import GroupLike

__all__ = ["sync_"]

Model = TypeVar("Model", bound=nn.Module)


def sync_(model: Model, process_group: GroupLike | None = "world") -> Model:
    """Lets a model's batch norms normalise, in training, by the statistics of all ranks' batches together.

        n = Σ n_r      μ = Σ n_r μ_r / n      m2 = Σ m2_r + n_r (μ_r - μ)²         over the ranks r, counts in float64

    Any backend of `torch.distributed` will do, gloo on the CPU included. Ranks may have batches of different sizes, and
    of none: a rank without data takes part with an empty batch, since the others wait for it (so all ranks must run the
    same layers equally often). Two collectives in forward, one in backward. The gradients are those of one process on
    the concatenated batch, if the loss is the sum over ranks; DistributedDataParallel divides by the number of ranks,
    as ever.

    It changes the layers in place and keeps their options, unlike torch's `convert_sync_batchnorm`, which builds new
    ones and silently drops a fused activation.

    Args:
        model: Its steadynorm batch norms are synchronised, in place; call it before or after wrapping in DDP or FSDP.
        process_group: A ProcessGroup, `"world"` for all ranks (looked up in each forward, so that it may be initialised
            later, and one process alone runs too), or None to turn synchronisation off.

    Returns:
        The model.

    Raises:
        ModelError: The model has no steadynorm batch norm.
        ArgumentError: `process_group` is none, such as what `new_group` gives to ranks outside of it.

    Example:
        >>> from steadynorm import BatchNorm1d
        >>> sync_(BatchNorm1d(2)).process_group
        'world'
    """
    layers = required_layers(model, "sync_")
    for layer in layers:
        layer.process_group = process_group
    plain = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)  # pyright: ignore
        and not isinstance(module, (nn.SyncBatchNorm, *{type(layer) for layer in layers}))
    ]
    if plain:
        warnings.warn(
            f"{len(plain)} batch norms of torch.nn in this model stay unsynchronised: {', '.join(plain[:5])}"
            f"{', ...' if len(plain) > 5 else ''}.",
            SteadynormWarning,
            stacklevel=2,
        )
    return model
