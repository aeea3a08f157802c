"""The graph of a model around its batch norms: which layers feed each, and which it feeds, with only maps between them
that let an affine map per channel pass."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import fx, nn

from steadynorm.surgery.absorbed import residual_for
from steadynorm.surgery.layers import is_batchnorm, is_foldable
from steadynorm.surgery.normed import Normed
from steadynorm.surgery.passing import input_of, passes
from steadynorm.surgery.tracing import Branches, Helpers, Tracer

__all__ = ["Left", "View", "reads_shape"]

_CALL_OPS = ("call_module", "call_function", "call_method")


class Left(Exception):
    """A batch norm stays; the message is the reason, as the report gives it."""


class Fed(NamedTuple):
    """A layer that takes a batch norm's output.

    Attributes:
        layer: It.
        joined: Whether a flattening lies between.
        pooled: Whether a pooling does.
        measured: Whether the size of what lies between is asked for.
    """

    layer: nn.Module
    joined: bool
    pooled: bool
    measured: bool


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
        helpers: Helpers | None = None,
    ) -> None:
        def whole(module: nn.Module) -> bool | None:
            if isinstance(module, Normed):
                return False
            return True if is_batchnorm(module) or is_foldable(module) or id(module) in opaque else None

        self.graph = Tracer(whole, branches or Branches(), helpers or Helpers()).traced(root, concrete)
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
        return input_of(node)

    def fed_by(self, norm: fx.Node, gone: set[int]) -> list[tuple[nn.Module, bool]]:
        """The layers whose outputs, one after another in the channels, are a batch norm's input.

        Returns:
            Each with whether a flattening of all axes but the first lies between.

        Raises:
            Left: Something else lies before it.
        """
        return list(self._up(input_of(norm), gone, norm, False, False))

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
        if _joins_channels(node) and not joined:
            for part in cast(Any, node.args[0] if node.args else node.kwargs["tensors"]):
                yield from self._up(part, gone, node, joined, pooled)
            return
        step = passes(node, self.module, gone)
        below = self.module(input_of(node))
        if step is None or (step.rows and not isinstance(below, nn.Linear)):
            raise Left(f"{self._called(node)} comes before it")
        yield from self._up(input_of(node), gone, node, joined or step.joins, pooled or step.pools)

    def feeds(self, norm: fx.Node, gone: set[int]) -> list[Fed]:
        """The layers that take a batch norm's output.

        Raises:
            Left: Something else takes it too.
        """
        return list(self._down(norm, gone, False, False, False))

    def _down(self, node: fx.Node, gone: set[int], joined: bool, pooled: bool, measured: bool) -> Iterator[Fed]:
        users = [user for user in node.users if not reads_shape(user, node)]
        measured = measured or len(users) < len(node.users)
        if not users:
            raise Left("no convolution or linear layer takes its output")
        for user in users:
            module = self.module(user)
            if module is not None and is_foldable(module) and input_of(user) is node:
                yield Fed(module, joined, pooled, measured)
                continue
            step = passes(user, self.module, gone) if user.op in _CALL_OPS and input_of(user) is node else None
            if step is None or step.rows:
                raise Left(f"{self._called(user)} comes after it")
            yield from self._down(user, gone, joined or step.joins, pooled or step.pools, measured)

    def _called(self, node: fx.Node) -> str:
        if node.op == "output":
            return "the end of what was traced"
        module = self.module(node)
        if module is not None:
            return f"{self.path(node)} ({type(module).__name__})"
        return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def reads_shape(node: fx.Node, read: fx.Node) -> bool:
    """Whether a node takes no more of another one than its shape, dtype or device."""
    if node.target is residual_for:
        return node.args[1] is read and node.args[0] is not read
    if node.op == "call_method":
        given = node.target in ("reshape_as", "view_as", "expand_as") and node.args[0] is not read
        return given or node.target in ("size", "dim", "ndimension")
    return node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device")


def _joins_channels(node: fx.Node) -> bool:
    parts = node.args[0] if node.args else node.kwargs.get("tensors")
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    return node.target in (torch.cat, torch.concat) and isinstance(parts, (list, tuple)) and bool(dim == 1)


def _times(node: fx.Node, user: fx.Node) -> int:
    """How often a node is an argument of a call."""
    found: list[fx.Node] = []
    fx.map_arg((user.args, user.kwargs), lambda n: found.append(n) if n is node else None)
    return len(found)
