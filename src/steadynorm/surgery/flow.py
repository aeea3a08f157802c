"""What lies around a nonlinearity in a traced forward: the layers that feed it, and who else takes their results."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, cast

from torch import fx, nn

from steadynorm.surgery.layers import has_matrix
from steadynorm.surgery.operations import LINEAR_NAMES, NORMS, Kind, function_of, kind_of, operands
from steadynorm.surgery.patterns import Left, View, reads_shape

__all__ = ["Flow", "Label", "Source"]


class Label(NamedTuple):
    """What to call a nonlinearity.

    Attributes:
        module: Its name, or that of the module that calls it as a function.
        function: That function's name; "" for a module.
        call: Which of several, counted from 1.
    """

    module: str
    function: str
    call: int

    def text(self, names: Mapping[str, str]) -> str:
        """In words.

        Args:
            names: Of modules, by the name that they had.
        """
        module = names.get(self.module, self.module)
        said = f"{self.function} in {module or 'the forward'}" if self.function else module
        return said if self.call == 1 else f"{said}, call {self.call}"


class Source(NamedTuple):
    """A layer that feeds a nonlinearity.

    Attributes:
        node: Its call.
        moved: Whether axes are moved between the two.
        joined: Whether an addition lies between.
        chained: Whether a concatenation does.
    """

    node: fx.Node
    moved: bool = False
    joined: bool = False
    chained: bool = False


class Flow:
    """One trace, asked about its nonlinearities."""

    def __init__(self, view: View, name: Callable[[nn.Module], str]) -> None:
        self.view = view
        self.name = name
        self._linear = {id(m): has_matrix(m) and not isinstance(m, NORMS) for m in view.modules.values()}

    def kind(self, node: fx.Node) -> Kind:
        """What a node is to a batch norm near it."""
        return kind_of(node, self.view.module(node))

    def called(self, node: fx.Node) -> str:
        """A node in words."""
        if node.op == "output":
            return "the end of what was traced"
        module = self.view.module(node)
        if module is not None:
            return f"{self.name(module)} ({type(module).__name__})"
        return "the model's input" if node.op == "placeholder" else function_of(node)

    def nonlinearities(self, full: Callable[[str], str]) -> Iterator[tuple[fx.Node, Label]]:
        """Each call of one, in the order of the forward, with what to call it.

        Args:
            full: The name in the model of what the traced part calls so.
        """
        met: Counter[Label] = Counter()
        for node in self.view.graph.nodes:
            if self.kind(node) != "activation":
                continue
            module = self.view.module(node)
            path, function = (full(self.caller(node)), function_of(node)) if module is None else (self.name(module), "")
            label = Label(path, function, 1)
            met[label] += 1
            yield node, label._replace(call=met[label])

    def caller(self, node: fx.Node) -> str:
        """The name, in the traced part, of the module whose forward makes a call."""
        stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
        if node.op == "call_module":
            stack = stack[:-1]
        return stack[-1] if stack else ""

    def sources(self, node: object, through_norms: bool = False) -> list[Source]:
        """The layers whose results, added and concatenated, a node is.

        Raises:
            Left: There are none.
        """
        return list(dict.fromkeys(self._up(node, through_norms, Source(cast(fx.Node, node)))))

    def _up(self, node: object, through_norms: bool, way: Source) -> list[Source]:
        if not isinstance(node, fx.Node):
            raise Left("no convolution or linear layer comes before it")
        kind, above = self.kind(node), self.view.input(node)
        if kind == "weighted":
            return [way._replace(node=node)]
        if kind == "same" or (kind == "norm" and through_norms):
            return self._up(above, through_norms, way)
        if kind == "scaled":
            return self._up(node.all_input_nodes[0], through_norms, way)
        if kind == "moved":
            return self._up(above, through_norms, way._replace(moved=True))
        if kind in ("add", "cat"):
            parts = operands(node) if kind == "add" else cast("list[object]", node.args[0])
            way = way._replace(joined=True) if kind == "add" else way._replace(chained=True)
            return self._any_up([p for p in parts if isinstance(p, fx.Node)], through_norms, way)
        if kind == "norm":
            raise Left(f"{self.called(node)} stands there already")
        if kind == "activation":
            raise Left(f"another nonlinearity comes before it: {self.called(node)}")
        if node.op == "placeholder":
            raise Left("no convolution or linear layer comes before it")
        raise Left(f"{self.called(node)} comes before it")

    def _any_up(self, parts: list[fx.Node], through_norms: bool, way: Source) -> list[Source]:
        found: list[Source] = []
        whys: list[str] = []
        for part in parts:
            try:
                found += self._up(part, through_norms, way)
            except Left as why:
                whys.append(str(why))
        if not found:
            raise Left("; ".join(dict.fromkeys(whys)) or "no convolution or linear layer comes before it")
        return found

    def check_uses(self, node: fx.Node) -> None:
        """That a layer's result goes to nonlinearities and sums alone, where a batch norm of it changes nothing else.

        Raises:
            Left: Something else takes it.
        """
        self._check_uses(node, node)

    def _check_uses(self, node: fx.Node, layer: fx.Node) -> None:
        for user in node.users:
            kind = self.kind(user)
            if reads_shape(user, node) or kind in ("activation", "add", "cat"):
                continue
            if kind == "scaled" or (kind in ("same", "moved") and self.view.input(user) is node):
                self._check_uses(user, layer)
            elif kind == "norm":
                raise Left(f"{self.called(user)} stands there already")
            elif not (kind == "mul" and self._of(user, layer)):
                raise Left(f"the output of {self.called(layer)} is used by {self.called(user)} too")

    def _of(self, node: fx.Node, x: fx.Node) -> bool:
        """Whether a node is a function of x alone, element by element, as x sigmoid(x) is."""
        if node is x:
            return True
        known = self.kind(node) in ("activation", "same", "scaled", "add", "mul")
        return known and bool(node.all_input_nodes) and all(self._of(one, x) for one in node.all_input_nodes)

    def is_factor(self, node: fx.Node) -> bool:
        """Whether a node's result is multiplied by something else: a gate, or part of a formula."""
        kinds = ((user, self.kind(user)) for user in node.users)
        return any(kind == "mul" or (kind in ("same", "scaled") and self.is_factor(user)) for user, kind in kinds)

    def is_hidden(self, node: fx.Node) -> bool:
        """Whether a layer with weights comes after it."""
        seen: set[fx.Node] = set()
        waiting = list(node.users)
        while waiting:
            one = waiting.pop()
            if one in seen:
                continue
            seen.add(one)
            module = self.view.module(one)
            if self._linear[id(module)] if module is not None else function_of(one).rstrip("_") in LINEAR_NAMES:
                return True
            waiting += one.users
        return False

    def next_layer(self, node: fx.Node) -> tuple[fx.Node, nn.Module] | None:
        """The one layer that all of a node's result goes to, over its channels as they are."""
        users = [user for user in node.users if not reads_shape(user, node)]
        if len(users) != 1 or self.view.input(users[0]) is not node:
            return None
        kind, module = self.kind(users[0]), self.view.module(users[0])
        if kind == "same":
            return self.next_layer(users[0])
        return (users[0], module) if kind == "weighted" and module is not None else None

    def norm_after(self, node: fx.Node) -> fx.Node | None:
        """A normalisation of a node's result."""
        for user in node.users:
            kind = self.kind(user)
            found = user if kind == "norm" else self.norm_after(user) if kind == "same" else None
            if found is not None:
                return found
        return None

    def branch_ends(self) -> Iterator[fx.Node]:
        """The ends of residual branches: of two that are added, the one with a nonlinearity that the other lacks."""
        ancestors: dict[fx.Node, set[fx.Node]] = {}
        for node in self.view.graph.nodes:
            ancestors[node] = {node}.union(*(ancestors[one] for one in node.all_input_nodes))
            parts = [p for p in operands(node) if isinstance(p, fx.Node)] if self.kind(node) == "add" else []
            if len(parts) == 2:
                own = [ancestors[parts[0]] - ancestors[parts[1]], ancestors[parts[1]] - ancestors[parts[0]]]
                bends = [any(self.kind(one) == "activation" for one in part) for part in own]
                meet = bool(ancestors[parts[0]] & ancestors[parts[1]])
                if meet and bends[0] != bends[1]:
                    yield self._end(parts[bends.index(True)])

    def _end(self, node: fx.Node) -> fx.Node:
        above = self.view.input(node)
        return self._end(above) if self.kind(node) == "same" and isinstance(above, fx.Node) else node
