"""Where a model has its batch norms, and which of them a caller means."""

import copy
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple, TypeAlias

import torch
from torch import nn

from steadynorm.errors import ArgumentError, ModelError

__all__ = ["Only", "Site", "chosen", "copied", "replace", "required_model", "sites_of"]

Only: TypeAlias = "Callable[[str, nn.Module], bool] | str | Sequence[str] | None"


class Site(NamedTuple):
    """One module, and the names under which the model has it.

    Attributes:
        layer: The module.
        names: At least one, the first one being that of `named_modules`.
    """

    layer: nn.Module
    names: tuple[str, ...]


def required_model(model: nn.Module, what: str) -> None:
    """Refuses what is no model of Python's.

    Raises:
        ArgumentError: It is not a module.
        ModelError: It is TorchScript, whose layers have been compiled away.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError(f"{what} needs a torch.nn.Module, got {type(model).__name__}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            f"{what} needs a model of Python's modules; this {type(model).__name__} is TorchScript, whose layers are "
            f"compiled and cannot be exchanged. Call {what} on the model before torch.jit.script or torch.jit.trace."
        )


def copied(model: nn.Module, what: str) -> nn.Module:
    """A copy to work on.

    Raises:
        ModelError: The model cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ModelError(
            f"{what} changes a copy of the model, and this {type(model).__name__} cannot be copied ({error}). Tensors "
            "with a history of gradients are the usual reason: weight_norm's, or attributes kept from a forward."
        ) from error


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts another module where the model has one of that name."""
    parent, _, own = name.rpartition(".")
    model.get_submodule(parent)._modules[own] = module  # pyright: ignore[reportPrivateUsage]


def sites_of(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[Site]:
    """The modules of a model that are wanted, each once, with all the places that have it."""
    found: dict[nn.Module, list[str]] = {}
    for path, parent in model.named_modules():
        here = [(path, parent)] if not path else []
        prefix = f"{path}." if path else ""
        for name, module in [*here, *((prefix + n, m) for n, m in parent._modules.items())]:  # pyright: ignore[reportPrivateUsage]
            if module is not None and wanted(module):
                found.setdefault(module, []).append(name)
    order = [module for _, module in model.named_modules() if module in found]
    return [Site(module, tuple(found[module])) for module in order]


def chosen(sites: Iterable[Site], only: Only, what: str = "batch norm") -> set[nn.Module]:
    """The layers that `only` means.

    Args:
        sites: All there are.
        only: None for all of them; a predicate of name and module; or names, or patterns of names with `*`, `?` and
            `[...]`, of layers or of the modules that hold them.
        what: What these layers are.

    Raises:
        ArgumentError: It is something else, or a name or pattern that fits none of them.
    """
    sites = list(sites)
    if only is None:
        return {site.layer for site in sites}
    if callable(only):
        return {site.layer for site in sites if any(only(name, site.layer) for name in site.names)}
    patterns = [only] if isinstance(only, str) else list(only)
    if not all(isinstance(pattern, str) for pattern in patterns):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError(f"only must be a predicate (name, module), a name or pattern, or a list of them: {only!r}.")
    layers: set[nn.Module] = set()
    for pattern in patterns:
        fits = {site.layer for site in sites if any(_fits(name, pattern) for name in site.names)}
        if not fits:
            known = ", ".join(repr(site.names[0]) for site in sites[:5]) or "none at all"
            raise ArgumentError(
                f"only={pattern!r} fits no {what} of this model; those that could be meant are {known}"
                f"{', ...' if len(sites) > 5 else ''}."
            )
        layers |= fits
    return layers


def _fits(name: str, pattern: str) -> bool:
    """Whether it is the name's own pattern, or that of a module around it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))
