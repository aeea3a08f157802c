"""What stands in a fused model where something stood that a batch norm does now."""

from typing import cast

from torch import Size, Tensor, nn

from steadynorm.activations import Activation
from steadynorm.errors import ShapeError
from steadynorm.nn.tracing import is_proxy

__all__ = ["Absorbed", "residual_for"]


class Absorbed(nn.Module):
    """In the place of an activation that the batch norm before it applies: gives back its input.

    Args:
        activation: The one that stood here.

    Example:
        >>> import torch
        >>> Absorbed(Activation("relu"))(torch.tensor([-1.0]))
        tensor([-1.])
    """

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        """The input itself."""
        return input

    def extra_repr(self) -> str:
        """What stood here."""
        return str(self.activation)


def residual_for(residual: Tensor, input: Tensor) -> Tensor:
    """What is added to a batch norm's output, in the shape of its input, as the layers want it.

    Args:
        residual: A tensor that broadcasts to the input's shape.
        input: The batch norm's input; its shape alone is read.

    Returns:
        The residual, expanded where it was smaller.

    Raises:
        ShapeError: It broadcasts to something larger, or not at all.

    Example:
        >>> import torch
        >>> residual_for(torch.ones(2, 1, 1), torch.zeros(4, 2, 3, 3)).shape
        torch.Size([4, 2, 3, 3])
    """
    if is_proxy(residual) or is_proxy(input):
        tracer = cast(nn.Module, residual if is_proxy(residual) else input).tracer
        return tracer.create_proxy("call_function", residual_for, (residual, input), {})  # pyright: ignore
    if residual.shape == input.shape:
        return residual
    if residual.dim() <= input.dim() and _fits(residual.shape, input.shape[input.dim() - residual.dim() :]):
        return residual.expand(input.shape)
    raise ShapeError(
        f"what is added to the batch norm's output must broadcast to its shape {tuple(input.shape)}, got "
        f"{tuple(residual.shape)}: fuse the model without this batch norm (only=...)."
    )


def _fits(shape: Size, wanted: Size) -> bool:
    return all(one in (1, other) for one, other in zip(shape, wanted, strict=True))
