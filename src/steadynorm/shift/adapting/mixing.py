"""Writes a mix of stored and freshly measured statistics into a model's batch norms, and can take it back."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from steadynorm.moments import Moments
from steadynorm.nn.base import BatchNorm
from steadynorm.ops.layout import accumulator_dtype
from steadynorm.shift.layers import BatchNormLayer, channel_axis, running_statistics

__all__ = ["Layers", "Mixer", "Snapshot", "evaluating", "is_frozen", "mix", "stored_share"]

Layers: TypeAlias = Sequence[tuple[str, BatchNormLayer]]


class Snapshot:
    """Tensors as they were, bit for bit, to be written back into the very same tensors."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._kept = [(tensor, tensor.detach().clone()) for tensor in tensors]

    def restore(self) -> None:
        """Writes them back."""
        with torch.no_grad():
            for tensor, before in self._kept:
                tensor.copy_(before)


def is_frozen(layer: BatchNormLayer) -> bool:
    """Whether `steadynorm.freeze_` has asked that this layer's statistics stay."""
    return isinstance(layer, BatchNorm) and layer.frozen


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """The model in evaluation mode; each module's own mode, and the state of chance, come back in the end."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


class _Layer(NamedTuple):
    """Where one layer starts from: its stored mean and (unbiased) variance, as Moments of count 1."""

    stored: Moments
    mean: Tensor
    var: Tensor


class Mixer:
    """Hooks that measure each layer's input and let the layer normalise by the mix at once, layer after layer.

        μ = a μ_stored + (1 - a) μ_seen        σ² = a σ²_stored + (1 - a) σ²_seen       (both σ² unbiased)

    A deeper layer is thus measured on what the mixed layers before it put out, as it will be when the model serves.
    Several batches are pooled: what was seen is merged over all of them up to now (law of total variance), not
    averaged batch by batch.

    Args:
        layers: Whose buffers are written, with their names.
        share: a, given a layer's name and how many examples were seen.
    """

    def __init__(self, layers: Layers, share: Callable[[str, int], float]) -> None:
        self._layers, self._share = layers, share
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
            x = args[0] if args else kwargs.get("input")
            if isinstance(layer, nn.modules.batchnorm._BatchNorm) and isinstance(x, Tensor):  # pyright: ignore
                self._mix(name, layer, x, kwargs.get("mask"))

        return before

    def _mix(self, name: str, layer: BatchNormLayer, x: Tensor, mask: Tensor | None) -> None:
        with torch.no_grad():
            fresh = Moments.of(x.detach(), channel_axis(layer), weight=mask)
            known = self._seen.get(name)
            seen = self._seen[name] = fresh if known is None else known.merge(fresh)
            start = self._start[name]
            mixed = mix(start.stored, seen, self._share(name, self.examples))
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


def stored_share(prior: float) -> Callable[[str, int], float]:
    """a = N / (N + n): the stored statistics count as N examples (images, not pixels) against the n seen.

    Example:
        >>> stored_share(16)("any layer", 64)
        0.2
    """

    def share(_: str, examples: int) -> float:
        return prior / (prior + examples)

    return share
