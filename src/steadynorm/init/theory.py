"""What an activation does to the second moment of a signal, and the gain that makes up for it."""

import copy
import math
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor, nn

from steadynorm.activations import Activation, resolve
from steadynorm.errors import ArgumentError, UnknownActivationError
from steadynorm.init.quadrature import Elementwise, expect_square

__all__ = ["AnyActivation", "Preserve", "as_function", "gain", "mean_field", "slope"]

AnyActivation: TypeAlias = "str | nn.Module | Activation | Elementwise | None"
Preserve: TypeAlias = Literal["signal", "gradient"]
Function: TypeAlias = "Activation | nn.Module | Elementwise"


def identity(z: Tensor) -> Tensor:
    """z."""
    return z


def as_function(activation: AnyActivation) -> Function:
    """The function behind what a user wrote, ready for float64; `identity` itself for the identity.

    Raises:
        UnknownActivationError: A name that is not known.
        ArgumentError: Neither a name, nor a module that can be copied, nor callable.
    """
    if isinstance(activation, str) and activation.lower() in ("identity", "linear"):
        return identity
    if activation is None or isinstance(activation, str | Activation):
        return resolve(activation) or identity
    if isinstance(activation, nn.Module):
        try:
            return resolve(activation) or identity
        except UnknownActivationError:
            return _evaluating(activation)
    if not callable(activation):  # pyright: ignore[reportUnnecessaryComparison]  (what a user passes)
        raise ArgumentError(f"activation must be a name, an nn.Module or a callable on tensors, got {activation!r}.")
    return activation


def _evaluating(module: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(module).double().cpu().eval()
    except Exception as error:  # a user's module may refuse in any way
        raise ArgumentError(
            f"an activation module is copied to float64 on the CPU to be looked at; {type(module).__name__} cannot be: "
            f"{error}"
        ) from error


def _mean_square_of(function: Function) -> float:
    """E[f(z)^2]: the closed form where it is exact, else by quadrature."""
    match function:
        case Activation(name="relu"):
            return 0.5
        case Activation(name="leaky_relu", params=(a,)):
            return (1 + a * a) / 2
        case nn.PReLU():  # one slope per channel: the mean over channels
            return (1 + float(function.weight.detach().square().mean())) / 2
        case _:
            return 1.0 if function is identity else expect_square(function)


def _derivative_of(function: Function) -> Elementwise:
    if isinstance(function, Activation):
        return function.derivative

    def derivative(z: Tensor) -> Tensor:
        with torch.enable_grad():
            at = z.detach().requires_grad_()
            out = function(at)
            if not (isinstance(out, Tensor) and out.shape == z.shape and out.requires_grad):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ArgumentError("it cannot be differentiated by torch, element by element")
            return torch.autograd.grad(out, at, torch.ones_like(out))[0]

    return derivative


def gain(activation: AnyActivation, preserve: Preserve = "signal") -> float:
    r"""The factor that keeps the second moment of a signal, or of its gradient, through a layer with this activation.

    signal:    gain = 1 / sqrt(E[f(z)^2]),      gradient:    gain = 1 / sqrt(E[f'(z)^2]),      z ~ N(0, 1)

    Weights drawn with standard deviation gain / sqrt(fan_in) turn f(z) back into pre-activations of second moment 1.
    This is He et al.'s argument for ReLU, E[f^2] = 1/2, with any f in its place. E[f^2] is the second moment about
    zero, not the variance: for a function with a large mean, such as the sigmoid, most of it is that mean, and what
    tells two examples apart shrinks from layer to layer all the same. E[f'^2] is what a small difference between two
    inputs, and the gradient on its way back, is multiplied by per layer; the gain that keeps it is Glorot's "4 for the
    sigmoid" made exact. The two agree for ReLU, leaky ReLU and the identity.

    Exact for identity, ReLU, leaky ReLU and PReLU. Otherwise by quadrature: to 1e-12 for an f whose kinks and jumps lie
    at multiples of 1/2, as those of the usual activations do; elsewhere a kink costs up to 1e-5, a jump up to 1e-2.

    Args:
        activation: A name (`steadynorm.activations.NAMES`, "identity" or "linear"), an `nn.Module` (evaluated in
            float64 and in eval mode), an `Activation`, None for the identity, or any callable that maps a float64
            tensor element by element.
        preserve: "signal" or "gradient" (then a callable must be differentiable by torch; a jump counts for nothing).

    Returns:
        The gain: sqrt(2) for ReLU, 1 for the identity.

    Raises:
        UnknownActivationError: A name that is not known.
        ArgumentError: The callable is not elementwise, not finite, or the expectation is 0 or infinite.

    Source:
        He, Zhang, Ren, Sun, "Delving Deep into Rectifiers", ICCV 2015, https://arxiv.org/abs/1502.01852;
        for the gradient: Schoenholz et al., "Deep Information Propagation", ICLR 2017,
        https://arxiv.org/abs/1611.01232.

    Example:
        >>> import torch
        >>> round(gain("relu"), 6), round(gain(nn.ELU()), 6), round(gain(torch.sin), 6)
        (1.414214, 1.245198, 1.520867)
        >>> round(gain("sigmoid"), 4), round(gain("sigmoid", preserve="gradient"), 4)
        (1.8462, 4.7226)
    """
    if preserve not in get_args(Preserve):
        raise ArgumentError(f'preserve must be "signal" or "gradient", got {preserve!r}.')
    function, what = as_function(activation), "f" if preserve == "signal" else "f'"
    mean_square = _mean_square_of(function) if preserve == "signal" else expect_square(_derivative_of(function))
    if not math.isfinite(mean_square) or mean_square <= 0:
        raise ArgumentError(
            f"a gain needs 0 < E[{what}(z)^2] < inf for z ~ N(0, 1), and {activation!r} gives {mean_square}. "
            "Use a function that is finite on the whole line and not zero everywhere."
        )
    return 1 / math.sqrt(mean_square)


def _check(q: float, gain_: float, layers: int = 1) -> None:
    if not (math.isfinite(q) and q > 0 and math.isfinite(gain_)):
        raise ArgumentError(f"q must be positive and the gain finite, got q={q!r}, gain={gain_!r}.")
    if layers < 1:
        raise ArgumentError(f"layers must be at least 1, got {layers!r}.")


def mean_field(activation: AnyActivation, gain: float | None = None, q: float = 1.0, layers: int = 50) -> list[float]:
    """The second moment of the pre-activations, layer by layer, of an infinitely wide network.

    q_0 = q,  q_{l+1} = gain^2 E[f(sqrt(q_l) z)^2],  z ~ N(0, 1)

    Args:
        activation: As in `gain`.
        gain: Weights have the standard deviation gain / sqrt(fan_in). None: the activation's own, which makes
            q = 1 a fixed point (not necessarily a stable one, see `slope`).
        q: The second moment of what enters the first activation; > 0.
        layers: How many layers to go through.

    Returns:
        `layers + 1` second moments, the first one `q`; inf from where they overflow.

    Raises:
        ArgumentError: q or layers is not positive, or the activation has no gain.

    Source:
        Poole et al., "Exponential expressivity in deep neural networks through transient chaos", NeurIPS 2016,
        https://arxiv.org/abs/1606.05340; Schoenholz et al., "Deep Information Propagation", ICLR 2017,
        https://arxiv.org/abs/1611.01232 (with zero biases).

    Example:
        >>> [round(q, 3) for q in mean_field("elu", q=2.0, layers=3)]
        [2.0, 1.861, 1.744, 1.644]
    """
    g = _gain_or(activation, gain)
    _check(q, g, layers)
    function = as_function(activation)
    moments = [float(q)]
    for _ in range(layers):
        if math.isfinite(moments[-1]):
            with np.errstate(over="ignore"):
                moments.append(g * g * expect_square(function, math.sqrt(moments[-1])))
        else:
            moments.append(math.inf)
    return [m if math.isfinite(m) else math.inf for m in moments]


def slope(activation: AnyActivation, gain: float | None = None, q: float = 1.0) -> float:
    """The derivative of the mean-field map at q: below 1 in size, a fixed point there is stable.

    d/dq gain^2 E[f(sqrt(q) z)^2] = gain^2 / (2 q) E[(z^2 - 1) f(sqrt(q) z)^2]

    (the derivative of the normal density in place of that of f, so that f may have kinks). At a stable fixed point a
    second moment that is off by a factor comes back, by `slope` per layer; at an unstable one it runs away. Exactly
    1, as for ReLU, it stays where it is.

    Args:
        activation: As in `gain`.
        gain: As in `mean_field`.
        q: Where; > 0.

    Returns:
        The slope.

    Raises:
        ArgumentError: q is not positive, or the activation has no gain.

    Source:
        As for `mean_field`.

    Example:
        >>> round(slope("elu"), 3), round(slope("relu"), 3), round(slope("gelu"), 3)
        (0.891, 1.0, 1.144)
    """
    g = _gain_or(activation, gain)
    _check(q, g)
    function = as_function(activation)
    return g * g / (2 * q) * expect_square(function, math.sqrt(q), lambda z: z * z - 1)


def _gain_or(activation: AnyActivation, given: float | None) -> float:
    return gain(activation) if given is None else given
