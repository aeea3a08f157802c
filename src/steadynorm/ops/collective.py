"""Sums over the ranks of a process group: once as plain numbers, once as autograd sees them.

Both go through one operation that torch takes as it is, so that a lost rank is told the same way from eager code, from
a backward and from a compiled graph. It is registered as one with an effect: a compiler that drops the sum wherever
its result is not used, as on a rank whose batch is empty, would leave the other ranks waiting for it. torch 2.13 cannot
run such an operation again within a compiled graph: checkpoint the compiled function, do not compile the checkpointed.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._library.effects import EffectType  # pyright: ignore[reportPrivateImportUsage]

from steadynorm.errors import ArgumentError, DistributedError, ModelError
from steadynorm.ops import rollcall

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work

__all__ = ["differentiable_sum_over_ranks", "sum_over_ranks", "world_size"]

_LOOK_EVERY = timedelta(seconds=2)  # how long to wait in a collective before asking whether it has failed elsewhere


def world_size(group: ProcessGroup) -> int:
    """The number of ranks in `group`.

    Raises:
        ArgumentError: `group` is what `torch.distributed.new_group` returns to a process that is not in it.
    """
    if isinstance(group, int):
        raise ArgumentError(
            "this process is not one of the process group's ranks. Call the layer on the group's ranks alone, or pass "
            "each process the group that it is in."
        )
    return group.size()


def sum_over_ranks(t: Tensor, group: ProcessGroup, what: str) -> Tensor:
    """Σ over the ranks of t, a new tensor and the same one on every rank; not recorded by autograd.

    Args:
        t: Of one shape, dtype and kind of device on all ranks; not changed.
        group: Whose ranks; all of them must call this, in the same order.
        what: What is being done, for the error message: "merging the batch's statistics".

    Raises:
        DistributedError: The sum failed. Where a rank has gone, the message names it; this takes up to a minute.
    """
    return torch.ops.steadynorm.sum_over_ranks(t.detach(), group.group_name, what)


def differentiable_sum_over_ranks(t: Tensor, group: ProcessGroup) -> Tensor:
    """The same as a part of autograd's graph, to any order, for torch.func and for torch.compile.

    What is minimised is the sum of the ranks' losses: the gradient of a sum over the ranks is the sum over the ranks of
    the gradients.

    Raises:
        ModelError: Under `torch.export`, which keeps no derivative but those of ops: the sum would have none.
    """
    if torch.compiler.is_exporting():
        raise ModelError(
            "a batch norm in training that is merged over the ranks of a process group cannot be exported: the program "
            "would lose what the other ranks add to its gradients. Export it in evaluation, or without the group: "
            "steadynorm.sync_(model, None)."
        )
    return _apply(t, group.group_name)


def _apply(t: Tensor, group_name: str) -> Tensor:
    kind = _SumOverRanks if torch.compiler.is_compiling() else _SumOverRanksWithTangent
    return kind.apply(t, group_name)  # pyright: ignore


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(t: Tensor, group_name: str) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.ops.steadynorm.sum_over_ranks(t, group_name, "merging the batch's statistics")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
        ctx.group_name = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _apply(grad, ctx.group_name), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int | None]:
        return _apply(*args), in_dims[0]


class _SumOverRanksWithTangent(_SumOverRanks):
    """For forward-mode AD; apart, because torch.compile refuses a Function that has a `jvp`."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _group_name: None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _apply(tangent, ctx.group_name)


def _sum_over_ranks(t: Tensor, group_name: str, what: str) -> Tensor:
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _resolve_process_group  # pyright: ignore

    try:
        group = _resolve_process_group(group_name)  # pyright: ignore[reportArgumentType] (a str under another name)
    except (RuntimeError, LookupError, ValueError) as error:
        raise DistributedError(
            f"{what} over the ranks failed: the process group of this forward was destroyed before its backward."
        ) from error
    total = t.clone(memory_format=torch.contiguous_format)
    try:
        work = dist.all_reduce(total, op=dist.ReduceOp.SUM, group=group, async_op=True)
        if work is not None:
            _wait(work, group, total.device)
    except RuntimeError as error:
        raise DistributedError(f"{what} over the ranks failed. {rollcall.call(group)} ({error})") from error
    return total


def _wait(work: Work, group: ProcessGroup, device: torch.device) -> None:
    """Waits for the sum; on the CPU it looks now and then whether it has failed on another rank.

    On other devices waiting is only queued, and the backend itself watches over its ranks.
    """
    while device.type == "cpu":
        try:
            work.wait(_LOOK_EVERY)
        except RuntimeError:
            if work.is_completed():
                break  # and no time-out: let it be told below
        else:
            return
        called = rollcall.is_called(group)
        if called:
            raise RuntimeError("it had failed on another rank")
        if called is None:
            break  # there will be nothing to learn from later looks either
    work.wait()


def _without_data(t: Tensor, _group_name: str, _what: str) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


_library = torch.library.Library("steadynorm", "FRAGMENT")
_library.define("sum_over_ranks(Tensor t, str group_name, str what) -> Tensor")
_library.impl("sum_over_ranks", _sum_over_ranks, "CompositeExplicitAutograd")
_library._register_effectful_op("steadynorm::sum_over_ranks", EffectType.ORDERED)  # pyright: ignore[reportPrivateUsage]
torch.library.register_fake("steadynorm::sum_over_ranks", _without_data, lib=_library)
