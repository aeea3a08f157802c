"""Commit: the operations that write running statistics, or what is held back for them. Nothing else writes any.

A forward that runs again within a backward is activation checkpointing's: it measures again and commits nothing. That
is asked inside of these operations, when they run; in a compiled graph they are opaque ops, so that it is asked there.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from steadynorm.errors import ArgumentError
from steadynorm.ops.backends import committing, only_reference
from steadynorm.ops.merging import merge
from steadynorm.ops.reference import Statistics
from steadynorm.ops.tables import as_table
from steadynorm.ops.writable import committable

__all__ = ["Running", "commit", "hold", "opaque", "recomputing", "updated"]


class Running(NamedTuple):
    """The buffers that remember: what `commit` writes.

    Attributes:
        mean: (C,).
        var: (C,), unbiased.
        num_batches_tracked: Counts the committed batches; needed where momentum is None.
        rejected: Counts the rejected batches.
    """

    mean: Tensor
    var: Tensor
    num_batches_tracked: Tensor | None = None
    rejected: Tensor | None = None


def recomputing() -> bool:
    """Whether a backward is running on this thread: then a forward is one that activation checkpointing runs again."""
    return torch._C._current_graph_task_id() != -1  # pyright: ignore


def opaque() -> bool:
    """Whether a custom op must stand for what is done here: in a compiled graph, and under a dispatch mode.

    Selective checkpointing is such a mode. It pairs the ops of a forward with those of the one that it runs again, the
    n-th of a kind with the n-th, so that a commit's own arithmetic, which is done once, must not be among them.
    """
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0  # pyright: ignore


def commit(
    running: Running, statistics: Statistics, momentum: float | None, *, weighted: bool = False
) -> Tensor | bool:
    """Moves the running statistics towards a batch's, in place: r <- (1 - momentum) r + momentum m.

    The variance committed is the unbiased one, m2 / (n - 1). A batch of n < 2 has none and changes nothing, nor does
    an empty one: weights are repetitions, and those that sum to about 1 would blow it up. A batch whose mean or
    variance is not finite, or not finite any more in the buffers' dtype, is rejected whole: the running statistics
    stay, and `rejected` counts it. Away from the CPU no value is read by the host. While a backward runs, nothing is
    written at all (see `recomputing`).

    Args:
        running: Changed in place.
        statistics: The batch's count, mean and m2.
        momentum: The share of the new batch in [0, 1]; None for the cumulative average, 1 / (number of batches).
        weighted: n is a sum of sample weights: then 0 < n < 2 is a mistake, and rejected, not merely a small batch.

    Returns:
        Whether the batch was rejected: a bool where the host could look for free, else a boolean scalar on the device;
        False where a compiled graph does it later.
    """
    if torch.compiler.is_exporting():  # no op of ours: a program may run where this package is not
        _commit_queued(running, statistics, momentum, weighted)
        return False
    if _known_to_recompute():
        return False
    with torch.no_grad():
        if opaque():
            torch.ops.steadynorm.commit_(*running, *(t.detach() for t in statistics), momentum, weighted)
            return False
        return _commit(running, _values(statistics), momentum, weighted)


def hold(held: Statistics, statistics: Statistics, rejected: Tensor | None = None) -> Tensor | bool:
    """Merges a batch's statistics into those held back for a later commit, in place; one not finite is rejected.

    Args:
        held: Changed in place.
        statistics: The batch's.
        rejected: Counts the rejected batches, in place.

    Returns:
        Whether the batch was rejected, as `commit` does.
    """
    if _known_to_recompute():
        return False
    with torch.no_grad():
        if opaque():
            torch.ops.steadynorm.hold_(*held, rejected, *(t.detach() for t in statistics))
            return False
        return _hold(held, _values(statistics), rejected)


def updated(
    running: Running, statistics: Statistics, momentum: float | None, *, weighted: bool = False
) -> tuple[Running, Tensor]:
    """What `commit` would write, as new tensors, and whether the batch was rejected; without a branch on any value."""
    statistics = Statistics(*(t.detach() for t in statistics))
    known = statistics.count >= 2
    mean = statistics.mean.to(running.mean.dtype)
    variance = (statistics.m2 / torch.where(known, statistics.count - 1, 1.0)).to(running.var.dtype)
    usable, finite = known.all(), (torch.isfinite(mean) & torch.isfinite(variance)).all()
    accepted, refused = usable & finite, usable & ~finite
    if weighted:
        refused = refused | (~usable & (statistics.count > 0).any())
    share = torch.full_like(usable, 1.0 if momentum is None else momentum, dtype=mean.dtype)
    if momentum is None:
        share = share / (_tracked(running) + 1)
    moved = [
        torch.lerp(buffer, torch.where(accepted, fresh, buffer), share.to(buffer.dtype))
        for buffer, fresh in ((running.mean, mean), (running.var, variance))
    ]
    counts = [
        None if counter is None else counter + happened
        for counter, happened in ((running.num_batches_tracked, accepted), (running.rejected, refused))
    ]
    return Running(moved[0], moved[1], counts[0], counts[1]), refused


def _known_to_recompute() -> bool:
    """In eager mode no op is called the second time: inside of another context it would be one that the first was not.

    Selective checkpointing refuses an op that it has not seen the first time, as after `no_commit` or `accumulate`.
    """
    return not torch.compiler.is_compiling() and recomputing()


def _values(statistics: Statistics) -> Statistics:
    """Without tangents: `no_grad` keeps graphs from being built, and does not concern forward-mode AD."""
    if torch.autograd.forward_ad._current_level < 0:  # pyright: ignore
        return statistics
    return Statistics(*(t.detach() for t in statistics))


def _commit(running: Running, statistics: Statistics, momentum: float | None, weighted: bool) -> Tensor | bool:
    if recomputing():
        return False
    look = _host_may_look(statistics) and not _is_transformed(running.mean)
    device = running.mean.device.type
    if (look or device != "cpu") and _is_memory(running.mean) and _is_memory(statistics.mean) and not only_reference():
        kernels = committing(device)
        if kernels is not None and committable(*running, statistics.mean, momentum):
            return kernels.commit(*running, as_table(statistics), momentum, weighted)
    return (_commit_now if look else _commit_queued)(running, statistics, momentum, weighted)


def _is_memory(t: Tensor) -> bool:
    """Whether this is memory, and what is done to it is not being traced: that must be torch's operations."""
    traced = torch._C._get_tracing_state() is not None  # pyright: ignore
    return not traced and type(t) is Tensor and not _is_transformed(t)


def _commit_queued(running: Running, statistics: Statistics, momentum: float | None, weighted: bool) -> Tensor:
    """For a device that runs behind the host: no value is waited for."""
    fresh, refused = updated(running, statistics, momentum, weighted=weighted)
    for buffer, value in zip(running, fresh, strict=True):
        if buffer is not None and value is not None:
            buffer.copy_(value)
    return refused


def _commit_now(running: Running, statistics: Statistics, momentum: float | None, weighted: bool) -> bool:
    """The same where the host may look: on the CPU a branch costs less than computing both sides of it."""
    count = statistics.count[0].item() if statistics.count.numel() else 0.0  # weights are per position: all are equal
    if count < 2:
        if weighted and count > 0 and running.rejected is not None:
            running.rejected.add_(1)
        return weighted and count > 0
    variance = statistics.m2 / (count - 1)
    if not (_fits(variance, running.var.dtype) and _fits(statistics.mean, running.mean.dtype)):
        if running.rejected is not None:
            running.rejected.add_(1)
        return True
    share = momentum if momentum is not None else 1 / (int(_tracked(running)) + 1)
    running.mean.lerp_(statistics.mean.to(running.mean.dtype), share)
    running.var.lerp_(variance.to(running.var.dtype), share)
    if running.num_batches_tracked is not None:
        running.num_batches_tracked.add_(1)
    return False


def _hold(held: Statistics, statistics: Statistics, rejected: Tensor | None) -> Tensor | bool:
    if recomputing():
        return False
    finite = (torch.isfinite(statistics.count) & torch.isfinite(statistics.mean) & torch.isfinite(statistics.m2)).all()
    batch = Statistics(*(torch.where(finite, t, 0) for t in statistics))
    for buffer, value in zip(held, merge(held, batch), strict=True):
        buffer.copy_(value)
    if rejected is not None:
        rejected.add_(~finite)
    return not bool(finite) if _host_may_look(statistics) else ~finite


def _host_may_look(statistics: Statistics) -> bool:
    """Whether reading a value waits for nothing; fake and transformed tensors say "cpu", but have no value to read."""
    mean = statistics.mean  # and not the count, which may be known from a shape and be no part of a transform
    return type(mean) is Tensor and mean.device.type == "cpu" and not _is_transformed(mean)


def _is_transformed(t: Tensor) -> bool:
    """Whether this stands for a tensor of a torch.func transform."""
    return torch._C._functorch.is_functorch_wrapped_tensor(t)  # pyright: ignore


def _fits(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether all are finite (a NaN compares false) and stay so in `dtype`."""
    return torch.linalg.vector_norm(values, math.inf).item() <= torch.finfo(dtype).max


def _tracked(running: Running) -> Tensor:
    if running.num_batches_tracked is None:
        raise ArgumentError("momentum=None is the average over all batches, which needs num_batches_tracked.")
    return running.num_batches_tracked


def _commit_op(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    rejected: Tensor | None,
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    momentum: float | None,
    weighted: bool,
) -> None:
    running = Running(running_mean, running_var, num_batches_tracked, rejected)
    _commit(running, Statistics(count, mean, m2), momentum, weighted)


def _hold_op(
    held_count: Tensor,
    held_mean: Tensor,
    held_m2: Tensor,
    rejected: Tensor | None,
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
) -> None:
    _hold(Statistics(held_count, held_mean, held_m2), Statistics(count, mean, m2), rejected)


def _returns_nothing(*tensors: object) -> None:
    """What the ops look like to a compiler."""


_library = torch.library.Library("steadynorm", "DEF")
_library.define(
    "commit_(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? num_batches_tracked, Tensor(d!)? rejected, "
    "Tensor count, Tensor mean, Tensor m2, float? momentum, bool weighted) -> ()"
)
_library.define(
    "hold_(Tensor(a!) held_count, Tensor(b!) held_mean, Tensor(c!) held_m2, Tensor(d!)? rejected, "
    "Tensor count, Tensor mean, Tensor m2) -> ()"
)
for _name, _op in (("commit_", _commit_op), ("hold_", _hold_op)):
    _library.impl(_name, _op, "CompositeExplicitAutograd")
    torch.library.register_fake(f"steadynorm::{_name}", _returns_nothing, lib=_library)
