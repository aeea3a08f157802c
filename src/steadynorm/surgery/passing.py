"""What may lie between a batch norm and the layer that takes it over: calls that let an affine map per channel pass."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.conv import _ConvNd as TorchConv  # pyright: ignore[reportPrivateUsage]

from steadynorm.surgery.normed import Normed

__all__ = ["Pass", "input_of", "passes", "places_of"]

_DROPOUTS: Final = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_F_DROPOUTS: Final = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
_ADAPTIVE: Final = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_F_ADAPTIVE: Final = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, torch.adaptive_avg_pool1d)
_POOLS: Final = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_F_POOLS: Final = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_ACTIVATIONS: Final = "torch.nn.modules.activation"

_ModuleOf: TypeAlias = Callable[[object], "nn.Module | None"]


@dataclass(frozen=True)
class Pass:
    """What a call between two layers works on: the places, the places and the channels, or the first two axes."""

    pools: bool = False
    joins: bool = False
    rows: bool = False


def input_of(node: fx.Node) -> object:
    """The first argument of a call."""
    return node.args[0] if node.args else node.kwargs.get("input")


def passes(node: fx.Node, module_of: _ModuleOf, gone: set[int]) -> Pass | None:
    """What a call does, where an affine map per channel may be moved from one side of it to the other.

    Args:
        node: The call.
        module_of: The module that a node calls.
        gone: Batch norms that do nothing any more, by id.

    Returns:
        None where it may not.
    """
    module = module_of(node)
    if module is not None:
        if module._forward_pre_hooks or module._forward_hooks:  # pyright: ignore[reportPrivateUsage]
            return None
        if id(module) in gone or type(module) in (nn.Identity, *_DROPOUTS):
            return Pass()
        if type(module) is nn.Flatten:
            return _flatten(module.start_dim, module.end_dim)
        if type(module) in _ADAPTIVE:
            return Pass(pools=True)
        if isinstance(module, _POOLS) and type(module) in _POOLS:
            return _average(module.padding, module.count_include_pad, getattr(module, "divisor_override", None))
        return None
    name = node.target if node.op == "call_method" else ""
    if node.target in _F_DROPOUTS:
        return Pass() if _literal(node, 2, "training", True) is False else None
    if node.target in _F_ADAPTIVE:
        return Pass(pools=True)
    if node.target in _F_POOLS:
        settings = ((3, "padding", 0), (5, "count_include_pad", True), (6, "divisor_override", None))
        return _average(*(_literal(node, *one) for one in settings))
    if node.target is torch.flatten or name == "flatten":
        return _flatten(_literal(node, 1, "start_dim", 0), _literal(node, 2, "end_dim", -1))
    if node.target is torch.mean or name == "mean":
        return _mean(node, module_of)
    if node.target is torch.reshape or name in ("view", "reshape"):
        shape = node.args[1:] if name and len(node.args) != 2 else _literal(node, 1, "shape", None)
        rows = isinstance(shape, (tuple, list)) and len(shape) == 2 and shape[1] == -1  # pyright: ignore
        return Pass(joins=True) if rows and _counts_rows(cast(Any, shape)[0], node, module_of, gone) else None
    return Pass() if name == "contiguous" else None


def _literal(node: fx.Node, place: int, name: str, default: Any) -> Any:
    """An argument that is written in the code."""
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[place] if len(node.args) > place else default


def _flatten(start: object, end: object) -> Pass | None:
    if start == 1 and end == -1:
        return Pass(joins=True)
    if start == 0 and end == 1:
        return Pass(rows=True)
    return Pass(pools=True) if isinstance(start, int) and start >= 2 else None


def _average(padding: object, counted: object, divisor: object) -> Pass | None:
    """An average of values alone: zeros of a padding that count would not pass through the map."""
    unpadded = padding in (0, (0,), (0, 0), (0, 0, 0), [0], [0, 0], [0, 0, 0])
    return Pass(pools=True) if divisor is None and (unpadded or counted is False) else None


def _mean(node: fx.Node, module_of: _ModuleOf) -> Pass | None:
    """A mean over places; over all of them, without keeping their axes, only the channels are left."""
    left = _left_by_mean(node, module_of)
    if left is None:
        over = _literal(node, 1, "dim", None)
        over = over if isinstance(over, (tuple, list)) else [over]
        after = all(isinstance(one, int) and one >= 2 for one in over)  # pyright: ignore[reportUnknownVariableType]
        return Pass(pools=True) if after and _is_plain_mean(node) else None
    return Pass(pools=True, joins=left == 0)


def _is_plain_mean(node: fx.Node) -> bool:
    return not set(node.kwargs) - {"input", "dim", "keepdim"}


def _left_by_mean(node: fx.Node, module_of: _ModuleOf) -> int | None:
    """How many axes behind the channels a mean over some of them leaves; None where that is not known."""
    dims, keep = _literal(node, 1, "dim", None), _literal(node, 2, "keepdim", False)
    dims = [dims] if isinstance(dims, int) else dims
    places = places_of(input_of(node), module_of)
    if not isinstance(dims, (tuple, list)) or not dims or places is None or not _is_plain_mean(node):
        return None
    over = {one + 2 + places if isinstance(one, int) and one < 0 else one for one in dims}  # pyright: ignore
    if not all(isinstance(one, int) and one >= 2 for one in over) or not isinstance(keep, bool):
        return None
    return places if keep else places - len(over)


def _is(module: object, *kinds: type[nn.Module]) -> bool:
    """Whether a module computes what one of these kinds does."""
    return isinstance(module, kinds) and type(module).forward.__module__.startswith(("torch.nn.", "steadynorm.nn."))


def _keeps_shape(module: object) -> bool:
    elementwise = type(module).__module__ == _ACTIVATIONS and not isinstance(module, (nn.GLU, nn.MultiheadAttention))
    return elementwise or _is(module, TorchBatchNorm, nn.Identity, *_DROPOUTS)


def places_of(node: object, module_of: _ModuleOf) -> int | None:
    """How many axes a tensor (N, C, *) has behind the channels; None where that is not known."""
    if not isinstance(node, fx.Node):
        return None
    module = module_of(node)
    if isinstance(module, TorchConv) and (_is(module, TorchConv) or isinstance(module, Normed)):
        return len(module.kernel_size)
    for kind, places in ((nn.BatchNorm2d, 2), (nn.BatchNorm3d, 3)):
        if _is(module, kind):
            return places
    start, end = (module.start_dim, module.end_dim) if isinstance(module, nn.Flatten) else (None, None)
    if module is None and _named(node, torch.flatten, "flatten"):
        start, end = _literal(node, 1, "start_dim", 0), _literal(node, 2, "end_dim", -1)
    if isinstance(start, int):
        return start - 1 if start >= 1 and end == -1 else None
    if module is None and _named(node, torch.mean, "mean"):
        return _left_by_mean(node, module_of)
    keeps = _keeps_shape(module) or _is(module, *_POOLS, *_ADAPTIVE)
    if keeps or node.target in (*_F_POOLS, *_F_ADAPTIVE, *_F_DROPOUTS) or _named(node, None, "contiguous"):
        return places_of(input_of(node), module_of)
    return None


def _named(node: fx.Node, function: object, method: str) -> bool:
    return (node.op == "call_function" and node.target is function) or (
        node.op == "call_method" and node.target == method
    )


def _counts_rows(size: object, node: fx.Node, module_of: _ModuleOf, gone: set[int]) -> bool:
    """Whether a number is the length of the first axis of what a call is given."""
    if not isinstance(size, fx.Node):
        return False
    if size.target is operator.getitem and size.args[1] == 0 and isinstance(size.args[0], fx.Node):
        shape = size.args[0]
        reads = (shape.target is getattr and shape.args[1] == "shape") or (
            (shape.op, shape.target, len(shape.args)) == ("call_method", "size", 1)
        )
        owner = shape.args[0] if reads else None
    else:
        owner = size.args[0] if (size.op, size.target, size.args[1:]) == ("call_method", "size", (0,)) else None
    below = input_of(node)
    while isinstance(below, fx.Node) and below is not owner:
        module = module_of(below)
        step = passes(below, module_of, gone)
        same = _keeps_shape(module) or _is(module, TorchConv)
        if not same and (step is None or step.rows):
            return False
        below = input_of(below)
    return below is owner and owner is not None
