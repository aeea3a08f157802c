"""What the ranks of torch.distributed tell each other: that all went well, and their Moments, merged by count."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steadynorm.errors import DistributedError
from steadynorm.moments import Moments
from steadynorm.ops.collective import sum_over_ranks
from steadynorm.ops.groups import resolve_group
from steadynorm.ops.layout import accumulator_dtype
from steadynorm.population.pools import Key, Pool

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Ranks"]


class Ranks:
    """The ranks that take part, or this process alone.

    Args:
        group: A process group; None for all ranks, which is this process where torch.distributed is not initialised.
        device: Where sums are made.
    """

    def __init__(self, group: "ProcessGroup | None", device: torch.device) -> None:
        self._group = resolve_group("world" if group is None else group)
        self._device = device

    @property
    def size(self) -> int:
        """How many."""
        return 1 if self._group is None else self._group.size()

    @property
    def rank(self) -> int:
        """This one's number in the group."""
        return 0 if self._group is None else self._group.rank()

    def add(self, numbers: list[float], failure: Exception | None) -> list[float]:
        """Σ over the ranks of each number. Every rank comes here, one that has failed as well.

        Raises:
            Exception: `failure`, on the rank that has it.
            DistributedError: On the others.
        """
        failed, *total = self._sum(torch.tensor([float(failure is not None), *numbers], dtype=torch.float64)).tolist()
        if failure is not None:
            raise failure
        if failed:
            raise DistributedError(
                f"recalibrate_ failed on {int(failed)} of {self.size} ranks, so that no rank's model was changed. "
                "Their own error says why."
            )
        return total

    def order(self, names: list[str], calls: Mapping[str, int]) -> list[str]:
        """The layers in the order in which the first rank that ran any has called them; those never called left out.

        Args:
            names: All layers, the same on every rank.
            calls: This rank's layers, in the order of their first calls.
        """
        table = torch.zeros(self.size, len(names), dtype=torch.float64)
        for place, name in enumerate(calls):
            table[self.rank, names.index(name)] = place + 1
        table = self._sum(table)
        first = next((row for row in table.tolist() if any(row)), [0.0] * len(names))
        known = sorted((place, name) for place, name in zip(first, names, strict=True) if place)
        later = [n for n, used in zip(names, (table > 0).any(0).tolist(), strict=True) if used]
        called = [name for _, name in known]
        return called + [name for name in later if name not in called]

    def merge(self, pools: Mapping[Key, Pool]) -> dict[Key, Moments]:
        """The Moments of all ranks' data for each key, identical on all of them: two sums for all layers together."""
        totals = {key: pool.total() for key, pool in pools.items()}
        if self._group is None or not totals:
            return totals
        parts = [torch.stack([t.to(self._device) for t in total]) for total in totals.values()]
        merged = torch.stack(Moments(*torch.cat(parts, 1).unbind()).all_reduce(self._group))
        split = merged.split([part.shape[1] for part in parts], 1)
        return {
            key: Moments(*(t.to(total.mean.device) for t in part.unbind()))
            for (key, total), part in zip(totals.items(), split, strict=True)
        }

    def _sum(self, t: Tensor) -> Tensor:
        if self._group is None:
            return t
        placed = t.to(self._device, accumulator_dtype(self._device))
        return sum_over_ranks(placed, self._group, "recalibrating").cpu()
