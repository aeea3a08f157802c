"""He initialisation of one tensor, with the gain of any activation."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from steadynorm.errors import ArgumentError, DtypeError, ShapeError
from steadynorm.init.theory import AnyActivation, gain

__all__ = ["Distribution", "Mode", "draw_", "he_normal_", "he_uniform_"]

Distribution = Literal["normal", "uniform"]
Mode = Literal["fan_in", "fan_out"]


def draw_(tensor: Tensor, std: float, distribution: Distribution, generator: torch.Generator | None) -> Tensor:
    """Fills the tensor with draws of mean 0 and the given standard deviation, in place, outside autograd."""
    with torch.no_grad():
        if distribution == "normal":
            return tensor.normal_(0.0, std, generator=generator)
        bound = math.sqrt(3.0) * std
        return tensor.uniform_(-bound, bound, generator=generator)


def _fan(tensor: Tensor, mode: Mode) -> int:
    if nn.parameter.is_lazy(tensor):
        raise ArgumentError("a lazy parameter has no shape yet: run one forward pass first, then initialise.")
    if not tensor.dtype.is_floating_point:
        raise DtypeError(f"weights must be floating point to be drawn at random, got {tensor.dtype}.")
    if tensor.dim() < 2:
        raise ShapeError(
            f"a weight needs at least the dimensions (out, in) to have a fan, got shape {tuple(tensor.shape)}. "
            "Biases and scales are set to constants instead."
        )
    if mode not in ("fan_in", "fan_out"):
        raise ArgumentError(f'mode must be "fan_in" or "fan_out", got {mode!r}.')
    return tensor.size(1 if mode == "fan_in" else 0) * math.prod(tensor.shape[2:])


def _he_(
    tensor: Tensor,
    activation: AnyActivation,
    mode: Mode,
    distribution: Distribution,
    generator: torch.Generator | None,
) -> Tensor:
    fan = _fan(tensor, mode)
    return draw_(tensor, gain(activation) / math.sqrt(max(fan, 1)), distribution, generator)


def he_normal_(
    tensor: Tensor,
    activation: AnyActivation = "relu",
    *,
    mode: Mode = "fan_in",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fills a weight from N(0, gain(activation)^2 / fan), in place.

    Args:
        tensor: A weight (out, in, *kernel) as `nn.Linear` and `nn.Conv*d` hold it, floating point.
        activation: The activation that follows the layer; as in `gain`.
        mode: "fan_in" (in * kernel size) keeps the second moment of the signal, "fan_out" (out * kernel size) that of
            the gradient, for activations with E[f^2] = E[f'^2] such as ReLU. These are torch's fans: exact for
            fan_in of grouped convolutions; `initialize_` knows the layer and also takes the right one of a transposed
            convolution.
        generator: Where the random numbers come from; None: torch's global one.

    Returns:
        The tensor.

    Raises:
        ArgumentError: An unknown mode or an activation without a gain.
        DtypeError: The tensor is not floating point.
        ShapeError: It has fewer than 2 dimensions.

    Source:
        He et al., ICCV 2015, https://arxiv.org/abs/1502.01852

    Example:
        >>> w = he_normal_(torch.empty(400, 300), "elu", generator=torch.Generator().manual_seed(0))
        >>> round(float(w.std() * 300**0.5), 2)  # gain("elu") is 1.245
        1.25
    """
    return _he_(tensor, activation, mode, "normal", generator)


def he_uniform_(
    tensor: Tensor,
    activation: AnyActivation = "relu",
    *,
    mode: Mode = "fan_in",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fills a weight from U(-b, b), b = gain(activation) sqrt(3 / fan), in place: `he_normal_`'s variance, bounded.

    Args:
        tensor: A weight (out, in, *kernel), floating point.
        activation: The activation that follows the layer; as in `gain`.
        mode: As in `he_normal_`.
        generator: Where the random numbers come from; None: torch's global one.

    Returns:
        The tensor.

    Raises:
        ArgumentError: An unknown mode or an activation without a gain.
        DtypeError: The tensor is not floating point.
        ShapeError: It has fewer than 2 dimensions.

    Source:
        He et al., ICCV 2015, https://arxiv.org/abs/1502.01852

    Example:
        >>> w = he_uniform_(torch.empty(400, 300), "relu", generator=torch.Generator().manual_seed(0))
        >>> bool(w.abs().max() <= (2 * 3 / 300) ** 0.5)
        True
    """
    return _he_(tensor, activation, mode, "uniform", generator)
