"""The tally of what a monitor has seen: pools of examples, tests, evidence, errors. Everything behind one lock."""

import itertools
import threading
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
import torch
from torch import Tensor

from steadynorm.errors import SteadynormWarning
from steadynorm.nn.watched import BatchNormLayer, ExampleMoments
from steadynorm.shift.watching.budget import Budget
from steadynorm.shift.watching.calibration import Calibration
from steadynorm.shift.watching.drift import ChannelSums, LayerShift, layer_shift
from steadynorm.shift.watching.embedding import features
from steadynorm.shift.watching.observer import Look
from steadynorm.shift.watching.pools import Pools
from steadynorm.shift.watching.sequential import shiryaev_roberts
from steadynorm.shift.watching.state import MonitorState

__all__ = ["POOL", "Tally"]

POOL: Final = 64
UNSEEN: Final = (
    "no batch norm ran on an input that can be read in any forward looked at: is a part of the model compiled, or run "
    "by threads of its own?"
)
NOT_FINITE: Final = "most examples are not finite at some layer and cannot be tested: look at the inputs"
TOO_SHORT: Final = "a forward is so short that idle hooks alone exceed the budget; feed batches with update() instead"
_RECENT_POOLS: Final = 16
_LAYERS_AT_ONCE: Final = 4
_ERRORS_KEPT: Final = 5
_EMPTY_LOOKS: Final = 20


class Tally:
    """What was seen since the last reset, and what it amounts to. Any thread may call any of it.

    Args:
        layers: The layers by name.
        mean_run: The evidence at which an alarm is raised.
        budget: When to look.
        on_alarm: Called with the state at the first alarm.
        rng: The source of chance.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        layers: Mapping[str, BatchNormLayer],
        mean_run: float,
        budget: Budget,
        on_alarm: Callable[[MonitorState], object] | None,
        rng: np.random.Generator,
        clock: Callable[[], float],
    ) -> None:
        self._layers, self._mean_run, self._budget, self._on_alarm = layers, mean_run, budget, on_alarm
        self._rng, self._clock = rng, clock
        self._lock = threading.Lock()
        self._count = itertools.count(1)  # its next() is atomic: the usual forward takes no lock
        self._number = 0
        self._pools, self._by_hand = Pools(POOL), Pools(POOL)
        self._watched: list[str] = list(layers)
        self._epoch = 0
        self._notes: list[str] = []
        self._errors: list[str] = []
        self._failures = 0
        self.calibration: Calibration | None = None
        self.reset()

    @property
    def watched(self) -> tuple[str, ...]:
        """The layers that are looked at."""
        return tuple(self._watched)

    def adopt(self, calibration: Calibration, notes: list[str]) -> None:
        """From here on tests are held against this calibration."""
        with self._lock:
            self.calibration = calibration
            self._pools, self._by_hand = Pools(calibration.pool), Pools(calibration.pool)
            self._watched, self._notes = list(calibration.layers), notes
            self._reset()

    def note(self, notes: list[str]) -> None:
        """Adds what users should know of, each once."""
        with self._lock:
            self._notes += [note for note in notes if note not in self._notes]

    def reset(self) -> None:
        """Forgets what was seen and any alarm; the calibration, and the account of time, stay."""
        with self._lock:
            self._reset()

    def _reset(self) -> None:
        self._epoch += 1  # a test that another thread is in the middle of belongs to the past
        self._first = self._number
        self._last = 0
        self._observed = self._examples = self._tests = self._not_finite = self._empty = 0
        self._evidence = 0.0
        self._alarm_batch: int | None = None
        self._recent: dict[str, deque[ChannelSums]] = {}
        self._by_hand.clear()
        self._next_group()

    def distance(self) -> tuple[LayerShift, ...]:
        """How far each layer and channel is from what it remembers, over the recent 1,000 examples or so.

        Ranked by `moved` where calibrated, else by the symmetric divergence `kl`. Empty before anything was seen.
        """
        with self._lock:
            recent = {name: list(sums) for name, sums in self._recent.items()}
            waiting = [*self._pools.waiting().items(), *self._by_hand.waiting().items()]
        for name, seen in waiting:
            recent.setdefault(name, []).append(ChannelSums.of(seen, self._layers[name]))
        found: list[LayerShift] = []
        for name, parts in recent.items():
            total = parts[0]
            for part in parts[1:]:
                total = total.merge(part)
            if total.means.count[0] > 0:
                found.append(layer_shift(name, total, self._layers[name], self._reference(name)))
        return tuple(sorted(found, key=lambda s: s.kl if s.moved is None else s.moved, reverse=True))

    def state(self) -> MonitorState:
        """A snapshot, for logs and metrics."""
        layers = self.distance()
        with self._lock:
            notes = [*self._notes, *([TOO_SHORT] if self._budget.too_small else [])]
            notes += [UNSEEN] if self._empty >= _EMPTY_LOOKS and not self._examples else []
            notes += [NOT_FINITE] if 2 * self._not_finite > self._examples else []
            return MonitorState(
                alarm=self._alarm_batch is not None,
                alarm_batch=self._alarm_batch,
                evidence=self._evidence,
                mean_run=self._mean_run,
                calibrated=self.calibration is not None,
                batches=self._batches,
                observed=self._observed,
                examples=self._examples,
                tests=self._tests,
                cost=self._budget.cost,
                not_finite=self._not_finite,
                failures=self._failures,
                errors=tuple(self._errors),
                notes=tuple(notes),
                layers=layers,
            )

    @property
    def _batches(self) -> int:
        return self._number - self._first

    def begin(self) -> Look | None:
        """A batch is about to be served; what to look for in it."""
        number = next(self._count)
        self._number = number
        if not self._budget.wants(number - 1):
            return None
        with self._lock:
            if self._budget.only_timing:
                return Look(number, frozenset())
            limit = None if self._budget.share is None else self._pools.room
            return Look(number, self._group, limit, float(self._rng.random()))

    def end(self, look: Look, forward: float, own: float) -> None:
        """It was served, in `forward` seconds of its own and `own` of looking."""
        entered = self._clock()
        if look.layers:
            self._absorb(look.taken)
        with self._lock:
            self._budget.looked(look.number - 1, forward, own + self._clock() - entered)

    def idles(self, seconds: float) -> None:
        """What the hooks cost a forward that is not looked at."""
        with self._lock:
            self._budget.idle = seconds

    def fed(self, taken: dict[str, ExampleMoments]) -> None:
        """A batch was fed by hand, all of it and of all layers."""
        with self._lock:
            self._number = next(self._count)
            pools, served = self._pooled(self._by_hand, taken)
            epoch = self._epoch
        self._test_all(pools, served, epoch)

    def _absorb(self, taken: dict[str, ExampleMoments]) -> None:
        """Puts what one forward gave into the pool, and tests it once it is full."""
        with self._lock:
            if not taken:  # none of these layers ran
                self._empty += 1
                self._next_group()
                return
            if not set(taken) <= self._group:  # meanwhile another thread's pool was full
                return
            pools, served = self._pooled(self._pools, taken)
            if pools and self._budget.share is not None:
                self._next_group()
            epoch = self._epoch
        self._test_all(pools, served, epoch)

    def _pooled(self, pools: Pools, taken: dict[str, ExampleMoments]) -> tuple[list[dict[str, ExampleMoments]], int]:
        """The pools that this has filled, and the batches served since the last ones."""
        self._observed += 1
        self._examples += max((len(seen.mean) for seen in taken.values()), default=0)
        pools.add(taken)
        full = pools.take()
        if not full:
            return [], 0
        served, self._last = max(self._batches - self._last, 0), self._batches
        return full, served

    def _test_all(self, pools: list[dict[str, ExampleMoments]], served: int, epoch: int) -> None:
        for pool in pools:
            self._test(pool, served / len(pools), epoch)

    def _test(self, pool: dict[str, ExampleMoments], batches: float, epoch: int) -> None:
        """One test: the mean evidence over the pool's layers, added to what there is."""
        sums = {name: ChannelSums.of(seen, self._layers[name]) for name, seen in pool.items()}
        evidence = [e for name, seen in pool.items() if (e := self._e_value(name, seen)) is not None]
        lost = max(len(pool[name].mean) - int(s.means.count[0]) for name, s in sums.items())
        with self._lock:
            if epoch != self._epoch:
                return
            for name, s in sums.items():
                self._recent.setdefault(name, deque(maxlen=_RECENT_POOLS)).append(s)
            self._not_finite += lost
            if not evidence:
                return
            self._tests += 1
            self._evidence = float(shiryaev_roberts(self._evidence, float(np.mean(evidence)), batches))
            raised = self._evidence >= self._mean_run and self._alarm_batch is None
            if raised:
                self._alarm_batch = self._batches
        if raised and self._on_alarm is not None:
            try:
                self._on_alarm(self.state())
            except Exception as error:
                self.fail(error)

    def _e_value(self, name: str, seen: ExampleMoments) -> float | None:
        """The evidence at one layer; None where there is nothing to hold it against."""
        reference = None if self.calibration is None else self.calibration.layers.get(name)
        if reference is None:
            return None
        values = features(seen, self._layers[name])
        values = values[np.isfinite(values).all(axis=1)]
        if len(values) * 2 < len(seen.mean) or values.shape[1] != len(reference.projection.centre):
            return None
        return reference.e_value(values)

    def _reference(self, name: str) -> tuple[Tensor, Tensor] | None:
        if self.calibration is None or name not in self.calibration.layers:
            return None
        reference = self.calibration.layers[name]
        return torch.from_numpy(reference.channel_mean), torch.from_numpy(reference.channel_sd)

    def _next_group(self) -> None:
        """Which layers the next pool is of: all, or where time counts a few at a time.

        Drawn anew from all of them, not each in its turn: then the mean e-value over a group has the expectation of the
        mean over all layers, whatever came before, and it is that one that the calibration keeps at 1.
        """
        self._pools.clear()
        watched = self._watched
        if self._budget.share is not None and len(watched) > _LAYERS_AT_ONCE:
            drawn = self._rng.choice(len(watched), _LAYERS_AT_ONCE, replace=False)
            watched = [watched[i] for i in drawn]
        self._group = frozenset(watched)

    def fail(self, error: Exception) -> None:
        """Records an exception instead of raising it, and warns of the first."""
        with self._lock:
            self._failures += 1
            first = self._failures == 1
            if len(self._errors) < _ERRORS_KEPT:
                self._errors.append(f"{type(error).__name__}: {error}")
        if first:
            try:
                warnings.warn(f"the monitor met {error!r}; serving goes on, see state().errors.", SteadynormWarning, 4)
            except Warning:
                return  # a filter that turns warnings into errors must not reach the serving path either
