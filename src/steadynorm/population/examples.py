"""The batches that a diagnosis is made on: read once, kept, sorted out."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from steadynorm.errors import ArgumentError, DataError
from steadynorm.nn.batches import first_tensor, moved
from steadynorm.population.batches import LABELS

__all__ = ["Batch", "Batches", "read_batches"]


@dataclass(frozen=True)
class Batch:
    """One batch.

    Attributes:
        given: As the loader gave it, on the model's device where it is tensors.
        x: Its inputs: the first tensor in it.
        y: Its targets, or None.
    """

    given: Any
    x: Tensor
    y: Any

    @property
    def size(self) -> int:
        """How many examples."""
        return len(self.x)


@dataclass(frozen=True)
class Batches:
    """What was read.

    Attributes:
        kept: The batches whose inputs are finite.
        refused: The places of those with NaN or infinite inputs.
        bad_examples: How many examples those are in.
    """

    kept: tuple[Batch, ...]
    refused: tuple[int, ...]
    bad_examples: int

    @property
    def examples(self) -> int:
        """How many examples in the batches that were kept."""
        return sum(batch.size for batch in self.kept)

    def shuffled(self, seed: int = 0) -> "tuple[Batch, ...] | None":
        """The same examples in random order in batches of the same sizes; None where they cannot be put together."""
        plain = all(isinstance(b.given, Tensor) or (isinstance(b.given, (tuple, list)) and _two(b)) for b in self.kept)
        if not plain or len({(b.x.shape[1:], b.x.dtype) for b in self.kept}) != 1:
            return None
        x = torch.cat([b.x for b in self.kept])
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
        sizes = [b.size for b in self.kept]
        xs = x[order].split(sizes)
        if any(b.y is None for b in self.kept):
            return tuple(Batch(part, part, None) for part in xs)
        ys = torch.cat([cast("Tensor", b.y) for b in self.kept])[order].split(sizes)
        return tuple(Batch((a, b), a, b) for a, b in zip(xs, ys, strict=True))


def _two(batch: Batch) -> bool:
    whole = cast("tuple[Any, ...]", batch.given)
    return len(whole) == 1 or (len(whole) == 2 and isinstance(batch.y, Tensor) and len(batch.y) == batch.size)


def read_batches(loader: Iterable[Any], model: nn.Module, most: int, what: str = "loader") -> Batches:
    """Reads whole batches until `most` examples are there.

    Args:
        loader: Batches: (inputs, targets), inputs alone, or a mapping with tensors.
        model: Tensors are moved to its device.
        most: Examples to read, at least 2.
        what: The argument's name, for messages.

    Raises:
        ArgumentError: There is nothing to iterate over, or `most` is below 2.
        DataError: There is no batch, or one holds no tensor.
    """
    if not isinstance(loader, Iterable) or isinstance(loader, (str, bytes)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError(f"{what} must be an iterable of batches, got {type(loader).__name__}.")
    if most < 2:
        raise ArgumentError(f"examples must be at least 2, got {most}.")
    tensors = [loader] if isinstance(loader, Tensor) else loader
    first = next(iter([*model.parameters(), *model.buffers()]), torch.zeros(()))
    kept: list[Batch] = []
    refused: list[int] = []
    bad = seen = 0
    for place, given in enumerate(tensors):
        here = moved(given, first.device)
        x = first_tensor(here)
        if x is None or x.dim() < 1:
            raise DataError(f"{what}: batch {place} holds no tensor of inputs, got {type(given).__name__}.")
        y = _targets(here)
        seen += len(x)
        finite = torch.isfinite(x.reshape(len(x), -1)).all(1) if x.is_floating_point() and len(x) else None
        if finite is not None and not bool(finite.all()):
            refused.append(place)
            bad += int((~finite).sum())
        elif len(x):
            kept.append(Batch(here, x, y))
        if seen >= most:
            break
    if not kept and not refused:
        raise DataError(f"{what} gave no batch. Check its data set, or make the loader anew if it was used up.")
    return Batches(tuple(kept), tuple(refused), bad)


def _targets(batch: Any) -> Any:
    """The second of a tuple; of a mapping, what is called as labels are."""
    if isinstance(batch, (tuple, list)):
        parts = cast("tuple[Any, ...]", batch)
        return parts[1] if len(parts) > 1 else None
    if isinstance(batch, Mapping):
        entries = cast("Mapping[Any, Any]", batch)
        return next((entries[name] for name in entries if name in LABELS), None)
    return None
