"""What measuring running statistics anew brings back, and how exact and fast it is beside update_bn and precise BN.

    python benchmarks/recalibrate.py --data ../shared/data      # some minutes on one core, then the guide's tables
    python benchmarks/recalibrate.py --tables                   # the guide's tables again, from the file

(a) A network of torch.nn's batch norms is trained on MNIST in two ways that leave its running statistics wrong: with
micro-batches of two images (the gradients of 64, sorted by label, add up to one step, so that the moving average has
seen the last labels most), and as the average of its weights over all steps (`AveragedModel`, whose buffers are the
last step's). Accuracy on the held-out images before, after `recalibrate_`, and under float64 population statistics: two
passes over a float64 copy of the network for each of its layers' inputs, from the definition.

(b) The statistics of the second network over batches of unequal size, by `recalibrate_`, by torch's `update_bn` and by
fvcore's `update_bn_stats` (where it is installed), against the same float64 reference: the largest error over all
layers and channels, of means in deviations and of variances relative to them. Times are the least of several rounds in
turns.

Writes docs/measured/recalibrate.json and what stands between the marks of docs/guides/recalibrate.md.
"""

import argparse
import copy
import importlib
import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, update_bn

import steadynorm as sn
from shift_models import DATA, accuracy, examples
from steadynorm.experiment.environment import describe

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "docs" / "measured" / "recalibrate.json"
GUIDE = ROOT / "docs" / "guides" / "recalibrate.md"
TRAINING, POPULATION, BATCH = 12_000, 10_000, 128
ROUNDS = 5
NAMES = {"micro": "trained with sorted micro-batches of 2", "averaged": "averaged weights (AveragedModel)"}
Statistics = dict[str, tuple[Tensor, Tensor]]


def network(way: str) -> nn.Sequential:
    """Three convolutions with batch norms of torch's, and a hidden layer, with one where batches have enough rows."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(576, 64, bias=False), nn.BatchNorm1d(64) if way == "averaged" else nn.Identity(),
        nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def trained(way: str, x: Tensor, y: Tensor) -> nn.Module:
    """The network, trained in one of the two ways."""
    model, chance = network(way), torch.Generator().manual_seed(1)
    average = AveragedModel(model)
    size, parts = (64, 32) if way == "micro" else (64, 1)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05 if way == "micro" else 0.2, momentum=0.9)
    for index in torch.randperm(len(x), generator=chance).split(size):
        optimiser.zero_grad()
        index = index[y[index].argsort()]
        for part in index.chunk(parts):
            if len(part) > 1:
                (cross_entropy(model(x[part]), y[part]) * len(part) / len(index)).backward()
        optimiser.step()
        average.update_parameters(model)
    return model if way == "micro" else average


def norms(model: nn.Module) -> list[tuple[str, Any]]:
    """The batch norms with their names."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@torch.no_grad()
def reference(model: nn.Module, batches: Sequence[Tensor]) -> Statistics:
    """Mean and unbiased variance of each layer's inputs in training mode, in float64, by two passes."""
    wide = copy.deepcopy(model).double().train()
    total: dict[str, Tensor] = {}
    count: dict[str, int] = {}
    mean: Statistics = {}

    def sums(name: str, deviate: bool) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].movedim(1, -1).reshape(-1, args[0].shape[1])
            value = (rows - mean[name][0]).square().sum(0) if deviate else rows.sum(0)
            total[name] = total.get(name, torch.zeros_like(value)) + value
            count[name] = count.get(name, 0) + len(rows)

        return hook

    for deviate in (False, True):
        total.clear()
        count.clear()
        handles = [layer.register_forward_pre_hook(sums(name, deviate)) for name, layer in norms(wide)]
        for batch in batches:
            wide(batch.double())
        for handle in handles:
            handle.remove()
        for name in total:
            mean[name] = (
                (mean[name][0], total[name] / (count[name] - 1)) if deviate else (total[name] / count[name],) * 2
            )
    return mean


def under(model: nn.Module, statistics: Statistics) -> nn.Module:
    """A copy with these running statistics."""
    model = copy.deepcopy(model)
    for name, layer in norms(model):
        layer.running_mean.copy_(statistics[name][0])
        layer.running_var.copy_(statistics[name][1])
    return model


def error(model: nn.Module, wanted: Statistics) -> tuple[float, float]:
    """The largest of the means, in deviations, and of the variances, relative."""
    found = [(m.running_mean.double(), m.running_var.double(), *wanted[n]) for n, m in norms(model)]
    means = max(float(((mean - m) / v.sqrt()).abs().max()) for mean, _, m, v in found)
    return means, max(float((var / v - 1).abs().max()) for _, var, _, v in found)


def unequal(x: Tensor) -> list[Tensor]:
    """Batches of 8 to 248 examples."""
    sizes, chance = [], torch.Generator().manual_seed(2)
    while sum(sizes) < len(x):
        sizes.append(min(int(torch.randint(8, 249, (), generator=chance)), len(x) - sum(sizes)))
    return list(x.split(sizes))


def ways() -> dict[str, Callable[[nn.Module, list[Tensor]], object]]:
    """What there is to measure with."""
    found: dict[str, Callable[[nn.Module, list[Tensor]], object]] = {
        "steadynorm.recalibrate_": lambda model, batches: sn.recalibrate_(model, batches, progress=False),
        "torch update_bn": lambda model, batches: update_bn(batches, model),
    }
    try:
        precise = importlib.import_module("fvcore.nn.precise_bn")
    except ImportError:
        return found
    found["fvcore update_bn_stats"] = lambda model, batches: precise.update_bn_stats(
        model.train(), batches, len(batches)
    )
    return found


def compared(model: nn.Module, x: Tensor) -> list[dict[str, Any]]:
    """Error and time of each way, on unequal batches."""
    batches = unequal(x)
    wanted, rows = reference(model, batches), {name: {"way": name, "seconds": float("inf")} for name in ways()}
    for _ in range(ROUNDS):
        for name, way in ways().items():
            fresh = copy.deepcopy(model).train()
            started = time.perf_counter()
            way(fresh, batches)
            rows[name]["seconds"] = min(rows[name]["seconds"], time.perf_counter() - started)
            rows[name]["mean_error"], rows[name]["variance_error"] = error(fresh, wanted)
    wide = copy.deepcopy(model).double()
    sn.recalibrate_(wide, [batch.double() for batch in batches], progress=False)
    mean_error, variance_error = error(wide, wanted)
    double = {"way": "steadynorm.recalibrate_, network in float64", "seconds": None}
    return [*rows.values(), double | {"mean_error": mean_error, "variance_error": variance_error}]


def measure(data: Path) -> dict[str, Any]:
    """Both parts."""
    (x, y), held_out = examples("mnist", data)
    index = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))[:TRAINING]
    x, y = x[index], y[index]
    population = x[:POPULATION]
    repaired = []
    for way in NAMES:
        model = trained(way, x, y)
        batches = list(population.split(BATCH))
        row: dict[str, Any] = {"network": way, "before": accuracy(model.eval(), *held_out)}
        exact = under(model, reference(model, batches))
        row["population"] = accuracy(exact.eval(), *held_out)
        for order in ("joint", "sequential"):
            fresh = copy.deepcopy(model)
            report = sn.recalibrate_(fresh, batches, order=order)
            row[order], row[f"{order}_passes"] = accuracy(fresh.eval(), *held_out), report.passes
        repaired.append(row)
    return {"environment": describe(1), "repaired": repaired, "compared": compared(model, population)}


def repaired_table(results: dict[str, Any]) -> str:
    """Accuracies, a row for each network."""
    lines = [
        "| network | before | after, joint | after, sequential | float64 population statistics |",
        "| --- " * 5 + "|",
    ]
    lines += [
        f"| {NAMES[row['network']]} | "
        + " | ".join(f"{100 * row[key]:.2f} %" for key in ("before", "joint", "sequential", "population"))
        + " |"
        for row in results["repaired"]
    ]
    return "\n".join(lines) + "\n"


def compared_table(results: dict[str, Any]) -> str:
    """Errors and seconds, a row for each way."""
    lines = ["| | error of means | error of variances | seconds |", "| --- " * 4 + "|"]
    for row in results["compared"]:
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.2f}"
        lines.append(f"| {row['way']} | {row['mean_error']:.1e} | {row['variance_error']:.1e} | {seconds} |")
    return "\n".join(lines) + "\n"


def written(page: str) -> str:
    """The page with every table as it was measured."""
    results = json.loads(MEASURED.read_text())
    for name, text in {"repaired": repaired_table(results), "compared": compared_table(results)}.items():
        page = re.sub(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m, t=text: m[1] + t + m[2], page, flags=re.S)
    return page


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures unless only the tables are wanted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="the folder that holds mnist/")
    parser.add_argument("--tables", action="store_true", help="the guide's tables again, from the file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if not options.tables:
        MEASURED.write_text(json.dumps(measure(options.data), indent=1) + "\n")
    GUIDE.write_text(written(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
