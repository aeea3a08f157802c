"""`fold`: a model for inference without the batch norms that a neighbour's weights can absorb."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.conv import _ConvNd as TorchConv  # pyright: ignore[reportPrivateUsage]

from steadynorm.errors import ArgumentError, ModelError
from steadynorm.surgery.converting import convert_
from steadynorm.surgery.fold_report import FoldedLayer, FoldReport
from steadynorm.surgery.layers import is_batchnorm
from steadynorm.surgery.matching import is_batch_norm
from steadynorm.surgery.merging import merge as merge_into
from steadynorm.surgery.merging import merges_in
from steadynorm.surgery.outputs import BOUNDS, bound_of, called, error_of, floating
from steadynorm.surgery.patterns import Left
from steadynorm.surgery.planning import Plan
from steadynorm.surgery.reading import Reading, Root
from steadynorm.surgery.sites import copied, replace

__all__ = ["FoldedModel", "fold"]


class FoldedModel(Protocol):
    """What `fold` adds to the model it returns."""

    fold_report: FoldReport


def fold(model: nn.Module, *, example: Any = None, verify: Any = None, merge: bool = True) -> nn.Module:
    """A copy of a model for inference in which batch norms have gone into the layers before or after them.

    A batch norm in evaluation is an affine map per channel, y = a x + b with a = γ / sqrt(σ² + ε), b = β - μ a and σ²
    the stored, unbiased variance. It goes into the weights w and bias c of a neighbour, in float64, rounded once:

        layer, then batch norm      w' = a w           c' = a c + b
        batch norm, then layer      w' = w a           c' = c + Σ w b

    Layers: Conv1d, 2d, 3d, ConvTranspose1d, 2d, 3d, Linear. Between them and the batch norm there may be Identity,
    Dropout, flattening, average pooling and means; before it also a concatenation of such layers. A convolution
    behind a batch norm that pads with zeros is given the value that the batch norm maps to zero to pad with. The
    activation of steadynorm's layers, and their residual, stay.

    The model is read by `torch.fx`, in every way that its forwards can take, or where that fails, its largest parts
    that can be. What cannot be folded exactly is left as it is, and the report says why: weights used twice,
    parametrised or hooked layers, and more.

    Args:
        model: In evaluation; it is not changed.
        example: An input of the model, to learn from it on which axes the channels of a batch norm behind a linear
            layer lie: a tensor, a tuple of arguments or a dict of named ones. Without one they are taken to be the
            features of 2-D inputs, and any other input is refused by an error.
        verify: One such input, or a list of several, run through both models. Also used as example.
        merge: Whether parallel convolutions of one input, and a batch norm beside them, become one where only their
            sum is used (RepVGG): exactly, by the sum of their kernels, the smaller padded with zeros. The others are
            replaced by a zero, and have no entries in the state_dict.

    Returns:
        The folded model, with a `fold_report` (a `FoldReport`). What stays keeps its names in the state_dict; a layer
        may have got a bias.

    Raises:
        ModelError: The model is in training, cannot be copied, or the verified error is beyond the bound: of the
            output's scale 1e-9 in float64, 1e-4 in float32, 2e-2 in float16, 1e-1 in bfloat16.
        ArgumentError: `model` is not a module.

    Source:
        Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
        Inference", section 3.2.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> folded = fold(model)
        >>> print(folded.fold_report)
        1 of 1 batch norms folded
          folded 1: into 0 before it
        >>> list(folded.state_dict())
        ['0.weight', '0.bias']
    """
    _check(model)
    folded = copied(model, "fold")
    originals = dict(model.named_modules(remove_duplicate=False))
    special = [name for name, module in originals.items() if is_batch_norm(module) and not is_batchnorm(module)]
    if special:  # those with an activation, frozen ones
        convert_(folded, only=lambda _, module: not is_batchnorm(module))
        converted = copied(folded, "fold")
        originals |= {name: converted.get_submodule(name) for name in special}
    reading = Reading(copied(folded, "fold"))
    inputs = _inputs(verify) if verify is not None else []
    ranks = _ranks(model, [*inputs, *(_inputs(example) if example is not None else [])])
    said: dict[str, FoldedLayer] = {}
    for root in reading.roots:
        plan = _agreed(reading, root, originals, ranks)
        if merge:
            _merge(plan, root)
        plan = _confirmed(reading, root, plan)
        _apply(folded, reading, plan)
        said |= {n: FoldedLayer(n, True, one.into, one.how) for n, one in plan.folds.items()}
        said |= {n: FoldedLayer(n, False, (), why) for n, why in plan.left.items()}
    layers = tuple(
        said.get(name) or FoldedLayer(name, False, (), _unread(originals[name], reading.untraced))
        for name, module in model.named_modules()
        if is_batch_norm(module)
    )
    error, bound = _verified(model, folded, inputs) if inputs else (None, None)
    cast(FoldedModel, folded).fold_report = FoldReport(layers, tuple(reading.untraced.items()), error, bound)
    return folded


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError(f"fold needs a torch.nn.Module, got {type(model).__name__}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("fold needs a model in Python, got one of TorchScript: fold it before torch.jit.script.")
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        raise ModelError(
            f"fold needs a model in evaluation, and {training[0]} is in training ({len(training)} modules are): folded "
            "layers use the stored statistics. Call model.eval() first."
        )


def _inputs(given: Any) -> list[Any]:
    return list(given) if isinstance(given, list) else [given]


def _ranks(model: nn.Module, inputs: Sequence[Any]) -> dict[str, set[int]]:
    """The numbers of axes of the inputs of each batch norm and convolution."""
    seen: dict[str, set[int]] = {}

    def hook(name: str) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs.get("input")
            if isinstance(x, Tensor):
                seen.setdefault(name, set()).add(x.dim())

        return before

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, (TorchBatchNorm, TorchConv))]
    handles = [m.register_forward_pre_hook(hook(n), with_kwargs=True) for n, m in layers] if inputs else []
    try:
        for given in inputs:
            called(model, given)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _agreed(reading: Reading, root: Root, originals: Mapping[str, nn.Module], ranks: Mapping[str, set[int]]) -> Plan:
    """The plan that holds whichever way the forward takes, and whichever of its optional arguments are given."""
    banned: dict[str, str] = {}
    while True:
        plans = [Plan(reading, root, view, originals, ranks, banned).make() for view in root.views]
        names = {name: plan.folds[name].into for plan in plans for name in plan.folds}
        differing = [name for name, into in names.items() if not all(_holds(plan, name, into) for plan in plans)]
        if not differing:
            made = plans[0]
            for plan in plans[1:]:  # what the first does not call
                made.folds, made.weights = plan.folds | made.folds, plan.weights | made.weights
                made.left = {name: why for name, why in (plan.left | made.left).items() if name not in made.folds}
                made.gone |= plan.gone
            return made
        banned |= dict.fromkeys(differing, "what is around it depends on the input, or on optional arguments")


def _holds(plan: Plan, name: str, into: tuple[str, ...]) -> bool:
    """Whether the batch norm goes into those layers in this plan too, or none of them is called at all."""
    if name in plan.folds:
        return plan.folds[name].into == into
    layers = [plan.reading.model.get_submodule(one) for one in (name, *into)]
    return not any(plan.view.calls[id(layer)] for layer in layers)


def _merge(plan: Plan, root: Root) -> None:
    """Takes in the merges that hold whichever way the forward takes."""
    found = [(view, merges_in(plan, view)) for view in root.views]
    for one in dict.fromkeys(one for _, merges in found for one in merges):
        layers = [plan.reading.model.get_submodule(name) for name in one.names]
        if all(one in merges or not any(view.calls[id(layer)] for layer in layers) for view, merges in found):
            with suppress(Left):
                merge_into(plan, one)


def _confirmed(reading: Reading, root: Root, plan: Plan) -> Plan:
    """The plan, if the part can be traced without the batch norms: its forward has no other way to them."""
    if not plan.folds:
        return plan
    modules = dict(reading.model.named_modules(remove_duplicate=False))
    _place(reading.model, reading, plan)
    try:
        reading.trace(root)
    except Exception as error:
        for name in (*plan.folds, *plan.absent):
            for alias in reading.names[id(modules[name])]:
                replace(reading.model, alias, modules[name])
        why = f"the forward needs the layer itself ({type(error).__name__}: {error})"
        plan.left |= dict.fromkeys(plan.folds, why)
        plan.folds, plan.weights, plan.absent = {}, {}, {}
    return plan


def _place(model: nn.Module, reading: Reading, plan: Plan) -> None:
    """Puts what remains of the layers into their places."""
    for name, remains in {**{name: made.remains for name, made in plan.folds.items()}, **plan.absent}.items():
        own = copy.deepcopy(remains).eval()
        for alias in _aliases(reading, name):
            replace(model, alias, own)


def _aliases(reading: Reading, name: str) -> Iterator[str]:
    yield from next(names for names in reading.names.values() if name in names)


def _apply(folded: nn.Module, reading: Reading, plan: Plan) -> None:
    _place(folded, reading, plan)
    for made in plan.folds.values():
        if made.unpadded is not None:
            conv = cast(TorchConv, folded.get_submodule(made.unpadded))
            conv.padding = (0,) * len(conv.kernel_size)
            none = [0, 0] * len(conv.kernel_size)
            conv._reversed_padding_repeated_twice = none  # pyright: ignore[reportPrivateUsage]
    for name, made in plan.weights.items():
        layer = folded.get_submodule(name)
        old = cast(nn.Parameter, layer.weight)
        with torch.no_grad():
            old.copy_(made.weight)
            bias = made.bias.to(device=old.device, dtype=old.dtype)
            kept = cast("nn.Parameter | None", layer.bias)
            if kept is None:
                layer.bias = nn.Parameter(bias, requires_grad=old.requires_grad)
            else:
                kept.copy_(bias)


def _unread(module: nn.Module, untraced: Mapping[str, str]) -> str:
    if not is_batchnorm(module):
        return f"{type(module).__name__} computes something of its own"
    return "its part of the model could not be traced" if untraced else "the forward does not call it"


def _verified(model: nn.Module, folded: nn.Module, inputs: Sequence[Any]) -> tuple[float, float]:
    worst, bound = 0.0, min(BOUNDS.values())
    for given in inputs:
        wanted, got = (floating(called(one, given)) for one in (model, folded))
        if len(wanted) != len(got) or not wanted:
            raise ModelError("verify needs a model whose outputs are tensors, the same number from both models.")
        bound = max(bound, bound_of(wanted))
        error = error_of(got, wanted)
        worst = error if error != error else max(worst, error)
    if not worst <= bound:
        raise ModelError(
            f"the folded model differs from the original by {worst:.2g} of the output's scale, beyond {bound:.0e}. "
            "Keep the original; a forward that depends on its input's values, or statistics of huge scale, can be why."
        )
    return worst, bound
