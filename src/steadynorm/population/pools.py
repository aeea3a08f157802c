"""The Moments of all that a layer is given, pooled as it comes."""

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import torch
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm  # pyright: ignore[reportPrivateUsage]

from steadynorm.errors import ModelError
from steadynorm.moments import Moments
from steadynorm.nn.base import BatchNorm
from steadynorm.ops.commit import Running
from steadynorm.ops.layout import accumulator_dtype
from steadynorm.ops.merging import merge_stacked
from steadynorm.ops.reference import Statistics

__all__ = ["Key", "Pool", "pools_for", "running"]

_MERGE_AT: Final = 64
"""Batches whose statistics wait to be merged in one go."""


class Key(NamedTuple):
    """What has running statistics of its own: a layer, or a domain of it.

    Attributes:
        name: The layer's name in the model.
        domain: The domain's, or None where the layer has none.
    """

    name: str
    domain: str | None

    def __str__(self) -> str:
        return (self.name or "the layer") + (f" ({self.domain})" if self.domain else "")


class Pool:
    """The Moments of all that one layer has been given, merged as it comes, in constant memory.

    Args:
        channels: C.
        device: Where the layer's buffers are.

    Attributes:
        batches: How many were added.
        rejected: How many of them were not finite in some channel, and left out.
        singles: How many held a single position: they count, and were normalised to β.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        zero = torch.zeros(3, channels, dtype=accumulator_dtype(device), device=device)
        self._parts = [zero]
        self.batches = 0
        self._rejected = torch.zeros((), dtype=torch.long, device=device)
        self._singles = torch.zeros((), dtype=torch.long, device=device)

    def add(self, statistics: Statistics | Moments) -> None:
        """Adds one batch's."""
        self.batches += 1
        self._parts.append(torch.stack(statistics).detach())
        if len(self._parts) > _MERGE_AT:
            self._merge()

    def total(self) -> Moments:
        """Of all together."""
        self._merge()
        return Moments(*self._parts[0].unbind())

    @property
    def rejected(self) -> int:
        """See the class."""
        self._merge()
        return int(self._rejected)

    @property
    def singles(self) -> int:
        """See the class."""
        self._merge()
        return int(self._singles)

    def _merge(self) -> None:
        if len(self._parts) == 1:
            return
        parts = torch.stack(self._parts)
        finite = torch.isfinite(parts.sum((1, 2)))  # a sum that overflows is the variance of nothing either
        self._rejected += (~finite).sum()
        self._singles += (finite & (parts[:, 0, 0] == 1))[1:].sum()
        parts = torch.where(finite[:, None, None], parts, 0.0)
        self._parts = [torch.stack(merge_stacked(Statistics(*parts.unbind(1))))]


def running(layer: TorchBatchNorm, domain: str | None) -> Running:
    """The buffers of a layer's statistics, or of one domain of it."""
    if isinstance(layer, BatchNorm):
        return layer.running(domain)
    mean, var = layer.running_mean, layer.running_var
    if mean is None or var is None:
        raise ModelError(f"{layer} keeps no running statistics.")
    return Running(mean, var, layer.num_batches_tracked)


def pools_for(layers: Mapping[str, TorchBatchNorm]) -> dict[Key, Pool]:
    """An empty pool for each layer and domain; the same keys in the same order on every rank."""
    pools: dict[Key, Pool] = {}
    for name, layer in layers.items():
        domains: Sequence[str | None] = (layer.domains if isinstance(layer, BatchNorm) else ()) or (None,)
        for domain in domains:
            pools[Key(name, domain)] = Pool(layer.num_features, running(layer, domain).mean.device)
    return pools
