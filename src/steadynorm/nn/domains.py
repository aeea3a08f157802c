"""Domains: separate running statistics, and by option γ and β, for data of several kinds in one layer.

The first domain lives in the names of `torch.nn` (`running_mean`, `weight`, ...), the others beside them with the
domain's name behind (`running_mean_sketch`): all are ordinary buffers and parameters, so that checkpoints, optimisers,
DDP and `.to()` need not know of them.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor, nn

from steadynorm.errors import ArgumentError

__all__ = ["PARAMETERS", "STATISTICS", "add_domains", "checked_domains", "fill_in", "named"]

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
PARAMETERS = ("weight", "bias")


def checked_domains(domains: Sequence[str] | None) -> tuple[str, ...]:
    """The names, or none at all; each must be able to be part of a buffer's name."""
    if domains is None:
        return ()
    names = tuple(domains)
    ordered = not isinstance(domains, (str, AbstractSet))  # a set would put another domain first in every process
    fine = all(isinstance(n, str) and n and f"_{n}".isidentifier() for n in names)  # pyright: ignore[reportUnnecessaryIsInstance]
    if not (names and ordered and fine and len(set(names)) == len(names)):
        raise ArgumentError(
            "domains must be a tuple or list of different names of letters, digits and underscores, e.g. "
            f'("photo", "sketch"); got {domains!r}.'
        )
    return names


def named(name: str, domain: str | None, domains: tuple[str, ...]) -> str:
    """The name of a domain's own buffer or parameter."""
    return name if not domains or domain == domains[0] else f"{name}_{domain}"


def add_domains(layer: nn.Module, domains: tuple[str, ...], affine: bool) -> None:
    """Registers the buffers, and if `affine` the parameters, of all domains but the first, as copies of the first's."""
    for domain in domains[1:]:
        for name in STATISTICS:
            buffer = layer._buffers.get(name)  # pyright: ignore[reportPrivateUsage]
            layer.register_buffer(named(name, domain, domains), None if buffer is None else buffer.clone())
        for name in PARAMETERS if affine else ():
            parameter = layer._parameters.get(name)  # pyright: ignore[reportPrivateUsage]
            copy = None if parameter is None else nn.Parameter(parameter.detach().clone())
            layer.register_parameter(named(name, domain, domains), copy)


def fill_in(state_dict: dict[str, Tensor], prefix: str, domains: tuple[str, ...], affine: bool) -> None:
    """Lets a checkpoint of a layer without domains start all of them: what is missing is the first domain's."""
    names = STATISTICS + (PARAMETERS if affine else ())
    own = {prefix + named(name, domain, domains): prefix + name for domain in domains[1:] for name in names}
    if own and not any(key in state_dict for key in own):
        state_dict.update({key: state_dict[first].clone() for key, first in own.items() if first in state_dict})


def reset(layer: nn.Module, domains: tuple[str, ...]) -> None:
    """Mean 0, variance 1 and nothing counted, in the buffers of all domains but the first."""
    for domain in domains[1:]:
        for name, value in zip(STATISTICS, (0, 1, 0), strict=True):
            buffer = layer._buffers.get(named(name, domain, domains))  # pyright: ignore[reportPrivateUsage]
            if isinstance(buffer, torch.Tensor):
                buffer.fill_(value)


def reset_affine(layer: nn.Module, domains: tuple[str, ...]) -> None:
    """γ = 1 and β = 0 in the parameters of all domains but the first."""
    for domain in domains[1:]:
        for name, value in zip(PARAMETERS, (1, 0), strict=True):
            parameter = layer._parameters.get(named(name, domain, domains))  # pyright: ignore[reportPrivateUsage]
            if parameter is not None:
                nn.init.constant_(parameter, value)
