"""The studies beside the comparison: gradients, layer inputs, batch size, dropout, standardisation."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Final, Literal, TypeAlias

from steadynorm.experiment import probes
from steadynorm.experiment.arms import Arm, Init
from steadynorm.experiment.evidence import DropoutAccuracies
from steadynorm.experiment.lab import Lab, Measured
from steadynorm.experiment.problem import Scaling
from steadynorm.experiment.rows import steps_of, test_accuracies
from steadynorm.experiment.search import Setting, Tuning
from steadynorm.experiment.stats import km_median, mean_interval
from steadynorm.experiment.train import Run
from steadynorm.report.schema import BatchSizeRow, DriftRow, GradientRow, RegularizationRow, StandardizationRow

__all__ = ["STUDIES", "batch_sizes", "drift", "gradient_evidence", "gradients", "regularization", "standardization"]

STUDIES: Final = ("gradients", "drift", "timing", "batch_size", "dropout", "standardisation")
"""The names that `compare(studies=...)` takes."""

DROPOUT: Final = 0.5
"""Probability of dropout after each hidden activation."""

_BATCH_SIZE_SEEDS: Final = 3

_PHASES: Final[tuple[Literal["start", "middle", "end"], ...]] = ("start", "middle", "end")
_LARGEST: Final = 3.4e38
"""Stands for an infinite norm: JSON has no infinity."""

Condition: TypeAlias = Literal[
    "plain, raw", "plain, standardised", "batch norm in the hidden layers, raw", "batch norm as first layer, raw"
]


def gradients(lab: Lab, measured: Measured) -> dict[str, list[Run]]:
    """Arm id -> probed runs on the fresh seeds, all arms with the corrected initialisation, each at its tuned rate."""
    settings = {arm.id: measured.tuning.most_accurate(arm, "corrected") for arm in lab.arms}
    chosen = set(measured.accuracy.values())
    groups = [lab.specs(s, test=s in chosen, probes=True) for s in settings.values()]
    return dict(zip(settings, lab.grouped(groups), strict=True))


def gradient_rows(runs: dict[str, list[Run]]) -> list[GradientRow]:
    """Medians over the seeds that got as far as each phase."""
    rows: list[GradientRow] = []
    for arm, of_arm in runs.items():
        for phase in _PHASES:
            records = [run.gradients[phase] for run in of_arm if run.gradients and phase in run.gradients]
            records = [record for record in records if record["norms"]]
            if not records:
                continue
            columns = zip(*(record["norms"] for record in records), strict=True)
            norms = [min(median(column), _LARGEST) for column in columns]
            spreads = [probes.spread_decades(record["norms"]) for record in records]
            row: GradientRow = {
                "arm": arm,
                "phase": phase,
                "step": records[0]["step"],
                "layers": records[0]["layers"],
                "norms": norms,
                "spread_decades": median(_LARGEST if s is None else s for s in spreads),
                "verdict": probes.verdict(norms),
            }
            rows.append(row)
    return rows


def gradient_evidence(runs: dict[str, list[Run]]) -> tuple[dict[str, list[float | None]], dict[str, dict[str, int]]]:
    """Per arm: each seed's worst spread over the phases (None where there is none), and counts of what went wrong."""
    spreads: dict[str, list[float | None]] = {}
    counts: dict[str, dict[str, int]] = {}
    for arm, of_arm in runs.items():
        spreads[arm] = [_worst_spread(run) for run in of_arm]
        found = [probes.verdict(r["norms"]) for run in of_arm for r in (run.gradients or {}).values() if r["norms"]]
        counts[arm] = {
            "phases": len(found),
            "vanishing": found.count("vanishing"),
            "exploding": found.count("exploding"),
            "diverged": sum(run.diverged_at is not None for run in of_arm),
        }
    return spreads, counts


def _worst_spread(run: Run) -> float | None:
    records = run.gradients or {}
    if run.diverged_at is not None or len(records) < len(_PHASES):
        return None
    spreads = [probes.spread_decades(record["norms"]) for record in records.values()]
    return None if any(s is None for s in spreads) else max(s for s in spreads if s is not None)


def drift(lab: Lab, measured: Measured) -> list[DriftRow]:
    """Percentiles from the seed with the median drift of each arm's most accurate setting, and that median."""
    rows: list[DriftRow] = []
    for arm in lab.arms:
        records = [run.drift for run in measured.runs[measured.accuracy[arm.id]] if run.drift is not None]
        if records:
            typical = sorted(records, key=lambda record: record["drift"])[(len(records) - 1) // 2]
            rows.append(
                {
                    "arm": arm.id,
                    "steps": typical["steps"],
                    "p15": typical["p15"],
                    "p50": typical["p50"],
                    "p85": typical["p85"],
                    "drift": typical["drift"],
                }
            )
    return rows


def batch_sizes(lab: Lab, measured: Measured) -> list[BatchSizeRow]:
    """Smaller and larger batches, the learning rate and the number of steps staying what they were tuned at."""
    base = lab.base.batch_size
    sizes = sorted({max(2, base // 15), max(2, base // 4), base, base * 4})
    seeds = lab.fresh_seeds[:_BATCH_SIZE_SEEDS]
    cases = [(measured.accuracy[arm.id], size) for arm in lab.arms for size in sizes if size != base]
    groups = [[lab.spec(setting, seed, batch_size=size) for seed in seeds] for setting, size in cases]
    runs = dict(zip(cases, lab.grouped(groups), strict=True))
    rows: list[BatchSizeRow] = []
    for arm in lab.arms:
        setting = measured.accuracy[arm.id]
        for size in sizes:
            of_size = runs[setting, size] if size != base else measured.runs[setting][: len(seeds)]
            mean, interval = mean_interval([run.final_accuracy for run in of_size])
            row: BatchSizeRow = {
                "arm": arm.id,
                "batch_size": size,
                "lr": setting.lr,
                "final_accuracy": mean,
                "interval": interval,
                "steps_to_target": km_median(steps_of(of_size, measured.target, lab.every), lab.base.steps)[0],
            }
            rows.append(row)
    return rows


def regularization(lab: Lab, measured: Measured) -> tuple[list[RegularizationRow], dict[str, DropoutAccuracies]]:
    """Each arm without dropout, and with it at the best of three learning rates around its tuned one."""
    candidates = {
        arm.id: [replace(measured.accuracy[arm.id], k=measured.accuracy[arm.id].k + d) for d in (-1, 0, 1)]
        for arm in lab.arms
    }
    settings = [setting for of_arm in candidates.values() for setting in of_arm]
    groups = [[lab.spec(s, seed, dropout=DROPOUT) for seed in lab.tuning_seeds] for s in settings]
    tuned = dict(zip(settings, lab.grouped(groups), strict=True))

    def accuracy(setting: Setting) -> float:
        return median(run.final_accuracy for run in tuned[setting])

    best = {arm: max(of_arm, key=accuracy) for arm, of_arm in candidates.items()}
    with_dropout = dict(
        zip(best, lab.grouped([lab.specs(s, dropout=DROPOUT, test=True) for s in best.values()]), strict=True)
    )
    rows: list[RegularizationRow] = []
    evidence: dict[str, DropoutAccuracies] = {}
    for arm in lab.arms:
        without = measured.runs[measured.accuracy[arm.id]]
        rows.append(_regularization_row(arm.id, 0.0, measured.accuracy[arm.id].lr, without))
        rows.append(_regularization_row(arm.id, DROPOUT, best[arm.id].lr, with_dropout[arm.id]))
        evidence[arm.id] = DropoutAccuracies(test_accuracies(without), test_accuracies(with_dropout[arm.id]))
    return rows, evidence


def _regularization_row(arm: str, p: float, lr: float, runs: Sequence[Run]) -> RegularizationRow:
    train = mean_interval([run.train_accuracy for run in runs])[0]
    test, interval = mean_interval(test_accuracies(runs))
    return {
        "arm": arm,
        "dropout": p,
        "lr": lr,
        "train_accuracy": train,
        "test_accuracy": test,
        "test_interval": interval,
        "gap": train - test,
    }


def standardization(lab: Lab, measured: Measured) -> tuple[list[StandardizationRow], dict[str, list[float]]]:
    """Features multiplied by 10^U(-3, 3): each remedy with a search of its own, the same for all, then on fresh seeds.

    The search is over learning rates; the initialisation is the one that tuning chose for the same hidden layers.
    """
    hidden = lab.primary
    # In a null experiment the "remedies" are plain networks again.
    first = Arm("first", "batch norm as first layer", "first" if hidden.where else None, hidden.salt)
    plain_init, hidden_init = measured.accuracy[lab.plain.id].init, measured.accuracy[hidden.id].init
    cases: list[tuple[Condition, Arm, Init, Scaling]] = [
        ("plain, raw", lab.plain, plain_init, "wild"),
        ("plain, standardised", lab.plain, plain_init, "wild, standardised"),
        ("batch norm in the hidden layers, raw", hidden, hidden_init, "wild"),
        ("batch norm as first layer, raw", first, plain_init, "wild"),
    ]
    chosen: list[tuple[Condition, Setting, Scaling]] = []
    for condition, arm, init, scaling in cases:
        tuning = Tuning(lab.runner, (arm,), replace(lab.base, scaling=scaling), lab.tuning_seeds, (init,))
        tuning.search_accuracy()
        chosen.append((condition, tuning.most_accurate(arm), scaling))
    all_runs = lab.grouped([lab.specs(setting, scaling=scaling, test=True) for _, setting, scaling in chosen])
    rows: list[StandardizationRow] = []
    evidence: dict[str, list[float]] = {}
    for (condition, setting, _), runs in zip(chosen, all_runs, strict=True):
        evidence[condition] = test_accuracies(runs)
        test, interval = mean_interval(evidence[condition])
        row: StandardizationRow = {
            "condition": condition,
            "init": setting.init,
            "lr": setting.lr,
            "test_accuracy": test,
            "interval": interval,
        }
        rows.append(row)
    return rows, evidence
