"""Puts batch norms where they were planned: into an nn.Sequential, into a layer, or beside a nonlinearity."""

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any, cast

from torch import Tensor, nn

from steadynorm.nn.base import BatchNorm
from steadynorm.surgery.layers import is_foldable
from steadynorm.surgery.normed import INPUT, OUTPUT, norm_inside_
from steadynorm.surgery.placing import Side, Spot

__all__ = ["put_"]


def put_(model: nn.Module, spots: Collection[Spot], options: Mapping[str, Any]) -> dict[Spot, BatchNorm]:
    """Puts batch norms into a model, with the device, dtype and mode of the layers whose results they take.

    Args:
        model: Changed in place.
        spots: Where; the names are those of the model as it is given.
        options: Of the batch norms.

    Returns:
        The batch norms.
    """
    norms: dict[Spot, BatchNorm] = {}
    beside: dict[nn.Sequential, list[tuple[int, Side, BatchNorm]]] = defaultdict(list)
    for spot in spots:
        layer = model.get_submodule(spot.layer)
        weight = cast(Tensor, layer.weight)
        norm = spot.kind(
            spot.width, channel_dim=spot.channel_dim, device=weight.device, dtype=weight.dtype, **options
        ).train(layer.training)
        norms[spot] = norm
        place = model.get_submodule(spot.key.module)
        if spot.key.position is not None:
            beside[cast(nn.Sequential, place)].append((spot.key.position, spot.key.side, norm))
        elif is_foldable(place):
            norm_inside_(place, norm, OUTPUT if spot.key.side == "after" else INPUT)
        else:
            _pair(model, spot, place, norm)
    for spot in spots:
        if spot.dead:
            model.get_submodule(spot.layer).register_parameter("bias", None)
    for sequence, added in beside.items():  # last: the names of what stands behind them change
        _between(sequence, added)
    return norms


def _pair(model: nn.Module, spot: Spot, activation: nn.Module, norm: BatchNorm) -> None:
    pair = nn.Sequential()
    pair.training = activation.training
    both = [("activation", activation), ("batchnorm", norm)]
    for name, module in both if spot.key.side == "after" else reversed(both):
        pair.add_module(name, module)
    parent, _, own = spot.key.module.rpartition(".")
    model.get_submodule(parent)._modules[own] = pair  # pyright: ignore[reportPrivateUsage]


def _between(sequence: nn.Sequential, added: list[tuple[int, Side, BatchNorm]]) -> None:
    """Children of an nn.Sequential at positions, which are those of the children that it has."""
    children = list(sequence._modules.items())  # pyright: ignore[reportPrivateUsage]
    taken = {name for name, _ in children}
    numbered = all(name == str(place) for place, (name, _) in enumerate(children))
    for position, side, norm in sorted(added, key=lambda one: -one[0]):
        name = f"{children[position - (side == 'after')][0]}_bn"
        while name in taken:
            name += "_"
        taken.add(name)
        children.insert(position, (name, norm))
    named = {str(place) if numbered else name: module for place, (name, module) in enumerate(children)}
    sequence._modules.clear()  # pyright: ignore[reportPrivateUsage]
    sequence._modules.update(named)  # pyright: ignore[reportPrivateUsage]
