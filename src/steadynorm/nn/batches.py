"""Batches of any form: tensors, mappings, tuples and lists, one inside of another."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["first_tensor", "moved"]


def first_tensor(batch: Any) -> Tensor | None:
    """The first tensor in a batch, in its order; None where there is none.

    Example:
        >>> first_tensor({"name": "a", "x": [torch.zeros(5, 2), torch.ones(1)]}).shape
        torch.Size([5, 2])
    """
    if isinstance(batch, Tensor):
        return batch
    inner: Iterable[Any] = ()
    if isinstance(batch, Mapping):
        inner = cast("Mapping[Any, Any]", batch).values()
    elif isinstance(batch, (tuple, list)):
        inner = cast("Sequence[Any]", batch)
    return next((t for t in map(first_tensor, inner) if t is not None), None)


def moved(batch: Any, device: torch.device) -> Any:
    """The same batch with its tensors, detached, on a device; named tuples stay what they are."""
    if isinstance(batch, Tensor):
        return batch.detach().to(device)
    if isinstance(batch, Mapping):
        return {name: moved(one, device) for name, one in cast("Mapping[Any, Any]", batch).items()}
    if isinstance(batch, (tuple, list)):
        parts: list[Any] = [moved(one, device) for one in cast("Sequence[Any]", batch)]
        if hasattr(batch, "_make"):
            return cast("Any", batch)._make(parts)
        return parts if isinstance(batch, list) else tuple(parts)
    return batch
