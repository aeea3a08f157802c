"""At which nonlinearities of a traced part a batch norm can be, where it goes, and if nowhere, why."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal, NamedTuple, TypeAlias, cast

from torch import fx, nn

from steadynorm.nn.base import BatchNorm
from steadynorm.nn.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from steadynorm.surgery.affine import inputs_of, outputs_of
from steadynorm.surgery.calls import Calls
from steadynorm.surgery.flow import Flow, Label, Source
from steadynorm.surgery.layers import has_matrix
from steadynorm.surgery.normed import INPUT, OUTPUT
from steadynorm.surgery.patterns import Left, View
from steadynorm.surgery.reading import Reading, Root

__all__ = ["KINDS", "Key", "Placing", "Row", "Side", "Spot", "Where"]

Where: TypeAlias = Literal["before", "after"]
Side: TypeAlias = Literal["before", "after"]

KINDS: Final[dict[int, type[BatchNorm]]] = {1: BatchNorm1d, 2: BatchNorm2d, 3: BatchNorm3d}


class Key(NamedTuple):
    """A place in the model.

    Attributes:
        module: By name; the nn.Sequential where `position` is given.
        side: Before or after it, or the child at that position.
        position: Counted from 0.
    """

    module: str
    side: Side
    position: int | None = None


@dataclass(frozen=True)
class Spot:
    """A batch norm to be.

    Attributes:
        key: Where.
        layer: The name of the layer whose outputs are its channels, or that takes it over its inputs.
        width: How many channels.
        kind: Its class.
        channel_dim: The axis of the channels.
        dead: Whether that layer's bias is made dead.
        zero: Whether it starts with γ = 0.
    """

    key: Key
    layer: str
    width: int
    kind: type[BatchNorm]
    channel_dim: int
    dead: bool
    zero: bool = field(default=False, compare=False)


Row: TypeAlias = "tuple[Label, Spot | str]"
"""A nonlinearity, and its batch norm or why there is none."""


@dataclass
class Placing:
    """The places in one trace.

    Attributes:
        reading: The model.
        root: The part that was traced.
        view: One trace of it.
        where: Before or after the nonlinearities.
        wanted: The names of the layers that may get a batch norm.
        calls: What an example showed; None where there was none.
        banned: Reasons against nonlinearities and places.
    """

    reading: Reading
    root: Root
    view: View
    where: Where
    wanted: Collection[str]
    calls: Calls | None
    banned: Mapping[object, str]

    def make(self, zero_gamma: bool) -> list[Row]:
        """Looks at each nonlinearity, in the order of the forward.

        Args:
            zero_gamma: Whether batch norms at the ends of residual branches are to start with γ = 0.
        """
        self.flow = Flow(self.view, self.reading.name)
        self._claimed: dict[fx.Node, Spot] = {}
        self._stacks = {one: list(one.meta.get("nn_module_stack", {}).items()) for one in self.view.graph.nodes}
        rows: list[Row] = []
        for node, label in self.flow.nonlinearities(self._full):
            try:
                if label in self.banned:
                    raise Left(self.banned[label])
                self._check_hidden(node)
                place = self._before if self.where == "before" else self._after
                rows += [(label, one) for one in place(node)]
            except Left as why:
                rows.append((label, str(why)))
        if not zero_gamma:
            return rows
        ends = {self._claimed[end].key for end in self.flow.branch_ends() if end in self._claimed}
        return [
            (label, replace(one, zero=True) if isinstance(one, Spot) and one.key in ends else one)
            for label, one in rows
        ]

    def _check_hidden(self, node: fx.Node) -> None:
        if self.flow.is_hidden(node):
            return
        if not self.root.name:
            raise Left("no layer with weights comes after it: it is the model's last")
        if self.calls is None:
            return  # refused with its layer, for the same reason
        module = self.view.module(node)
        inside = self._full(self.flow.caller(node)) if module is None else self.reading.name(module)
        around = f"{inside}." if inside else ""
        now = max(
            (when for name, when in self.calls.last.items() if name == inside or name.startswith(around)), default=0
        )
        weighted = [n for n, m in self.reading.model.named_modules() if has_matrix(m, False)]
        if not any(self.calls.last.get(name, 0) > now for name in weighted):
            raise Left("no layer with weights comes after it: it is the model's last")

    def _before(self, node: fx.Node) -> list[Spot | str]:
        found: list[Spot | str] = []
        sources = self.flow.sources(self.view.input(node))
        for source in sources:
            if source.node in self._claimed:
                continue
            try:
                spot = self._before_one(node, source, alone=len(sources) == 1)
            except Left as why:
                found.append(str(why))
                continue
            found.append(spot)
        if not found:
            raise Left(f"{', '.join(self._layer(one)[1] for one in sources)} got one before an earlier nonlinearity")
        return found

    def _before_one(self, node: fx.Node, source: Source, alone: bool) -> Spot:
        layer, name = self._checked(source)
        try:
            self.flow.check_uses(source.node)
        except Left:
            # What else takes the layer's result is to have it as it is, and there the bias is not dead.
            key = self._at_activation(node, "before") if alone and source == Source(source.node) else None
            if key is None:
                raise
            return self._spot(key, layer, name, outputs_of(layer), dead=False)
        key = self._in_sequence(source.node, layer, "after") or Key(name, "after")
        self._check_room(key, layer, name)
        spot = self._spot(key, layer, name, outputs_of(layer), getattr(layer, "bias", None) is not None)
        self._claimed[source.node] = spot
        return spot

    @staticmethod
    def _check_room(key: Key, layer: nn.Module, name: str) -> None:
        if key.position is None and (hasattr(layer, INPUT) or hasattr(layer, OUTPUT)):
            raise Left(f"{name} has a child already where the batch norm would be")

    def _after(self, node: fx.Node) -> list[Spot | str]:
        sources = self.flow.sources(self.view.input(node), through_norms=True)
        layers = [self._checked(one)[0] for one in sources]
        widths = {outputs_of(layer) for layer in layers}
        if len(widths) > 1 or any(one.chained or one.moved for one in sources):
            raise Left("its channels are not those of one layer: axes are moved or joined before it")
        if self.flow.is_factor(node):
            raise Left("its result is a factor, or part of a formula")
        norm = self.flow.norm_after(node)
        if norm is not None:
            raise Left(f"{self.flow.called(norm)} stands there already")
        layer, name = self._layer(sources[0])
        key = self._at_activation(node, "after")
        if key is None:
            return [self._before_next(node, layer, widths.pop())]
        self._claimed[node] = self._spot(key, layer, name, widths.pop(), dead=False)
        return [self._claimed[node]]

    def _before_next(self, node: fx.Node, layer: nn.Module, width: int) -> Spot:
        """In front of the layer that takes the nonlinearity's result, where that is no module of its own."""
        following = self.flow.next_layer(node)
        if following is None:
            raise Left("it is no module of its own, and what takes its result is not one layer alone")
        after, name = self._checked(Source(following[0]))
        if inputs_of(after) != width or isinstance(after, nn.Linear) != isinstance(layer, nn.Linear):
            raise Left(f"it is no module of its own, and its channels are not those of {name}")
        key = Key(name, "before")
        self._check_room(key, after, name)
        self._claimed[node] = self._spot(key, layer, self.reading.name(layer), width, dead=False)
        return self._claimed[node]

    def _layer(self, source: Source) -> tuple[nn.Module, str]:
        layer = cast(nn.Module, self.view.module(source.node))
        return layer, self.reading.name(layer)

    def _checked(self, source: Source) -> tuple[nn.Module, str]:
        """A layer that may get a batch norm."""
        layer, name = self._layer(source)
        self.reading.check(layer, self.view, self.root)
        if name not in self.wanted:
            raise Left(f"only= does not mean {name}")
        if self.root.name:  # what calls this part, and how often, cannot be read
            why = next(w for part, w in self.reading.untraced.items() if not part or self.root.name.startswith(part))
            if self.calls is None:
                raise Left(f"what calls {self.root.name} could not be traced ({why}): give example=, to see its calls")
            if self.calls.count[name] != 1:
                raise Left(f"{name} was called {self.calls.count[name]} times on the example")
        return layer, name

    def _spot(self, key: Key, layer: nn.Module, name: str, width: int, dead: bool) -> Spot:
        if key in self.banned:
            raise Left(self.banned[key])
        if not isinstance(layer, nn.Linear):
            return Spot(key, name, width, KINDS[len(cast("tuple[int, ...]", layer.kernel_size))], 1, dead)
        # A linear layer's features are its last axis, of however many.
        ranks = set[int]() if self.calls is None else self.calls.ranks[name]
        if ranks == {2}:
            return Spot(key, name, width, BatchNorm1d, 1, dead)
        for dims, allowed in ((1, {2, 3}), (2, {4}), (3, {5})):
            if ranks <= allowed:
                return Spot(key, name, width, KINDS[dims], -1, dead)
        raise Left(f"the results of {name} are {' and '.join(f'{rank}-D' for rank in sorted(ranks))}")

    def _at_activation(self, node: fx.Node, side: Side) -> Key | None:
        """At a nonlinearity itself, where it is a module with a place of its own."""
        module = self.view.module(node)
        if module is None:
            return None
        key = self._in_sequence(node, module, side)
        if key is not None:
            return key
        try:
            self.reading.check(module, self.view, self.root)
        except Left:
            return None
        return None if any(True for _ in module.parameters()) else Key(self.reading.name(module), side)

    def _in_sequence(self, node: fx.Node, module: nn.Module, side: Side) -> Key | None:
        """The place beside a child of an nn.Sequential, where it is that which calls it, and is itself called once."""
        caller, path = self._caller(node)
        sequence = self.view.modules[path]
        calls = {key for one in self._stacks.values() for key, (inside, _) in one if inside == path}
        whole = isinstance(sequence, nn.Sequential) and type(sequence).forward is nn.Sequential.forward
        if not whole or len(calls) > 1 or self._full(path) not in self.root.own:
            return None
        beside = [one for one in self._stacks if self.view.module(one) is module and self._caller(one)[0] == caller]
        places = [place for place, child in enumerate(cast(nn.Sequential, sequence)) if child is module]
        if len(beside) != len(places):
            return None
        return Key(self._full(path), side, places[beside.index(node)] + (side == "after"))

    def _caller(self, node: fx.Node) -> tuple[str, str]:
        """The call that a module is called in, and the name of the module whose forward that is."""
        stack = self._stacks[node]
        return (stack[-2][0], stack[-2][1][0]) if len(stack) > 1 else ("", "")

    def _full(self, path: str) -> str:
        return ".".join(part for part in (self.root.name, path) if part)
