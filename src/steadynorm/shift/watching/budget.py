"""How often to look: as often as keeps the time spent on looking under a share of the time spent on serving."""

from typing import Final

import numpy as np

from steadynorm.errors import ArgumentError

__all__ = ["BESIDE", "Budget"]

_WARMUP: Final = 3
_MEMORY: Final = 0.3
_LONGEST_GAP: Final = 10_000
BESIDE: Final = 1.5
"""What a look costs for each second that its own clock shows: it leaves caches cold, and hooks make Python take a
longer way around every layer. Measured as 1.1 to 1.6 times, the latter on small networks."""


class Budget:
    """An account of time: serving earns a share of itself, looking costs what it took.

        next look after n forwards:    n (share * forward - idle) >= spent - earned + u * expected cost

    with u ~ Uniform(1, 2) drawn anew for each look, since a fixed rhythm could fall in step with one of the traffic. So
    the mean cost stays under the share, but for the last look. Forwards in between are not even timed: they are taken
    to last as long as those looked at. Nothing here depends on the data, only on time.

    Args:
        share: Of the forward's time, e.g. 0.03; None for no limit: every batch is looked at.
        rng: The source of chance.
    """

    def __init__(self, share: float | None, rng: np.random.Generator) -> None:
        if share is not None and not 0 < share < 1:
            raise ArgumentError(
                f"budget must be a share of the forward's time in (0, 1), or None for all; got {share!r}."
            )
        self.share = share
        self.served = 0.0
        self.spent = 0.0
        self.idle = 0.0
        self.next_look = 0
        self._looks = 0
        self._seen = 0
        self._forward = 0.0
        self._expected = 0.0
        self._rng = rng

    def wants(self, number: int) -> bool:
        """Whether to look at, and to time, the forward of this number, counted from 0."""
        return number >= self.next_look

    @property
    def only_timing(self) -> bool:
        """Whether the next look is to time the forward alone: the first ones, which are slow and say little."""
        return self.share is not None and self._looks < _WARMUP

    def looked(self, number: int, forward: float, own: float) -> None:
        """Notes what a look cost and decides on the next one.

        Args:
            number: Of the forward that was looked at.
            forward: Its own seconds.
            own: Seconds of looking, by the hooks' own clock; taken `BESIDE` times.
        """
        own *= BESIDE
        timed_only, passed = self.only_timing, max(number + 1 - self._seen, 0)
        self._looks += 1
        self._seen = max(self._seen, number + 1)
        fresh = self._looks <= _WARMUP + 1
        self._forward = forward if fresh else self._forward + _MEMORY * (forward - self._forward)
        if not timed_only:
            self._expected = own if fresh else self._expected + _MEMORY * (own - self._expected)
        self.served += passed * self._forward
        self.spent += own + passed * self.idle
        if self.share is not None:
            self.next_look = number + 1 + (0 if self.only_timing else self._gap(self.share))

    def _gap(self, share: float) -> int:
        lacking = self.spent - share * self.served + float(self._rng.uniform(1, 2)) * self._expected
        income = share * self._forward - self.idle
        if lacking <= 0:
            return 0
        return _LONGEST_GAP if income <= 0 else min(_LONGEST_GAP, round(lacking / income))

    @property
    def too_small(self) -> bool:
        """Whether forwards are so short that hooks cost more than the share without looking at anything."""
        return self.share is not None and self._looks > _WARMUP and self.idle >= self.share * self._forward

    @property
    def cost(self) -> float:
        """The share so far: spent / served; 0 before anything was served."""
        return self.spent / self.served if self.served > 0 else 0.0
