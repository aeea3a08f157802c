"""The activations that a batch norm can absorb: each one's value and derivative, by name or from its `torch.nn` module.

An `Activation` is a name and a tuple of floats: it hashes, pickles and compares by value, and a kernel of any backend
can be chosen by it. What it computes is written here once, in plain torch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steadynorm.errors import ArgumentError, UnknownActivationError

__all__ = ["NAMES", "Activation", "ActivationLike", "resolve"]

ActivationLike: TypeAlias = "str | nn.Module | Activation | None"

_SELU_ALPHA: Final = 1.6732632423543772848170429916717
_SELU_SCALE: Final = 1.0507009873554804934193349852946
_Value = Callable[..., Tensor]


def _d_elu(z: Tensor, alpha: float) -> Tensor:
    return (alpha * torch.exp(z.clamp(max=0))).masked_fill(z > 0, 1.0)


def _d_selu(z: Tensor) -> Tensor:
    return _SELU_SCALE * _d_elu(z, _SELU_ALPHA)


def _d_celu(z: Tensor, alpha: float) -> Tensor:
    return torch.exp(z.clamp(max=0) / alpha).masked_fill(z > 0, 1.0)


def _d_silu(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def _d_gelu(z: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-z * math.sqrt(0.5)) + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def _d_gelu_tanh(z: Tensor) -> Tensor:
    c = math.sqrt(2 / math.pi)
    t = torch.tanh(c * (z + 0.044715 * z**3))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * c * (1 + 3 * 0.044715 * z * z)


def _d_sigmoid(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 - s)


def _d_mish(z: Tensor) -> Tensor:
    t = torch.tanh(F.softplus(z))
    return t + z * torch.sigmoid(z) * (1 - t * t)


def _gelu_tanh(z: Tensor) -> Tensor:
    return F.gelu(z, approximate="tanh")


def _softplus(z: Tensor, beta: float, threshold: float) -> Tensor:
    return F.softplus(z, beta, threshold)


def _d_softplus(z: Tensor, beta: float, threshold: float) -> Tensor:
    return torch.sigmoid(beta * z).masked_fill(beta * z > threshold, 1.0)


@dataclass(frozen=True)
class _Formula:
    value: _Value
    derivative: _Value
    defaults: tuple[float, ...] = ()


def _d_relu(z: Tensor) -> Tensor:
    return (z > 0).to(z.dtype)


def _d_relu6(z: Tensor) -> Tensor:
    return ((z > 0) & (z < 6)).to(z.dtype)


def _d_leaky_relu(z: Tensor, slope: float) -> Tensor:
    return torch.full_like(z, slope).masked_fill(z > 0, 1.0)


# torch's own hardswish and hardsigmoid hold 1/6 in float32 even for float64 input, hence their spelled-out values.
def _hardswish(z: Tensor) -> Tensor:
    return z * F.relu6(z + 3) / 6


def _d_hardswish(z: Tensor) -> Tensor:
    return torch.where(z.abs() < 3, z / 3 + 0.5, (z >= 3).to(z.dtype))


def _hardsigmoid(z: Tensor) -> Tensor:
    return F.relu6(z + 3) / 6


def _d_hardsigmoid(z: Tensor) -> Tensor:
    return (z.abs() < 3).to(z.dtype) / 6


def _d_tanh(z: Tensor) -> Tensor:
    return 1 - torch.tanh(z) ** 2


_FORMULAS: Final[dict[str, _Formula]] = {
    "relu": _Formula(F.relu, _d_relu),
    "relu6": _Formula(F.relu6, _d_relu6),
    "leaky_relu": _Formula(F.leaky_relu, _d_leaky_relu, (0.01,)),
    "elu": _Formula(F.elu, _d_elu, (1.0,)),
    "selu": _Formula(F.selu, _d_selu),
    "celu": _Formula(F.celu, _d_celu, (1.0,)),
    "silu": _Formula(F.silu, _d_silu),
    "gelu": _Formula(F.gelu, _d_gelu),
    "gelu_tanh": _Formula(_gelu_tanh, _d_gelu_tanh),
    "hardswish": _Formula(_hardswish, _d_hardswish),
    "hardsigmoid": _Formula(_hardsigmoid, _d_hardsigmoid),
    "sigmoid": _Formula(torch.sigmoid, _d_sigmoid),
    "tanh": _Formula(torch.tanh, _d_tanh),
    "softplus": _Formula(_softplus, _d_softplus, (1.0, 20.0)),
    "mish": _Formula(F.mish, _d_mish),
}

NAMES: Final = tuple(_FORMULAS)
"""The names that `activation=` accepts."""

_ALIASES: Final = {"swish": "silu", "leakyrelu": "leaky_relu"}


@dataclass(frozen=True)
class Activation:
    """An elementwise function f, by name and parameters.

    Attributes:
        name: One of `NAMES`.
        params: The function's parameters in the order of its `torch.nn` module (`leaky_relu`: slope; `elu`, `celu`:
            alpha; `softplus`: beta, threshold). Left empty, torch's defaults.

    Example:
        >>> f = Activation("leaky_relu", (0.2,))
        >>> f(torch.tensor([-1.0, 2.0]))
        tensor([-0.2000,  2.0000])
        >>> f.derivative(torch.tensor([-1.0, 2.0]))
        tensor([0.2000, 1.0000])
    """

    name: str
    params: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        name = _ALIASES.get(self.name, self.name)
        if name not in _FORMULAS:
            raise UnknownActivationError(
                f"activation must be one of {', '.join(NAMES)}, got {self.name!r}. "
                "Apply any other function after the layer."
            )
        defaults = _FORMULAS[name].defaults
        params = tuple(float(p) for p in self.params) or defaults
        if len(params) != len(defaults):
            raise ArgumentError(f"activation {name!r} takes {len(defaults)} parameters, got {self.params!r}.")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "params", params)

    def __call__(self, z: Tensor) -> Tensor:
        """f(z), elementwise."""
        return _FORMULAS[self.name].value(z, *self.params)

    def derivative(self, z: Tensor) -> Tensor:
        """f'(z), elementwise; at a kink the value that torch's own backward uses."""
        return _FORMULAS[self.name].derivative(z, *self.params)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{p:g}' for p in self.params)})" if self.params else self.name


_MODULES: Final[dict[type[nn.Module], Callable[[Any], Activation]]] = {
    nn.ReLU: lambda _: Activation("relu"),
    nn.ReLU6: lambda _: Activation("relu6"),
    nn.LeakyReLU: lambda module: Activation("leaky_relu", (module.negative_slope,)),
    nn.ELU: lambda module: Activation("elu", (module.alpha,)),
    nn.SELU: lambda _: Activation("selu"),
    nn.CELU: lambda module: Activation("celu", (module.alpha,)),
    nn.SiLU: lambda _: Activation("silu"),
    nn.GELU: lambda module: Activation("gelu_tanh" if module.approximate == "tanh" else "gelu"),
    nn.Hardswish: lambda _: Activation("hardswish"),
    nn.Hardsigmoid: lambda _: Activation("hardsigmoid"),
    nn.Sigmoid: lambda _: Activation("sigmoid"),
    nn.Tanh: lambda _: Activation("tanh"),
    nn.Softplus: lambda module: Activation("softplus", (module.beta, module.threshold)),
    nn.Mish: lambda _: Activation("mish"),
}


def _from_module(module: object) -> Activation | None:
    # By exact class: a subclass may compute something else.
    found = _MODULES.get(type(module))  # pyright: ignore[reportArgumentType, reportCallIssue]
    return None if found is None else found(module)


def resolve(activation: ActivationLike) -> Activation | None:
    """Turns what a user wrote for `activation=` into an `Activation`.

    Args:
        activation: A name from `NAMES`, a `torch.nn` activation module (its parameters are taken over), an
            `Activation`, or None for the identity.

    Returns:
        The activation, or None for the identity.

    Raises:
        UnknownActivationError: Neither a known name nor a module of a known class.

    Example:
        >>> resolve(nn.ELU(alpha=0.5))
        Activation(name='elu', params=(0.5,))
    """
    if activation is None or isinstance(activation, nn.Identity):
        return None
    if isinstance(activation, Activation):
        return activation
    if isinstance(activation, str):
        return Activation(activation.lower())
    found = _from_module(activation)
    if found is None:
        raise UnknownActivationError(
            f"activation must be a name ({', '.join(NAMES)}), the torch.nn module of one, or None; "
            f"got {activation!r}. Apply any other function after the layer."
        )
    return found
