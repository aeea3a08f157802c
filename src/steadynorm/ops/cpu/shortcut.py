"""The training step of a plain layer on the CPU with nothing in between: eager mode's shortest way to the kernels.

What a step does follows from the shapes, strides, dtypes and settings that it is called with. Once they have passed
every check, a layer keeps a `Shortcut` for them, and steps that are called with the same go straight to the kernels.
"""

from typing import Any

import torch
from torch import Tensor, nn

from steadynorm.activations import Activation
from steadynorm.ops.autograd import differentiable_backward
from steadynorm.ops.backends import readable
from steadynorm.ops.cpu.backend import (
    backward,
    backward_of,
    computing_dtype,
    forward_of,
    partial_size,
    plan_for,
    way_of,
)
from steadynorm.ops.cpu.bits import flags, words_for
from steadynorm.ops.cpu.call import BENT, KEPT, Call
from steadynorm.ops.cpu.geometry import dense
from steadynorm.ops.cpu.kernel import threads_for
from steadynorm.ops.cpu.pages import empty_like, is_large
from steadynorm.ops.reference import Operands, Statistics, Train

__all__ = ["Shortcut", "way_after_residual"]

_PLAIN = (Tensor, nn.Parameter)


def way_after_residual(activation: Activation | None, dtype: torch.dtype) -> tuple[str, dict[str, float]]:
    """As `way_of`, for a layer that adds a residual before: a kink is kept in bits, whatever else it could be."""
    if activation is None:
        return way_of(None, dtype, weighted=False)
    way, numbers = way_of(activation, dtype, weighted=True)  # the way that has a slope and a cap
    return (KEPT if way == BENT else way), numbers


class Shortcut:
    """One kind of step.

    Args:
        operands: What the step was called with that has passed the checks; without weights and mask, and such as
            `serves`.
        spec: Its settings.
        laid_for: Whatever else the layer must ask for again; compared by the layer.
    """

    @staticmethod
    def serves(operands: Operands) -> bool:
        """Whether kernels can read these as they are."""
        x, weight, bias, residual, _, _ = operands
        computed = computing_dtype(x)
        return (
            dense(x)
            and all(t is None or t.dtype == computed for t in (weight, bias))
            and (residual is None or residual.dtype in (x.dtype, computed))
        )

    def __init__(self, operands: Operands, spec: Train, laid_for: tuple[object, ...] = ()) -> None:
        x, residual = operands.x, operands.residual
        self.spec, self.activation, self.laid_for = spec, spec.activation, laid_for
        self.shape, self.strides, self.dtype = x.shape, x.stride(), x.dtype
        self.residual = None if residual is None else residual.dtype
        self.affine = computing_dtype(x)
        self.channels = spec.layout.channels
        plan = plan_for(operands, spec)
        self.threads, self.tasks = plan.threads, plan.geometry.chunks * plan.geometry.parts
        read = plan.geometry
        kinds, self.call, self.bits = plan.kinds, plan.template, 0
        # What is added last has the output's own gradient: its values are needed only to differentiate an activation,
        # and where that is straight but for its kinks, a bit for each.
        self.adds_last = residual is not None and spec.activation is None
        way, numbers = way_after_residual(spec.activation, x.dtype)
        if residual is not None and way == KEPT:
            self.bits, kinds = words_for(read, self.channels), kinds._replace(activation=KEPT)
            self.call = Call.from_buffer_copy(plan.template)
            self.call.slope, self.call.cap = numbers["slope"], numbers["cap"]
        self.keeps_residual = residual is not None and not (self.adds_last or self.bits)
        self.forward = forward_of(read).bind(kinds)
        self.backward = backward_of(read).bind(kinds._replace(added="") if self.adds_last else kinds)
        self.geometry, self.at_once = read, read.parts == 1 or plan.at_once
        self.partial = partial_size(read, spec, at_once=True)
        self.empty_like = empty_like if is_large(x) else torch.empty_like

    def fits(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> bool:
        """Whether these are what the checks have passed, as memory that kernels can read as it is."""
        if type(x) not in _PLAIN or x.shape != self.shape or x.stride() != self.strides or x.dtype != self.dtype:
            return False
        for t in (weight, bias):
            if t is not None and not (
                t.dtype == self.affine
                and type(t) in _PLAIN
                and t.is_cpu
                and t.numel() == self.channels
                and t.is_contiguous()
                and not t.is_neg()
            ):
                return False
        if (residual is None) != (self.residual is None):
            return False
        if residual is not None and not (
            type(residual) in _PLAIN
            and residual.is_cpu
            and not residual.is_neg()
            and not residual._is_zerotensor()  # pyright: ignore
            and residual.shape == self.shape
            and residual.stride() == self.strides
            and residual.dtype == self.residual
        ):
            return False
        if not x.is_cpu or x.is_neg() or x._is_zerotensor():  # pyright: ignore
            return False
        return self.threads == threads_for(x.numel())

    def has_back(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, kept: Tensor | None) -> bool:
        """Whether saved tensors are as they were: hooks may have brought them back in other memory."""
        as_kept = kept is None or (
            (kept.is_contiguous() if self.bits else kept.stride() == self.strides)
            and kept.dtype == (torch.int64 if self.bits else self.residual)
            and kept.is_cpu
        )
        return (
            as_kept
            and x.stride() == self.strides
            and x.dtype == self.dtype
            and x.is_cpu
            and all(t is None or (t.is_contiguous() and t.is_cpu and t.dtype == self.affine) for t in (weight, bias))
        )

    def step(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """y, and the batch's statistics (3, C)."""
        table = torch.empty((3, self.channels), dtype=torch.float64, device="cpu")
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
            partial = torch.empty(shortcut.partial, dtype=torch.float64, device="cpu")
            call.partial = partial.data_ptr()
        kept = residual if shortcut.keeps_residual else None
        if shortcut.bits:
            kept = torch.empty(shortcut.bits, dtype=torch.int64, device="cpu")
            call.bits = kept.data_ptr()
        shortcut.forward(call, shortcut.threads)
        ctx.shortcut = shortcut
        ctx.save_for_backward(x, weight, bias, kept, table)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        shortcut: Shortcut = ctx.shortcut
        x, weight, bias, kept, table = ctx.saved_tensors
        straight = grad_y.stride() == shortcut.strides and readable(grad_y) and shortcut.has_back(x, weight, bias, kept)
        if torch.is_grad_enabled() or not straight:
            return _the_long_way(shortcut, grad_y, Operands(x, weight, bias, kept), table)
        call = Call.from_buffer_copy(shortcut.call)
        sums = torch.empty((2, shortcut.channels), dtype=torch.float64, device="cpu")
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
        if kept is not None:
            if shortcut.bits:
                call.bits = kept.data_ptr()
            else:
                call.residual = kept.data_ptr()
            grad_residual = shortcut.empty_like(x, dtype=shortcut.residual)
            call.grad_residual = grad_residual.data_ptr()
        call.tasks = shortcut.tasks
        if shortcut.partial:
            partial = torch.empty(shortcut.partial, dtype=torch.float64, device="cpu")
            call.partial = partial.data_ptr()
        shortcut.backward(call, threads_for(x.numel()))  # there may be fewer by now, as after a fork
        if shortcut.adds_last:
            grad_residual = grad_y.to(shortcut.residual)
        return grad_x, grad_weight, grad_bias, grad_residual, None, None


# torch's own `apply` first looks for what a transform may have left behind; here none is active.
_apply: Any = super(torch.autograd.Function, _Step).apply  # pyright: ignore


def _the_long_way(shortcut: Shortcut, grad_y: Tensor, operands: Operands, table: Tensor) -> tuple[Tensor | None, ...]:
    """For a derivative of the derivative, and for gradients that kernels cannot read as they are."""
    spec = shortcut.spec
    if shortcut.bits and operands.residual is not None:  # the activation has been told: what is left is an affine map
        rises = flags(operands.residual, shortcut.geometry, shortcut.shape, shortcut.strides)
        slope = shortcut.call.slope
        grad_y = torch.where(rises, grad_y, grad_y * slope if slope else 0)
        operands, spec = operands._replace(residual=None), spec._replace(activation=None)
    if torch.is_grad_enabled():
        found = differentiable_backward((grad_y, None, None), operands, spec)
    else:
        found = backward(grad_y, None, None, operands, Statistics(*table.unbind()), spec)
    if shortcut.adds_last or shortcut.bits:
        found = found._replace(residual=grad_y.to(shortcut.residual))
    return *found, None, None
