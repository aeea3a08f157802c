"""The measured runs as rows of the results."""

from collections.abc import Sequence
from statistics import fmean

import numpy as np

from steadynorm.experiment.lab import Lab, Measured
from steadynorm.experiment.search import Setting, Tuning
from steadynorm.experiment.stats import km_median, mean_interval, paired_ratio
from steadynorm.experiment.train import Run
from steadynorm.report.schema import INITS, Choice, Curve, FreshRun, Ratio, Summary, TimingRow

__all__ = [
    "choices",
    "curves",
    "fresh_runs",
    "ratio_curve",
    "ratios",
    "steps_of",
    "summaries",
    "test_accuracies",
]

_TARGETS = 15


def _choice(setting: Setting, purpose: str, tuning: Tuning) -> Choice:
    return {
        "arm": setting.arm.id,
        "purpose": "accuracy" if purpose == "accuracy" else "speed",
        "init": setting.init,
        "lr": setting.lr,
        "at_edge": tuning.at_edge(setting),
    }


def _chosen(lab: Lab, measured: Measured) -> list[tuple[str, Setting]]:
    """(purpose, setting), arm by arm, each pair once."""
    found: list[tuple[str, Setting]] = []
    for arm in lab.arms:
        speeds = [measured.speed[arm.id, init] for init in ("tuned", *INITS)]
        found += [("accuracy", measured.accuracy[arm.id]), *(("speed", setting) for setting in dict.fromkeys(speeds))]
    return found


def choices(lab: Lab, measured: Measured) -> list[Choice]:
    """Each arm's chosen settings: for accuracy, for speed, and for speed with each initialisation."""
    return [_choice(setting, purpose, measured.tuning) for purpose, setting in _chosen(lab, measured)]


def _padded(run: Run, length: int) -> list[float]:
    """The curve of a run that diverged stays at its final accuracy."""
    return [*run.curve, *[run.final_accuracy] * (length - len(run.curve))]


def curves(lab: Lab, measured: Measured) -> list[Curve]:
    """Validation accuracy over the steps, per chosen setting: pointwise percentiles over the fresh seeds."""
    steps = list(range(lab.every, lab.base.steps + 1, lab.every))
    rows: list[Curve] = []
    for purpose, setting in _chosen(lab, measured):
        table = np.array([_padded(run, len(steps)) for run in measured.runs[setting]])
        p10, p50, p90 = np.quantile(table, [0.1, 0.5, 0.9], axis=0).tolist()
        row: Curve = {
            "arm": setting.arm.id,
            "purpose": purpose,
            "init": setting.init,
            "lr": setting.lr,
            "steps": steps,
            "p10": p10,
            "p50": p50,
            "p90": p90,
        }
        rows.append(row)
    return rows


def fresh_runs(lab: Lab, measured: Measured) -> list[FreshRun]:
    """Every run on a fresh seed, once for each purpose that it serves."""
    return [
        {
            "arm": setting.arm.id,
            "purpose": purpose,
            "init": setting.init,
            "lr": setting.lr,
            "seed": seed,
            "steps_to_target": run.steps_to(measured.target, lab.every),
            "final_accuracy": run.final_accuracy,
            "best_accuracy": run.best_accuracy,
            "test_accuracy": run.test_accuracy if purpose == "accuracy" else None,
            "train_accuracy": run.train_accuracy,
            "diverged_at": run.diverged_at,
        }
        for purpose, setting in _chosen(lab, measured)
        for seed, run in zip(lab.fresh_seeds, measured.runs[setting], strict=True)
    ]


def steps_of(runs: Sequence[Run], target: float, every: int) -> list[int | None]:
    """Steps to a target, one per run."""
    return [run.steps_to(target, every) for run in runs]


def test_accuracies(runs: Sequence[Run]) -> list[float]:
    """The test accuracy of each run that was asked for it."""
    return [run.test_accuracy for run in runs if run.test_accuracy is not None]


def _ratio(lab: Lab, measured: Measured, arm: str, init: str, target: float) -> Ratio:
    plain, other = (
        steps_of(measured.runs[measured.speed[who, init]], target, lab.every) for who in (lab.plain.id, arm)
    )
    found = paired_ratio(plain, other, lab.base.steps)
    return {
        "arm": arm,
        "init": init,
        "target": target,
        "ratio": found.ratio,
        "interval": found.interval,
        "method": found.method,
        "reached_plain": found.reached_plain,
        "reached_arm": found.reached_arm,
        "seeds": found.seeds,
    }


def ratios(lab: Lab, measured: Measured) -> list[Ratio]:
    """Steps to the target, plain over each other arm: tuned, and with each initialisation for both."""
    inits = ("tuned", *INITS)
    return [_ratio(lab, measured, arm.id, init, measured.target) for arm in lab.arms[1:] for init in inits]


def ratio_curve(lab: Lab, measured: Measured) -> list[Ratio]:
    """The same for a grid of targets, from half-way between chance and the target to the best that an arm reaches."""
    chance = 1 / lab.runner.problem.classes
    settings = [measured.speed[arm.id, "tuned"] for arm in lab.arms]
    top = max(fmean(run.best_accuracy for run in measured.runs[s]) for s in settings)
    low = max(0.5, (chance + measured.target) / 2) if measured.target > 0.5 else measured.target
    targets = np.linspace(low, max(top, measured.target), _TARGETS).tolist()
    return [_ratio(lab, measured, arm.id, "tuned", target) for arm in lab.arms[1:] for target in targets]


def summaries(lab: Lab, measured: Measured, timing: Sequence[TimingRow]) -> list[Summary]:
    """One row per arm, with the figures that a reader asks for first."""
    seconds = {row["arm"]: row["seconds_per_step"] for row in timing}
    return [_summary(lab, measured, number, seconds) for number in range(len(lab.arms))]


def _summary(lab: Lab, measured: Measured, number: int, seconds: dict[str, float]) -> Summary:
    arm = lab.arms[number]
    accurate, fast = measured.accuracy[arm.id], measured.speed[arm.id, "tuned"]
    steps = steps_of(measured.runs[fast], measured.target, lab.every)
    median_steps, steps_interval = km_median(steps, lab.base.steps)
    runs = measured.runs[accurate]
    final, final_interval = mean_interval([run.final_accuracy for run in runs])
    test, test_interval = mean_interval(test_accuracies(runs))
    per_step = seconds.get(arm.id)
    return {
        "arm": arm.id,
        "label": arm.label,
        "choice_accuracy": _choice(accurate, "accuracy", measured.tuning),
        "choice_speed": _choice(fast, "speed", measured.tuning),
        "steps_to_target": median_steps,
        "steps_interval": steps_interval,
        "reached": sum(n is not None for n in steps),
        "seeds": len(steps),
        "final_accuracy": final,
        "final_interval": final_interval,
        "best_accuracy": fmean(run.best_accuracy for run in runs),
        "test_accuracy": test,
        "test_interval": test_interval,
        "lr_range": measured.tuning.range_that_trains(arm, accurate.init, measured.target),
        "seconds_per_step": per_step,
        "seconds_to_target": None if per_step is None or median_steps is None else per_step * median_steps,
    }
