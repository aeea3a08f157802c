"""The stages of a comparison, in the order in which a reader wants their results."""

from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from steadynorm.experiment import rows, studies
from steadynorm.experiment.arms import takes_dropout
from steadynorm.experiment.claims import judge
from steadynorm.experiment.evidence import DropoutAccuracies, Evidence
from steadynorm.experiment.lab import Lab, Measured, measure, tune
from steadynorm.experiment.search import INITS
from steadynorm.experiment.settings import Settings
from steadynorm.experiment.timing import seconds_per_step
from steadynorm.experiment.train import RunSpec
from steadynorm.report.schema import Results

__all__ = ["best_normalised", "blank_results", "carry_out", "foreseen_runs"]

_LIKELY_GRID = 7
"""Learning rates that a search usually ends up with."""


@dataclass
class _Findings:
    """What the studies hand to the claims, filled in as they finish."""

    spreads: dict[str, list[float | None]] = field(default_factory=dict[str, list[float | None]])
    counts: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])
    standardization: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    dropout: dict[str, DropoutAccuracies] = field(default_factory=dict[str, DropoutAccuracies])


def foreseen_runs(settings: Settings, arms: int) -> dict[str, int]:
    """About how many runs each stage takes, for the progress bar."""
    grid = _LIKELY_GRID * len(INITS) * settings.tuning_seeds
    runs = {
        "tuning": arms * grid,
        "learning rates that train": arms * 2 * settings.tuning_seeds,
        "fresh seeds": arms * 3 * settings.seeds,
        "gradients": arms * settings.seeds // 2,
        "batch_size": arms * 3 * min(3, settings.seeds),
        "dropout": arms * (3 * settings.tuning_seeds + settings.seeds),
        "standardisation": 4 * (_LIKELY_GRID * settings.tuning_seeds + settings.seeds),
    }
    return {stage: n for stage, n in runs.items() if stage not in studies.STUDIES or stage in settings.studies}


def carry_out(lab: Lab, settings: Settings, results: Results) -> Measured:
    """Runs every stage and enters its rows into `results` as soon as it has them."""
    progress, findings = lab.runner.progress, _Findings()
    progress.foresee(foreseen_runs(settings, len(lab.arms)))

    progress.stage("tuning")
    tuning, target = tune(lab, None if settings.target == "auto" else float(settings.target))
    results["target"] = target
    results["target_source"] = (
        "99 % of the plain network's median validation accuracy at its best setting, on the tuning seeds"
        if settings.target == "auto"
        else "as given"
    )
    results["tuning"] = tuning.rows(target)

    progress.stage("fresh seeds")
    measured = measure(lab, tuning, target)
    results["choices"] = rows.choices(lab, measured)
    results["curves"] = rows.curves(lab, measured)
    results["runs"] = rows.fresh_runs(lab, measured)
    results["ratios"] = rows.ratios(lab, measured)
    results["ratio_curve"] = rows.ratio_curve(lab, measured)
    _sum_up(lab, measured, findings, results)

    progress.stage("learning rates that train")
    tuning.search_range(target)
    results["tuning"] = tuning.rows(target)
    _studies(lab, measured, settings, findings, results)
    return measured


def _studies(lab: Lab, measured: Measured, settings: Settings, findings: _Findings, results: Results) -> None:
    problem = lab.runner.problem
    for study in (name for name in studies.STUDIES if name in settings.studies):
        lab.runner.progress.stage(study)
        match study:
            case "gradients":
                runs = studies.gradients(lab, measured)
                results["gradients"] = studies.gradient_rows(runs)
                findings.spreads, findings.counts = studies.gradient_evidence(runs)
            case "drift":
                results["drift"] = studies.drift(lab, measured)
            case "timing":
                results["timing"] = seconds_per_step(lab, measured)
            case "batch_size":
                results["batch_sizes"] = studies.batch_sizes(lab, measured)
            case "dropout" if not takes_dropout(problem.source, problem.input_shape, problem.classes):
                pass  # the claim that rests on it then says that it was not measured
            case "dropout":
                results["regularization"], findings.dropout = studies.regularization(lab, measured)
            case _:
                results["standardization"], findings.standardization = studies.standardization(lab, measured)
        _sum_up(lab, measured, findings, results)


def _sum_up(lab: Lab, measured: Measured, findings: _Findings, results: Results) -> None:
    results["summaries"] = rows.summaries(lab, measured, results["timing"])
    results["claims"] = judge(
        Evidence(
            ratios=results["ratios"],
            runs=results["runs"],
            timing=results["timing"],
            gradient_spreads=findings.spreads,
            gradient_counts=findings.counts,
            standardization=findings.standardization,
            dropout=findings.dropout,
            plain=lab.plain.id,
            primary=lab.primary.id,
        )
    )


def best_normalised(lab: Lab, measured: Measured) -> RunSpec:
    """The run of a batch-normalised arm with the best final validation accuracy, from the most accurate such arm."""
    arms = [arm for arm in lab.arms if arm.where is not None] or [lab.primary]
    settings = [measured.accuracy[arm.id] for arm in arms]
    setting = max(settings, key=lambda s: fmean(run.final_accuracy for run in measured.runs[s]))
    runs = zip(lab.fresh_seeds, measured.runs[setting], strict=True)
    seed = max(runs, key=lambda pair: pair[1].final_accuracy)[0]
    return lab.spec(setting, seed)


def blank_results(version: str, settings: Settings, environment: dict[str, str]) -> Results:
    """Results with every section empty, to be filled in stage by stage."""
    nothing: dict[str, Any] = {}
    return {
        "schema": 1,
        "version": version,
        "status": "interrupted",
        "settings": settings.as_json(),
        "environment": environment,
        "data": nothing,
        "model": dict(nothing),
        "arms": [],
        "target": None,
        "target_source": "",
        "tuning": [],
        "choices": [],
        "curves": [],
        "runs": [],
        "summaries": [],
        "ratios": [],
        "ratio_curve": [],
        "gradients": [],
        "drift": [],
        "batch_sizes": [],
        "regularization": [],
        "standardization": [],
        "timing": [],
        "claims": [],
        "saved_model": None,
    }
