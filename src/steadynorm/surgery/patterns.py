"""The graph of a model around its batch norms: which layers feed each, and which it feeds, with only maps between them
that let an affine map per channel pass."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.proxy import TraceError

from steadynorm.surgery.absorbed import residual_for
from steadynorm.surgery.layers import is_batchnorm, is_foldable
from steadynorm.surgery.normed import Normed

__all__ = ["Branches", "Left", "View", "reads_shape"]

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_F_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
_ADAPTIVE = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_F_ADAPTIVE = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_CALL_OPS = ("call_module", "call_function", "call_method")


class Left(Exception):
    """A batch norm stays; the message is the reason, as the report gives it."""


class Branches:
    """The way that a trace takes where a forward asks whether something about its input is true.

    Args:
        given: The answers, in the order of the questions; after them it is always "no".

    Attributes:
        taken: The answers that were given.
    """

    most = 64

    def __init__(self, given: tuple[bool, ...] = ()) -> None:
        self.given = given
        self.taken: list[bool] = []
        self._known: dict[object, bool] = {}

    def answer(self, question: fx.Node) -> bool:
        """The same for the same question about the same tensors."""
        key = (question.op, question.target, question.args, tuple(question.kwargs.items()))
        try:
            known = self._known.get(key)
        except TypeError:  # a list among the arguments
            key, known = question, self._known.get(question)
        if known is None:
            if len(self.taken) == self.most:
                raise TraceError("its forward asks too much about its input's values")
            known = self.given[len(self.taken)] if len(self.taken) < len(self.given) else False
            self.taken.append(known)
            self._known[key] = known
        return known


class _Tracer(fx.Tracer):
    """Keeps whole what can be folded, and what cannot be traced."""

    def __init__(self, opaque: frozenset[int], branches: Branches) -> None:
        super().__init__()
        self.opaque = opaque
        self.branches = branches

    def to_bool(self, obj: fx.Proxy) -> bool:
        return self.branches.answer(obj.node)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, Normed):
            return False
        known = is_batchnorm(m) or is_foldable(m) or id(m) in self.opaque
        return known or super().is_leaf_module(m, module_qualified_name)


def _literal(node: fx.Node, place: int, name: str, default: Any) -> Any:
    """An argument that is written in the code."""
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[place] if len(node.args) > place else default


@dataclass(frozen=True)
class _Pass:
    """What a call between two layers works on: the places, the places and the channels, or the first two axes."""

    pools: bool = False
    joins: bool = False
    rows: bool = False


class View:
    """One trace of a module's forward.

    Attributes:
        nodes: The only call of each module called once, by the module's id.
        calls: How often each module is called, by its id.
    """

    def __init__(
        self,
        root: nn.Module,
        opaque: frozenset[int],
        concrete: Mapping[str, Any] | None = None,
        branches: Branches | None = None,
    ) -> None:
        tracer = _Tracer(opaque, branches or Branches())
        self.graph = tracer.trace(root, None if concrete is None else dict(concrete))
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self.calls: Counter[int] = Counter()
        self.nodes: dict[int, fx.Node] = {}
        self.read_directly: set[int] = set()
        self._inside = {node: path for node in self.graph.nodes if (path := self._normed(node)) is not None}
        parameters = dict(root.named_parameters(remove_duplicate=False)) | dict(root.named_buffers())
        for node in self.graph.nodes:
            module = self.module(node)
            if module is not None:
                self.calls[id(module)] += 1
                self.nodes[id(module)] = node
            elif node.op == "get_attr" and node.target in parameters and not self._inside.keys() >= node.users.keys():
                self.read_directly.add(id(parameters[node.target]))

    def module(self, node: object) -> nn.Module | None:
        """The module that a node calls."""
        path = self.path(node)
        return None if path is None else self.modules[path]

    def path(self, node: object) -> str | None:
        """The name of the module that a node calls, in what was traced."""
        if isinstance(node, fx.Node) and node.op == "call_module":
            return cast(str, node.target)
        return self._inside.get(cast(fx.Node, node))

    def _normed(self, node: fx.Node) -> str | None:
        """The layer with a batch norm inside it whose own operation a node is."""
        stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
        path = stack[-1] if stack else ""
        weight = node.args[1] if node.op == "call_function" and len(node.args) > 1 else None
        if not isinstance(weight, fx.Node) or weight.op != "get_attr" or not isinstance(self.modules[path], Normed):
            return None
        return path if weight.target == (f"{path}.weight" if path else "weight") else None

    @staticmethod
    def input(node: fx.Node) -> object:
        """The first argument of a call."""
        return node.args[0] if node.args else node.kwargs.get("input")

    def fed_by(self, norm: fx.Node, gone: set[int]) -> list[tuple[nn.Module, bool]]:
        """The layers whose outputs, one after another in the channels, are a batch norm's input.

        Returns:
            Each with whether a flattening of all axes but the first lies between.

        Raises:
            Left: Something else lies before it.
        """
        return list(self._up(self.input(norm), gone, norm, False, False))

    def _up(
        self, node: object, gone: set[int], user: fx.Node, joined: bool, pooled: bool
    ) -> Iterator[tuple[nn.Module, bool]]:
        if not isinstance(node, fx.Node) or node.op not in _CALL_OPS:
            raise Left("no convolution or linear layer comes before it")
        module = self.module(node)
        foldable = module is not None and is_foldable(module)
        if len([u for u in node.users if not reads_shape(u, node)]) > 1 or _times(node, user) != 1:
            kind = f"of {self.path(node) or node.name}"
            raise Left(f"the output {kind} before it is used elsewhere too")
        if foldable and module is not None:
            if pooled and isinstance(module, nn.Linear):
                raise Left(f"the pooling between {self.path(node)} and it goes over the features")
            yield module, joined
            return
        if node.target is torch.cat and _literal(node, 1, "dim", 0) == 1 and not joined:
            for part in cast(Any, node.args[0]):
                yield from self._up(part, gone, node, joined, pooled)
            return
        step = self._passes(node, gone)
        below = self.module(self.input(node))
        if step is None or (step.rows and not isinstance(below, nn.Linear)):
            raise Left(f"{self._called(node)} comes before it")
        yield from self._up(self.input(node), gone, node, joined or step.joins, pooled or step.pools)

    def feeds(self, norm: fx.Node, gone: set[int]) -> list[tuple[nn.Module, bool, bool]]:
        """The layers that take a batch norm's output.

        Returns:
            Each with whether a flattening, and whether a pooling, lies between.

        Raises:
            Left: Something else takes it too.
        """
        return list(self._down(norm, gone, False, False))

    def _down(
        self, node: fx.Node, gone: set[int], joined: bool, pooled: bool
    ) -> Iterator[tuple[nn.Module, bool, bool]]:
        if not node.users:
            raise Left("no convolution or linear layer takes its output")
        for user in node.users:
            module = self.module(user)
            if module is not None and is_foldable(module) and self.input(user) is node:
                yield module, joined, pooled
                continue
            step = self._passes(user, gone) if user.op in _CALL_OPS and self.input(user) is node else None
            if step is None or step.rows:
                raise Left(f"{self._called(user)} comes after it")
            yield from self._down(user, gone, joined or step.joins, pooled or step.pools)

    def _called(self, node: fx.Node) -> str:
        if node.op == "output":
            return "the end of what was traced"
        module = self.module(node)
        if module is not None:
            return f"{self.path(node)} ({type(module).__name__})"
        return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))

    def _passes(self, node: fx.Node, gone: set[int]) -> _Pass | None:
        """What a call does, where an affine map per channel may be moved from one side of it to the other."""
        module = self.module(node)
        if module is not None:
            if module._forward_pre_hooks or module._forward_hooks:  # pyright: ignore[reportPrivateUsage]
                return None
            if id(module) in gone or type(module) in (nn.Identity, *_DROPOUTS):
                return _Pass()
            if type(module) is nn.Flatten:
                return _flatten(module.start_dim, module.end_dim)
            if type(module) in _ADAPTIVE:
                return _Pass(pools=True)
            return _average(module) if isinstance(module, _POOLS) and type(module) in _POOLS else None
        if node.target in _F_DROPOUTS and _literal(node, 2, "training", True) is False:
            return _Pass()
        if node.target in _F_ADAPTIVE:
            return _Pass(pools=True)
        if node.target is torch.flatten or (node.op == "call_method" and node.target == "flatten"):
            return _flatten(_literal(node, 1, "start_dim", 0), _literal(node, 2, "end_dim", -1))
        if node.op == "call_method" and node.target == "contiguous":
            return _Pass()
        return None


def reads_shape(node: fx.Node, read: fx.Node) -> bool:
    """Whether a node takes no more of another one than its shape, dtype or device."""
    if node.target is residual_for:
        return node.args[1] is read and node.args[0] is not read
    if node.op == "call_method":
        given = node.target in ("reshape_as", "view_as", "expand_as") and node.args[0] is not read
        return given or node.target in ("size", "dim", "ndimension")
    return node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device")


def _times(node: fx.Node, user: fx.Node) -> int:
    """How often a node is an argument of a call."""
    found: list[fx.Node] = []
    fx.map_arg((user.args, user.kwargs), lambda n: found.append(n) if n is node else None)
    return len(found)


def _flatten(start: object, end: object) -> _Pass | None:
    if start == 1 and end == -1:
        return _Pass(joins=True)
    if start == 0 and end == 1:
        return _Pass(rows=True)
    return _Pass(pools=True) if isinstance(start, int) and start >= 2 else None


def _average(pool: nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d) -> _Pass | None:
    """An average of values alone: zeros of a padding that count would not pass through the map."""
    sizes = pool.padding if isinstance(pool.padding, tuple) else (pool.padding,)
    counted = any(sizes) and pool.count_include_pad
    divided = getattr(pool, "divisor_override", None) is not None
    return None if counted or divided else _Pass(pools=True)
