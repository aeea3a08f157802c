"""Batch norm in micro-batches of two: plain, ghost batches, renorm and accumulated statistics, on MNIST.

    python benchmarks/microbatch.py                       # some 12 minutes on one idle core
    python benchmarks/microbatch.py --seeds 2 --steps 20  # a look at it
    python benchmarks/measured.py                         # then writes the tables of docs/guides/small-batches.md

Every optimiser step takes the mean gradient of 16 images, whatever the arm, so that batch norm alone differs: what an
activation is normalised by (two images or all 16) and what is committed when. The arms of one seed start from the same
weights and see the same images in the same order. Micro-batches are drawn in two ways: at random, and each of one class
(as in the second experiment of Ioffe, "Batch Renormalization", 2017).

Each arm's learning rate is the one of the same small grid with the best mean validation accuracy over seeds of their
own; the figures are test accuracies (evaluation mode) of fresh seeds. `accumulated` computes what `ghost` does, up to
rounding, and takes its rate. Renorm's schedule is the paper's, scaled to the length of the run.

MNIST is looked for in $STEADYNORM_DATA, or in shared/data beside the repository; --data takes another data set. Runs
are kept one by one in <out>.unfinished: Ctrl-C loses the current one only, and the same call goes on from there.
"""

import argparse
import contextlib
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import steadynorm as sn
from measured import microbatch_tables
from steadynorm.errors import SteadynormError
from steadynorm.experiment.data import LabelledData, load
from steadynorm.experiment.environment import describe
from steadynorm.experiment.split import Split, split
from steadynorm.experiment.stats import mean_interval

ROOT = Path(__file__).resolve().parent.parent
MICRO, BATCH = 2, 16
MOMENTUM = 0.9  # of SGD
VALIDATION_EXAMPLES = 2_000  # at most
TUNING_SEEDS = (100, 101)
ORDERS = {"random": "random pairs", "class": "pairs of one class"}
PAPER_STEPS = 100_000  # of which Ioffe's schedule takes 5,000 to begin and 40,000 to end

Layer = Callable[[int, int], nn.Module]  # dimensions of the data and channels -> batch norm


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        label: As the tables name it.
        examples: Per forward.
        options: Of this package's layer; None for torch.nn's.
        momentum: Of the running statistics.
        accumulate: Whether a step's forwards commit once, together.
        renorm: Whether the batch is corrected towards the running statistics.
        rate_of: The arm whose learning rate this one takes, where it is not tuned itself.
    """

    label: str
    examples: int = MICRO
    options: dict[str, Any] | None = None
    momentum: float = 0.1
    accumulate: bool = False
    renorm: bool = False
    rate_of: str | None = None


GHOST = {"ghost_batch_size": MICRO}
ARMS = {
    "plain": Arm("plain (`torch.nn`)"),
    "plain-slow": Arm("plain (`torch.nn`), momentum 0.01", momentum=0.01),
    "accumulated": Arm("accumulated: `sn.accumulate`", options={}, accumulate=True, rate_of="ghost"),
    "ghost": Arm(f"ghost: {BATCH} at once, `ghost_batch_size=2`", BATCH, GHOST),
    "renorm": Arm("renorm: `sn.Renorm`", options={}, renorm=True),
    "renorm-slow": Arm("renorm, momentum 0.01", options={}, momentum=0.01, renorm=True),
    "renorm-ghost": Arm(f"renorm and ghost, {BATCH} at once", BATCH, GHOST, renorm=True),
    "reference": Arm(f"for reference: one batch of {BATCH}", BATCH, {}),
}


class Network(NamedTuple):
    """A network, and the learning rates that its arms choose from."""

    label: str
    build: Callable[[tuple[int, ...], int, Layer], nn.Module]
    rates: tuple[float, ...]


def mlp(shape: tuple[int, ...], classes: int, norm: Layer) -> nn.Module:
    """Two hidden layers of 64: a channel has as many values as the batch has examples."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(shape), 64, bias=False), norm(1, 64), nn.ReLU(),
        nn.Linear(64, 64, bias=False), norm(1, 64), nn.ReLU(),
        nn.Linear(64, classes),
    )  # fmt: skip


def cnn(shape: tuple[int, ...], classes: int, norm: Layer) -> nn.Module:
    """Two convolutions: of 28 by 28 images a channel has 100, then 25 values for each example."""
    return nn.Sequential(
        nn.Conv2d(shape[0], 8, 3, 3, 1, bias=False), norm(2, 8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, 1, bias=False), norm(2, 16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, classes),
    )  # fmt: skip


NETWORKS = {"mlp": Network("MLP", mlp, (0.003, 0.01, 0.03)), "cnn": Network("CNN", cnn, (0.03, 0.1, 0.3))}


class Key(NamedTuple):
    """What one run is: the runs of one network, order and seed differ in the arm (and its rate) alone."""

    network: str
    order: str
    arm: str
    lr: float
    seed: int


def layers_of(arm: Arm, steps: int) -> Layer:
    """Makes the arm's batch norms."""
    commits = steps * (1 if arm.accumulate else BATCH // arm.examples)
    scaled = [round(share * commits / PAPER_STEPS) for share in (5_000, 35_000, 20_000)]
    renorm = sn.Renorm(warmup=scaled[0], ramp=(scaled[1], scaled[2])) if arm.renorm else None

    def layer(dims: int, channels: int) -> nn.Module:
        if arm.options is None:
            return (nn.BatchNorm1d, nn.BatchNorm2d)[dims - 1](channels, momentum=arm.momentum)
        kind = (sn.BatchNorm1d, sn.BatchNorm2d)[dims - 1]
        return kind(channels, momentum=arm.momentum, renorm=renorm, **arm.options)

    return layer


def batches(y: Tensor, by_class: bool, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows of BATCH examples for ever, each example once an epoch; neighbours of one class if wished."""
    while True:
        rows = torch.randperm(len(y), generator=generator)
        if by_class:
            same = [rows[y[rows] == label] for label in y.unique()]
            pairs = torch.cat([r[: len(r) // MICRO * MICRO].view(-1, MICRO) for r in same])
            rows = pairs[torch.randperm(len(pairs), generator=generator)].flatten()
        yield from rows[: len(rows) // BATCH * BATCH].split(BATCH)


def train(key: Key, parts: Split, steps: int) -> nn.Module:
    """Trains one network."""
    arm = ARMS[key.arm]
    torch.manual_seed(key.seed)
    shape, classes = tuple(parts.x_train.shape[1:]), len(parts.y_train.unique())
    model = NETWORKS[key.network].build(shape, classes, layers_of(arm, steps))
    optimizer = torch.optim.SGD(model.parameters(), key.lr, MOMENTUM)
    rows_of = batches(parts.y_train, key.order == "class", torch.Generator().manual_seed(key.seed))
    for _ in range(steps):
        optimizer.zero_grad()
        with sn.accumulate(model) if arm.accumulate else contextlib.nullcontext():
            for rows in next(rows_of).split(arm.examples):
                loss = nn.functional.cross_entropy(model(parts.x_train[rows]), parts.y_train[rows])
                (loss * len(rows) / BATCH).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """In evaluation mode."""
    right = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(1_000), y.split(1_000), strict=True))
    return right / len(x)


class Runs:
    """The runs that are finished, on disk after each of them."""

    def __init__(self, path: Path, settings: dict[str, Any], total: int) -> None:
        self.path, self.settings, self.total = path, settings, total
        self.done: dict[Key, dict[str, float]] = {}
        self.fresh_seconds: list[float] = []
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            if before["settings"] != settings:
                sys.exit(f"{path} holds runs with other settings: {before['settings']}. Remove it, or choose --out.")
            self.done = {Key(*row["run"]): row["found"] for row in before["runs"]}
            print(f"going on after {len(self.done)} runs", file=sys.stderr)

    def get(self, key: Key, parts: Split) -> dict[str, float]:
        """Validation and test accuracy of a run."""
        if key not in self.done:
            begun, begun_cpu = time.perf_counter(), time.process_time()
            model = train(key, parts, self.settings["steps"])
            n = VALIDATION_EXAMPLES
            found = {
                "validation": accuracy(model, parts.x_val[:n], parts.y_val[:n]),
                "test": accuracy(model, parts.x_test, parts.y_test),
                "cpu_seconds": round(time.process_time() - begun_cpu, 2),
            }
            self.done[key] = found
            rows = [{"run": list(k), "found": f} for k, f in self.done.items()]
            write(self.path, {"settings": self.settings, "runs": rows})
            self._say(key, found, time.perf_counter() - begun)
        return self.done[key]

    def _say(self, key: Key, found: dict[str, float], seconds: float) -> None:
        self.fresh_seconds.append(seconds)
        each = sum(self.fresh_seconds) / len(self.fresh_seconds)
        left = (self.total - len(self.done)) * each / 60
        print(
            f"[{len(self.done)}/{self.total}] {key.network}, {ORDERS[key.order]}, {key.arm}, lr {key.lr:g}, seed "
            f"{key.seed}: {found['test']:.1%} in {seconds:.1f} s, about {left:.0f} min left",
            file=sys.stderr,
        )


def measure(data: LabelledData, runs: Runs, seeds: int) -> list[dict[str, Any]]:
    """Tunes every arm, then trains it from fresh seeds; arms take turns, so that none has the machine's quiet hour."""
    places = [(network, order) for network in NETWORKS for order in ORDERS]
    tuned = [name for name, arm in ARMS.items() if arm.rate_of is None]
    for seed in TUNING_SEEDS:
        parts = split(data, seed)
        for network, order in places:
            for lr in NETWORKS[network].rates:
                for arm in tuned:
                    runs.get(Key(network, order, arm, lr, seed), parts)

    def rate(network: str, order: str, arm: str) -> float:
        def mean(lr: float) -> float:
            keys = [Key(network, order, ARMS[arm].rate_of or arm, lr, seed) for seed in TUNING_SEEDS]
            return sum(runs.done[key]["validation"] for key in keys)

        return max(NETWORKS[network].rates, key=mean)

    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        parts = split(data, seed)
        for network, order in places:
            for arm in ARMS:
                runs.get(Key(network, order, arm, rate(network, order, arm), seed), parts)
    for network, order in places:
        plain: list[float] = []
        for arm in ARMS:  # plain comes first
            lr = rate(network, order, arm)
            found = [runs.done[Key(network, order, arm, lr, seed)]["test"] for seed in range(seeds)]
            plain = plain or found
            rows.append({
                "network": network, "order": order, "arm": arm, "lr": lr, "test": found,
                "accuracy": interval(found),
                "over_plain": interval([a - b for a, b in zip(found, plain, strict=True)]),
            })  # fmt: skip
    return rows


def interval(values: list[float]) -> list[float | None]:
    """The mean and its interval."""
    centre, bounds = mean_interval(values)
    return [None if value is None else round(value, 5) for value in (centre, *bounds)]


def write(path: Path, content: dict[str, Any]) -> None:
    """Puts the file in place as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    text = json.dumps(content, allow_nan=False)
    aside.write_text(text.replace('{"network"', '\n{"network"').replace('{"run"', '\n{"run"') + "\n", encoding="utf-8")
    aside.replace(path)


def positive(text: str) -> int:
    """A whole number of at least one."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def arguments() -> argparse.Namespace:
    """The command line."""
    larger = Path(os.environ.get("STEADYNORM_DATA") or ROOT.parent / "shared" / "data")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=positive, default=5, help="fresh seeds per arm (default: 5)")
    parser.add_argument("--steps", type=positive, default=200, help=f"optimiser steps of {BATCH} images (default: 200)")
    parser.add_argument("--data", default=str(larger / "mnist"), help="images: a folder, or digits (default: MNIST)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "measured" / "microbatch.json", help="the results")
    parser.add_argument("--json", action="store_true", help="print the results as JSON, not as tables")
    return parser.parse_args()


def main() -> None:
    """Trains what is missing, writes the results and prints them."""
    args = arguments()
    torch.set_num_threads(1)
    try:
        data = load(args.data)
    except SteadynormError as error:
        sys.exit(f"{error} (--data digits needs no file.)")
    if data.kind != "image":
        sys.exit(f"--data must be images, {data.name} is a table.")
    settings = {
        "data": data.name, "training_examples": len(split(data, 0).x_train), "steps": args.steps, "batch": BATCH,
        "microbatch": MICRO, "seeds": args.seeds, "tuning_seeds": list(TUNING_SEEDS), "optimizer_momentum": MOMENTUM,
        "rates": {name: list(network.rates) for name, network in NETWORKS.items()},
        "torch": torch.__version__, "steadynorm": sn.__version__,
    }  # fmt: skip
    tuned = sum(arm.rate_of is None for arm in ARMS.values())
    total = sum(len(ORDERS) * len(n.rates) * len(TUNING_SEEDS) * tuned for n in NETWORKS.values())
    total += len(NETWORKS) * len(ORDERS) * len(ARMS) * args.seeds
    unfinished = args.out.with_name(args.out.name + ".unfinished")
    runs = Runs(unfinished, settings, total)
    try:
        rows = measure(data, runs, args.seeds)
    except KeyboardInterrupt:
        if runs.done:
            kept = f"{len(runs.done)} of {total} runs are kept in {unfinished}"
            print(f"\n{kept}; the same call goes on from there.", file=sys.stderr)
        sys.exit(130)
    results = {
        "command": shlex.join(["python", "benchmarks/microbatch.py", *sys.argv[1:]]),
        "environment": describe(1),
        "cpu_seconds": round(sum(found["cpu_seconds"] for found in runs.done.values())),
        "settings": settings,
        "labels": {
            "arms": {name: arm.label for name, arm in ARMS.items()},
            "networks": {name: network.label for name, network in NETWORKS.items()},
            "orders": ORDERS,
        },
        "figures": "each [mean, low, high]: a Student t-interval at 95 % over the seeds; over_plain is paired",
        "results": rows,
        "tuning": [
            {**key._asdict(), "validation": found["validation"]}
            for key, found in runs.done.items()
            if key.seed in TUNING_SEEDS
        ],
    }
    write(args.out, results)
    unfinished.unlink()
    print(json.dumps(results, indent=1) if args.json else microbatch_tables(results))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # before the first run
        sys.exit(130)
