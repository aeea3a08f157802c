"""`compare`: the same network trained with and without batch norm, and what that says; `Comparison`: its result."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Literal, cast

import torch

from steadynorm.errors import DataError
from steadynorm.experiment import environment, models
from steadynorm.experiment.arms import Arm, arms_for, build, is_weighted
from steadynorm.experiment.data import Source, load
from steadynorm.experiment.lab import Lab, Measured
from steadynorm.experiment.models import ModelLike
from steadynorm.experiment.pipeline import best_normalised, blank_results, carry_out
from steadynorm.experiment.problem import Problem
from steadynorm.experiment.progress import Progress
from steadynorm.experiment.runner import Runner, available_cores
from steadynorm.experiment.search import INITS
from steadynorm.experiment.settings import Settings
from steadynorm.experiment.studies import STUDIES
from steadynorm.experiment.train import Optimizer, RunSpec, train_model
from steadynorm.files.aside import write_aside
from steadynorm.report.schema import ArmInfo, Results
from steadynorm.surgery.operations import is_activation

__all__ = ["Comparison", "compare"]

RESULTS_FILE: Final = "results.json"
REPORT_FILE: Final = "report.html"
MODEL_FOLDER: Final = "best_model"


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """What a comparison found.

    Attributes:
        results: Plain data, as in `results.json`; its shape is `steadynorm.report.schema.Results`.
    """

    results: Results

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes `results.json` and `report.html` into a folder, which is made if need be; returns the folder."""
        from steadynorm.report import to_json, write_html

        where = _folder(folder)
        write_aside({where / RESULTS_FILE: to_json(self.results).encode()})
        write_html(self.results, where / REPORT_FILE)
        return where

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Comparison":
        """Reads what `save` wrote.

        Raises:
            DataError: There is no `results.json`, or it is not one of this version.
        """
        from steadynorm.report.serialize import check_schema

        path = Path(folder) / RESULTS_FILE
        try:
            results: Any = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read {path} ({error}). Name the folder that `compare` wrote to.") from error
        if not isinstance(results, dict):
            raise DataError(f"{path} does not hold the results of a comparison.")
        found = cast("Results", results)
        check_schema(found)
        return cls(found)

    def __str__(self) -> str:
        lines = [f"{self.results['model'].get('name')} on {self.results['data'].get('name')}: {self.results['status']}"]
        lines += [f"{claim['verdict']}: {claim['claim']} {claim['explanation']}" for claim in self.results["claims"]]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        from steadynorm.report import notebook_html

        return notebook_html(self.results)


def _folder(folder: str | os.PathLike[str]) -> Path:
    where = Path(folder)
    try:
        where.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write to {where} ({error}). Name a folder that can be made.") from error
    return where


def compare(
    data: Source = "digits",
    model: ModelLike = "sigmoid-mlp",
    *,
    label: str | None = None,
    seeds: int = 10,
    tuning_seeds: int = 3,
    steps: int | None = None,
    batch_size: int = 60,
    target: float | Literal["auto"] = "auto",
    optimizer: Optimizer = "sgd",
    first_seed: int = 0,
    arms: Sequence[Arm] | None = None,
    studies: Sequence[str] = STUDIES,
    jobs: int | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Comparison:
    """Trains a network without batch norm, with it before and with it after the nonlinearity, each at its best.

    Every arm gets the same search on validation data: learning rates in half-decades, extended while the best is at an
    edge, times three initialisations (torch's default, and two corrected by the activation's gain). What is reported is
    then measured on fresh seeds, each with its own split, data order and initialisation, the same for all arms.

    Args:
        data: See `steadynorm.experiment.data.load`.
        model: A name, "pkg.mod:factory", a factory or a module; see `steadynorm.experiment.models.resolve`.
        label: The label column, for a table whose label column has an unusual name.
        seeds: Fresh seeds to measure on.
        tuning_seeds: Seeds to choose settings on.
        steps: Optimiser updates per run; by default 2,000, and 400 for "elu-mlp-20", which takes long and arrives soon.
        batch_size: Examples per step.
        target: The validation accuracy whose arrival is timed, as a fraction; "auto": 99 % of what the plain network
            reaches at its best setting.
        optimizer: "sgd" (without momentum) or "adam".
        first_seed: Where the seeds start: another one repeats the whole comparison on other splits, orders and weights.
        arms: Other arms than plain, before and after.
        studies: Which further studies to carry out: some of gradients, drift, timing, batch_size, dropout,
            standardisation.
        jobs: Worker processes, each with one thread; by default one per core. Changes no number but the seconds.
        out: A folder for `results.json`, `report.html`, the best batch-normalised model and a log of finished runs;
            the same call with the same folder goes on where an interrupted one stopped.
        progress: Whether to show a progress bar on stderr.

    Returns:
        The comparison; it shows itself in a notebook. After Ctrl-C it holds what has finished, and its status is
        "interrupted".

    Raises:
        ArgumentError: An argument is out of range.
        DataError: The data cannot be read, or `out` cannot be written to.
        ModelError: The model cannot be built, fits no such data, or has no place for batch norm.

    Source:
        Ioffe & Szegedy, ICML 2015, https://arxiv.org/abs/1502.03167

    Example:
        >>> from steadynorm.experiment import compare
        >>> found = compare(seeds=2, tuning_seeds=1, steps=10, studies=(), jobs=1, progress=False)
        >>> [row["arm"] for row in found.results["summaries"]]
        ['plain', 'before', 'after']
    """
    workers = available_cores() if jobs is None else jobs
    source = models.resolve(model)
    steps = source.default_steps if steps is None else steps
    settings = Settings(seeds, tuning_seeds, steps, batch_size, target, optimizer, tuple(studies), workers, first_seed)
    chosen = arms_for(source, None if arms is None else tuple(arms))
    problem = Problem.of(load(data, label=label), source)
    results = blank_results(version("steadynorm"), settings, environment.describe(settings.jobs))
    _describe(problem, chosen, results)
    folder = None if out is None else _folder(out)
    comparison = Comparison(results)
    with Progress(progress) as bar:
        tuning, fresh = Lab.seeds(tuning_seeds, seeds, first_seed)
        base = RunSpec(chosen[0], "default", 1.0, tuning[0], steps, batch_size, optimizer)
        lab = Lab(Runner(problem, workers, folder, bar), chosen, base, tuning, fresh)
        try:
            measured = carry_out(lab, settings, results)
            if folder is not None:
                bar.stage("saving")
                results["saved_model"] = _save_best(lab, measured, folder)
            results["status"] = "complete"
        except KeyboardInterrupt:
            pass  # blank results say "interrupted" until the last stage is done
        finally:
            if folder is not None:
                comparison.save(folder)
    return comparison


def _describe(problem: Problem, arms: Sequence[Arm], results: Results) -> None:
    """Builds every arm in every way, which finds a model that cannot be used before anything is trained."""
    infos: list[ArmInfo] = []
    for arm in arms:
        with torch.random.fork_rng(devices=[]):
            shape, classes = problem.input_shape, problem.classes
            network, *_ = [build(problem.source, arm, shape, classes, init=init) for init in INITS]
        models.check_output(network, shape, classes, problem.source.name)
        infos.append({"id": arm.id, "label": arm.label, "parameters": sum(p.numel() for p in network.parameters())})
        if arm is arms[0]:
            layers = [str(m) for m in network.modules() if is_weighted(m) or is_activation(m)]
            results["model"] = {
                "name": problem.source.name,
                "description": problem.source.description,
                "layers": layers,
            }
    results["arms"] = infos
    parts = problem.split(0)
    results["data"] = {
        "name": problem.data.name,
        "kind": problem.data.kind,
        "classes": problem.classes,
        "class_names": list(problem.data.classes),
        "features": list(problem.input_shape),
        "train": len(parts.y_train),
        "validation": len(parts.y_val),
        "test": len(parts.y_test),
    }


def _save_best(lab: Lab, measured: Measured, folder: Path) -> str:
    """Trains the best batch-normalised run once more, which gives the same network, and saves it."""
    from steadynorm.experiment.saved import save_model

    spec, problem = best_normalised(lab, measured), lab.runner.problem
    network = train_model(spec, problem)[1]
    parts = problem.split(spec.seed)
    record: dict[str, Any] = {
        "model": problem.source.name,
        "arm": spec.arm.id,
        "where": spec.arm.where,
        "input_shape": list(problem.input_shape),
        "classes": list(problem.data.classes),
        "init": spec.init,
        "lr": spec.lr,
        "steps": spec.steps,
        "seed": spec.seed,
    }
    if parts.mean is not None and parts.scale is not None:
        record["preprocessing"] = {"mean": parts.mean.tolist(), "scale": parts.scale.tolist()}
    save_model(folder / MODEL_FOLDER, network.eval(), record)
    return MODEL_FOLDER
