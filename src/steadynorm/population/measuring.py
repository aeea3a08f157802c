"""Batch norms that normalise by the batch and hand its statistics to a pool, instead of to their running ones."""

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm  # pyright: ignore[reportPrivateUsage]

from steadynorm.moments import Moments
from steadynorm.nn.base import BatchNorm
from steadynorm.nn.staleness import Staleness
from steadynorm.ops.commit import Running
from steadynorm.ops.reference import Statistics
from steadynorm.population.pools import Key, Pool, running

__all__ = ["measuring", "unsuspicious"]

_PLAIN: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@contextmanager
def measuring(
    layers: Mapping[str, TorchBatchNorm], pools: Mapping[Key, Pool], seen: Callable[[str], None]
) -> Generator[None]:
    """Within it these layers normalise each batch by itself, its statistics go to their pools, and `seen` is told."""
    with ExitStack() as stack:
        for name, layer in layers.items():
            way = _ours if isinstance(layer, BatchNorm) else _by_twin if type(layer) in _PLAIN else _by_stand_in
            stack.enter_context(way(name, layer, pools, seen))  # pyright: ignore[reportArgumentType]
        yield


@contextmanager
def _ours(name: str, layer: BatchNorm, pools: Mapping[Key, Pool], seen: Callable[[str], None]) -> Generator[None]:
    """In train mode, where the step has measured the batch anyway (masks and weights included)."""

    def remember(_: BatchNorm, domain: str | None, statistics: Statistics, weighted: bool) -> bool:
        into[domain].add(statistics)
        seen(name)
        return False

    into = {key.domain: pool for key, pool in pools.items() if key.name == name}
    training, single_value, group = layer.training, layer.single_value, layer.process_group
    corrector = layer._corrector  # pyright: ignore[reportPrivateUsage]
    layer.enter(remember)
    try:
        # Ranks may have different numbers of batches, so that none waits for another's before the end.
        layer.training, layer.single_value, layer.process_group = True, "beta", None
        layer._corrector, layer.shortcut = None, None  # pyright: ignore[reportPrivateUsage]
        yield
    finally:
        layer.training, layer.single_value, layer.process_group = training, single_value, group
        layer._corrector, layer.shortcut = corrector, None  # pyright: ignore[reportPrivateUsage]
        layer.leave(remember)


class _Twin(BatchNorm):
    """A layer of ours in the place of one of `torch.nn`: it reads a batch once to measure and normalise it, also where
    SyncBatchNorm would wait for other ranks. It shares γ and β.
    """

    _dims = (2, 3, 4, 5)

    def __init__(self, of: TorchBatchNorm) -> None:
        mean = running(of, None).mean
        super().__init__(of.num_features, of.eps, affine=False, device=mean.device, dtype=mean.dtype)
        for name in ("weight", "bias"):
            if name in of._parameters:
                self._parameters[name] = of._parameters[name]
            else:  # a parametrization's
                del self._parameters[name]
                self.__dict__[name] = getattr(of, name)


@contextmanager
def _by_twin(
    name: str, layer: TorchBatchNorm, pools: Mapping[Key, Pool], seen: Callable[[str], None]
) -> Generator[None]:
    twin, before = _Twin(layer), layer.__dict__.get("forward")
    with _ours(name, twin, pools, seen):
        layer.__dict__["forward"] = twin.forward
        try:
            yield
        finally:
            del layer.__dict__["forward"]
            if before is not None:
                layer.__dict__["forward"] = before


@contextmanager
def _by_stand_in(
    name: str, layer: TorchBatchNorm, pools: Mapping[Key, Pool], seen: Callable[[str], None]
) -> Generator[None]:
    """A layer with a forward of its own, in evaluation, by stand-in statistics that are those of the batch."""
    mean, var, _, _ = running(layer, None)
    stand_in = Running(torch.zeros_like(mean), torch.ones_like(var))
    pool = pools[Key(name, None)]

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("input")
        if isinstance(x, Tensor):
            batch = Moments.of(x.detach())
            pool.add(batch)
            stand_in.mean.copy_(batch.mean)
            stand_in.var.copy_(batch.m2 / batch.count)  # biased, as a batch is normalised
            seen(name)

    handle = layer.register_forward_pre_hook(before, with_kwargs=True)
    training = layer.training
    try:
        layer.training = False
        layer.running_mean, layer.running_var = stand_in.mean, stand_in.var
        yield
    finally:
        layer.running_mean, layer.running_var, layer.training = mean, var, training
        handle.remove()


@contextmanager
def unsuspicious(layers: Mapping[str, TorchBatchNorm]) -> Generator[None]:
    """Evaluating by statistics that do not fit averaged weights is no cause for a warning here: they are replaced."""
    watched = [(layer, layer.staleness.settled) for layer in layers.values() if isinstance(layer, BatchNorm)]
    for layer, _ in watched:
        layer.staleness.settled = True
    try:
        yield
    except BaseException:
        for layer, settled in watched:
            layer.staleness.settled = settled
        raise
    for layer, _ in watched:
        layer.staleness = Staleness(layer.weight, layer.running_mean)
