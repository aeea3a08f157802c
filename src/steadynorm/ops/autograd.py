"""The training step as autograd sees it: keep x alone, first derivative in closed form, higher ones by the composite.

In eager mode `BatchNormTrain` saves its inputs and a few numbers per channel, nothing of x's size besides x itself.
Where an `autograd.Function` is not welcome (torch.func, forward-mode AD, a graph being compiled) the differentiable
composite of `reference` runs instead.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steadynorm.ops import library, reference
from steadynorm.ops.backends import backend_for
from steadynorm.ops.collective import differentiable_sum_over_ranks, sum_over_ranks
from steadynorm.ops.layout import Layout
from steadynorm.ops.merging import merged
from steadynorm.ops.reference import Gradients, Operands, Statistics, Train

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "Correction",
    "composite_is_needed",
    "differentiable_backward",
    "measure",
    "normalize_by_constants",
    "over_ranks",
    "peeled",
    "train",
]

Correction = Callable[[Statistics, Tensor | None, Tensor | None], tuple[Tensor | None, Tensor | None]]


class BatchNormTrain(torch.autograd.Function):
    """The training step with its first derivative in closed form and all further ones through the composite.

    `given` are the statistics to normalise by, where they had to be known beforehand: those of several ranks, or those
    that a correction of weight and bias was made from. They still are functions of x: the derivative goes through them,
    unless `spec.constant` says otherwise, as in evaluation. Of an affine map whose γ learns nothing, x is not kept.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, given: Statistics | None, spec: Train, *tensors: Any
    ) -> tuple[Tensor, ...]:
        operands = Operands(*tensors)
        backend = backend_for(operands)
        if given is None:
            y, statistics = backend.train(operands, spec)
        else:
            y, statistics = backend.normalize_by(given, operands, spec), given
        ctx.spec = spec
        # What is added last has the output's own gradient: its values are needed only to differentiate an activation.
        added_last = operands.residual is not None and spec.activation is None
        ctx.added_last = operands.residual.dtype if operands.residual is not None and added_last else None
        kept = operands._replace(residual=None) if added_last else operands
        if spec.constant and spec.activation is None and not ctx.needs_input_grad[3]:
            kept = kept._replace(x=None)  # pyright: ignore[reportArgumentType]
        ctx.save_for_backward(*kept, *statistics)
        ctx.set_materialize_grads(False)
        if spec.constant:  # which may be the running statistics themselves, and must not become a part of the graph
            return (y,)
        ctx.mark_non_differentiable(statistics.count)
        return y, statistics.count, statistics.mean, statistics.m2

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_y: Tensor | None, *grad_statistics: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        _, grad_mean, grad_m2 = grad_statistics or (None, None, None)
        tensors: tuple[Any, ...] = ctx.saved_tensors
        count, mean, m2 = tensors[6:]
        operands = Operands(*tensors[:6])
        if tensors[0] is None and grad_y is not None:  # no value of x matters: any tensor of its shape will do
            operands = operands._replace(x=grad_y)
        if torch.is_grad_enabled():  # create_graph=True: a derivative of this derivative will be asked for
            given = Statistics(count, mean, m2) if ctx.spec.constant else None
            found = differentiable_backward((grad_y, grad_mean, grad_m2), operands, ctx.spec, given)
        else:
            summed = None
            wanted_by_x = ctx.needs_input_grad[2]  # or nobody asks what the other ranks pulled
            if ctx.spec.group is not None and wanted_by_x:
                summed = partial(sum_over_ranks, group=ctx.spec.group, what="summing the batch's gradients")
            statistics = Statistics(count, mean, m2)
            backward = backend_for(operands).backward
            found = backward(grad_y, grad_mean, grad_m2, operands, statistics, ctx.spec, summed)
        if ctx.added_last is not None and grad_y is not None:
            g = grad_y if operands.valid is None else torch.where(operands.valid, grad_y, 0)
            found = found._replace(residual=g.to(ctx.added_last))
        return None, None, *found, None, None


def differentiable_backward(
    grads: tuple[Tensor | None, ...], operands: Operands, spec: Train, given: Statistics | None = None
) -> Gradients:
    """The same derivative, as a graph: autograd through the composite, which can be differentiated again.

    `given` are statistics that are constants. The inputs are aliased first: where one depends on another (a residual
    computed from x), autograd would otherwise follow that path as well and count it twice.
    """
    x = operands.x.view_as(operands.x)
    weight, bias, residual = (None if t is None else t.view_as(t) for t in operands[1:4])
    aliased = operands._replace(x=x, weight=weight, bias=bias, residual=residual)
    if given is None:
        y, statistics = _composite(aliased, spec, None)
    else:
        y, statistics = reference.normalize_by(given, aliased, spec), given
    aliases = aliased[:4]
    outputs = (y, statistics.mean, statistics.m2)
    reached = [(out, g) for out, g in zip(outputs, grads, strict=True) if g is not None and out.requires_grad]
    wanted = [t for t in aliases if t is not None and t.requires_grad]
    if not (reached and wanted):
        return Gradients(None, None, None, None)
    found = iter(
        torch.autograd.grad(
            [out for out, _ in reached], wanted, [g for _, g in reached], create_graph=True, allow_unused=True
        )
    )
    return Gradients(*(next(found) if t is not None and t.requires_grad else None for t in aliases))


def composite_is_needed() -> bool:
    """Whether this runs where an `autograd.Function` is not welcome: a graph being made, torch.func, forward AD."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None  # pyright: ignore
        or torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore
        or torch.autograd.forward_ad._current_level >= 0  # pyright: ignore
    )


def peeled(t: Tensor) -> Tensor:
    """What is inside of the wrappers of torch.func's derivatives; it may still be `vmap`'s."""
    functorch = torch._C._functorch  # pyright: ignore
    while not torch.compiler.is_compiling() and functorch.is_gradtrackingtensor(t):  # which a compiler cannot trace
        t = functorch.get_unwrapped(t)
    return t


class _MergedOverRanks(torch.autograd.Function):
    """`merged` for a compiled graph, with one sum over the ranks in backward.

        dL/dμ_r = n_r / n Σ g_μ + 2 n_r (μ_r - μ) Σ g_m2      dL/dm2_r = Σ g_m2      Σ: over the ranks

    Left to autograd, the two sums of the forward would become two in backward, one waiting for the other. Yet m2 does
    not change with the common mean that it is taken around: Σ n_r (μ_r - μ) = 0.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        count: Tensor, mean: Tensor, m2: Tensor, group: "ProcessGroup"
    ) -> tuple[Tensor, Tensor, Tensor]:
        return merged(Statistics(count, mean, m2), partial(differentiable_sum_over_ranks, group=group))

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, "ProcessGroup"], output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        count, mean, _, ctx.group = inputs
        ctx.save_for_backward(count, mean, *output[:2])
        ctx.mark_non_differentiable(output[0])

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, _grad_count: Tensor, grad_mean: Tensor, grad_m2: Tensor
    ) -> tuple[None, Tensor, Tensor, None]:
        own_count, own_mean, count, mean = ctx.saved_tensors
        of_mean, of_m2 = differentiable_sum_over_ranks(torch.stack([grad_mean, grad_m2]), ctx.group).unbind()
        share = own_count / torch.where(count > 0, count, 1.0)
        return None, share * of_mean + 2 * own_count * (own_mean - mean) * of_m2, of_m2, None


def over_ranks(local: Statistics, group: "ProcessGroup") -> Statistics:
    """This rank's statistics merged with those of the others, differentiably where a gradient is wanted."""
    if torch.compiler.is_compiling():
        return Statistics(*_MergedOverRanks.apply(*local, group))  # pyright: ignore
    if composite_is_needed() or any(t.requires_grad for t in local):
        return merged(local, partial(differentiable_sum_over_ranks, group=group))
    return merged(local, partial(sum_over_ranks, group=group, what="merging the batch's statistics"))


def _composite(operands: Operands, spec: Train, correct: Correction | None) -> tuple[Tensor, Statistics]:
    """The training step as one graph of differentiable operations, the sums over ranks included."""
    if spec.group is None and correct is None:
        return reference.train(operands, spec)
    statistics = reference.measure(operands.x, operands.position_weight, spec.layout)
    if spec.group is not None:
        statistics = over_ranks(statistics, spec.group)
    if correct is not None:
        operands = _corrected(operands, Statistics(*(t.detach() for t in statistics)), correct)
    return reference.normalize_by(statistics, operands, spec), statistics


def _corrected(operands: Operands, statistics: Statistics, correct: Correction) -> Operands:
    weight, bias = correct(statistics, operands.weight, operands.bias)
    return operands._replace(weight=weight, bias=bias)


def train(operands: Operands, spec: Train, correct: Correction | None = None) -> tuple[Tensor, Statistics]:
    """Measure, merge over the ranks of `spec.group`, and normalize, with gradients to x, weight, bias and residual.

    Args:
        operands, spec: As in `reference.train`.
        correct: What makes another weight and bias of the statistics, through which no gradient flows (batch renorm).
    """
    if spec.group is None and library.is_needed(operands):
        given = None
        if correct is not None:
            given = library.measure(operands.x, operands.position_weight, spec.layout)
            operands = _corrected(operands, given, correct)
        return library.train(operands, spec, given)
    if composite_is_needed():
        return _composite(operands, spec, correct)
    given = None
    if spec.group is not None or correct is not None:
        with torch.no_grad():
            given = backend_for(operands).measure(operands.x, operands.position_weight, spec.layout)
            if spec.group is not None:
                given = over_ranks(given, spec.group)
        if correct is not None:
            operands = _corrected(operands, given, correct)
    y, count, mean, m2 = BatchNormTrain.apply(given, spec, *operands)  # pyright: ignore
    return y, Statistics(count, mean, m2)


def normalize_by_constants(operands: Operands, mean: Tensor, variance: Tensor, spec: Train) -> Tensor:
    """y = f(γ (x - μ) / sqrt(σ² + ε) + β + residual), 0 where not valid, by numbers that are no functions of x.

    Elementwise with constants per channel: an example gets the same result alone as in any batch.

    Args:
        operands: What is normalised; y has the dtype and memory format of x.
        mean: μ, (C,).
        variance: σ², (C,).
        spec: The settings.
    """
    if (
        composite_is_needed()
        or mean.requires_grad
        or variance.requires_grad
        or (backend := backend_for(operands)) is reference
    ):
        return reference.normalize_by_constants(mean, variance, operands, spec)
    if not torch.is_grad_enabled():
        return backend.normalize_by_constants(mean, variance, operands, spec)
    given = Statistics(torch.ones_like(mean, dtype=torch.float64), mean.double(), variance.double())
    return BatchNormTrain.apply(given, spec._replace(constant=True), *operands)[0]  # pyright: ignore


def measure(x: Tensor, position_weight: Tensor | None, layout: Layout) -> Statistics:
    """`reference.measure`, by the fastest way that keeps its derivatives."""
    if composite_is_needed() or (x.requires_grad and torch.is_grad_enabled()):
        return reference.measure(x, position_weight, layout)
    return backend_for(Operands(x, position_weight=position_weight)).measure(x, position_weight, layout)
