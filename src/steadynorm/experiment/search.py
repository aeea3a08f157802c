"""The search that every arm gets alike: learning rates in half-decades, for each initialisation, on validation."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Final, get_args

from steadynorm.experiment.arms import Arm, Init
from steadynorm.experiment.runner import Runner
from steadynorm.experiment.train import Optimizer, Run, RunSpec
from steadynorm.report.schema import TuningRow

__all__ = ["INITS", "Setting", "Tuning"]

INITS: Final[tuple[Init, ...]] = get_args(Init)

_START: Final[dict[Optimizer, range]] = {"sgd": range(-4, 1), "adam": range(-7, -2)}
"""The common grid, in half-decades: k stands for the learning rate 10^(k/2)."""

_BOUNDS: Final[dict[Optimizer, tuple[int, int]]] = {"sgd": (-12, 5), "adam": (-12, 2)}
"""How far the grid may grow."""


@dataclass(frozen=True)
class Setting:
    """One arm with one initialisation and one learning rate.

    Attributes:
        arm: The arm.
        init: The initialisation.
        k: The learning rate is 10^(k/2).

    Example:
        >>> Setting(Arm("plain", "without"), "default", -1).lr
        0.3162
    """

    arm: Arm
    init: Init
    k: int

    @property
    def lr(self) -> float:
        """The learning rate, to four digits."""
        return float(f"{10 ** (self.k / 2):.4g}")


class Tuning:
    """Tuning runs of several arms, and what follows from them.

    Every arm and initialisation starts with the same learning rates. While the best one is at an edge of those tried,
    the next one beyond is tried too, within the same bounds for all.

    Args:
        runner: Trains.
        arms: The arms.
        base: What every run has in common; its arm, init, lr and seed are replaced.
        seeds: The tuning seeds.
        inits: The initialisations to search over.
    """

    def __init__(
        self, runner: Runner, arms: Sequence[Arm], base: RunSpec, seeds: Sequence[int], inits: Sequence[Init] = INITS
    ) -> None:
        self._runner, self._base, self._seeds = runner, base, seeds
        self._arms, self._inits = arms, inits
        self._low, self._high = _BOUNDS[base.optimizer]
        self._runs: dict[Setting, list[Run]] = {}

    def search_accuracy(self) -> None:
        """Runs the common grid, and grows it until no arm's most accurate setting is at an edge."""
        self._run(Setting(arm, init, k) for arm, init in self._pairs() for k in _START[self._base.optimizer])
        self._grow(self._pairs(), lambda edge: edge == self.most_accurate(edge.arm, edge.init))

    def search_speed(self, target: float) -> None:
        """Grows the grid until no arm's fastest setting is at an edge."""
        self._grow(self._pairs(), lambda edge: edge == self.fastest(edge.arm, target, edge.init))

    def search_range(self, target: float) -> None:
        """Grows each arm's grid, at its more accurate initialisation, until neither edge trains."""
        pairs: list[tuple[Arm, Init]] = [(arm, self.most_accurate(arm).init) for arm in self._arms]
        self._grow(pairs, lambda edge: self.trains(edge, target))

    def most_accurate(self, arm: Arm, init: Init | None = None) -> Setting:
        """The setting with the highest median validation accuracy; among equals the smaller rate, then the default."""
        return max(self._settings(arm, init), key=self.accuracy)

    def fastest(self, arm: Arm, target: float, init: Init | None = None) -> Setting | None:
        """The setting with the smallest geometric mean of the steps to the target; None where no run arrives.

        A run that does not arrive counts as twice its length; among equals, as in `most_accurate`.
        """
        arriving = [s for s in self._settings(arm, init) if any(n is not None for n in self._steps(s, target))]
        return min(arriving, key=lambda s: self._log_steps(s, target), default=None)

    def accuracy(self, setting: Setting) -> float:
        """Median over the tuning seeds of the final validation accuracy."""
        return median(run.final_accuracy for run in self._runs[setting])

    def trains(self, setting: Setting, target: float) -> bool:
        """Whether no seed diverges and the median accuracy is at least the target."""
        return self.accuracy(setting) >= target and all(run.diverged_at is None for run in self._runs[setting])

    def at_edge(self, setting: Setting) -> bool:
        """Whether a search could not go on because the learning rate is at the widest that is tried."""
        return setting.k in (self._low, self._high)

    def range_that_trains(self, arm: Arm, init: Init, target: float) -> list[float] | None:
        """The lowest and highest learning rate tried that trains; None if none does."""
        rates = [s.lr for s in self._settings(arm, init) if self.trains(s, target)]
        return [min(rates), max(rates)] if rates else None

    def rows(self, target: float) -> list[TuningRow]:
        """All settings tried, arm by arm, for the results."""
        return [
            {
                "arm": s.arm.id,
                "init": s.init,
                "lr": s.lr,
                "accuracies": [run.final_accuracy for run in self._runs[s]],
                "accuracy": self.accuracy(s),
                "steps_to_target": self._steps(s, target),
                "diverged": sum(run.diverged_at is not None for run in self._runs[s]),
                "trains": self.trains(s, target),
            }
            for arm in self._arms
            for s in self._settings(arm, None)
        ]

    def _pairs(self) -> list[tuple[Arm, Init]]:
        return [(arm, init) for arm in self._arms for init in self._inits]

    def _settings(self, arm: Arm, init: Init | None) -> list[Setting]:
        inits = self._inits if init is None else (init,)
        return [s for i in inits for s in sorted(self._runs, key=lambda s: s.k) if s.arm == arm and s.init == i]

    def _steps(self, setting: Setting, target: float) -> list[int | None]:
        return [run.steps_to(target, self._base.eval_every) for run in self._runs[setting]]

    def _log_steps(self, setting: Setting, target: float) -> float:
        beyond = 2 * self._base.steps
        return fmean(math.log(n or beyond) for n in self._steps(setting, target))

    def _run(self, settings: Iterable[Setting]) -> None:
        wanted = list(settings)
        base, seeds = self._base, self._seeds
        specs = [replace(base, arm=s.arm, init=s.init, lr=s.lr, seed=seed) for s in wanted for seed in seeds]
        runs = self._runner.run(specs)
        for number, setting in enumerate(wanted):
            self._runs[setting] = runs[number * len(seeds) : (number + 1) * len(seeds)]

    def _grow(self, pairs: Sequence[tuple[Arm, Init]], wants_more: Callable[[Setting], bool]) -> None:
        while True:
            wanted: list[Setting] = []
            for arm, init in pairs:
                tried = self._settings(arm, init)
                if wants_more(tried[0]) and tried[0].k > self._low:
                    wanted.append(replace(tried[0], k=tried[0].k - 1))
                if wants_more(tried[-1]) and tried[-1].k < self._high:
                    wanted.append(replace(tried[-1], k=tried[-1].k + 1))
            if not wanted:
                return
            self._run(wanted)
