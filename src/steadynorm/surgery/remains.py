"""What stands in a folded model where a batch norm stood: nothing, its activation, a padding by its zero, or a zero."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steadynorm.activations import Activation
from steadynorm.errors import ShapeError
from steadynorm.nn.tracing import is_proxy

__all__ = ["Absent", "ChannelPad", "Remainder"]


class Remainder(nn.Module):
    """What is left of a batch norm whose affine map a neighbour has taken over: f(x + residual).

    Args:
        activation: f; None for the identity.
        dims: The numbers of axes for which the folding holds; any by default.

    Raises:
        ShapeError: An input with another number of axes: its channels are not where the neighbour has them.

    Example:
        >>> Remainder(Activation("relu"))(torch.tensor([-1.0, 2.0]))
        tensor([0., 2.])
    """

    def __init__(self, activation: Activation | None = None, dims: Sequence[int] = ()) -> None:
        super().__init__()
        self.activation = activation
        self.dims = tuple(dims)

    def forward(self, input: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """The input with the residual added, through the activation."""
        if self.dims and not is_proxy(input) and input.dim() not in self.dims:
            wanted = " or ".join(f"{d}-D" for d in self.dims)
            raise ShapeError(
                f"the batch norm that stood here was folded for {wanted} input, got shape {tuple(input.shape)}, whose "
                "channels lie on another axis: fold the model with example=, an input of this kind."
            )
        y = input if residual is None else input + residual
        return y if self.activation is None else self.activation(y)

    def extra_repr(self) -> str:
        """What it does, where it does anything."""
        said = [] if self.activation is None else [f"activation={self.activation}"]
        return ", ".join([*said, *([f"dims={self.dims}"] if self.dims else [])])


class ChannelPad(nn.Module):
    """Pads each channel with a value of its own: the one that the folded batch norm maps to zero.

    Args:
        value: (C,).
        padding: As of `torch.nn.functional.pad`: the last axis first, both ends of each.

    Example:
        >>> ChannelPad(torch.tensor([7.0]), (1, 2))(torch.zeros(1, 1, 1))
        tensor([[[7., 0., 7., 7.]]])
    """

    value: Tensor

    def __init__(self, value: Tensor, padding: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("value", value)
        self.padding = tuple(padding)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, *) to (N, C, *) with longer axes."""
        inside = torch.ones_like(input[:1, :1])
        border = 1 - F.pad(inside, self.padding)
        value = self.value.reshape(1, -1, *[1] * (len(self.padding) // 2))
        return F.pad(input, self.padding) + value * border

    def extra_repr(self) -> str:
        """Channels and padding."""
        return f"{self.value.numel()}, padding={self.padding}"


class Absent(nn.Module):
    """In the place of a branch that another one has taken over: a zero without axes, which any sum takes.

    Args:
        zero: The tensor to give back; no part of the state_dict.

    Example:
        >>> Absent(torch.zeros(()))(torch.ones(2, 3))
        tensor(0.)
    """

    zero: Tensor

    def __init__(self, zero: Tensor) -> None:
        super().__init__()
        self.register_buffer("zero", zero, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Nothing of the input."""
        return self.zero
