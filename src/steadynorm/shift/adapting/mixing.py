"""Writes a mix of stored and freshly measured statistics into a model's batch norms, and can take it back."""

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from steadynorm.moments import Moments
from steadynorm.nn.base import BatchNorm
from steadynorm.nn.watched import BatchNormLayer, channel_axis, input_and_mask, running_statistics
from steadynorm.ops.layout import accumulator_dtype

__all__ = [
    "Layers",
    "Mixer",
    "Rule",
    "Share",
    "Snapshot",
    "is_frozen",
    "mix",
    "shares",
    "stored_share",
]

Layers: TypeAlias = Sequence[tuple[str, BatchNormLayer]]
Rule: TypeAlias = Callable[[str, Moments, Moments, int], Moments]
Share: TypeAlias = Callable[[str, int], float]


class Snapshot:
    """The buffers (and parameters) of layers as they were, bit for bit.

    Kept by module and name: a model that was moved, cast or loaded with `assign=True` since has other tensors there.

    Args:
        layers: Whose.
        affine: γ and β as well.
    """

    def __init__(self, layers: Layers, affine: bool = False) -> None:
        self._kept: list[tuple[nn.Module, str, Tensor]] = []
        for module in dict.fromkeys(part for _, layer in layers for part in layer.modules()):
            parameters = module.named_parameters(recurse=False) if affine else ()
            tensors = (*module.named_buffers(recurse=False), *parameters)
            self._kept += [(module, name, tensor.detach().clone()) for name, tensor in tensors]

    def restore(self) -> None:
        """Writes them back, in the dtype and on the device that the model has now."""
        with torch.no_grad():
            for module, name, before in self._kept:
                getattr(module, name).copy_(before)


def is_frozen(layer: BatchNormLayer) -> bool:
    """Whether `steadynorm.freeze_` has asked that this layer's statistics stay."""
    return isinstance(layer, BatchNorm) and layer.frozen


class _Layer(NamedTuple):
    """Where one layer starts from: its stored mean and (unbiased) variance, as Moments of count 1."""

    stored: Moments
    mean: Tensor
    var: Tensor


class Mixer:
    """Hooks that measure each layer's input and let the layer normalise by the mix at once, layer after layer.

        μ = a μ_stored + (1 - a) μ_seen        σ² = a σ²_stored + (1 - a) σ²_seen       (both σ² unbiased)

    That is `shares(a)`; any other rule may stand in its place. A deeper layer is thus measured on what the mixed layers
    before it put out, as it will be when the model serves. Several batches are pooled: what was seen is merged over all
    of them up to now (law of total variance), not averaged batch by batch.

    Args:
        layers: Whose buffers are written, with their names.
        rule: What a layer is to hold, given its name, what it stored, what was seen, and of how many examples.
    """

    def __init__(self, layers: Layers, rule: Rule) -> None:
        self._layers, self._rule, self._thread = layers, rule, threading.get_ident()
        self._start: dict[str, _Layer] = {}
        self._seen: dict[str, Moments] = {}
        self.examples = 0
        for name, layer in layers:
            mean, var = running_statistics(layer)
            wide = [t.detach().to(accumulator_dtype(t.device), copy=True) for t in (mean, var)]
            self._start[name] = _Layer(Moments(torch.ones_like(wide[0]), *wide), mean, var)

    @property
    def seen(self) -> Mapping[str, Moments]:
        """What was measured at the layers that were used."""
        return self._seen

    @contextmanager
    def attached(self) -> Generator[None]:
        """The hooks are on the layers within this block, and off after it, whatever happens."""
        handles = [layer.register_forward_pre_hook(self._hook(name), with_kwargs=True) for name, layer in self._layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x, mask = input_and_mask(args, kwargs)
            here = threading.get_ident() == self._thread  # another thread may be serving this model
            if here and isinstance(layer, BatchNormLayer) and x is not None:
                self._mix(name, layer, x, mask)

        return before

    def _mix(self, name: str, layer: BatchNormLayer, x: Tensor, mask: Tensor | None) -> None:
        with torch.no_grad():
            fresh = Moments.of(x.detach(), channel_axis(layer), weight=mask)
            known = self._seen.get(name)
            seen = self._seen[name] = fresh if known is None else known.merge(fresh)
            start = self._start[name]
            mixed = self._rule(name, start.stored, seen, self.examples)
            start.mean.copy_(mixed.mean)
            start.var.copy_(mixed.m2)


def mix(stored: Moments, seen: Moments, share: float) -> Moments:
    """The stored statistics as `share` of the mix, by `Moments.mix`, with unbiased variances on both sides.

    Returns:
        Moments of count 1, so that m2 is the mixed variance. A variance that is not defined by what was seen (a single
        value per channel) stays the stored one.

    Example:
        >>> stored = Moments(torch.ones(1), torch.tensor([0.0]), torch.tensor([1.0]))
        >>> mixed = mix(stored, Moments.of(torch.tensor([[2.0], [4.0]])), share=0.25)
        >>> mixed.mean.item(), mixed.m2.item()
        (2.25, 1.75)
    """
    variance = seen.variance(unbiased=True)
    variance = torch.where(torch.isnan(variance), stored.m2, variance)
    unbiased = Moments(seen.count, seen.mean, variance * seen.count)
    mixed = stored.mix(unbiased, prior=share, examples=1 - share)
    return Moments(torch.ones_like(mixed.count), mixed.mean, mixed.m2 / mixed.count)


def shares(share: Share) -> Rule:
    """The mix in which what is stored has the weight `share(name, examples)`."""
    return lambda name, stored, seen, examples: mix(stored, seen, share(name, examples))


def stored_share(prior: float) -> Share:
    """a = N / (N + n): the stored statistics count as N examples (images, not pixels) against the n seen.

    Example:
        >>> stored_share(16)("any layer", 64)
        0.2
    """

    def share(_: str, examples: int) -> float:
        return prior / (prior + examples)

    return share
