"""The examples that a model is to be adapted to: read, checked, put into chunks."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steadynorm.errors import ArgumentError, DataError
from steadynorm.nn.batches import first_tensor

__all__ = ["Chunk", "probabilities", "read_chunks"]


class Chunk(NamedTuple):
    """What goes through the model at once.

    Attributes:
        batch: What the forward is given.
        examples: How many there are in it.
    """

    batch: Any
    examples: int


def read_chunks(batches: Any, model: nn.Module, size: int, as_given: bool) -> list[Chunk]:
    """All examples, in their order, in chunks of at most `size`; or as given, where they cannot be put together.

    Args:
        batches: One tensor (N, ...), or an iterable of tensors or of tuples and lists with the inputs first.
        model: Tensors are moved to its device.
        size: Examples in a chunk, at most.
        as_given: Batches are the business of the user's own forward: each is one chunk.

    Raises:
        ArgumentError: `batches` is nothing to iterate over.
        DataError: There is no batch, one is none, or one holds values that are not finite.
    """
    if not isinstance(batches, (Tensor, Iterable)):
        raise ArgumentError(
            f"batches must be a tensor (N, ...) or an iterable of batches, got {type(batches).__name__}."
        )
    given: list[Any] = [batches] if isinstance(batches, Tensor) else list(batches)  # pyright: ignore[reportUnknownArgumentType]
    find = first_tensor if as_given else _first_entry
    inputs = [_checked(find(batch), batch, place, as_given) for place, batch in enumerate(given)]
    kept = [(batch, x) for batch, x in zip(given, inputs, strict=True) if len(x)]
    if not kept:
        raise DataError("there is no example to adapt to: the batches are empty, or there is none.")
    if as_given:
        return [Chunk(batch, len(x)) for batch, x in kept]
    first = next(iter([*model.parameters(), *model.buffers()]))
    tensors = [x.to(first.device) for _, x in kept]
    if len({(x.shape[1:], x.dtype) for x in tensors}) > 1:
        return [Chunk(x, len(x)) for x in tensors]
    return [Chunk(x, len(x)) for x in _evenly(torch.cat(tensors), size)]


def _evenly(x: Tensor, size: int) -> tuple[Tensor, ...]:
    """Chunks that differ by one example at most, so that none is left over to stand alone."""
    return torch.tensor_split(x, -(-len(x) // size))


def _first_entry(batch: Any) -> Any:
    """The inputs of a batch of the usual form."""
    return batch[0] if isinstance(batch, (tuple, list)) and batch else batch  # pyright: ignore[reportUnknownVariableType]


def _checked(x: Any, batch: object, place: int, as_given: bool) -> Tensor:
    if not isinstance(x, Tensor) or x.dim() < 1:
        required = "a tensor somewhere in it" if as_given else "a tensor (N, ...), or a tuple with one first,"
        advice = "" if as_given else " For batches of another form pass forward=lambda batch: model(...)."
        raise DataError(f"batch {place}: {required} is required, got {type(batch).__name__}.{advice}")
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x.flatten(1) if x.dim() > 1 else x[:, None]).all(1)).sum())
        raise DataError(f"batch {place}: {bad} of {len(x)} examples hold NaN or infinite values. Remove them first.")
    return x


def probabilities(output: object, examples: int) -> Tensor | None:
    """(N, K) class probabilities in float64 from logits (N, K) or (N, K, *), averaged over the positions of the latter.

    None where the output is something else: no tensor, a single number for each example, another number of rows.
    """
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.dim() < 2:
        return None
    if output.shape[0] != examples or output.shape[1] < 2:
        return None
    p = output.detach().to("cpu", torch.float64).softmax(1)
    return p.flatten(2).mean(2) if p.dim() > 2 else p
