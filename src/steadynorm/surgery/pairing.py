"""What follows a batch norm in a graph: an activation, or a sum and an activation, that it can do itself."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
import torch.nn.functional as F
from torch import fx, nn

from steadynorm.activations import Activation, resolve
from steadynorm.errors import UnknownActivationError
from steadynorm.surgery.absorbed import residual_for
from steadynorm.surgery.patterns import Left, reads_shape

__all__ = ["ModuleOf", "Pair", "called", "pair_at"]

ModuleOf: TypeAlias = Callable[[object], nn.Module | None]

_SUMS: Final = (operator.add, operator.iadd, torch.add, "add", "add_")
# They move values and change none, so that an elementwise function may stand before them as well as behind.
_MOVES: Final = (
    *("contiguous", "reshape", "reshape_as", "view", "view_as", "flatten", "unflatten", "squeeze", "unsqueeze"),
    *("permute", "transpose", "movedim", "swapaxes"),
    *(torch.reshape, torch.flatten, torch.squeeze, torch.unsqueeze, torch.permute, torch.transpose, torch.movedim),
)
_PLAIN: Final = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), "relu"),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_"), "sigmoid"),
    **dict.fromkeys((F.tanh, torch.tanh, torch.tanh_, "tanh", "tanh_"), "tanh"),
    **dict.fromkeys((F.selu, F.selu_, torch.selu, torch.selu_), "selu"),
    **{F.relu6: "relu6", F.silu: "silu", F.mish: "mish", F.hardswish: "hardswish", F.hardsigmoid: "hardsigmoid"},
}
_WITH_PARAMETERS: Final[dict[object, tuple[str, tuple[tuple[str, float], ...]]]] = {
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), ("leaky_relu", (("negative_slope", 0.01),))),
    **dict.fromkeys((F.elu, F.elu_), ("elu", (("alpha", 1.0),))),
    **dict.fromkeys((F.celu, F.celu_, torch.celu, torch.celu_), ("celu", (("alpha", 1.0),))),
    F.softplus: ("softplus", (("beta", 1.0), ("threshold", 20.0))),
}


@dataclass(frozen=True)
class Pair:
    """A batch norm in a graph, and what it can do in place of the nodes behind it.

    Attributes:
        norm: Its call.
        activation: What it will apply; None for the identity, after a sum that none follows.
        act: The node that applied it, if there is one.
        add: The sum before that, if there is one.
        residual: What that adds to the batch norm's output.
        between: What only moves values, or does nothing, on the way.
    """

    norm: fx.Node
    activation: Activation | None
    act: fx.Node | None
    add: fx.Node | None
    residual: fx.Node | None
    between: tuple[fx.Node, ...]

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All of them, in the order of the graph."""
        return tuple(sorted(node for node in (self.norm, *self.between, self.add, self.act) if node is not None))

    @property
    def last(self) -> fx.Node:
        """The one whose result it will give."""
        return self.nodes[-1]


def pair_at(norm: fx.Node, module_of: ModuleOf) -> Pair:
    """What a batch norm is followed by.

    Args:
        norm: Its call.
        module_of: The module that a node calls, or None.

    Raises:
        Left: By nothing that it could do itself.
    """
    if "residual" in norm.kwargs:
        raise Left("it adds something to its output already")
    between, add = _next(norm, module_of, moving=True)
    at = between[-1] if between else norm
    activation = _activation(add, at, module_of)
    if activation is not None:
        return Pair(norm, activation, add, None, None, between)
    residual = None if any(node.op != "call_module" for node in between) else _other(add, at)
    if residual is None:
        raise Left(f"neither an activation nor a sum follows it, but {called(add, module_of)}")
    try:
        more, act = _next(add, module_of, moving=False)
        activation = _activation(act, more[-1] if more else add, module_of)
    except Left:
        more, act = (), None
    if activation is None:
        return Pair(norm, None, None, add, residual, between)
    return Pair(norm, activation, act, add, residual, (*between, *more))


def _next(node: fx.Node, module_of: ModuleOf, moving: bool) -> tuple[tuple[fx.Node, ...], fx.Node]:
    """The only one that takes a node's result, past those that do nothing, or only move values."""
    passed: list[fx.Node] = []
    while True:
        at = passed[-1] if passed else node
        users = [user for user in at.users if not reads_shape(user, at)]
        if len(users) != 1:
            raise Left("its output is used by nothing" if not users else f"its output is used {len(users)} times")
        user = users[0]
        if user.target is residual_for:
            raise Left("another batch norm adds its output")
        if type(module_of(user)) is not nn.Identity and not (moving and _moves(user, at)):
            return tuple(passed), user
        passed.append(user)


def called(node: fx.Node, module_of: ModuleOf) -> str:
    """A node in words."""
    module = module_of(node)
    if node.op == "output":
        return "the end of what was traced"
    if module is not None:
        return f"{node.target} ({type(module).__name__})"
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _other(node: fx.Node, one: fx.Node) -> fx.Node | None:
    """What a sum adds to `one`."""
    if node.target not in _SUMS or node.op not in ("call_function", "call_method") or len(node.args) != 2:
        return None
    others = [arg for arg in node.args if arg is not one]
    alone = set(node.kwargs) <= {"alpha"} and node.kwargs.get("alpha", 1) == 1
    return others[0] if alone and len(others) == 1 and isinstance(others[0], fx.Node) else None


def _moves(node: fx.Node, moved: fx.Node) -> bool:
    known = node.op in ("call_function", "call_method") and node.target in _MOVES
    return known and bool(node.args) and node.args[0] is moved and moved not in node.args[1:]


def _activation(node: fx.Node, input: fx.Node, module_of: ModuleOf) -> Activation | None:
    given = node.args[0] if node.args else node.kwargs.get("input")
    if given is not input:
        return None
    module = module_of(node)
    if module is not None:
        try:
            return resolve(module)
        except UnknownActivationError:
            return None
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in _PLAIN:
        return Activation(_PLAIN[node.target])
    if node.target is F.gelu:
        how = _argument(node, 1, "approximate", "none")
        return Activation("gelu_tanh" if how == "tanh" else "gelu") if how in ("none", "tanh") else None
    if node.target in _WITH_PARAMETERS:
        name, parameters = _WITH_PARAMETERS[node.target]
        values = [_argument(node, place, key, value) for place, (key, value) in enumerate(parameters, 1)]
        return Activation(name, tuple(values)) if all(isinstance(v, (int, float)) for v in values) else None
    return None


def _argument(node: fx.Node, place: int, name: str, default: object) -> Any:
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[place] if len(node.args) > place else default
