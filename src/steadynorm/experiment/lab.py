"""The comparison itself: every arm tuned alike, then measured on fresh seeds."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from steadynorm.experiment.arms import Arm, Init
from steadynorm.experiment.runner import Runner
from steadynorm.experiment.search import INITS, Setting, Tuning
from steadynorm.experiment.train import Run, RunSpec

__all__ = ["Lab", "Measured", "measure", "tune"]

_FIRST_FRESH_SEED = 1000


@dataclass(frozen=True)
class Lab:
    """What every part of a comparison works with.

    Attributes:
        runner: Carries out the runs.
        arms: The arms, the plain one first.
        base: The run that all others vary.
        tuning_seeds: Seeds that settings are chosen on.
        fresh_seeds: Seeds that everything reported is measured on; none of them is a tuning seed.
    """

    runner: Runner
    arms: tuple[Arm, ...]
    base: RunSpec
    tuning_seeds: tuple[int, ...]
    fresh_seeds: tuple[int, ...]

    @staticmethod
    def seeds(tuning: int, fresh: int, first: int = 0) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Disjoint tuning and fresh seeds, none of them under `first`."""
        first_fresh = first + max(_FIRST_FRESH_SEED, tuning)
        return tuple(range(first, first + tuning)), tuple(range(first_fresh, first_fresh + fresh))

    @property
    def plain(self) -> Arm:
        """The arm without batch norm."""
        return self.arms[0]

    @property
    def primary(self) -> Arm:
        """The arm that the claims are judged on."""
        return self.arms[1]

    @property
    def every(self) -> int:
        """Steps between evaluations."""
        return self.base.eval_every

    def spec(self, setting: Setting, seed: int, **changes: object) -> RunSpec:
        """The run of a setting on a seed."""
        return replace(self.base, arm=setting.arm, init=setting.init, lr=setting.lr, seed=seed, **changes)

    def specs(self, setting: Setting, **changes: object) -> list[RunSpec]:
        """The runs of a setting on all fresh seeds."""
        return [self.spec(setting, seed, **changes) for seed in self.fresh_seeds]

    def grouped(self, groups: Sequence[list[RunSpec]]) -> list[list[Run]]:
        """Carries out several lists of runs at once."""
        runs = iter(self.runner.run([spec for group in groups for spec in group]))
        return [[next(runs) for _ in group] for group in groups]


@dataclass(frozen=True)
class Measured:
    """The settings that tuning chose, and their runs on the fresh seeds.

    Attributes:
        tuning: The search that they come from.
        target: The validation accuracy that counts as arriving.
        accuracy: Arm id -> the most accurate setting.
        speed: Arm id, initialisation ("tuned": the better one) -> the fastest setting.
        runs: Setting -> one run per fresh seed.
    """

    tuning: Tuning
    target: float
    accuracy: dict[str, Setting]
    speed: dict[tuple[str, str], Setting]
    runs: dict[Setting, list[Run]]


def tune(lab: Lab, target: float | None) -> tuple[Tuning, float]:
    """Searches each arm's settings; returns the search, and the target: the given one, or the plain network's own."""
    tuning = Tuning(lab.runner, lab.arms, lab.base, lab.tuning_seeds)
    tuning.search_accuracy()
    if target is None:
        target = 0.99 * tuning.accuracy(tuning.most_accurate(lab.plain))
    tuning.search_speed(target)
    return tuning, target


def measure(lab: Lab, tuning: Tuning, target: float) -> Measured:
    """Measures the chosen settings on the fresh seeds.

    Where no setting of an arm arrives at the target, its most accurate one stands in for the fastest.
    """

    def fastest(arm: Arm, init: Init | None) -> Setting:
        return tuning.fastest(arm, target, init) or tuning.most_accurate(arm, init)

    accuracy = {arm.id: tuning.most_accurate(arm) for arm in lab.arms}
    speed = {(arm.id, init): fastest(arm, init) for arm in lab.arms for init in INITS}
    speed |= {(arm.id, "tuned"): fastest(arm, None) for arm in lab.arms}
    # Accuracy settings come first: a setting that serves both purposes is one run, with its test accuracy and probes.
    chosen = dict.fromkeys([*accuracy.values(), *speed.values()])
    for_accuracy = set(accuracy.values())
    groups = [lab.specs(s, test=s in for_accuracy, probes=s in for_accuracy) for s in chosen]
    runs = dict(zip(chosen, lab.grouped(groups), strict=True))
    return Measured(tuning, target, accuracy, speed, runs)
