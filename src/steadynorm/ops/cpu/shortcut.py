"""The training step of a plain layer on the CPU with nothing in between: eager mode's shortest way to the kernels.

What a step does follows from the shapes, strides, dtypes and settings that it is called with. Once they have passed
every check, a layer keeps a `Shortcut` for them, and steps that are called with the same go straight to the kernels.
"""

from typing import Any

import torch
from torch import Tensor, nn

from steadynorm.ops.autograd import differentiable_backward
from steadynorm.ops.backends import readable
from steadynorm.ops.cpu.backend import backward, backward_of, forward_of, partial_size, plan_for
from steadynorm.ops.cpu.call import Call
from steadynorm.ops.cpu.kernel import threads_for
from steadynorm.ops.cpu.pages import empty_like, is_large
from steadynorm.ops.reference import Operands, Statistics, Train

__all__ = ["Shortcut"]

_PLAIN = (Tensor, nn.Parameter)


class Shortcut:
    """One kind of step.

    Args:
        operands: What the step was called with that has passed the checks; without weights and mask.
        spec: Its settings.
    """

    def __init__(self, operands: Operands, spec: Train) -> None:
        x, weight, bias, residual, _, _ = operands
        self.spec, self.activation = spec, spec.activation
        self.shape, self.strides, self.dtype = x.shape, x.stride(), x.dtype
        self.residual = None if residual is None else residual.dtype
        affine = weight if weight is not None else bias
        self.affine = None if affine is None else affine.dtype
        self.channels = spec.layout.channels
        plan = plan_for(operands, spec)
        self.threads, self.tasks = plan.threads, plan.geometry.chunks * plan.geometry.parts
        read = plan.geometry
        self.forward = forward_of(read).bind(plan.kinds)
        # What is added last has the output's own gradient: its values are needed only to differentiate an activation.
        self.keeps_residual = residual is not None and spec.activation is not None
        kinds = plan.kinds if self.keeps_residual else plan.kinds._replace(added="")
        self.backward = backward_of(read).bind(kinds)
        self.call, self.at_once = plan.template, read.parts == 1 or plan.at_once
        self.partial = partial_size(read, spec, at_once=True)
        self.empty_like = empty_like if is_large(x) else torch.empty_like

    def fits(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> bool:
        """Whether these are what the checks have passed, as memory that kernels can read as it is."""
        if type(x) not in _PLAIN or x.shape != self.shape or x.stride() != self.strides or x.dtype != self.dtype:
            return False
        for t in (weight, bias):
            if t is not None and not (
                t.dtype == self.affine and type(t) in _PLAIN and t.numel() == self.channels and t.is_contiguous()
            ):
                return False
        if (residual is None) != (self.residual is None):
            return False
        if residual is not None and not (
            type(residual) in _PLAIN
            and residual.shape == self.shape
            and residual.stride() == self.strides
            and residual.dtype == self.residual
        ):
            return False
        return x.is_cpu and self.threads == threads_for(x.numel())

    def step(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """y, and the batch's statistics (3, C)."""
        table = torch.empty((3, self.channels), dtype=torch.float64)
        return _apply(x, weight, bias, residual, self, table), table


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        shortcut: Shortcut,
        table: Tensor,
    ) -> Tensor:
        y = shortcut.empty_like(x)
        call = Call.from_buffer_copy(shortcut.call)
        call.x, call.y, call.statistics = x.data_ptr(), y.data_ptr(), table.data_ptr()
        if weight is not None:
            call.weight = weight.data_ptr()
        if bias is not None:
            call.bias = bias.data_ptr()
        if residual is not None:
            call.residual = residual.data_ptr()
        call.tasks = shortcut.tasks
        if shortcut.partial:
            partial = torch.empty(shortcut.partial, dtype=torch.float64)
            call.partial = partial.data_ptr()
        shortcut.forward(call, shortcut.threads)
        ctx.shortcut = shortcut
        ctx.save_for_backward(x, weight, bias, residual if shortcut.keeps_residual else None, table)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        shortcut: Shortcut = ctx.shortcut
        x, weight, bias, residual, table = ctx.saved_tensors
        if torch.is_grad_enabled() or grad_y.stride() != shortcut.strides or not readable(grad_y):
            return _the_long_way(shortcut, grad_y, Operands(x, weight, bias, residual), table)
        call = Call.from_buffer_copy(shortcut.call)
        sums = torch.empty((2, shortcut.channels), dtype=torch.float64)
        grad_x = shortcut.empty_like(x)
        grad_weight = grad_bias = grad_residual = None
        call.x, call.grad_y, call.grad_x = x.data_ptr(), grad_y.data_ptr(), grad_x.data_ptr()
        call.statistics, call.sums = table.data_ptr(), sums.data_ptr()
        if weight is not None:
            grad_weight = torch.empty_like(weight)
            call.weight, call.grad_weight = weight.data_ptr(), grad_weight.data_ptr()
        if bias is not None:
            grad_bias = torch.empty_like(bias)
            call.bias, call.grad_bias = bias.data_ptr(), grad_bias.data_ptr()
        if residual is not None:
            grad_residual = shortcut.empty_like(residual)
            call.residual, call.grad_residual = residual.data_ptr(), grad_residual.data_ptr()
        call.tasks = shortcut.tasks
        if shortcut.partial:
            partial = torch.empty(shortcut.partial, dtype=torch.float64)
            call.partial = partial.data_ptr()
        shortcut.backward(call, shortcut.threads)
        if shortcut.residual is not None and not shortcut.keeps_residual:
            grad_residual = grad_y.to(shortcut.residual)
        return grad_x, grad_weight, grad_bias, grad_residual, None, None


# torch's own `apply` first looks for what a transform may have left behind; here none is active.
_apply: Any = super(torch.autograd.Function, _Step).apply  # pyright: ignore


def _the_long_way(shortcut: Shortcut, grad_y: Tensor, operands: Operands, table: Tensor) -> tuple[Tensor | None, ...]:
    """For a derivative of the derivative, and for gradients that kernels cannot read as they are."""
    if torch.is_grad_enabled():
        found = differentiable_backward((grad_y, None, None), operands, shortcut.spec)
    else:
        found = backward(grad_y, None, None, operands, Statistics(*table.unbind()), shortcut.spec)
    if shortcut.residual is not None and not shortcut.keeps_residual:
        found = found._replace(residual=grad_y.to(shortcut.residual))
    return *found, None, None
