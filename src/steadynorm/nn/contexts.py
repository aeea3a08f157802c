"""When statistics are written, and whose they are: no_commit, accumulate, domain.

A context holds for the model, whichever thread runs it: threads that need different ones need models of their own.
"""

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn

from steadynorm.errors import ArgumentError, ModelError
from steadynorm.nn.remembering import Held, never
from steadynorm.nn.selection import required_layers

__all__ = ["accumulate", "domain", "no_commit"]


@contextmanager
def no_commit(model: nn.Module) -> Generator[None]:
    """Forwards in train mode that normalise by the batch and leave all running statistics as they are.

    For a second look at data that is not the training data: adversarial and virtual-adversarial steps, a teacher in
    train mode, gradient penalties, sharpness-aware second passes.

    Args:
        model: Its steadynorm batch norms are meant, in eager mode and compiled.

    Raises:
        ModelError: The model has none.

    Example:
        >>> import torch
        >>> from steadynorm import BatchNorm1d
        >>> layer = BatchNorm1d(2)
        >>> with no_commit(layer):
        ...     y = layer(torch.randn(8, 2))
        >>> layer.running_mean, layer.num_batches_tracked
        (tensor([0., 0.]), tensor(0))
    """
    layers = required_layers(model, "no_commit")
    for layer in layers:
        layer.enter(never)
    try:
        yield
    finally:
        for layer in layers:
            layer.leave(never)


@contextmanager
def accumulate(model: nn.Module) -> Generator[None]:
    """Several forwards, one commit: their Moments are merged, weighted by count, and committed at the end.

    For gradient accumulation: the running statistics then come out as those of the one large batch that the
    micro-batches make up, in one update (momentum and `num_batches_tracked` count one). Each forward still is
    normalised by its own batch: that part of a large batch only `process_group` or a real one can give. A batch that is
    not finite is counted (`rejected_batches`) and left out of the merge. If the block raises, nothing is committed.
    Blocks nest: an inner one's result is merged into the outer one's.

    Args:
        model: Its steadynorm batch norms are meant, in eager mode and compiled.

    Raises:
        ModelError: The model has none.

    Example:
        >>> import torch
        >>> from steadynorm import BatchNorm1d
        >>> layer, x = BatchNorm1d(1, momentum=1.0), torch.tensor([[3.0], [5.0], [8.0], [9.0], [11.0], [24.0]])
        >>> with accumulate(layer):
        ...     for part in x.split(2):
        ...         y = layer(part)
        >>> layer.running_mean.item(), round(layer.running_var.item(), 4), layer.num_batches_tracked.item()
        (10.0, 55.2, 1)
    """
    layers = [layer for layer in required_layers(model, "accumulate") if layer.tracks]
    held = [Held(layer) for layer in layers]
    for layer, hold in zip(layers, held, strict=True):
        layer.enter(hold)
    try:
        yield
    finally:
        for layer, hold in zip(layers, held, strict=True):
            layer.leave(hold)
    for layer, hold in zip(layers, held, strict=True):
        hold.release(layer)


@contextmanager
def domain(model: nn.Module, name: str) -> Generator[None]:
    """The forwards inside are of this domain: its running statistics (and γ, β with `domain_affine`) are used.

    Where activation checkpointing runs a forward again that depends on the domain (`domain_affine`, renorm,
    `single_value="running"`, frozen layers, evaluation), backward must run inside of the same domain, one backward for
    each: nothing else tells that second forward which one it is of. Outside of any it is an error, inside of another
    one the gradients are that one's.

    Args:
        model: Its layers that were built with `domains=` are meant; others go on as they are.
        name: One of their domains.

    Raises:
        ModelError: No layer has domains.
        ArgumentError: A layer does not know this domain; the message lists those it knows.

    Example:
        >>> import torch
        >>> from steadynorm import BatchNorm1d
        >>> layer = BatchNorm1d(1, momentum=1.0, domains=("photo", "sketch"))
        >>> with domain(layer, "sketch"):
        ...     y = layer(torch.tensor([[3.0], [5.0]]))
        >>> layer.running("photo").mean.item(), layer.running("sketch").mean.item()
        (0.0, 4.0)
    """
    layers = [layer for layer in required_layers(model, "domain") if layer.domains]
    if not layers:
        raise ModelError(
            'no batch norm of this model has domains: build them with domains=("photo", "sketch"), or leave '
            "`with domain(...)` out."
        )
    for layer in layers:
        if name not in layer.domains:
            raise ArgumentError(f"unknown domain {name!r}: {layer} knows {', '.join(map(repr, layer.domains))}.")
    for layer in layers:
        layer.enter_domain(name)
    try:
        yield
    finally:
        for layer in layers:
            layer.leave_domain(name)
