"""The training step as autograd sees it: keep x alone, first derivative in closed form, higher ones by the composite.

In eager mode `BatchNormTrain` saves its inputs and a few numbers per channel, nothing of x's size besides x itself.
Where an `autograd.Function` is not welcome (torch.func, forward-mode AD, a graph being compiled) the differentiable
composite of `reference` runs instead.
"""

from typing import Any

import torch
from torch import Tensor

from steadynorm.ops import reference
from steadynorm.ops.reference import Gradients, Statistics, Train

__all__ = ["train"]


class BatchNormTrain(torch.autograd.Function):
    """`reference.train` with its first derivative in closed form and all further ones through the composite."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        position_weight: Tensor | None,
        valid: Tensor | None,
        spec: Train,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, statistics = reference.train(x, weight, bias, residual, position_weight, valid, spec)
        ctx.spec = spec
        # What is added last has the output's own gradient: its values are needed only to differentiate an activation.
        ctx.added_last = None if residual is None or spec.activation is not None else residual.dtype
        kept = residual if ctx.added_last is None else None
        ctx.save_for_backward(x, weight, bias, kept, position_weight, valid, *statistics)
        ctx.mark_non_differentiable(statistics.count)
        ctx.set_materialize_grads(False)
        return y, statistics.count, statistics.mean, statistics.m2

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_y: Tensor | None, _grad_count: Tensor | None, grad_mean: Tensor | None, grad_m2: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weight, bias, residual, position_weight, valid, count, mean, m2 = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: a derivative of this derivative will be asked for
            found = _differentiable_backward(
                (grad_y, grad_mean, grad_m2), (x, weight, bias, residual), position_weight, valid, ctx.spec
            )
        else:
            found = reference.backward(
                grad_y, grad_mean, grad_m2,
                x, weight, bias, residual, position_weight, valid, Statistics(count, mean, m2), ctx.spec,
            )  # fmt: skip
        if ctx.added_last is not None and grad_y is not None:
            g = grad_y if valid is None else torch.where(valid, grad_y, 0)
            found = found._replace(residual=g.to(ctx.added_last))
        return *found, None, None, None


def _differentiable_backward(
    grads: tuple[Tensor | None, ...],
    inputs: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    position_weight: Tensor | None,
    valid: Tensor | None,
    spec: Train,
) -> Gradients:
    """The same derivative, as a graph: autograd through the composite, which can be differentiated again.

    The inputs are aliased first: where one depends on another (a residual computed from x), autograd would otherwise
    follow that path as well and count it twice.
    """
    x, weight, bias, residual = (None if t is None else t.view_as(t) for t in inputs)
    assert x is not None  # noqa: S101 (x is a Tensor by the signature; the comprehension hides it from the type checker)
    y, statistics = reference.train(x, weight, bias, residual, position_weight, valid, spec)
    outputs = (y, statistics.mean, statistics.m2)
    reached = [(out, g) for out, g in zip(outputs, grads, strict=True) if g is not None and out.requires_grad]
    wanted = [t for t in (x, weight, bias, residual) if t is not None and t.requires_grad]
    if not (reached and wanted):
        return Gradients(None, None, None, None)
    found = iter(
        torch.autograd.grad(
            [out for out, _ in reached], wanted, [g for _, g in reached], create_graph=True, allow_unused=True
        )
    )
    aliases = (x, weight, bias, residual)
    return Gradients(*(next(found) if t is not None and t.requires_grad else None for t in aliases))


def _composite_is_needed() -> bool:
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore
        or torch.autograd.forward_ad._current_level >= 0  # pyright: ignore
    )


def train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    position_weight: Tensor | None,
    valid: Tensor | None,
    spec: Train,
) -> tuple[Tensor, Statistics]:
    """Measure and normalize with gradients to x, weight, bias and residual; see `reference.train` for the arguments."""
    if _composite_is_needed():
        return reference.train(x, weight, bias, residual, position_weight, valid, spec)
    y, count, mean, m2 = BatchNormTrain.apply(x, weight, bias, residual, position_weight, valid, spec)  # pyright: ignore
    return y, Statistics(count, mean, m2)
