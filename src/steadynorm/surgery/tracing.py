"""Traces of a module's forward: in the way that it is told, with the functions kept whole that need real numbers."""

import ast
import inspect
import operator
import textwrap
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from types import CodeType, FrameType, FunctionType
from typing import Any, Final, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.utils import _pytree as pytree  # pyright: ignore[reportPrivateUsage]

__all__ = ["INPLACE", "Branches", "Helpers", "InplaceProxy", "Tracer"]

INPLACE: Final = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")
"""The operators that write into their first argument."""
_SETTINGS: Final = {"stride", "kernel_size", "dilation", "groups", "in_channels", "out_channels"}
"""What a function may read of a layer that it is handed: none of it changes when the layer takes over a batch norm."""


_CONSTANTS: Final = (fx.Proxy, Tensor, str, int, float, complex, type(None), torch.dtype, torch.device)


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


class Helpers:
    """Functions of modules (files) that are kept whole in a trace: they ask for numbers where a trace has none.

    Each is one call in the graph, of which nothing but its arguments is known. So it has to be certain that it calls no
    layer: one that it is handed may be read for its stride and the like, and no more.
    """

    def __init__(self) -> None:
        self._found: list[tuple[dict[str, Any], str, FunctionType]] = []

    def add(self, error: BaseException) -> bool:
        """Takes in the innermost function that an error went through and that is not known yet.

        Returns:
            Whether there was one, so that another trace may go further.
        """
        for caller, frame in reversed(list(_calls(error))):
            space = caller.f_globals
            if any(function.__code__ is frame.f_code and here is space for here, _, function in self._found):
                continue
            names = [key for key, value in space.items() if _is_of(value, frame.f_code)]
            if names and not frame.f_globals.get("__name__", "").startswith(("torch.", "steadynorm.")):
                self._found += [(space, name, space[name]) for name in names]
                return True
        return False

    @contextmanager
    def kept_whole(self, tracer: fx.Tracer) -> Generator[None]:
        """Each of the functions is one call, where it is given something of the trace."""
        for space, name, function in self._found:
            space[name] = _whole(tracer, function)
        try:
            yield
        finally:
            for space, name, function in self._found:
                space[name] = function


def _calls(error: BaseException) -> Iterator[tuple[FrameType, FrameType]]:
    """The frames that an error went through, each with the one that called it, from the outside."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        yield trace.tb_frame, trace.tb_next.tb_frame
        trace = trace.tb_next


def _is_of(value: object, code: CodeType) -> bool:
    return isinstance(value, FunctionType) and value.__code__ is code


def _whole(tracer: fx.Tracer, function: FunctionType) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs))):
            return function(*args, **kwargs)
        given = inspect.signature(function).bind(*args, **kwargs).arguments
        for name, value in given.items():
            if isinstance(value, nn.Module):
                if not _reads_settings_alone(function, name):
                    raise TraceError(f"{function.__name__} is handed a {type(value).__name__}, and may call it")
            elif not _is_constant(value):
                raise TraceError(f"{function.__name__} is handed a {type(value).__name__}, and may change it")
        used = (function.__globals__.get(name) for name in function.__code__.co_names)
        if function.__closure__ or any(isinstance(one, nn.Module) for one in used):
            raise TraceError(f"{function.__name__} may call a module of its own")
        args = tuple(_by_name(tracer, value) for value in args)
        return tracer.create_proxy("call_function", function, args, {k: _by_name(tracer, v) for k, v in kwargs.items()})

    return called


def _is_constant(value: object) -> bool:
    """Whether a function cannot change it, or is followed in what it does to it."""
    if isinstance(value, tuple):
        return all(map(_is_constant, cast("tuple[object, ...]", value)))
    return isinstance(value, _CONSTANTS)


def _by_name(tracer: fx.Tracer, value: object) -> object:
    return tracer.path_of_module(value) if isinstance(value, nn.Module) else value


def _reads_settings_alone(function: FunctionType, parameter: str) -> bool:
    """Whether all that a function does with an argument is to read attributes in `_SETTINGS`."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):
        return False
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    reads = [node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in _SETTINGS]
    own = [node for node in uses if node.id == parameter]
    return bool(own) and all(node in reads for node in own) and not {"locals", "eval", "exec"} & {n.id for n in uses}


class InplaceProxy(fx.Proxy):
    """Keeps `a += b` what it is: torch's would record `a = a + b`, which leaves what else is called `a` as it was."""


def _inplace(name: str) -> Callable[..., fx.Proxy]:
    target = getattr(operator, name)

    def method(self: fx.Proxy, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return method


for _name in INPLACE:
    setattr(InplaceProxy, f"__{_name}__", _inplace(_name))


class Tracer(fx.Tracer):
    """Takes the way that it is told, and goes into all modules but some.

    Args:
        whole: Whether a module is one call; None for what torch would say.
        branches: The way.
        helpers: The functions that are one call, too.
    """

    def __init__(self, whole: Callable[[nn.Module], bool | None], branches: Branches, helpers: Helpers) -> None:
        super().__init__()
        self.whole = whole
        self.branches = branches
        self.helpers = helpers

    def to_bool(self, obj: fx.Proxy) -> bool:
        """The answer of the way that it takes."""
        return self.branches.answer(obj.node)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one call."""
        known = self.whole(m)
        return super().is_leaf_module(m, module_qualified_name) if known is None else known

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """What stands for a node in the forward."""
        return InplaceProxy(node, self)

    def traced(self, root: nn.Module, concrete: Mapping[str, Any] | None) -> fx.Graph:
        """The graph of a module's forward, with some arguments given."""
        with self.helpers.kept_whole(self):
            return self.trace(root, None if concrete is None else dict(concrete))
