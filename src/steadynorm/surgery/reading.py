"""Which parts of a model can be traced, and what is true of their layers in the model as a whole."""

import dis
import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, Final

from torch import nn
from torch.fx.proxy import TraceError

from steadynorm.surgery.layers import is_batchnorm, obstacle
from steadynorm.surgery.patterns import Left, View
from steadynorm.surgery.tracing import Branches, Helpers

__all__ = ["Reading", "Root"]

_MOST_WAYS: Final = 16


@dataclass(frozen=True)
class Root:
    """A part of the model that was traced as one.

    Attributes:
        name: Of the part; "" for the whole model.
        views: Its forward as traced: with all arguments given, and, if some have defaults, with those; each in every
            way that it can take where it asks about its input.
        own: The names of what it holds, less what lies in untraceable parts inside it.
    """

    name: str
    views: tuple[View, ...]
    own: frozenset[str]


@dataclass
class Reading:
    """A model read for surgery; tracing may leave marks on it, so it is a copy that is read.

    Attributes:
        model: That copy.
        roots: The largest parts that could be traced.
        untraced: The parts that could not, with the reason.
    """

    model: nn.Module
    roots: list[Root] = field(default_factory=list[Root])
    untraced: dict[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        self.names: dict[int, list[str]] = defaultdict(list)
        for name, module in self.model.named_modules(remove_duplicate=False):
            self.names[id(module)].append(name)
        self._owners: dict[int, int] = defaultdict(int)
        for module in self.model.modules():
            for tensor in (*module._parameters.values(), *module._buffers.values()):  # pyright: ignore[reportPrivateUsage]
                self._owners[id(tensor)] += tensor is not None
        self._opaque: set[int] = set()
        self._helpers = Helpers()
        self._seen: set[int] = set()
        self.roots = self._read("", self.model)

    def name(self, module: nn.Module) -> str:
        """A module's first name."""
        return self.names[id(module)][0]

    def check(self, module: nn.Module, view: View, root: Root) -> None:
        """That a layer may be changed.

        Raises:
            Left: It may not.
        """
        name = self.name(module)
        why = obstacle(module)
        if why is None and view.calls[id(module)] != 1:
            why = f"is called {view.calls[id(module)]} times"
        if why is None and not root.own.issuperset(self.names[id(module)]):
            why = f"is part of what could not be traced too, as {', '.join(self.names[id(module)])}"
        tensors = [*module.parameters(), *module.buffers()]
        if why is None and any(self._owners[id(t)] > 1 for t in tensors):
            why = "shares its weights with another layer"
        if why is None and any(id(t) in view.read_directly for t in tensors):
            why = "has its weights read by another part of the model"
        if why is None:
            why = self._reached_into(name, root)
        if why is not None:
            raise Left(f"{name} {why}")

    def trace(self, root: Root, module: nn.Module | None = None) -> list[View]:
        """Traces the part anew, which raises if its forward needs what has gone meanwhile.

        Args:
            root: The part.
            module: Itself, if it has another name by now.

        Returns:
            Its forward with all arguments given, in every way that it can take.
        """
        return list(self._views(self.model.get_submodule(root.name) if module is None else module, None, []))

    def _read(self, name: str, module: nn.Module) -> list[Root]:
        """The largest traceable parts of a module: itself, itself around what is not, or those inside it."""
        if id(module) in self._seen:
            return []
        self._seen.add(id(module))
        root, why = self._traced(name, module)
        if root is not None:
            return [root]
        opaque = len(self._opaque)
        inside = [
            found
            for child, part in module.named_children()
            for found in self._read(f"{name}.{child}" if name else child, part)
        ]
        if len(self._opaque) > opaque:
            root, why = self._traced(name, module)
            if root is not None:
                return [root, *(one for one in inside if one.name not in root.own)]
        if not _is_leaf(module):  # lists of modules among them, which nothing calls
            self._opaque.add(id(module))
            self.untraced[name] = why
        return inside

    def _traced(self, name: str, module: nn.Module) -> tuple[Root | None, str]:
        if _is_leaf(module):
            return None, "it is a layer"
        ended: list[Exception] = []
        try:
            views = [view for given in _defaults(type(module)) for view in self._views(module, given, ended)]
            if not views:
                raise ended[0]
        except Exception as error:  # whatever a user's forward raises when it is handed a stand-in
            if self._helpers.add(error):
                return self._traced(name, module)
            if error in ended:
                return None, "its forward ends in an error whatever it is given"
            said = str(error).strip().splitlines()
            return None, f"{type(error).__name__}: {said[0] if said else ''}"[:160]
        return Root(name, tuple(views), frozenset(self._own(name, module))), ""

    def _views(self, module: nn.Module, concrete: Mapping[str, Any] | None, ended: list[Exception]) -> Iterator[View]:
        """A forward in each way that it can take, less those that end in an error of its own, which goes into a list.

        Raises:
            TraceError: There are too many.
        """
        ways: list[tuple[bool, ...]] = [()]
        for way in ways:
            branches = Branches(way)
            try:
                yield View(module, frozenset(self._opaque), concrete, branches, self._helpers)
            except Exception as error:
                if not _is_raised(error):
                    raise
                ended.append(error)
            ways += [(*branches.taken[:place], True) for place in range(len(way), len(branches.taken))]
            if len(ways) > _MOST_WAYS:
                raise TraceError(f"its forward branches in more than {_MOST_WAYS} ways on its input's values")

    def _own(self, name: str, module: nn.Module) -> Iterator[str]:
        yield name
        for child, part in module._modules.items():  # pyright: ignore[reportPrivateUsage]
            if part is not None and id(part) not in self._opaque:
                yield from self._own(f"{name}.{child}" if name else child, part)

    def _reached_into(self, name: str, root: Root) -> str | None:
        """Whether the code of an untraced part around the root names the layer, and may call it by itself."""
        attribute = next((part for part in reversed(name.split(".")) if not part.isdigit()), "")
        for around in self.untraced:
            inside = around == "" or root.name.startswith(around + ".")
            part = self.model.get_submodule(around)
            if inside and attribute in _names_in(type(part)) and not hasattr(part, attribute):
                return f"may be called by {around or 'the model'} directly, which could not be traced"
        return None


def _defaults(kind: type[nn.Module]) -> Iterator[dict[str, Any] | None]:
    """Values of a forward's arguments to trace it with: none; all defaults there are; all but that of the first."""
    yield None
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    optional = {one.name: one.default for one in parameters if one.default is not one.empty}
    if optional:
        yield optional
    if len(optional) > 1 and parameters[0].name in optional:
        yield {name: value for name, value in optional.items() if name != parameters[0].name}


def _is_raised(error: Exception) -> bool:
    """Whether a forward's own `raise` or `assert` ended it, as it would have ended a call: no failure of the trace."""
    trace = None if isinstance(error, TraceError) else error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "torch":
        return False
    return trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _is_leaf(module: nn.Module) -> bool:
    if is_batchnorm(module):
        return True
    return type(module).__module__.startswith(("torch.nn.", "steadynorm.nn.")) and not isinstance(module, nn.Sequential)


def _names_in(kind: type) -> set[str]:
    """The names that the code of a module's class uses."""
    found: set[str] = set()

    def read(code: CodeType) -> None:
        found.update(code.co_names)
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                read(constant)

    for cls in kind.__mro__:
        if cls.__module__.startswith("torch.nn.modules"):
            continue
        for value in vars(cls).values():
            code = getattr(value, "__code__", None)
            if isinstance(code, CodeType) and value.__name__ != "__init__":
                read(code)
    return found
