"""What an operation in a graph is to a batch norm that would stand near it."""

from typing import Any, Final, Literal, TypeAlias

from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase as TorchNormBase  # pyright: ignore[reportPrivateUsage]

from steadynorm.surgery.layers import is_foldable

__all__ = ["LINEAR_NAMES", "NORMS", "Kind", "function_of", "is_activation", "kind_of", "operands"]

Kind: TypeAlias = Literal[
    "weighted", "activation", "norm", "same", "scaled", "moved", "add", "cat", "mul", "output", "other"
]

_NOT_ELEMENTWISE: Final = (nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin, nn.GLU)
NORMS: Final = (TorchNormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d)
_SAME: Final = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
    *(getattr(nn, f"{kind}Pool{d}d") for kind in ("Max", "Avg", "AdaptiveMax", "AdaptiveAvg") for d in (1, 2, 3)),
)
_MOVED: Final = (nn.Flatten, nn.Unflatten)
_ACTIVATION_NAMES: Final = (
    *("relu", "relu6", "elu", "selu", "celu", "leaky_relu", "rrelu", "prelu", "gelu", "silu", "mish", "tanh"),
    *("sigmoid", "logsigmoid", "log_sigmoid", "hardtanh", "hardswish", "hardsigmoid", "softplus", "softsign"),
    *("tanhshrink", "softshrink", "hardshrink", "threshold"),
)
LINEAR_NAMES: Final = (
    *("linear", "bilinear", "matmul", "bmm", "mm", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention"),
    *(f"conv{kind}{d}d" for kind in ("", "_transpose") for d in (1, 2, 3)),
)
"""Functions of tensors that mix channels."""
_NAMES: Final[dict[str, Kind]] = {
    **dict.fromkeys(_ACTIVATION_NAMES, "activation"),
    **dict.fromkeys(("batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm"), "norm"),
    **dict.fromkeys(("local_response_norm", "normalize"), "norm"),
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "contiguous"), "same"),
    **dict.fromkeys(
        (f"{kind}_pool{d}d" for kind in ("max", "avg", "adaptive_max", "adaptive_avg") for d in (1, 2, 3)), "same"
    ),
    **dict.fromkeys(("flatten", "unflatten", "view", "reshape", "permute", "transpose", "squeeze"), "moved"),
    **dict.fromkeys(("unsqueeze", "movedim", "swapaxes"), "moved"),
    **dict.fromkeys(("add", "iadd"), "add"),
    **dict.fromkeys(("mul", "imul", "sub", "isub", "div", "truediv", "itruediv"), "mul"),
    **dict.fromkeys(("pow", "neg"), "scaled"),
    **dict.fromkeys(("cat", "concat", "concatenate"), "cat"),
}
_TORCH: Final = ("torch", "_operator", "")


def is_activation(module: nn.Module) -> bool:
    """Whether this is an elementwise nonlinearity of `torch.nn`."""
    return type(module).__module__ == "torch.nn.modules.activation" and not isinstance(module, _NOT_ELEMENTWISE)


def kind_of(node: fx.Node, module: nn.Module | None) -> Kind:
    """What a node is.

    Args:
        node: Of a graph.
        module: What it calls, if that is a module.
    """
    if module is not None:
        return _kind_of(module)
    if node.op not in ("call_function", "call_method"):
        return "output" if node.op == "output" else "other"
    kind = _NAMES.get(function_of(node).rstrip("_"), "other") if _is_torchs(node) else "other"
    if kind in ("add", "mul", "scaled") and len(node.all_input_nodes) == 1:  # with a number, or itself
        return "scaled"
    return "other" if kind == "scaled" else kind


def function_of(node: fx.Node) -> str:
    """The name of the function or method that a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def operands(node: fx.Node) -> list[Any]:
    """What a binary operation takes."""
    named = [node.kwargs[name] for name in ("input", "other") if name in node.kwargs]
    return [*node.args, *named][:2]


def _kind_of(module: nn.Module) -> Kind:
    if is_foldable(module):
        return "weighted"
    if isinstance(module, NORMS):
        return "norm"
    if is_activation(module):
        return "activation"
    if type(module) in _SAME:
        return "same"
    return "moved" if type(module) in _MOVED else "other"


def _is_torchs(node: fx.Node) -> bool:
    """Whether a function is one of torch, of Python's operators, or a tensor's method."""
    if node.op == "call_method":
        return True
    module = getattr(node.target, "__module__", None) or ""
    return module.partition(".")[0] in _TORCH
