"""Which axes of a tensor are channels and which are positions, and how weights line up with the positions."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from steadynorm.errors import ShapeError

__all__ = ["Layout", "accumulator_dtype", "align"]


class Layout(NamedTuple):
    """How a tensor (N, C, *) is read: `dim` holds the channels, every other axis the positions.

    Attributes:
        dim: The channel axis, counted from the front.
        positions: The other axes, which statistics are taken over.
        channels: C.
        count: Values per channel, N times the spatial size.
        view: The shape that lines a (C,) tensor up with the input.
    """

    dim: int
    positions: tuple[int, ...]
    channels: int
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    view: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor, channel_dim: int = 1) -> "Layout":
        """Reads the layout off `x`; raises ShapeError where `x` has no such axis."""
        if x.dim() < 2 or not -x.dim() <= channel_dim < x.dim():
            raise ShapeError(
                f"expected an input of at least 2 dimensions (N, C, *) with its channels in dimension {channel_dim}, "
                f"got shape {tuple(x.shape)}. Add a batch dimension with x.unsqueeze(0), or pass another channel_dim."
            )
        dim = channel_dim % x.dim()
        if dim == 0:
            raise ShapeError(
                f"channel_dim={channel_dim} is the batch dimension of an input of shape {tuple(x.shape)}; "
                "the channels must be in another one (1, or -1 for channels last)."
            )
        positions = tuple([d for d in range(x.dim()) if d != dim])
        channels = x.shape[dim]
        count = math.prod([x.shape[d] for d in positions])
        return Layout(dim, positions, channels, count, tuple([channels if d == dim else 1 for d in range(x.dim())]))

    def line_up(self, per_channel: Tensor) -> Tensor:
        """A (C,) tensor in a shape that broadcasts against the input."""
        return per_channel if self.dim == len(self.view) - 1 else per_channel.view(self.view)


def align(weight: Tensor, x: Tensor, layout: Layout, what: str = "weight") -> Tensor:
    """Lines a weight or mask (N, *) up with `x`, from the batch axis on: (N,) weighs examples, (N, L) positions.

    Alignment starts at the front (not at the back, as in NumPy) because the first axis of a weight is always the batch:
    a weight of shape (N,) means one number per example, even where L happens to equal N.
    """
    sizes = [x.shape[d] for d in layout.positions]
    # Spelled out, because `w in (1, s)` is false for a symbolic size under torch.compile.
    pairs = zip(weight.shape, sizes, strict=False)
    fits = weight.dim() <= len(sizes) and all(w == 1 or w == s for w, s in pairs)
    if not fits:
        raise ShapeError(
            f"{what} must be broadcastable to the positions (N, *) = {tuple(sizes)} of an input of shape "
            f"{tuple(x.shape)}, batch axis first, got shape {tuple(weight.shape)}. For one number per example pass "
            f"shape ({sizes[0]},)."
        )
    full = weight.reshape(*weight.shape, *(1,) * (len(sizes) - weight.dim()))
    return full.unsqueeze(layout.dim)


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """The dtype that statistics are held in: float64, or float32 on a device that has no float64 (Apple's MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64
