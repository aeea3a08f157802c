"""Batches of any size, from one example on, gathered into pools of one size."""

from collections.abc import Mapping

import torch
from torch import Tensor

from steadynorm.nn.watched import ExampleMoments

__all__ = ["Pools", "concatenate"]


def concatenate(parts: list[ExampleMoments]) -> ExampleMoments:
    """One after the other; without variances unless all have them (a size may have shrunk to one position)."""
    variances = [p.var for p in parts if p.var is not None]
    means = torch.cat([p.mean for p in parts])
    return ExampleMoments(means, torch.cat(variances) if len(variances) == len(parts) else None)


def _rows(seen: ExampleMoments, start: int, stop: int | None = None) -> ExampleMoments:
    def part(t: Tensor) -> Tensor:
        return t[start:stop].clone()

    return ExampleMoments(part(seen.mean), None if seen.var is None else part(seen.var))


class Pools:
    """Examples that wait, layer by layer, until there are enough for a test.

    Args:
        size: Examples per pool.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._waiting: dict[str, list[ExampleMoments]] = {}

    def add(self, taken: Mapping[str, ExampleMoments]) -> None:
        """Puts those of one forward behind those that wait. A layer that this forward did not use waits no longer."""
        for name in [n for n in self._waiting if n not in taken]:
            del self._waiting[name]
        for name, seen in taken.items():
            self._waiting.setdefault(name, []).append(seen)

    @property
    def room(self) -> int:
        """How many examples the pool still lacks: of the layer that lacks most."""
        return self.size - min((self._count(name) for name in self._waiting), default=0)

    def take(self) -> list[dict[str, ExampleMoments]]:
        """The pools that are full, oldest first; what is left goes on waiting."""
        full = min((self._count(name) // self.size for name in self._waiting), default=0)
        if full == 0:
            return []
        rows = {name: concatenate(parts) for name, parts in self._waiting.items()}
        self._waiting = {name: [_rows(seen, full * self.size)] for name, seen in rows.items()}
        return [
            {name: _rows(seen, at * self.size, (at + 1) * self.size) for name, seen in rows.items()}
            for at in range(full)
        ]

    def waiting(self) -> dict[str, ExampleMoments]:
        """What is not full yet."""
        return {name: concatenate(parts) for name, parts in self._waiting.items() if self._count(name)}

    def clear(self) -> None:
        """Forgets all that wait."""
        self._waiting = {}

    def _count(self, name: str) -> int:
        return sum(len(part.mean) for part in self._waiting[name])
