"""Which activation follows each layer of a model: from its graph where torch.fx can trace it, else in module order."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from torch import Tensor, fx, nn

from steadynorm.activations import Activation, resolve
from steadynorm.errors import ArgumentError, UnknownActivationError
from steadynorm.init.quadrature import values
from steadynorm.init.theory import AnyActivation, as_function, gain, identity

__all__ = ["BATCH_NORMS", "TRANSPOSED", "WEIGHTED", "Follows", "Weighted", "find"]

TRANSPOSED: Final = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
Weighted: TypeAlias = (
    nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
)
WEIGHTED: Final = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
BATCH_NORMS: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_POOLS = tuple(
    getattr(nn, f"{kind}Pool{d}d") for kind in ("Max", "Avg", "AdaptiveMax", "AdaptiveAvg") for d in (1, 2, 3)
)
_CONTAINERS: Final = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_SHAPES = (nn.Flatten, nn.Unflatten, nn.Upsample, nn.PixelShuffle, nn.ChannelShuffle)
_PADS = tuple(getattr(nn, f"{kind}Pad{d}d") for kind in ("Zero", "Reflection", "Replication") for d in (1, 2, 3))
_THROUGH: Final[tuple[type[nn.Module], ...]] = (*_NORMS, *_POOLS, *_SHAPES, *_PADS, nn.Softmax, nn.LogSoftmax)

_SIZES: Final = {"size", "dim", "numel", "getattr"}
_THROUGH_OPS: Final = (
    {"batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm", "dropout", "dropout1d", "dropout2d"}
    | {"dropout3d", "alpha_dropout", "feature_alpha_dropout", "interpolate", "pad", "mean", "getitem", "chunk", "split"}
    | {"flatten", "unflatten", "reshape", "view", "permute", "transpose", "movedim", "squeeze", "unsqueeze", "expand"}
    | {"softmax", "log_softmax"}
    | {"pixel_shuffle", "cat", "concat", "stack", "add", "sub", "neg", "iadd", "isub", "rsub", "to", "type", "t"}
    | {f"{kind}_pool{d}d" for kind in ("max", "avg", "adaptive_max", "adaptive_avg") for d in (1, 2, 3)}
    | {f"{kind}_pool{d}d_with_indices" for kind in ("max", "adaptive_max") for d in (1, 2, 3)}
)
_SCALING_OPS: Final = {"mul", "imul", "truediv", "itruediv", "div"}
_MOST_PROBED: Final = 4096  # parameters; an elementwise function has few
_PROBE: Final = np.linspace(-5.0, 5.0, 101)


@dataclass(frozen=True)
class Follows:
    """What follows a layer.

    Attributes:
        label: The activation's name, or what there is in its place.
        kind: "output" where the layer's result is the model's, "layer" where another Linear or convolution comes
            first, "unknown" where an operation without a gain does.
        gain: The gain that preserves the signal; 1 where there is no activation.
        activation: The activation itself; None where there is none.
    """

    label: str
    kind: Literal["activation", "layer", "output", "unknown"]
    gain: float = 1.0
    activation: AnyActivation = field(default=None, compare=False)


_OUTPUT: Final = Follows("nothing (output)", "output")
_LAYER: Final = Follows("another layer", "layer")


def _judge(activation: AnyActivation, label: str) -> Follows | None:
    """What an operation is to the layer before it: an activation, None for the identity, else a dead end."""
    try:
        function = as_function(activation)
        if isinstance(function, nn.PReLU):  # a slope per channel: no function of one vector, yet its gain is known
            return Follows(label, "activation", gain(function), function)
        if function is identity or np.array_equal(values(function, _PROBE), _PROBE):
            return None
        return Follows(label, "activation", gain(function), function)
    except ArgumentError:
        return Follows(f"{label} (no gain)", "unknown")


def _judge_module(module: nn.Module) -> Follows | None:
    """None: the signal passes through; otherwise what it meets."""
    if isinstance(module, WEIGHTED):
        return _LAYER
    if isinstance(module, BATCH_NORMS):
        fused = getattr(module, "activation", None)  # steadynorm's layers apply one of their own
        return Follows(str(fused), "activation", gain(fused), fused) if isinstance(fused, Activation) else None
    if isinstance(module, _THROUGH):
        return None
    name = type(module).__name__
    if sum(p.numel() for p in module.parameters()) > _MOST_PROBED:
        return Follows(f"{name} (no gain)", "unknown")
    with contextlib.suppress(UnknownActivationError):
        name = str(resolve(module))
    return _judge(module, name)


class _Tracer(fx.Tracer):
    """Keeps layers, batch norms and whatever is an elementwise function whole."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # Judged beforehand: while fx traces, calling any module records it instead of computing.
        self._whole = {id(m) for m in model.modules() if isinstance(m, (*WEIGHTED, *BATCH_NORMS)) or _is_elementwise(m)}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) in self._whole or super().is_leaf_module(m, module_qualified_name)


def _is_elementwise(module: nn.Module) -> bool:
    if any(isinstance(child, (*WEIGHTED, *BATCH_NORMS, *_THROUGH)) for child in module.modules()):
        return False
    found = _judge_module(module)
    return found is not None and found.kind == "activation"


def _operation(node: fx.Node) -> tuple[str, Any]:
    """The name of a function or method node, and a function of one tensor that repeats it with its constants."""
    target, args, kwargs = node.target, node.args, dict(node.kwargs)
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))

    def repeat(z: Tensor) -> Tensor:
        def put(value: Any) -> Any:
            return z if isinstance(value, fx.Node) else value

        given, named = [put(a) for a in args], {k: put(v) for k, v in kwargs.items()}
        return getattr(given[0], target)(*given[1:], **named) if isinstance(target, str) else target(*given, **named)

    return name.rstrip("_"), repeat


def _judge_node(node: fx.Node, modules: dict[str, nn.Module]) -> Follows | None:
    if node.op == "output":
        return _OUTPUT
    if node.op == "call_module":
        return _judge_module(modules[str(node.target)])
    name, repeat = _operation(node)
    signals = [n for n in node.all_input_nodes if n.op != "get_attr"]
    if name in _THROUGH_OPS or (name in _SCALING_OPS and len(signals) == 1):
        return None
    if len(node.all_input_nodes) > 1:
        return Follows(f"{name} (no gain)", "unknown")
    return _judge(repeat, name)


def _walk(start: fx.Node, modules: dict[str, nn.Module]) -> set[Follows]:
    """What the signal from a layer meets first, over every branch it takes."""
    met: set[Follows] = set()
    seen: set[fx.Node] = set()
    waiting = list(start.users)
    while waiting:
        node = waiting.pop()
        if node in seen or (node.op != "call_module" and _operation(node)[0] in _SIZES):
            continue
        seen.add(node)
        found = _judge_node(node, modules)
        if found is None:
            waiting.extend(node.users)
        else:
            met.add(found)
    return met


def _sum_up(met: set[Follows]) -> Follows:
    """One verdict over the branches: an activation if it is the only one, beside layers and outputs."""
    active = met - {_OUTPUT, _LAYER}
    if len(active) == 1:
        return active.pop()
    if active:
        labels = ", ".join(sorted(f.label for f in active))
        return Follows(f"several: {labels}", "unknown")
    return _LAYER if _LAYER in met else _OUTPUT


def _by_graph(model: nn.Module) -> dict[str, Follows]:
    graph = _Tracer(model).trace(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    met: dict[nn.Module, set[Follows]] = {}
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(modules[node.target], WEIGHTED):
            met.setdefault(modules[node.target], set()).update(_walk(node, modules))
    return {name: _sum_up(met[module]) for name, module in model.named_modules() if module in met}


def _leaves(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules that compute, in order: what torch.nn computes as one (an attention, say) stays one."""
    whole = type(module).__module__.startswith("torch.nn") and not isinstance(module, _CONTAINERS)
    children = [] if whole or isinstance(module, (*WEIGHTED, *BATCH_NORMS)) else list(module.named_children())
    if not children:
        yield name, module
    for child_name, child in children:
        yield from _leaves(child, f"{name}.{child_name}" if name else child_name)


def _by_order(model: nn.Module) -> dict[str, Follows]:
    """Module order stands in for the order of computation; functions called in `forward` cannot be seen."""
    follows: dict[str, Follows] = {}
    open_layer: str | None = None
    for name, module in _leaves(model):
        found = _judge_module(module)
        if open_layer is not None and found is not None:
            follows[open_layer] = found
            open_layer = None
        if isinstance(module, WEIGHTED):
            open_layer = name
    if open_layer is not None:
        follows[open_layer] = _OUTPUT
    return follows


def find(model: nn.Module) -> tuple[dict[str, Follows], str]:
    """What follows each Linear and convolution of a model.

    Args:
        model: Any model; nothing in it is changed or run on data.

    Returns:
        What follows, by the layer's name, for each layer that the model calls; and how that was found out: empty for
        the model's graph, else why module order was used.
    """
    if isinstance(model, (*WEIGHTED, *BATCH_NORMS)):
        return _by_order(model), ""
    try:
        return _by_graph(model), ""
    except Exception as error:  # tracing runs the model's own code on proxies, which may fail in any way
        reason = str(error).strip().split("\n")[0]
        return _by_order(model), f"{type(error).__name__}: {reason}"
