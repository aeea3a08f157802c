"""A batch norm in evaluation as an affine map, and what that map makes of the weights of its neighbour, in float64."""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.conv import _ConvNd as TorchConv  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.conv import _ConvTransposeNd as TorchConvTranspose  # pyright: ignore[reportPrivateUsage]

from steadynorm.nn.base import BatchNorm

__all__ = ["Affine", "Weights", "affine_map", "after", "before", "inputs_of", "outputs_of", "padding_of", "weights_of"]


class Affine(NamedTuple):
    """x -> scale x + shift, (C,) each, float64 on the CPU."""

    scale: Tensor
    shift: Tensor


class Weights(NamedTuple):
    """Weight and bias of a convolution or linear layer, float64 on the CPU."""

    weight: Tensor
    bias: Tensor


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().to(device="cpu", dtype=torch.float64)


def affine_map(layer: TorchBatchNorm) -> Affine:
    """What a batch norm in evaluation computes: scale = γ / sqrt(σ² + ε), shift = β - μ scale.

    Args:
        layer: It keeps running statistics: μ, and σ², unbiased as torch stores it.

    Returns:
        (C,) each; of the domain in use where the layer has several.

    Example:
        >>> layer = nn.BatchNorm1d(1, eps=0.0)
        >>> _ = layer.running_mean.fill_(3.0), layer.running_var.fill_(4.0)
        >>> affine_map(layer)
        Affine(scale=tensor([0.5000], dtype=torch.float64), shift=tensor([-1.5000], dtype=torch.float64))
    """
    weight, bias = layer.weight, layer.bias
    mean, var = cast(Tensor, layer.running_mean), cast(Tensor, layer.running_var)
    if isinstance(layer, BatchNorm):
        running = layer.running(layer.active_domain)
        mean, var = running.mean, running.var
        weight, bias = layer.affine_of(layer.active_domain)
    scale = (_exact(var) + layer.eps).rsqrt()
    if weight is not None:  # pyright: ignore[reportUnnecessaryComparison]
        scale = scale * _exact(weight)
    shift = -_exact(mean) * scale
    if bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
        shift = shift + _exact(bias)
    return Affine(scale, shift)


def inputs_of(layer: nn.Module) -> int:
    """The channels (features) that a convolution (linear layer) takes."""
    return cast(int, layer.in_channels if isinstance(layer, TorchConv) else layer.in_features)


def outputs_of(layer: nn.Module) -> int:
    """The channels (features) that a convolution (linear layer) gives."""
    return cast(int, layer.out_channels if isinstance(layer, TorchConv) else layer.out_features)


def padding_of(layer: TorchConv) -> tuple[int, ...]:
    """How far a convolution pads, as `torch.nn.functional.pad` wants it: the last axis first, both ends of each."""
    return tuple(layer._reversed_padding_repeated_twice)  # pyright: ignore[reportPrivateUsage]


def weights_of(layer: nn.Module) -> Weights:
    """Its weight, and its bias or zeros."""
    bias = cast("Tensor | None", layer.bias)
    exact = torch.zeros(outputs_of(layer), dtype=torch.float64) if bias is None else _exact(bias)
    return Weights(_exact(cast(Tensor, layer.weight)), exact)


def _by_group(layer: nn.Module, weight: Tensor) -> Tensor:
    """The weight as (groups, outputs or inputs of one, the other, *), whichever of the two the layer stores first."""
    groups = layer.groups if isinstance(layer, TorchConv) else 1
    return weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])


def _along(vector: Tensor, weight: Tensor, axis: int) -> Tensor:
    """A (channels,) vector along an axis of a weight by group."""
    shape = [1] * weight.dim()
    shape[0], shape[axis] = weight.shape[0], weight.shape[axis]
    return vector.reshape(shape)


def after(layer: nn.Module, weights: Weights, affine: Affine) -> Weights:
    """The weights with a batch norm behind them taken in: w' = scale w, b' = scale b + shift, by output channel.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> two = torch.full((1,), 2.0, dtype=torch.float64)
        >>> after(layer, Weights(two.view(1, 1), two), Affine(two, two))
        Weights(weight=tensor([[4.]], dtype=torch.float64), bias=tensor([6.], dtype=torch.float64))
    """
    grouped = _by_group(layer, weights.weight)
    axis = 2 if isinstance(layer, TorchConvTranspose) else 1
    scaled = grouped * _along(affine.scale, grouped, axis)
    return Weights(scaled.reshape(weights.weight.shape), weights.bias * affine.scale + affine.shift)


def before(layer: nn.Module, weights: Weights, affine: Affine) -> Weights:
    """The weights with a batch norm in front of them taken in: w' = w scale, b' = b + Σ w shift, by input channel.

    The sum is over the input channels and the whole kernel, so it holds where each output sees the whole kernel: of a
    convolution that pads with zeros, or a transposed one with a kernel of more than a point, only where shift is zero.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> two = torch.full((1,), 2.0, dtype=torch.float64)
        >>> before(layer, Weights(two.view(1, 1), two), Affine(two, two))
        Weights(weight=tensor([[4.]], dtype=torch.float64), bias=tensor([6.], dtype=torch.float64))
    """
    grouped = _by_group(layer, weights.weight)
    transposed = isinstance(layer, TorchConvTranspose)
    axis = 1 if transposed else 2
    scaled = (grouped * _along(affine.scale, grouped, axis)).reshape(weights.weight.shape)
    if not bool(affine.shift.any()):
        return Weights(scaled, weights.bias)
    added = (grouped * _along(affine.shift, grouped, axis)).sum(axis)
    return Weights(scaled, weights.bias + (added.flatten(2).sum(2) if added.dim() > 2 else added).reshape(-1))
