"""What a model gives on an example, and how far it is from what another one gives."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree  # pyright: ignore[reportPrivateUsage]

from steadynorm.errors import ModelError, SteadynormError

__all__ = ["BOUNDS", "bound_of", "called", "error_of", "floating"]

BOUNDS: Final = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How far outputs that are the same but for rounding may be apart, as a share of their scale."""


def called(model: nn.Module, example: Any) -> Any:
    """What a model gives, without gradients.

    Args:
        model: In whichever mode it is.
        example: A tensor, a tuple of arguments or a mapping of named ones.

    Raises:
        ModelError: It does not take the example.
    """
    given = dict(cast("Mapping[str, Any]", example)) if isinstance(example, Mapping) else example
    # A forward may work in place, and the example serves again.
    given = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), given)
    try:
        with torch.no_grad():
            if isinstance(example, Mapping):
                return model(**given)
            return model(*given) if isinstance(given, tuple) else model(given)
    except SteadynormError:
        raise
    except Exception as error:  # whatever a user's forward raises
        raise ModelError(
            "example= (and verify=) needs inputs that the model takes: a tensor, a tuple of arguments, or a mapping of "
            f"named ones. With the given one it failed: {type(error).__name__}: {error}"
        ) from error


def floating(output: Any) -> list[Tensor]:
    """The floating-point tensors in an output of any form, less those without elements."""
    return [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point() and t.numel()]


def bound_of(tensors: Sequence[Tensor]) -> float:
    """How far they may be from others: that of the coarsest dtype among them."""
    return max((BOUNDS.get(tensor.dtype, 1e-4) for tensor in tensors), default=min(BOUNDS.values()))


def error_of(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """max |got - wanted| / max |wanted|, of the tensor where that is largest; of a wanted 0, max |got|.

    An infinity that is wanted and got is no error, and no scale.

    Returns:
        NaN where one of them has one, or another shape.

    Example:
        >>> error_of([torch.tensor([1.0, 2.5])], [torch.tensor([1.0, 2.0])])
        0.25
    """
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        if a.shape != b.shape:
            return float("nan")
        x, y = a.double(), b.double()
        scale = y.abs().where(~y.isinf(), 0).max().item()
        error = (x - y).where(x != y, 0).abs().max().item()
        relative = error / scale if scale > 0 else error
        worst = relative if relative != relative else max(worst, relative)
    return worst
