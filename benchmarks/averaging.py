"""Which running statistics fit averaged weights? An EMA of the weights, its treatments, five seeds.

    python benchmarks/averaging.py            # measure (about five minutes on one core) and write the guide's tables
    python benchmarks/averaging.py --tables   # write the tables again from the file

Trains small networks and keeps, beside each, one exponential moving average of the weights per decay. At several points
of training each average is measured against the truth: a pass of the whole training set through the averaged network,
whose Moments are merged batch by batch (the law of total variance). The treatments are those of `TREATMENTS`.

Two distances to that truth, each the mean over all channels of all layers:

    mean        |μ - μ*| / σ*                variance    |log(σ² / σ*²)|           *: recalibrated

and the test accuracy of the averaged network in evaluation mode under each treatment. Intervals are Student's, over the
seeds. MNIST is looked for in $STEADYNORM_DATA, or in shared/data beside the repository, and left out where it is not
there. Writes docs/measured/averaging.json, and what stands between the marks `<!-- measured -->` and
`<!-- /measured -->` of docs/guides/averaging.md.
"""

import argparse
import copy
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import steadynorm as sn
from steadynorm.experiment.data import LabelledData, load
from steadynorm.experiment.environment import describe
from steadynorm.experiment.split import Split, split
from steadynorm.experiment.stats import mean_interval

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "docs" / "measured" / "averaging.json"
GUIDE = ROOT / "docs" / "guides" / "averaging.md"
BLOCK = re.compile(r"(<!-- measured -->\n).*?(<!-- /measured -->)", re.DOTALL)
FIGURES = ("mean", "variance", "accuracy")
NAMES = {"digits": "digits", "mnist": "MNIST"}

TREATMENTS = {
    "stale": "never updated",
    "copied": "the live model's",
    "deviations": "means averaged, standard deviations averaged",
    "variances": "means averaged, variances averaged",
    "pooled": "the same, and the spread between the means added to the variance",
    "recalibrated": "measured anew on the whole training set",
}
DECAYS = (0.9, 0.99, 0.999)
# With warm-up the decay is at most (1 + updates) / (10 + updates), so that the first weights are soon forgotten.
WARMUPS = (True, False)
POINTS = (100, 300, 1000, 3000)
SEEDS = 5
BATCH, RATE, MOMENTUM = 64, 0.05, 0.9
TRAINING_EXAMPLES, TEST_EXAMPLES = 6_000, 2_000  # at most: of MNIST a random part, so that all ends in minutes


class Statistics(NamedTuple):
    """Mean and unbiased variance of every channel of every layer, one after another, float64."""

    mean: Tensor
    var: Tensor


def mlp(shape: tuple[int, ...]) -> nn.Sequential:
    """Two hidden layers of 64."""
    inputs = math.prod(shape)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(inputs, 64, bias=False), sn.BatchNorm1d(64, activation="relu"),
        nn.Linear(64, 64, bias=False), sn.BatchNorm1d(64, activation="relu"),
        nn.Linear(64, 10),
    )  # fmt: skip


def cnn(shape: tuple[int, ...]) -> nn.Sequential:
    """Three convolutions; the first brings images of 28 by 28 to 10 by 10."""
    return nn.Sequential(
        nn.Conv2d(shape[0], 8, 3, 3 if shape[1] > 16 else 1, 1, bias=False), sn.BatchNorm2d(8, activation="relu"),
        nn.Conv2d(8, 16, 3, 2, 1, bias=False), sn.BatchNorm2d(16, activation="relu"),
        nn.Conv2d(16, 16, 3, 1, 1, bias=False), sn.BatchNorm2d(16, activation="relu"),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


NETWORKS = {"mlp": mlp, "cnn": cnn}


def layers(model: nn.Module) -> list[nn.Module]:
    """The batch norms, in order."""
    return [module for module in model.modules() if isinstance(module, sn.nn.BatchNorm1d | sn.nn.BatchNorm2d)]


def statistics(model: nn.Module) -> Statistics:
    """The running statistics, copied out."""
    mean, var = (torch.cat([getattr(layer, f"running_{name}") for layer in layers(model)]) for name in ("mean", "var"))
    return Statistics(mean.double(), var.double())


def recalibrated(model: nn.Module, x: Tensor, batch: int = 500) -> Statistics:
    """The truth: merged Moments of a pass of the whole training set in training mode."""
    model = copy.deepcopy(model).train()
    seen = [sn.Moments.empty(layer.num_features) for layer in layers(model)]
    for number, layer in enumerate(layers(model)):

        def look(_: nn.Module, inputs: tuple[Tensor, ...], number: int = number) -> None:
            seen[number] = seen[number].merge(sn.Moments.of(inputs[0]))

        layer.register_forward_pre_hook(look)
    with torch.no_grad():
        for part in x.split(batch):
            model(part)
    return Statistics(torch.cat([m.mean for m in seen]), torch.cat([m.variance(unbiased=True) for m in seen]))


class Average:
    """An EMA of the weights, and every treatment of the statistics beside it."""

    def __init__(self, model: nn.Module, decay: float, warmup: bool) -> None:
        self.model = copy.deepcopy(model).eval()
        self.decay, self.warmup, self.updates = decay, warmup, 0
        self.found = {name: statistics(model) for name in TREATMENTS if name != "recalibrated"}

    @torch.no_grad()
    def update(self, weights: list[Tensor], live: Statistics) -> None:
        """One step, by the formulas written out."""
        d = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        self.updates += 1
        torch._foreach_lerp_(list(self.model.parameters()), weights, 1 - d)
        self.found["copied"] = live
        for name in ("deviations", "variances", "pooled"):
            old = self.found[name]
            if name == "deviations":
                var = old.var.sqrt().lerp(live.var.sqrt(), 1 - d).square()
            else:
                var = old.var.lerp(live.var, 1 - d)
            if name == "pooled":
                var = var + d * (1 - d) * (live.mean - old.mean).square()
            self.found[name] = Statistics(old.mean.lerp(live.mean, 1 - d), var)

    def judge(self, parts: Split) -> dict[str, dict[str, float]]:
        """Distances to the recalibrated statistics, and test accuracy in evaluation mode, by treatment."""
        truth = recalibrated(self.model, parts.x_train)
        return {
            name: {**distances(found, truth), "accuracy": accuracy(self.model, found, parts)}
            for name, found in {**self.found, "recalibrated": truth}.items()
        }


def distances(found: Statistics, truth: Statistics) -> dict[str, float]:
    """Means over all channels of all layers; a channel without any variance (a dead unit's) has no scale: left out."""
    alive = truth.var > 1e-12
    return {
        "mean": float(((found.mean - truth.mean).abs() / truth.var.sqrt())[alive].mean()),
        "variance": float((found.var / truth.var).log().abs()[alive].mean()),
    }


@torch.no_grad()
def accuracy(model: nn.Module, found: Statistics, parts: Split) -> float:
    """On the test part, with these statistics put into the averaged model."""
    sizes = [layer.num_features for layer in layers(model)]
    for layer, mean, var in zip(layers(model), found.mean.split(sizes), found.var.split(sizes), strict=True):
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var)
    return float((model.eval()(parts.x_test).argmax(1) == parts.y_test).double().mean())


def one_run(data: LabelledData, network: str, seed: int) -> Iterator[dict[str, Any]]:
    """Trains once; yields a row per point, warm-up, decay and treatment."""
    torch.manual_seed(seed)
    whole, n, n_test = split(data, seed), TRAINING_EXAMPLES, TEST_EXAMPLES  # in random order
    x, y = whole.x_train[:n], whole.y_train[:n]
    parts = Split(x, y, whole.x_val, whole.y_val, whole.x_test[:n_test], whole.y_test[:n_test])
    model = NETWORKS[network](tuple(x.shape[1:]))
    optimizer = torch.optim.SGD(model.parameters(), RATE, MOMENTUM)
    averages = [Average(model, decay, warmup) for warmup in WARMUPS for decay in DECAYS]
    order = torch.randperm(len(x))
    for step in range(1, max(POINTS) + 1):
        if len(order) < BATCH:
            order = torch.randperm(len(x))
        rows, order = order[:BATCH], order[BATCH:]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        weights, live = list(model.parameters()), statistics(model)
        for average in averages:
            average.update(weights, live)
        if step in POINTS:
            for average in averages:
                for name, found in average.judge(parts).items():
                    where = {"step": step, "warmup": average.warmup, "decay": average.decay}
                    yield {**where, "treatment": name, **found}


def measure(sources: dict[str, LabelledData]) -> list[dict[str, Any]]:
    """One row per data set, network, warm-up, decay, point and treatment; intervals over the seeds."""
    results: list[dict[str, Any]] = []
    for (data, loaded), network in itertools.product(sources.items(), NETWORKS):
        begun = time.perf_counter()
        cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for seed in range(SEEDS):
            for row in one_run(loaded, network, seed):
                key = tuple(row[name] for name in ("warmup", "decay", "step", "treatment"))
                cells.setdefault(key, []).append(row)
        for (warmup, decay, step, treatment), rows in sorted(cells.items(), key=lambda cell: (not cell[0][0], cell[0])):
            where = {"data": data, "network": network, "warmup": warmup, "decay": decay, "step": step}
            results.append({**where, "treatment": treatment, **{f: summary(rows, f) for f in FIGURES}})
        print(f"{data} {network}: {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    return results


def summary(rows: list[dict[str, Any]], figure: str) -> list[float]:
    """The mean over the seeds and its interval."""
    centre, bounds = mean_interval([row[figure] for row in rows])
    return [round(value, 5) for value in (centre, *bounds) if value is not None]


def sources() -> dict[str, LabelledData]:
    """The data sets that are there."""
    larger = Path(os.environ.get("STEADYNORM_DATA") or ROOT.parent / "shared" / "data")
    found = {"digits": load("digits")}
    if (larger / "mnist").is_dir():
        found["mnist"] = load(larger / "mnist")
    else:
        print("MNIST is left out: it is not among the larger data sets", file=sys.stderr)
    return found


def tables(measured: dict[str, Any]) -> str:
    """What the guide shows: distances and accuracy at the last point, and how often which treatment is nearer."""
    results, last = measured["results"], max(POINTS)
    # Where even the longest average has been through thousands of steps, warm-up matters to that one alone.
    rows = [r for r in results if r["step"] == last and (r["warmup"] or r["decay"] == max(DECAYS))]
    shown = {
        "mean": ("Distance of the means", ("stale", "copied", "deviations")),  # the others average them likewise
        "variance": ("Distance of the variances", ("stale", "copied", "deviations", "variances", "pooled")),
        "accuracy": ("Test accuracy in %", tuple(TREATMENTS)),
    }
    parts = [f"{title} after {last:,} steps:\n\n{table(rows, figure, t)}" for figure, (title, t) in shown.items()]
    return "\n\n".join([*parts, duels(results)])


def table(rows: list[dict[str, Any]], figure: str, treatments: Sequence[str]) -> str:
    """One row per network and decay, with the half width of the interval."""
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        label = (
            f"{NAMES[row['data']]} {row['network'].upper()}, {row['decay']:g}{'' if row['warmup'] else ', no warm-up'}"
        )
        mean, _, high = (100 * value for value in row[figure]) if figure == "accuracy" else row[figure]
        digits = 1 if figure == "accuracy" else 3 if mean >= 0.1 else 4
        cells.setdefault(label, {})[row["treatment"]] = f"{mean:.{digits}f} ± {high - mean:.{digits}f}"
    lines = ["| network, decay | " + " | ".join(treatments) + " |", "| --- |" + " --- |" * len(treatments)]
    lines += [f"| {label} | " + " | ".join(found[t] for t in treatments) + " |" for label, found in cells.items()]
    return "\n".join(lines)


def duels(results: list[dict[str, Any]]) -> str:
    """How often averaged deviations are nearer than each rival, the two intervals apart."""
    keys = ("data", "network", "warmup", "decay", "step")
    found = {(*(row[key] for key in keys), row["treatment"]): row for row in results}
    settings = list(dict.fromkeys(where[:-1] for where in found))
    lines = ["| `deviations` against | warm-up | means: nearer, farther | variances: nearer, farther |"]
    lines.append("| --- | --- | --- | --- |")
    for rival, warmup in itertools.product(("copied", "variances", "pooled"), WARMUPS):
        pairs = [(found[*s, "deviations"], found[*s, rival]) for s in settings if s[2] == warmup]
        counts = [
            f"{sum(a[f][2] < b[f][1] for a, b in pairs)}, {sum(a[f][1] > b[f][2] for a, b in pairs)}"
            for f in ("mean", "variance")
        ]
        counts[0] = counts[0] if rival == "copied" else "the same"
        lines.append(f"| `{rival}` | {'yes' if warmup else 'no'} | {' | '.join(counts)} |")
    half = len(settings) // 2
    return (
        f"In how many of {half} settings (networks, decays, {len(POINTS)} points of training; {half} with warm-up and "
        f"{half} without) the intervals of two treatments lie apart:\n\n" + "\n".join(lines)
    )


def write(path: Path, text: str) -> None:
    """Puts a file in place as a whole."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def main() -> None:
    """Measures unless told only to write the tables, then writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="from docs/measured/averaging.json as it is")
    if not parser.parse_args().tables:
        torch.set_num_threads(1)
        begun = time.perf_counter()
        results = measure(sources())
        content = {
            "command": "python benchmarks/averaging.py",
            "environment": describe(1),
            "seconds": round(time.perf_counter() - begun),
            "settings": {
                "treatments": TREATMENTS, "seeds": SEEDS, "batch": BATCH, "lr": RATE, "momentum": MOMENTUM,
                "training_examples": TRAINING_EXAMPLES, "test_examples": TEST_EXAMPLES,
            },
            "figures": "each [mean, low, high]: a Student t-interval at 95 % over the seeds",
            "results": results,
        }  # fmt: skip
        write(MEASURED, json.dumps(content, allow_nan=False).replace("}, {", "},\n{") + "\n")
    block = tables(json.loads(MEASURED.read_text(encoding="utf-8")))
    page = GUIDE.read_text(encoding="utf-8")
    write(GUIDE, BLOCK.sub(lambda match: f"{match[1]}{block}\n{match[2]}", page))


if __name__ == "__main__":
    main()
