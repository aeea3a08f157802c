"""A module's forward, written anew with what follows its batch norms done by them; all else about it stays."""

import copyreg
import inspect
import linecache
import operator
import random
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import fx, nn

from steadynorm.surgery.absorbed import residual_for
from steadynorm.surgery.layers import hooked
from steadynorm.surgery.pairing import ModuleOf, Pair, pair_at
from steadynorm.surgery.patterns import Left
from steadynorm.surgery.tracing import INPLACE, InplaceProxy

__all__ = ["Code", "LeftOne", "Rewritten", "become", "rewritten"]


class LeftOne(Left):
    """One batch norm of those that were to be rewritten together stays as it is.

    Attributes:
        norm: Which one.
    """

    def __init__(self, norm: nn.Module, why: str) -> None:
        super().__init__(why)
        self.norm = norm


class Code:
    """The source of a forward, and the names that it uses.

    Attributes:
        source: One function `forward`.
        names: What its names stand for; modules by their own name in a tuple, since they cannot be pickled.
    """

    def __init__(self, source: str, names: Mapping[str, object]) -> None:
        self.source = source
        self.names = {
            key: (value.__name__,) if isinstance(value, types.ModuleType) else value for key, value in names.items()
        }

    def __deepcopy__(self, memo: object) -> "Code":
        return self

    def function(self) -> Callable[..., Any]:
        """The function."""
        import importlib

        space: dict[str, Any] = {
            key: importlib.import_module(cast(str, value[0])) if isinstance(value, tuple) else value
            for key, value in self.names.items()
        }
        file = f"<fused forward {hash(self.source)}>"
        linecache.cache[file] = (len(self.source), None, self.source.splitlines(keepends=True), file)
        exec(compile(self.source, file, "exec"), space)
        return cast("Callable[..., Any]", space["forward"])


class Rewritten:
    """Mixed into the class of a module whose forward was rewritten, so that it can be copied and pickled.

    Attributes:
        fused_from: The class that the module had.
        fused_code: The forward that it has now.
    """

    fused_from: type[nn.Module]
    fused_code: Code

    def __reduce_ex__(self, protocol: Any) -> Any:
        make, args, *rest = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        if make is not copyreg.__newobj__:  # pyright: ignore[reportAttributeAccessIssue]
            return (make, args, *rest)  # the class knows how to make one of its own
        return (_new, (self.fused_from, self.fused_code, *args[1:]), *rest)


def _new(kind: type[nn.Module], code: Code, *args: Any) -> nn.Module:
    made = _class(kind, code)
    return made.__new__(made, *args)


def _class(kind: type[nn.Module], code: Code) -> type[nn.Module]:
    body = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "fused_from": kind,
        "fused_code": code,
        "forward": code.function(),
    }
    return types.new_class(kind.__name__, (Rewritten, kind), {}, lambda space: space.update(body))


def become(module: nn.Module, code: Code) -> None:
    """Gives a module that forward; it stays the object that it is, and an instance of the class that it had.

    Raises:
        Left: Its class does not allow it.
    """
    try:
        object.__setattr__(module, "__class__", _class(type(module), code))
    except TypeError as error:
        raise Left(f"the class of what holds it cannot be changed ({error})") from error


class _Tracer(fx.Tracer):
    """Goes into the modules that lie between the forward and its batch norms, and into no others."""

    def __init__(self, through: set[int]) -> None:
        super().__init__()
        self.through = through

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) not in self.through

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return InplaceProxy(node, self)


def rewritten(owner: nn.Module, norms: Iterable[nn.Module], through: Iterable[nn.Module]) -> Code:
    """The forward of a module with its batch norms' activations, and the sums before those, done by them.

    Args:
        owner: What the pairs lie in; it is traced, and its mode changed.
        norms: Its batch norms, each called once.
        through: The modules inside it whose forwards become part of its own.

    Raises:
        LeftOne: One of the batch norms has to stay as it is.
        Left: It cannot be traced alone, in both modes, or not without changing what it does.
    """
    norms, flat = list(norms), {id(module) for module in through}
    codes: list[tuple[str, Mapping[str, object]]] = []
    for training in (True, False):
        owner.train(training)
        graph = _trace(owner, flat)
        modules = dict(owner.named_modules(remove_duplicate=False))

        def module_of(node: object, modules: Mapping[str, nn.Module] = modules) -> nn.Module | None:
            return modules[cast(str, node.target)] if isinstance(node, fx.Node) and node.op == "call_module" else None

        for norm in norms:
            try:
                _join(graph, _pair(graph, norm, module_of))
            except Left as why:
                raise LeftOne(norm, str(why)) from why
        graph.lint()
        code = graph.python_code("self")
        codes.append((code.src, code.globals))
    (one, names), (other, more) = codes
    if one == other:
        return Code(one, names)
    if flat:
        raise Left("what holds it does something else in training, and so may what lies between")
    return Code(_either(one, other), {**names, **more})


def _trace(owner: nn.Module, through: set[int]) -> fx.Graph:
    parts = [module for module in owner.modules() if module is owner or id(module) in through]
    if any(hooked(module) for module in parts if module is not owner):
        raise Left("hooks of what lies between would not be called any more")
    before = [_values(module) for module in parts]
    drawn = torch.get_rng_state(), random.getstate()
    try:
        graph = _Tracer(through).trace(owner)
    except Exception as error:  # whatever a user's forward raises when it is handed a stand-in
        said = next(iter(str(error).strip().splitlines()), "")
        raise Left(f"the forward of what holds it cannot be traced ({type(error).__name__}: {said[:100]})") from error
    if not torch.equal(drawn[0], torch.get_rng_state()) or drawn[1] != random.getstate():
        raise Left("the forward of what holds it draws at random")
    if before != [_values(module) for module in parts]:
        raise Left("the forward of what holds it changes attributes, or makes tensors of its own")
    if not _same_by_default(owner, graph, through):
        raise Left("the forward of what holds it depends on its optional arguments")
    return graph


def _same_by_default(owner: nn.Module, graph: fx.Graph, through: set[int]) -> bool:
    """Whether a trace with all arguments given is also that of a call without the optional ones."""
    parameters = inspect.signature(type(owner).forward).parameters.values()
    optional = {one.name: one.default for one in parameters if one.default is not one.empty}
    try:
        return not optional or _calls(graph, optional) == _calls(_Tracer(through).trace(owner, optional), optional)
    except Exception:
        return False


def _calls(graph: fx.Graph, optional: Mapping[str, object]) -> list[tuple[object, ...]]:
    """What is called with what, by default."""
    checks = {node for node in graph.nodes if getattr(node.target, "__name__", "").startswith("_assert")}
    checks |= {node for node in graph.nodes if node.target is operator.eq and checks.issuperset(node.users)}
    calls = [node for node in graph.nodes if node.op != "placeholder" and node not in checks]
    given = {node: f"%{node.target}" for node in graph.nodes if node.op == "placeholder"}
    place: dict[fx.Node, Any] = {node: optional.get(str(node.target), name) for node, name in given.items()}
    place |= {node: f"%{i}" for i, node in enumerate(calls)}

    def placed(value: Any) -> Any:
        return fx.map_arg(value, place.__getitem__)

    return [(node.op, node.target, placed(node.args), placed(node.kwargs)) for node in calls]


def _values(module: nn.Module) -> dict[str, int]:
    """The attributes of a module by identity."""
    kept = {name: value for name, value in vars(module).items() if name not in ("training", "_modules")}
    inside = {f"{name}.{key}": id(one) for name in ("_buffers", "_parameters") for key, one in kept[name].items()}
    return {name: id(value) for name, value in kept.items()} | inside


def _changes(node: fx.Node, module_of: ModuleOf) -> bool:
    """Whether a node may write into what it is given."""
    module = module_of(node)
    if module is not None:
        return bool(getattr(module, "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    written = name.endswith("_") and not name.endswith("__")
    return written or name in INPLACE or name == "setitem" or bool(node.kwargs.get("inplace", False))


def _pair(graph: fx.Graph, norm: nn.Module, module_of: ModuleOf) -> Pair:
    """What a batch norm can do itself, where its call may move to that of the sum.

    Raises:
        Left: Something is written into between.
    """
    calls = [node for node in graph.nodes if module_of(node) is norm]
    if len(calls) != 1:
        raise Left(f"the forward of what holds it calls it {len(calls)} times")
    pair = pair_at(calls[0], module_of)
    if pair.add is None:
        return pair
    order = list(graph.nodes)
    between = order[order.index(pair.norm) + 1 : order.index(pair.add)]
    x = pair.norm.args[0]
    if isinstance(x, fx.Node) and len(x.users) > 1 and any(_changes(node, module_of) for node in between):
        raise Left("something may be written into its input before the sum")
    residual = cast(fx.Node, pair.residual)
    elsewhere = residual.op == "placeholder" or len(residual.users) > 1
    if pair.add.args[0] is residual and _changes(pair.add, module_of) and elsewhere:
        raise Left("the sum is written into a tensor that is used elsewhere too")
    return pair


def _join(graph: fx.Graph, pair: Pair) -> None:
    norm, act = pair.norm, pair.act
    if pair.add is None and act is not None:
        act.replace_all_uses_with(cast(fx.Node, act.args[0] if act.args else act.kwargs["input"]))
        graph.erase_node(act)
        return
    x = cast(fx.Node, norm.args[0] if norm.args else norm.kwargs["input"])
    with graph.inserting_before(cast(fx.Node, pair.add)):
        added = graph.call_function(residual_for, (cast(fx.Node, pair.residual), x))
        given = {name: value for name, value in norm.kwargs.items() if name != "input"}
        joined = graph.call_module(cast(str, norm.target), (x,), {**given, "residual": added})
    pair.last.replace_all_uses_with(joined)
    gone = pair.nodes[::-1]
    for node in gone:
        for user in [user for user in node.users if user not in gone]:  # they read its shape, which is the input's
            user.replace_input_with(node, x)
        graph.erase_node(node)


def _either(training: str, evaluation: str) -> str:
    """One forward of two that differ."""
    head, _, first = training.lstrip().partition("\n")
    second = evaluation.lstrip().partition("\n")[2]

    def deeper(body: str) -> Iterator[str]:
        return (f"    {line}" if line.strip() else line for line in body.splitlines())

    return "\n".join([head, "    if self.training:", *deeper(first), "    else:", *deeper(second), ""])
