"""Whether a class known by its name alone computes what that name says: tried out on random numbers in float64."""

from typing import Any

import torch
from torch import Tensor, nn

from steadynorm.activations import Activation

__all__ = ["objection"]

_TOLERANCE = 1e-6  # in float64; hard-coded constants in float32 pass, another formula does not


def objection(
    layer: nn.Module, eps: float, momentum: float | None, activation: Activation | None, frozen: bool
) -> str | None:
    """Why a layer is no batch norm followed by the activation; None if it is one.

        frozen or evaluation    f(γ (x - μ) / sqrt(σ² + ε) + β)        μ, σ²: the running ones
        training                the same with the batch's (biased), and the running ones move towards them (unbiased)

    Hooks are not called, and neither the layer's tensors nor torch's random state change.

    Args:
        layer: With `running_mean` and `running_var`; its `forward` is what is tried out.
        eps: ε.
        momentum: What the layer remembers of a batch; None for the cumulative average.
        activation: f; None for the identity.
        frozen: Whether it should normalise by the running statistics in training too.
    """
    synced = isinstance(layer, nn.SyncBatchNorm)  # its training forward needs the other ranks
    for training in (False,) if synced else (False, True):
        random = torch.Generator().manual_seed(0)
        double = _double(layer, random, training)
        before = {name: tensor.detach().clone() for name, tensor in _tensors(double).items()}
        x = torch.randn(3, len(before["running_mean"]), 2, 2, generator=random, dtype=torch.float64) * 3 + 1
        by_batch = training and not frozen
        mean = x.mean((0, 2, 3)) if by_batch else before["running_mean"]
        var = x.var((0, 2, 3), correction=0) if by_batch else before["running_var"]
        y = (x - _wide(mean)) / torch.sqrt(_wide(var) + eps)
        y = y * _wide(before.get("weight", torch.ones(()))) + _wide(before.get("bias", torch.zeros(())))
        expected = [y if activation is None else activation(y)]
        share = 0.0 if not by_batch else 1.0 if momentum is None else momentum
        expected.append((1 - share) * before["running_mean"] + share * mean)
        expected.append((1 - share) * before["running_var"] + share * x.var((0, 2, 3)))
        try:
            with torch.no_grad():
                got = [type(layer).forward(double, x.clone())]
        except Exception as error:  # somebody else's forward may raise anything
            return f"its forward could not be tried out ({type(error).__name__}: {error})"
        now = _tensors(double)
        got += [now["running_mean"], now["running_var"]]
        if not all(_close(one, other) for one, other in zip(got, expected, strict=True)):
            mode = "training" if training else "evaluation"
            return f"in {mode} its forward computes something else than a batch norm of that name would"
    return None


def _double(layer: nn.Module, random: torch.Generator, training: bool) -> nn.Module:
    """The layer with other numbers: float64 on the CPU, one of their own for each channel."""
    double = type(layer).__new__(type(layer))
    state: dict[str, Any] = dict(vars(layer), training=training)

    def other(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point():
            return None if tensor is None else torch.zeros(tensor.shape, dtype=tensor.dtype)
        return torch.rand(tensor.shape, generator=random, dtype=torch.float64) + 0.5

    parameters = {name: other(tensor) for name, tensor in state["_parameters"].items()}
    state["_parameters"] = {n: None if t is None else nn.Parameter(t) for n, t in parameters.items()}
    state["_buffers"] = {name: other(tensor) for name, tensor in state["_buffers"].items()}
    vars(double).update(state)
    return double


def _tensors(layer: nn.Module) -> dict[str, Tensor]:
    both = {**vars(layer)["_parameters"], **vars(layer)["_buffers"]}
    return {name: tensor for name, tensor in both.items() if tensor is not None}


def _wide(channels: Tensor) -> Tensor:
    return channels.reshape(-1, 1, 1)


def _close(got: object, expected: Tensor) -> bool:
    if not isinstance(got, Tensor) or got.shape != expected.shape:
        return False
    return torch.allclose(got.to(expected.dtype), expected, rtol=_TOLERANCE, atol=_TOLERANCE)
