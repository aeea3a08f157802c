"""Which calls of a graph may write into a tensor that another one reads later."""

import operator
from collections.abc import Callable, Iterable
from typing import Final, TypeAlias

import torch
import torch.nn.functional as F
from torch import fx, nn

from steadynorm.surgery.tracing import INPLACE

__all__ = ["may_write", "written_before"]

_ModuleOf: TypeAlias = Callable[[object], "nn.Module | None"]

_MAKES_NEW: Final = (
    *(operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.mul, torch.cat, torch.stack),
    *(F.relu, torch.relu, torch.sigmoid, torch.tanh, F.max_pool2d, "add", "mul", "sub", "relu", "mean", "sum", "clone"),
)
_KNOWN: Final = ("torch", "_operator", "operator", "math", "builtins", "steadynorm")


def may_write(node: fx.Node, module_of: _ModuleOf) -> bool:
    """Whether a call may write into what it is given: in place by its name, or nothing is known of it."""
    module = module_of(node)
    if module is not None:
        known = type(module).__module__.startswith(("torch.nn.", "steadynorm."))
        return bool(getattr(module, "inplace", False)) or not known
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    by_name = (name.endswith("_") and not name.endswith("__")) or name in (*INPLACE, "setitem")
    known = isinstance(node.target, str) or (getattr(node.target, "__module__", None) or "torch").startswith(_KNOWN)
    return by_name or not known or bool(node.kwargs.get("inplace", False)) or "out" in node.kwargs


def written_before(node: fx.Node, readers: Iterable[fx.Node], module_of: _ModuleOf, gone: set[int]) -> bool:
    """Whether the memory that a call's first argument lies in may be written into after the call, before the readers.

    Args:
        node: The call; it comes before the readers.
        readers: What its output goes into.
        module_of: The module that a node calls.
        gone: Batch norms that give back their input, by id.
    """
    order = {one: place for place, one in enumerate(node.graph.nodes)}
    last = max(order[reader] for reader in readers)
    memory = _memory(node.args[0] if node.args else node.kwargs.get("input"), module_of, gone)
    for one in list(order)[order[node] + 1 : last]:
        if may_write(one, module_of) and any(
            _memory(given, module_of, gone) is memory for given in one.all_input_nodes
        ):
            return True
    return False


def _memory(node: object, module_of: _ModuleOf, gone: set[int]) -> object:
    """The node that made the tensor that another one is, or may be, a view of."""
    while isinstance(node, fx.Node) and node.op in ("call_module", "call_function", "call_method"):
        module = module_of(node)
        new = node.target in _MAKES_NEW and not may_write(node, module_of)
        if module is not None:
            same = (
                id(module) in gone
                or isinstance(module, (nn.Identity, nn.Flatten))
                or "Dropout" in type(module).__name__
            )
            new = not same and not may_write(node, module_of)
        if new or not node.all_input_nodes:
            return node
        node = node.all_input_nodes[0]
    return node
