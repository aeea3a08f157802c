"""Runs over the data: one for all layers, or one for each with those before it at their new statistics."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm  # pyright: ignore[reportPrivateUsage]

from steadynorm.errors import DataError
from steadynorm.moments import Moments
from steadynorm.population.batches import Caller, examples_in
from steadynorm.population.measuring import measuring
from steadynorm.population.pools import Key, Pool, pools_for
from steadynorm.population.ranks import Ranks
from steadynorm.progress import tracked

__all__ = ["Measurement", "Passes"]


@dataclass
class Measurement:
    """What was measured.

    Attributes:
        moments: Of each layer and domain, over all ranks.
        counted: How many batches each was given, over all ranks.
        rejected: How many of them were not finite.
        singles: How many held a single position.
        batches: Of one pass, over all ranks.
        examples: Of one pass, over all ranks.
        passes: Over the data.
        short: How many batches the loader fell short of what was asked for, over all ranks.
        repeated: Layers that were called more than once in a forward.
    """

    moments: dict[Key, Moments] = field(default_factory=dict[Key, Moments])
    counted: dict[Key, int] = field(default_factory=dict[Key, int])
    rejected: dict[Key, int] = field(default_factory=dict[Key, int])
    singles: dict[Key, int] = field(default_factory=dict[Key, int])
    batches: int = 0
    examples: int = 0
    passes: int = 0
    short: int = 0
    repeated: tuple[str, ...] = ()


class _Reached(BaseException):
    """Ends a forward at the layer that it is run for; no `except Exception` of a model's own takes it for an error."""


class _Calls:
    """How often each layer is called in a forward, and in which order first."""

    def __init__(self) -> None:
        self.now: dict[str, int] = {}
        self.fewest: dict[str, int] = {}
        self.most: dict[str, int] = {}
        self.stop_at: tuple[str, int] | None = None
        self._forwards = 0

    def add(self, name: str) -> None:
        """A layer has been measured."""
        times = self.now[name] = self.now.get(name, 0) + 1
        self.most.setdefault(name, 0)  # in the order of the first calls
        if self.stop_at == (name, times):
            raise _Reached

    def forward_done(self) -> None:
        """A forward has come to its end."""
        for name in {*self.most, *self.now}:
            times = self.now.get(name, 0)
            known = self.fewest.get(name, 0 if self._forwards else times)
            self.fewest[name] = min(known, times)
            self.most[name] = max(self.most.get(name, 0), times)
        self.now = {}
        self._forwards += 1


class Passes:
    """A model's layers, and the data that they are measured on.

    Args:
        layers: Those to be measured, with their names.
        given: The batches, iterated over once a pass.
        run: Runs the model on one batch.
        ranks: Who takes part.
        limit: Batches of a pass, at most.
        show: Whether a bar may be shown.
    """

    def __init__(
        self,
        layers: Mapping[str, TorchBatchNorm],
        given: Iterable[Any],
        run: Caller,
        ranks: Ranks,
        limit: int | None,
        *,
        show: bool,
    ) -> None:
        self._layers, self._given, self._run, self._ranks = layers, given, run, ranks
        self._limit, self._show = limit, show and ranks.rank == 0
        self._calls = _Calls()

    def joint(self) -> Measurement:
        """All layers at once, each normalising by the batch.

        Raises:
            DataError: There was no batch, on any rank.
        """
        found = Measurement()
        self._pass(self._layers, found, "recalibrating")
        most = self._calls.most
        found.repeated = tuple(name for name in self._layers if most.get(name, 0) > 1)
        return found

    def sequential(self, commit: Callable[[TorchBatchNorm, Key, Moments, int], None]) -> Measurement:
        """Layer after layer, in the order in which they are called; `commit` writes each one's before the next.

        The first pass measures all layers as `joint` does, which for the first of them is all there is to measure.
        """
        found = self.joint()
        order = self._ranks.order(list(self._layers), self._calls.most)
        calls, stoppable = self._calls, {n for n, most in self._calls.most.items() if self._calls.fewest[n] == most}
        most = dict(calls.most)
        for place, name in enumerate(order):
            layer = self._layers[name]
            if place:
                calls.stop_at = (name, most[name]) if name in stoppable else None
                self._pass({name: layer}, found, f"recalibrating, layer {place + 1} of {len(order)}")
            for key in found.moments:
                if key.name == name:
                    commit(layer, key, found.moments[key], found.counted[key])
        return found

    def _pass(self, layers: Mapping[str, TorchBatchNorm], found: Measurement, what: str) -> None:
        """Runs over the data once and replaces what was found of these layers."""
        pools = pools_for(layers)
        failure: Exception | None = None
        batches = examples = 0
        try:
            with measuring(layers, pools, self._calls.add):
                for batch in tracked(islice(self._given, self._limit), what, self._expected(), show=self._show):
                    size = examples_in(batch)
                    if size == 0:
                        continue
                    self._forward(batch)
                    batches, examples = batches + 1, examples + (size or 0)
        except Exception as error:
            failure = error
        short = 0 if self._limit is None else self._limit - batches
        sums = [batches, examples, short, *self._tallies(pools)]
        total, examples, short, *tallies = (round(n) for n in self._ranks.add(sums, failure))
        if not total:
            raise DataError("the loader gave no batch with an example in it, so there is nothing to measure.")
        found.passes += 1
        if found.passes == 1:
            found.batches, found.examples, found.short = total, examples, short
        elif (total, examples) != (found.batches, found.examples):
            raise DataError(
                f'order="sequential" needs the same examples in each pass: the first had {found.examples} in '
                f"{found.batches} batches, pass {found.passes} had {examples} in {total}."
            )
        for at, key in enumerate(pools):
            found.counted[key], found.rejected[key], found.singles[key] = tallies[3 * at : 3 * at + 3]
        found.moments |= self._ranks.merge(pools)

    def _forward(self, batch: Any) -> None:
        self._calls.now = {}
        try:
            self._run(batch)
        except _Reached:
            return
        self._calls.forward_done()

    def _tallies(self, pools: Mapping[Key, Pool]) -> list[float]:
        return [float(n) for pool in pools.values() for n in (pool.batches, pool.rejected, pool.singles)]

    def _expected(self) -> int | None:
        """How many batches there will be, where the loader knows."""
        try:
            known = len(self._given)  # pyright: ignore[reportArgumentType]
        except TypeError:
            return self._limit
        return known if self._limit is None else min(known, self._limit)
