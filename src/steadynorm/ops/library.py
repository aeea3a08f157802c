"""The training step as operators of `torch.library`: what a compiled graph, or a dispatch mode, holds in its place.

    steadynorm::measure          x -> statistics
    steadynorm::train            x, γ, β, ... -> y, statistics
    steadynorm::train_backward   dL/dy, dL/dstatistics -> dL/dx, dL/dγ, dL/dβ, dL/dresidual

Each is opaque, computed by the backend of the tensors that it meets when it runs, and its results are dense as
`torch.empty_like(x)` is. On a GPU, where kernels in Triton compute it, a compiler sees these instead (as
`torch.library.triton_op` does it), unless sizes are left open, which the kernels' blocks follow from.

Statistics are one tensor (3, C): count, mean and m2. Where they had to be known beforehand they are `given`, and still
taken for functions of x: the derivative goes through them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from steadynorm.activations import Activation
from steadynorm.ops import reference
from steadynorm.ops.accelerator import into_a_graph, kernels, writing_a_graph
from steadynorm.ops.backends import (
    Backend,
    backend_for,
    may_have_kernels,
)
from steadynorm.ops.layout import Layout, accumulator_dtype
from steadynorm.ops.reference import Operands, Statistics, Train

__all__ = ["is_needed", "measure", "train"]

_Tensors = tuple[Tensor, ...]


def is_needed(operands: Operands) -> bool:
    """Whether an operator must stand for the step: in a compiled graph, and under a dispatch mode.

    Not where derivatives are taken by torch.func or forward-mode AD, which see through the composite alone, nor where
    no kernel would run. An exported program holds no operator of ours: it may run where this package is not.
    """
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting():
            return False
    elif not torch._C._len_torch_dispatch_stack():  # pyright: ignore
        return False
    transformed = torch._C._are_functorch_transforms_active()  # pyright: ignore
    if transformed or torch.autograd.forward_ad._current_level >= 0:  # pyright: ignore
        return False
    return may_have_kernels(operands)


def measure(x: Tensor, position_weight: Tensor | None, layout: Layout) -> Statistics:
    """`reference.measure` as one operator, without a derivative."""
    return Statistics(*torch.ops.steadynorm.measure(x.detach(), position_weight, layout.dim).unbind())


def train(operands: Operands, spec: Train, given: Statistics | None = None) -> tuple[Tensor, Statistics]:
    """`reference.train` as one operator, on this process alone; by the statistics `given` of x, where there are any."""
    f = spec.activation
    y, table = torch.ops.steadynorm.train(
        *operands,
        None if given is None else torch.stack(given),
        spec.layout.dim,
        spec.eps,
        None if f is None else f.name,
        [] if f is None else list(f.params),
    )
    count, mean, m2 = table.unbind()
    return y, Statistics(count.detach(), mean, m2)


def _read(x: Tensor, dim: int, eps: float, activation: str | None, parameters: list[float]) -> Train:
    """The settings, from what a schema can hold of them."""
    return Train(Layout.of(x, dim), eps, None if activation is None else Activation(activation, tuple(parameters)))


def _backend(operands: Operands) -> Backend:
    """What computes; while a graph is traced, kernels that it will hold."""
    found = kernels(operands.x.device.type) if writing_a_graph() else None
    return found or backend_for(operands)


def _measure(x: Tensor, position_weight: Tensor | None, dim: int) -> Tensor:
    backend = _backend(Operands(x, position_weight=position_weight))
    return torch.stack(backend.measure(x, position_weight, Layout.of(x, dim)))


def _measure_without_data(x: Tensor, _position_weight: Tensor | None, dim: int) -> Tensor:
    return x.new_empty((3, x.shape[dim]), dtype=accumulator_dtype(x.device))


def _train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    position_weight: Tensor | None,
    valid: Tensor | None,
    given: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, Tensor]:
    operands, spec = Operands(x, weight, bias, residual, position_weight, valid), _read(x, *settings)
    backend = _backend(operands)
    if given is None:
        y, statistics = backend.train(operands, spec)
    else:
        statistics = Statistics(*given.unbind())
        y = backend.normalize_by(statistics, operands, spec)
    return _dense_as(x, y), torch.stack(statistics)


def _train_without_data(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _measure_without_data(x, None, others[6])


def _train_backward(
    grad_y: Tensor | None,
    grad_statistics: Tensor | None,
    statistics: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    position_weight: Tensor | None,
    valid: Tensor | None,
    *settings: Any,
) -> _Tensors:
    operands, spec = Operands(x, weight, bias, residual, position_weight, valid), _read(x, *settings)
    _, grad_mean, grad_m2 = (None, None, None) if grad_statistics is None else grad_statistics.unbind()
    found = _backend(operands).backward(grad_y, grad_mean, grad_m2, operands, Statistics(*statistics.unbind()), spec)
    grad_x, grad_weight, grad_bias, grad_residual = (x.new_empty(0) if t is None else t for t in found)
    if residual is not None:
        grad_residual = _dense_as(x, grad_residual)
        if grad_residual is grad_y:  # as it is without an activation; an operator gives nothing back that it was given
            grad_residual = grad_residual.clone()
    return _dense_as(x, grad_x), grad_weight, grad_bias, grad_residual


def _train_backward_without_data(
    _grad_y: Tensor | None,
    _grad_statistics: Tensor | None,
    _statistics: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *_others: Any,
) -> _Tensors:
    weight, bias = (x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (weight, bias))
    residual = x.new_empty(0) if residual is None else torch.empty_like(x, dtype=residual.dtype)
    return torch.empty_like(x), weight, bias, residual


def _dense_as(x: Tensor, t: Tensor) -> Tensor:
    """`t` behind the strides of `torch.empty_like(x)`, as a compiler was told; those of the kernels already are."""
    if t.stride() == x.stride() or t.stride() == torch.empty_like(x, device="meta").stride():
        return t
    return torch.empty_like(x, dtype=t.dtype).copy_(t)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    operands, ctx.settings = Operands(*inputs[:6]), inputs[7:]
    # What is added last has the output's own gradient: its values are needed only to differentiate an activation.
    added_last = operands.residual is not None and ctx.settings[2] is None
    ctx.added_last = operands.residual.dtype if operands.residual is not None and added_last else None
    ctx.save_for_backward(*(operands._replace(residual=None) if added_last else operands), output[1])
    ctx.set_materialize_grads(False)


def _first_derivative(ctx: Any, grad_y: Tensor | None, grad_statistics: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, statistics = ctx.saved_tensors
    operands = Operands(*tensors)
    found = torch.ops.steadynorm.train_backward(grad_y, grad_statistics, statistics, *operands, *ctx.settings)
    grads = [None if t is None else grad for t, grad in zip(operands[:4], found, strict=True)]
    if ctx.added_last is not None and grad_y is not None:
        g = grad_y if operands.valid is None else torch.where(operands.valid, grad_y, 0)
        grads[3] = g.to(ctx.added_last)
    return *grads, *(None,) * (3 + len(ctx.settings))


def _keep_all(ctx: Any, inputs: tuple[Any, ...], output: _Tensors) -> None:
    ctx.settings = inputs[9:]
    ctx.save_for_backward(*inputs[:9])
    ctx.set_materialize_grads(False)


def _second_derivative(ctx: Any, *pulls: Tensor | None) -> tuple[Tensor | None, ...]:
    """By the composite, which can be differentiated again; the statistics are functions of x there."""
    grad_y, grad_statistics, _, *tensors = ctx.saved_tensors
    with torch.enable_grad():
        # Aliased: where one depends on another, autograd would follow that path as well and count it twice.
        grad_y, grad_statistics, *differentiated = aliases = [
            None if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
            for t in (grad_y, grad_statistics, *tensors[:4])
        ]
        operands = Operands(*differentiated, *tensors[4:])  # pyright: ignore[reportArgumentType]
        y, statistics = reference.train(operands, _read(operands.x, *ctx.settings))
        first = _derivatives([y, torch.stack(statistics)], differentiated, [grad_y, grad_statistics], True)
    second = _derivatives(first, aliases, list(pulls), torch.is_grad_enabled())
    return *second[:2], None, *second[2:], *(None,) * (2 + len(ctx.settings))


def _derivatives(
    outputs: list[Tensor | None], inputs: list[Tensor | None], pulls: list[Tensor | None], create_graph: bool
) -> list[Tensor | None]:
    """Σ dL/d output d output / d input, for each input that is there; None where there is nothing."""
    reached = [(out, g) for out, g in zip(outputs, pulls, strict=True) if out is not None and g is not None]
    found = iter(
        torch.autograd.grad(
            [out for out, _ in reached],
            [t for t in inputs if t is not None],
            [g for _, g in reached],
            create_graph=create_graph,
            allow_unused=True,
        )
        if reached
        else ()
    )
    return [None if t is None else next(found, None) for t in inputs]


def _seen_through(op: Callable[..., Any]) -> Callable[..., Any]:
    """What functionalization, the step of a compiler that takes operators apart, makes of one of ours."""

    def decompose(mode: Any, operator: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = [t for t in args if isinstance(t, Tensor)]
        left_open = any(isinstance(size, torch.SymInt) for t in tensors for size in t.shape)
        if left_open or kernels(tensors[0].device.type) is None:
            return mode.__torch_dispatch__(operator, types, args, kwargs)
        with mode, into_a_graph():
            return op(*args, **kwargs)

    return decompose


_OPERANDS = "Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? position_weight, Tensor? valid"
_SETTINGS = "int channel_dim, float eps, str? activation, float[] parameters"
_library = torch.library.Library("steadynorm", "FRAGMENT")
for _schema, _op, _without_data in (
    ("measure(Tensor x, Tensor? position_weight, int channel_dim) -> Tensor", _measure, _measure_without_data),
    (f"train({_OPERANDS}, Tensor? given, {_SETTINGS}) -> (Tensor, Tensor)", _train, _train_without_data),
    (
        f"train_backward(Tensor? grad_y, Tensor? grad_statistics, Tensor statistics, {_OPERANDS}, {_SETTINGS}) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
        _train_backward,
        _train_backward_without_data,
    ),
):
    _name = _schema[: _schema.index("(")]
    # The strides of the results follow from those of x: a compiler must not hand over an x of other ones.
    _library.define(_schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))
    _library.impl(_name, _op, "CompositeExplicitAutograd")
    torch.library.register_fake(f"steadynorm::{_name}", _without_data, lib=_library)
    torch.library.register_torch_dispatch(
        f"steadynorm::{_name}", FunctionalTensorMode, _seen_through(_op), lib=_library
    )
for _name, _derivative, _setup in (
    ("train", _first_derivative, _keep),
    ("train_backward", _second_derivative, _keep_all),
):
    torch.library.register_autograd(f"steadynorm::{_name}", _derivative, setup_context=_setup, lib=_library)
