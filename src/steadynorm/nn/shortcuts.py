"""A layer's shortcut: a plain training step on the CPU that is like the last one goes straight to the kernels.

The first step of a kind passes every check, and lays a shortcut for those like it. Whatever could make a step another
one is asked again each time.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steadynorm.ops import reference
from steadynorm.ops.backends import backend_for, cpu_committing, only_reference
from steadynorm.ops.commit import recomputing
from steadynorm.ops.layout import Layout
from steadynorm.ops.reference import Operands, Statistics, Train
from steadynorm.ops.writable import committable
from steadynorm.step import Settings, check_fit

if TYPE_CHECKING:
    from steadynorm.nn.base import BatchNorm

__all__ = ["lay_shortcut", "take_shortcut"]


def _is_plain(layer: "BatchNorm") -> bool:
    """Whether a training step of this layer measures, normalizes and commits, and nothing else."""
    return (
        layer.training
        and not only_reference()
        and not layer.frozen
        and layer.ghost_batch_size is None
        and layer._corrector is None  # pyright: ignore[reportPrivateUsage]
        and layer._group.group is None  # pyright: ignore[reportPrivateUsage]
        and not layer.domains
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None  # pyright: ignore
        and torch.autograd.forward_ad._current_level < 0  # pyright: ignore
        and torch._C._get_tracing_state() is None  # pyright: ignore
        and torch._C._len_torch_dispatch_stack() == 0  # pyright: ignore
    )


def take_shortcut(layer: "BatchNorm", x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | bool] | None:
    """The whole step, where the shortcut that the layer has fits; else None, and nothing is done.

    Returns:
        y, and whether the batch was refused by the running statistics.
    """
    shortcut = layer.shortcut
    if shortcut is None or not shortcut.at_once or not _is_plain(layer):
        return None
    # Through torch.nn's own dicts: as attributes they would cost as much as all the rest.
    parameters, buffers = layer.__dict__["_parameters"], layer.__dict__["_buffers"]
    if "weight" not in parameters or "bias" not in parameters:  # parametrized
        return None
    weight, bias, mean = parameters["weight"], parameters["bias"], buffers["running_mean"]
    if (
        not shortcut.fits(x, weight, bias, residual)
        or not _belong(shortcut.channels, mean, buffers["running_var"])
        or (shortcut.activation is not layer.activation and shortcut.activation != layer.activation)
        or shortcut.spec.eps != layer.eps
        or shortcut.laid_for != _asked(layer)
    ):
        return None
    if mean is not None and not layer.staleness.settled:
        layer.staleness.look(weight, mean, evaluating=False)
    y, table = shortcut.step(x, weight, bias, residual)
    return y, mean is not None and _remember(layer, mean, table)


def _asked(layer: "BatchNorm") -> tuple[object, ...]:
    """What the checks that a shortcut leaves out have looked at."""
    return layer.channel_dim, layer.num_features, layer.single_value


def _belong(channels: int, mean: Tensor | None, var: Tensor | None) -> bool:
    if mean is None or var is None:
        return mean is var
    return mean.shape == var.shape == (channels,) and mean.is_cpu and var.is_cpu


def _remember(layer: "BatchNorm", mean: Tensor, table: Tensor) -> Tensor | bool:
    buffers = layer.__dict__["_buffers"]
    var, tracked, rejected = buffers["running_var"], buffers["num_batches_tracked"], buffers["_rejected"]
    if (
        "remember" in layer.__dict__
        or var is None
        or not committable(mean, var, tracked, rejected, table, layer.momentum)
    ):
        return layer.remember(layer, None, Statistics(*table.unbind()), False)
    if recomputing():
        return False
    return cpu_committing().commit(mean, var, tracked, rejected, table, layer.momentum, weighted=False)


def lay_shortcut(
    layer: "BatchNorm", operands: Operands, layout: Layout, settings: Settings
) -> tuple[Tensor, Tensor | bool] | None:
    """Lays a shortcut for this step and those like it, where there is one, and takes it at once.

    The first step must go the same way as those after it: activation checkpointing compares what a forward saves with
    what it saves when run again.
    """
    layer.shortcut = None
    x, weight, bias, residual, _, _ = operands
    if not _is_plain(layer) or x.device.type != "cpu" or backend_for(operands) is reference:
        return None
    from steadynorm.ops.cpu.shortcut import Shortcut

    buffers = layer.__dict__["_buffers"]
    check_fit(x, layout, buffers["running_mean"], buffers["running_var"], weight, bias, residual)
    if not Shortcut.serves(operands) or not settings.eps >= 0:
        return None
    layer.shortcut = Shortcut(operands, Train(layout, settings.eps, settings.activation), _asked(layer))
    return take_shortcut(layer, x, residual)
