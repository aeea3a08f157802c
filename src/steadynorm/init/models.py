"""He initialisation of a whole model, each layer by the activation that follows it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from steadynorm.errors import ArgumentError
from steadynorm.init.following import BATCH_NORMS, TRANSPOSED, WEIGHTED, Follows, Weighted, find
from steadynorm.init.tensors import Distribution, draw_
from steadynorm.init.theory import AnyActivation, Preserve, gain

__all__ = ["Initialization", "LayerInit", "initialize_"]


@dataclass(frozen=True)
class LayerInit:
    """How one layer was initialised.

    Attributes:
        name: Its name in the model.
        kind: Its class.
        follows: The activation that follows, or why there is none.
        gain: The gain used.
        fan: How many inputs each output sums (on average, for a transposed convolution).
        std: The weights' standard deviation, gain / sqrt(fan).
    """

    name: str
    kind: str
    follows: str
    gain: float
    fan: float
    std: float


@dataclass(frozen=True)
class Initialization:
    """What `initialize_` did.

    Attributes:
        layers: The layers that were drawn anew.
        norms: Names of the batch norms set to gamma 1, beta 0, with their running statistics reset.
        untouched: Names of modules with parameters of their own that were left as they were.
        untraced: Empty if what follows each layer was read off the model's graph; else why it could not be, and
            module order was used instead.
    """

    layers: tuple[LayerInit, ...]
    norms: tuple[str, ...]
    untouched: tuple[str, ...]
    untraced: str

    def __str__(self) -> str:
        rows = [("layer", "kind", "followed by", "gain", "fan", "std")]
        rows += [
            (r.name or "(model)", r.kind, r.follows, f"{r.gain:.4f}", f"{r.fan:g}", f"{r.std:.4g}") for r in self.layers
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        if self.norms:
            lines.append(f"batch norms set to gamma 1, beta 0: {', '.join(self.norms)}")
        if self.untouched:
            lines.append(f"left as they were: {', '.join(self.untouched)}")
        if self.untraced:
            lines.append(
                f"The model's graph could not be traced ({self.untraced}); what follows a layer is taken from module "
                "order, and functions called in forward() were not seen. Check the table, or pass activation=."
            )
        return "\n".join(lines)


def _fan_in(layer: Weighted) -> float:
    """Inputs summed by one output, borders left aside: in / groups * kernel size, over the stride where transposed."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    fan = layer.in_channels / layer.groups * math.prod(layer.kernel_size)
    return fan / math.prod(layer.stride) if isinstance(layer, TRANSPOSED) else fan


def _settable(layer: nn.Module) -> bool:
    """Whether writing to `layer.weight` lasts: not where old-style hooks compute it from other parameters."""
    return isinstance(layer.weight, nn.Parameter) or parametrize.is_parametrized(layer, "weight")


def _draw_(layer: Weighted, std: float, distribution: Distribution, generator: torch.Generator | None) -> None:
    with torch.no_grad():
        if parametrize.is_parametrized(layer, "weight"):
            layer.weight = draw_(torch.empty_like(layer.weight), std, distribution, generator)
        else:
            draw_(layer.weight, std, distribution, generator)
        if layer.bias is not None:
            layer.bias.zero_()


def _plan(
    name: str, layer: Weighted, follows: Follows, forced: tuple[str, float] | None, preserve: Preserve
) -> LayerInit:
    label, gain_ = follows.label, follows.gain
    if forced is not None and follows.kind != "output":
        label, gain_ = forced
    elif follows.kind == "activation" and preserve != "signal":
        gain_ = gain(follows.activation, preserve)
    fan = _fan_in(layer)
    return LayerInit(name, type(layer).__name__, label, gain_, fan, gain_ / math.sqrt(max(fan, 1.0)))


def _own_parameters(model: nn.Module) -> Iterator[tuple[str, set[int]]]:
    """Modules with parameters of their own, and the identities of those: a tied one is in several."""
    for name, module in model.named_modules():
        own = {id(p) for p in module.parameters(recurse=False)}
        if own:
            yield name, own


def initialize_(
    model: nn.Module,
    *,
    activation: AnyActivation = None,
    generator: torch.Generator | None = None,
    distribution: Distribution = "normal",
    preserve: Preserve = "signal",
) -> Initialization:
    """Initialises each Linear and convolution by the activation that follows it, in place.

    Weights get mean 0 and standard deviation gain(f) / sqrt(fan), where f is the first nonlinearity that the layer's
    result meets, looking through batch (and other) norms, dropout, pooling, flattening, additions and softmax; an
    activation fused into a steadynorm batch norm counts. Where none follows (the output layer, or a layer straight
    before another) the gain is 1. Biases become 0; batch norms get gamma 1, beta 0 and fresh running statistics. Other
    modules, and layers inside those that torch.nn computes as one (`nn.MultiheadAttention`), are left alone and named
    in the result.

    The fan is the number of inputs that one output sums: in_features; in_channels / groups * kernel size; for a
    transposed convolution that over the stride (in the mean over positions). Borders are not counted.

    The activation that follows is the usual reading of He et al. (and torch's). What is kept from layer to layer is a
    matter of the activation before, so the two differ in the first layer, whose result has the second moment gain^2
    for standardised input, and the last.

    Args:
        model: Any model. Its graph is traced with torch.fx; where that fails, module order is used and the result
            says so (then functions called in `forward`, such as `F.relu`, are not seen).
        activation: What to take for every layer but the output, in place of what is found; as in `gain`.
        generator: Where the random numbers come from; None: torch's global one.
        distribution: "normal" or "uniform".
        preserve: What the gain keeps from layer to layer, "signal" or "gradient"; see `gain`.

    Returns:
        What was done, layer by layer; `print` it to see a table.

    Raises:
        ArgumentError: An unknown distribution, an activation without a gain, or a layer whose shape is not yet known.

    Source:
        He et al., ICCV 2015, https://arxiv.org/abs/1502.01852

    Example:
        >>> net = nn.Sequential(nn.Linear(64, 100), nn.BatchNorm1d(100), nn.ELU(), nn.Linear(100, 10))
        >>> print(initialize_(net))
        layer  kind    followed by       gain    fan  std
        0      Linear  elu(1)            1.2452  64   0.1556
        3      Linear  nothing (output)  1.0000  100  0.1
        batch norms set to gamma 1, beta 0: 1
    """
    if distribution not in ("normal", "uniform"):
        raise ArgumentError(f'distribution must be "normal" or "uniform", got {distribution!r}.')
    if any(nn.parameter.is_lazy(p) for p in model.parameters()):
        raise ArgumentError("the model has lazy layers, whose shape is not known: run one forward pass first.")
    forced = None if activation is None else (_label(activation), gain(activation, preserve))
    follows, untraced = find(model)
    modules = dict(model.named_modules())
    layers = {name: m for name in follows if isinstance(m := modules[name], WEIGHTED) and _settable(m)}
    plans = tuple(_plan(name, layer, follows[name], forced, preserve) for name, layer in layers.items())
    for plan in plans:
        _draw_(layers[plan.name], plan.std, distribution, generator)
    norms = {name: m for name, m in modules.items() if isinstance(m, BATCH_NORMS)}
    for norm in norms.values():
        norm.reset_parameters()
    drawn = {id(p) for module in (*layers.values(), *norms.values()) for p in module.parameters()}
    untouched = tuple(name for name, own in _own_parameters(model) if not drawn & own)
    return Initialization(plans, tuple(norms), untouched, untraced)


def _label(activation: AnyActivation) -> str:
    if isinstance(activation, nn.Module):
        return type(activation).__name__
    return str(getattr(activation, "__name__", activation))
