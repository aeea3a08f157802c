"""How often `steadynorm.shift.Monitor` alarms on clean streams, how soon on corrupted ones, and what its hooks cost.

    python benchmarks/shift_monitor.py --out docs/measured/monitor.json
    python benchmarks/shift_monitor.py --quick          # a first impression in a few minutes
    python benchmarks/shift_monitor.py --peers          # frouros beside it, where it is installed
    python benchmarks/shift_monitor.py --out docs/measured/monitor.json --page docs/guides/monitor.md

One population per network, its held-out images. Calibrations of 1,000 examples and streams are drawn from it
independently, with replacement. What each layer sees of each image is measured once, with the library's own functions;
streams are then drawn from that. A test takes 64 examples, so that batches of 16 are tested four at a time and one of
256 four times. Intervals are Student's over calibrations: streams of one calibration are no independent evidence.
"""

import argparse
import importlib.util
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from corruptions import REPORTED, SEVERITIES, corrupt
from shift_models import CACHE, DATA, MODELS, accuracy, trained
from shift_monitor_cost import cost
from shift_monitor_peers import peers
from shift_monitor_tables import tables
from steadynorm.experiment.stats import mean_interval
from steadynorm.nn.watched import bn_layers
from steadynorm.shift.watching.calibration import Calibration, LayerReference, fit_calibration, fit_gaussian, t_squared
from steadynorm.shift.watching.collecting import clean_features, collect
from steadynorm.shift.watching.embedding import fit_projection
from steadynorm.shift.watching.resampling import draw, pseudo_means
from steadynorm.shift.watching.sequential import e_value, p_value, shiryaev_roberts

Floats = npt.NDArray[np.float64]
Features = dict[str, Floats]

POOL, EXAMPLES, MEAN_RUN = 64, 1000, 1000
SIZES = (16, 64, 256)
HORIZON = 6400
PARTS = ("false_alarms", "correlated", "delays", "peers", "cost")


def features_of(model: nn.Module, x: Tensor) -> Features:
    """What each layer sees of each image."""
    layers = dict(bn_layers(model))
    seen, _ = collect(model, layers, x.split(250), len(x))
    return clean_features(seen, layers)[0]


def split_recipe(values: Features, channels: Mapping[str, int], seed: int) -> Calibration:
    """The recipe to compare with: mean and covariance from one half, the null from the other, nothing widened."""
    rng, half = np.random.default_rng(seed), EXAMPLES // 2
    indices, layers = draw(half, POOL, 4999, 1, rng), {}
    for name, v in values.items():
        projection = fit_projection(v[:half])
        gaussian = fit_gaussian(projection.scores(v[:half]))
        null = np.sort(t_squared(pseudo_means(projection.scores(v[half:]), indices), gaussian, POOL))
        layers[name] = LayerReference(channels[name], projection, gaussian, null, v.mean(0), v.std(0), v.var(0))
    return Calibration(layers, POOL, 1, EXAMPLES, 1.0)


def plain_recipe(values: Features, channels: Mapping[str, int], seed: int) -> Calibration:
    """The library's, with its null left as narrow as the bootstrap draws it."""
    fitted = fit_calibration(values, channels, pool=POOL, block=1, seed=seed)
    layers = {k: replace(v, null=v.null / fitted.widening) for k, v in fitted.layers.items()}
    return replace(fitted, layers=layers, widening=1.0)


def library(values: Features, channels: Mapping[str, int], seed: int) -> Calibration:
    """What `Monitor.calibrate` does."""
    return fit_calibration(values, channels, pool=POOL, seed=seed)


RECIPES: dict[str, Callable[[Features, Mapping[str, int], int], Calibration]] = {
    "steadynorm": library,
    "not widened": plain_recipe,
    "split bootstrap": split_recipe,
}


def evidence(calibration: Calibration, population: Features, streams: npt.NDArray[np.int64]) -> Floats:
    """Mean e-value over the layers of every pool of streams (streams, examples) of indices into the population."""
    count, length = streams.shape
    pool = calibration.pool
    pools = streams[:, : length // pool * pool].reshape(-1, pool)
    total = np.zeros(len(pools))
    for name, reference in calibration.layers.items():
        white = (reference.projection.scores(population[name]) - reference.gaussian.mean) @ reference.gaussian.whiten
        white = white.astype(np.float32)
        means = np.concatenate([white[part].mean(axis=1) for part in np.array_split(pools, max(1, len(pools) // 2000))])
        total += e_value(p_value(pool * np.sum(means.astype(np.float64) ** 2, axis=1), reference.null))
    return total.reshape(count, -1) / len(calibration.layers)


def alarms(e: Floats, size: int, pool: int = POOL) -> npt.NDArray[np.float64]:
    """The served batch of the first alarm of each stream (streams, tests); infinite where there is none."""
    so_far, first = np.zeros(len(e)), np.full(len(e), np.inf)
    for test in range(e.shape[1]):
        so_far = shiryaev_roberts(so_far, e[:, test], pool / size)
        first[(so_far >= MEAN_RUN) & np.isinf(first)] = math.ceil((test + 1) * pool / size)
    return first


def summary(shares: Sequence[float]) -> dict[str, Any]:
    """Mean, interval and worst of one share per calibration."""
    mean, interval = mean_interval(list(shares))
    bounds = [None if b is None else min(1.0, max(0.0, b)) for b in interval]
    return {"share": mean, "interval": bounds, "worst": max(shares)}


def false_alarms(population: Features, channels: Mapping[str, int], calibrations: int, streams: int) -> list[Any]:
    """Shares of clean streams that alarm within a tenth, and within the whole, of the stated mean run."""
    size_of = len(next(iter(population.values())))
    rows = []
    for recipe, fit in RECIPES.items():
        early: dict[int, list[float]] = {size: [] for size in SIZES}
        whole: dict[int, list[float]] = {size: [] for size in SIZES}
        fewer = recipe != "steadynorm"  # a comparison needs no such narrow interval
        for c in range(calibrations * 2 // 5 if fewer else calibrations):
            rng = np.random.default_rng([c, 1])
            chosen = rng.integers(size_of, size=EXAMPLES)
            calibration = fit({k: v[chosen] for k, v in population.items()}, channels, c)
            for size in SIZES:
                length = MEAN_RUN * size // POOL * POOL
                drawn = rng.integers(size_of, size=(streams // 2 if fewer else streams, length))
                e = evidence(calibration, population, drawn)
                first = alarms(e, size)
                early[size].append(float(np.mean(first <= MEAN_RUN / 10)))
                whole[size].append(float(np.mean(first <= MEAN_RUN)))
        for size in SIZES:
            rows.append(
                {"recipe": recipe, "batch_size": size, "tenth": summary(early[size]), "whole": summary(whole[size])}
            )
            print(recipe, size, rows[-1]["tenth"], rows[-1]["whole"], flush=True)
    return rows


def delays(
    model: nn.Module, population: Features, channels: Mapping[str, int], x: Tensor, y: Tensor, seeds: int, streams: int
) -> list[Any]:
    """Served batches until the alarm, the shift being there from the first one on; and what it costs in accuracy."""
    size_of = len(next(iter(population.values())))
    fitted = []
    for c in range(seeds):
        chosen = np.random.default_rng([c, 1]).integers(size_of, size=EXAMPLES)
        fitted.append(library({k: v[chosen] for k, v in population.items()}, channels, c))
    rows = []
    for name in REPORTED:
        for severity in SEVERITIES:
            changed = torch.from_numpy(corrupt(x.numpy(), name, severity, seed=0))
            shifted = features_of(model, changed)
            row: dict[str, Any] = {"corruption": name, "severity": severity, "accuracy": accuracy(model, changed, y)}
            for size in SIZES:
                rng, found = np.random.default_rng([severity, size]), []
                for calibration in fitted:
                    drawn = rng.integers(len(x), size=(streams, HORIZON))
                    found.append(alarms(evidence(calibration, shifted, drawn), size))
                together = np.concatenate(found)
                row[str(size)] = {
                    "median": None if np.isinf(np.median(together)) else float(np.median(together)),
                    "alarmed": float(np.mean(np.isfinite(together))),
                    "horizon": HORIZON // size,
                }
            rows.append(row)
            print(row, flush=True)
    return rows


def correlated(population: Features, channels: Mapping[str, int], labels: npt.NDArray[np.int64], count: int) -> Any:
    """Streams in runs of ten of one class: calibrated in their order, and as if their examples were independent."""
    rng, run = np.random.default_rng(0), 10
    by_class, (_, sizes) = np.argsort(labels), np.unique(labels, return_counts=True)
    starts = np.cumsum(sizes) - sizes

    def stream(length: int) -> npt.NDArray[np.int64]:
        classes = rng.integers(len(sizes), size=(length // run + 1, 1))
        within = rng.random((len(classes), run)) * sizes[classes]
        return by_class[starts[classes] + within.astype(np.int64)].ravel()[:length]

    rows: dict[str, list[float]] = {}
    whole: dict[str, list[float]] = {}
    blocks: list[int] = []
    for c in range(count):
        chosen = stream(EXAMPLES)
        values = {k: v[chosen] for k, v in population.items()}
        for how, block in (("block estimated", None), ("block=1", 1)):
            calibration = fit_calibration(values, channels, pool=POOL, block=block, seed=c)
            if block is None:
                blocks.append(calibration.block)
            streams = np.stack([stream(MEAN_RUN * POOL) for _ in range(20)])
            first = alarms(evidence(calibration, population, streams), POOL, calibration.pool)
            rows.setdefault(how, []).append(float(np.mean(first <= MEAN_RUN / 10)))
            whole.setdefault(how, []).append(float(np.mean(first <= MEAN_RUN)))
    found = {how: {"tenth": summary(rows[how]), "whole": summary(whole[how])} for how in rows}
    print("correlated", found, flush=True)
    return {"run": run, "blocks": blocks, "batch_size": POOL, **found}


def measure(name: str, options: argparse.Namespace, result: dict[str, Any], save: Callable[[], None]) -> None:
    """The parts that were asked for, of one network, each saved as soon as it is there."""
    model, _, (x, y) = trained(name, options.data, options.cache)
    channels = {key: layer.num_features for key, layer in bn_layers(model)}
    population = features_of(model, x)
    calibrations, streams, seeds = (6, 10, 2) if options.quick else (50, 20, 5)
    few = 500
    result.update(corrupted=few, held_out=len(x), accuracy=accuracy(model, x, y), channels=channels)

    def compared() -> Any:
        shifted = {"clean": population}
        for corruption in REPORTED:
            for severity in (1, 3, 5):
                changed = torch.from_numpy(corrupt(x[:few].numpy(), corruption, severity, seed=0))
                shifted[f"{corruption} {severity}"] = features_of(model, changed)
        return peers(population, shifted, EXAMPLES, MEAN_RUN)

    parts: dict[str, Callable[[], Any]] = {
        "false_alarms": lambda: false_alarms(population, channels, calibrations, streams),
        "correlated": lambda: correlated(population, channels, y.numpy(), 5 if options.quick else 10),
        "delays": lambda: delays(model, population, channels, x[:few], y[:few], seeds, 5),
        "peers": compared,
        "cost": lambda: [cost(model, x, size, 2 if options.quick else 6) for size in (1, 16, 64, 256)],
    }
    for part in options.parts:
        entered = time.perf_counter()
        result[part] = parts[part]()
        result.setdefault("seconds", {})[part] = round(time.perf_counter() - entered)
        save()


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what was asked for and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=Path("monitor.json"), help="read first, so that parts add up")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peers", action="store_true", help="frouros beside it, which must be installed")
    parser.add_argument("--page", type=Path, help="only write the tables of --out into this page, between its marks")
    options = parser.parse_args(arguments)
    if options.page:
        before, start, rest = options.page.read_text().partition("<!-- measured -->\n")
        end, after = rest.partition("<!-- /measured -->")[1:]
        options.page.write_text(
            before + start + "\n" + tables(json.loads(options.out.read_text())) + "\n" + end + after
        )
        return
    if not options.peers:
        options.parts = [part for part in options.parts if part != "peers"]
    elif importlib.util.find_spec("frouros") is None:
        raise SystemExit("--peers needs frouros: pip install frouros (in an environment of its own, it pins scipy)")
    torch.set_num_threads(1)
    results: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"models": {}}
    results.update(mean_run=MEAN_RUN, pool=POOL, calibration_examples=EXAMPLES, quick=options.quick)
    results.update(torch=torch.__version__, numpy=np.__version__)

    def save() -> None:
        options.out.write_text(json.dumps(results, indent=1) + "\n")

    for name in options.models:
        measure(name, options, results["models"].setdefault(name, {}), save)


if __name__ == "__main__":
    main()
