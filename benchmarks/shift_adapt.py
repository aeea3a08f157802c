"""What adapting the running statistics brings back of the accuracy that a corruption costs, and what the guards avert.

    python benchmarks/shift_adapt.py              # about a quarter of an hour on one core, then the guide's tables
    python benchmarks/shift_adapt.py --tune       # choose the prior's N first, on corruptions and images kept apart
    python benchmarks/shift_adapt.py --quick      # a few cells, into a temporary file
    python benchmarks/shift_adapt.py --tables     # the guide's tables again, from the file

Every cell: one of the networks of shift_models.py, one corruption at one severity, batches of one size, in random order
or sorted by label. Each batch is an episode: the model is adapted to it (without labels), its accuracy on that batch is
counted, the adaptation undone. "Before" is the accuracy on the same images as they came, "lost" the distance from
there to the accuracy on the same images clean; recovery is the mean of (after - before) / lost over the corruptions
that cost a point or more. Half of the held-out images and the corruptions of `VALIDATION` are used for choosing
settings (--tune), the other half and those of `REPORTED` for these figures.

Writes docs/measured/adapt.json and what stands between the marks of docs/guides/adapt.md. A run goes on from what the
file holds: remove it to begin anew.
"""

import argparse
import json
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from corruptions import CONSTANTS, MEANING, REPORTED, SEVERITIES, VALIDATION, corrupt, corruptions_for
from shift_models import CACHE, DATA, MODELS, accuracy, remeasured, trained
from steadynorm.experiment.environment import describe
from steadynorm.shift.adapting.adaptation import PRIOR, adapt_

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "docs" / "measured" / "adapt.json"
GUIDE = ROOT / "docs" / "guides" / "adapt.md"
METHODS = ("prior", "adabn", "tent")
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
UNGUARDED = (1, 8, 64, 256)
ORDERS = ("random", "sorted")
IMAGES = {1: 256, 2: 256, 3: 256, 4: 256, 5: 512}
CLEAN = 1000
TUNING = 256
UNGUARDED_IMAGES = 256
EPISODES = 64
"""At most so many batches in a cell, and 16 of sizes that are refused unseen."""
PRIORS = (4, 8, 16, 32, 64, 128)
NAMES = {"mnist": "MNIST", "cifar10": "CIFAR-10"}
WORTH = 0.01
"""A corruption that costs less accuracy than this has nothing to recover."""


class Cell(NamedTuple):
    """One row of the file. Accuracies are shares of right predictions on the same images."""

    corruption: str
    severity: int
    order: str
    method: str
    size: int
    guarded: bool
    images: int
    clean: float
    before: float
    after: float
    adapted: int
    abstained: int
    retrain: int


class Images(NamedTuple):
    """A corrupted set, and its clean twin's right predictions."""

    x: Tensor
    y: Tensor
    clean: Tensor


@torch.inference_mode()
def right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """(N,) which predictions are right."""
    return torch.cat([model(part).argmax(1) for part in x.split(256)]) == y


def cells(
    model: nn.Module,
    images: Images,
    where: tuple[str, int],
    sizes: Iterable[int],
    methods: Iterable[str],
    orders: Iterable[str] = ORDERS,
    **options: Any,
) -> Iterator[Cell]:
    """All sizes, orders and methods for one corrupted set."""
    before = right(model, images.x, images.y)
    for order in orders:
        index = torch.arange(len(images.y)) if order == "random" else torch.argsort(images.y, stable=True)
        for size in sizes:
            parts = [part for part in index.split(size) if len(part) == size]
            parts = parts[:: max(1, len(parts) // (EPISODES if size >= 64 or "guard" in options else 16))]
            used = torch.cat(parts)
            for method in methods:
                if method == "tent" and size == 1 and not options.get("guard", True):
                    continue  # it needs at least two
                hits, verdicts = 0, {"adapted": 0, "abstained": 0, "retrain": 0}
                for part in parts:
                    with adapt_(model, images.x[part], method, **options) as report:
                        verdicts[report.verdict] += 1
                        now = right(model, images.x[part], images.y[part]) if report.applied else before[part]
                    hits += int(now.sum())
                clean, was = (float(t[used].double().mean()) for t in (images.clean, before))
                yield Cell(
                    *where, order, method, size, options.get("guard", True), len(used),
                    round(clean, 5), round(was, 5), round(hits / len(used), 5), **verdicts,
                )  # fmt: skip


def halves(held_out: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The held-out images for the figures, and those for choosing settings, each in random order."""
    x, y = held_out
    index = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    figures, settings = index[: len(x) // 2], index[len(x) // 2 :]
    return (x[figures], y[figures]), (x[settings], y[settings])


def spoilt(model: nn.Module, x: Tensor, y: Tensor, name: str, severity: int) -> Images:
    """A corrupted set; severity 0 is clean."""
    clean = right(model, x, y)
    return Images(torch.from_numpy(corrupt(x.numpy(), name, severity)) if severity else x, y, clean)


def measure(name: str, options: argparse.Namespace, path: Path) -> None:
    """All cells of one network, and that it is fit for the purpose; written one set after the other.

    What the file has already is not measured again, so that a run may be interrupted.
    """
    started = time.perf_counter()
    model, train, held_out = trained(name, options.data, options.cache)
    found = read(path)["models"].get(name)
    if found is None:
        plain, again = accuracy(model, *held_out), accuracy(remeasured(model, train[0]), *held_out)
        found = {"accuracy": plain, "remeasured": again, "cells": []}
    done = {(row[0], row[1], row[5]) for row in found["cells"]}
    (x, y), _ = halves(held_out)
    for corruption, severity, guarded in plan(options.quick):
        if (corruption, severity, guarded) in done:
            continue
        n = (IMAGES[severity] if guarded else UNGUARDED_IMAGES) if severity else CLEAN
        images = spoilt(model, x[:n], y[:n], corruption, severity)
        where, settings = (corruption, severity), {} if guarded else {"guard": False}
        sizes = SIZES if guarded and not options.quick else UNGUARDED
        found["cells"] += map(list, cells(model, images, where, sizes, METHODS, **settings))
        keep(path, "models", name, found)
        print(f"{name} {corruption} {severity} {guarded}: {time.perf_counter() - started:.0f} s", flush=True)


def plan(quick: bool) -> list[tuple[str, int, bool]]:
    """Corruption, severity and whether guarded, what matters most first."""
    corruptions, severities = (REPORTED[:2], (5,)) if quick else (REPORTED, SEVERITIES[::-1])
    guarded = [(corruption, severity, True) for severity in severities for corruption in corruptions]
    return [("clean", 0, True), *guarded, *((corruption, 5, False) for corruption in corruptions)]


def keep(path: Path, part: str, name: str, found: Any) -> None:
    """Adds to the file, which another run may have added to meanwhile."""
    results = read(path)
    results[part][name] = found
    write(results | {"prior": PRIOR, "environment": describe(1)}, path)


def tune(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Recovery of the validation corruptions, and what is lost on clean images, by N; on images kept apart."""
    model, _, held_out = trained(name, options.data, options.cache)
    _, (x, y) = halves(held_out)
    rows: list[dict[str, Any]] = []
    sets = {
        (c, s): spoilt(model, x[:TUNING], y[:TUNING], c, s)
        for c in ("clean", *(v for v in corruptions_for(x.shape[1]) if v in VALIDATION))
        for s in ((0,) if c == "clean" else (3, 5))
    }
    for prior in PRIORS:
        found: list[Cell] = []
        for where, images in sets.items():
            found += cells(model, images, where, (64, 256), ("prior",), ("random",), prior=prior, guard=False)
        for size in (64, 256):
            here = [c for c in found if c.size == size]
            clean = next(c.after - c.before for c in here if c.severity == 0)
            rows.append({"prior": prior, "size": size, "clean": clean, "recovery": recovery(here)[0]})
            print(name, rows[-1], flush=True)
    return rows


def recovery(found: Sequence[Cell]) -> tuple[float | None, int]:
    """Mean share of the lost accuracy that came back, and over how many corruptions."""
    shares = [(c.after - c.before) / (c.clean - c.before) for c in found if c.severity and c.clean - c.before >= WORTH]
    return (sum(shares) / len(shares) if shares else None), len(shares)


def rows_of(results: dict[str, Any], name: str) -> list[Cell]:
    """The cells of a network, as they stand in the file."""
    return [Cell(*row) for row in results["models"][name]["cells"]]


def share(value: float | None) -> str:
    """A share as a table shows it."""
    return "" if value is None else f"{100 * value:.1f}".replace("-0.0", "0.0")


def constants_table() -> str:
    """The published constants."""
    lines = ["| corruption | 1 | 2 | 3 | 4 | 5 | what they are |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for name, constants in CONSTANTS.items():
        values = " | ".join(", ".join(map(str, c)) if isinstance(c, tuple) else str(c) for c in constants)
        used = " (for choosing settings)" if name in VALIDATION else ""
        lines.append(f"| {name}{used} | {values} | {MEANING[name]} |")
    return "\n".join(lines)


def recovery_table(results: dict[str, Any]) -> str:
    """Recovery and clean accuracy by network, size and method; random order."""
    lines = [
        "| network | n | " + " | ".join(f"{m}: severity 5 | {m}: clean" for m in METHODS) + " |",
        "| --- | --- |" + " --- | --- |" * len(METHODS),
    ]
    for name in results["models"]:
        found = [c for c in rows_of(results, name) if c.guarded and c.order == "random"]
        for size in sorted({c.size for c in found}):
            row = [NAMES[name], str(size)]
            for method in METHODS:
                here = [c for c in found if c.size == size and c.method == method]
                worst, clean = [c for c in here if c.severity == 5], next(c for c in here if c.severity == 0)
                if not sum(c.adapted for c in here):
                    row += ["abstains", "abstains"]
                else:
                    gain = share(clean.after - clean.before)
                    row += [f"{share(recovery(worst)[0])} %", f"{gain if gain.startswith('-') else '+' + gain}"]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def corruption_table(results: dict[str, Any], size: int = 64) -> str:
    """Accuracy before and after the prior mix, by corruption at severity 5, and the mean over all severities."""
    columns = [f"{NAMES[n]}: {what}" for n in results["models"] for what in ("before", "after", _span(results, n))]
    lines = [f"| corruption | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    for corruption in REPORTED:
        row = [corruption]
        for name in results["models"]:
            here = [
                c for c in rows_of(results, name)
                if c.guarded and (c.corruption, c.order, c.method, c.size) == (corruption, "random", "prior", size)
            ]  # fmt: skip
            worst = next((c for c in here if c.severity == 5), None)
            if worst is None:
                row += ["", "", ""]
                continue
            means = [sum(v) / len(here) for v in ([c.before for c in here], [c.after for c in here])]
            row += [share(worst.before), share(worst.after), " → ".join(map(share, means))]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def _span(results: dict[str, Any], name: str) -> str:
    severities = {c.severity for c in rows_of(results, name) if c.severity}
    return f"mean {min(severities)}-{max(severities)}"


def guards_table(results: dict[str, Any]) -> str:
    """Mean accuracy at severity 5 with guards and without, by network, order, method and size."""
    lines = [
        "| network, order | method | n | before | without guards | with guards | batches refused |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in results["models"]:
        found = [c for c in rows_of(results, name) if c.severity == 5]
        for order in ORDERS:
            for method in METHODS:
                for size in sorted({c.size for c in found if not c.guarded}):
                    here = [c for c in found if (c.order, c.method, c.size) == (order, method, size)]
                    on, off = ([c for c in here if c.guarded == guarded] for guarded in (True, False))
                    if not on or not off:
                        continue
                    batches = sum(c.adapted + c.abstained + c.retrain for c in on)
                    values = [mean(c.before for c in on), mean(c.after for c in off), mean(c.after for c in on)]
                    refused = share(sum(c.abstained + c.retrain for c in on) / batches)
                    row = [f"{NAMES[name]}, {order}", method, str(size), *map(share, values), f"{refused} %"]
                    lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def mean(values: Iterable[float]) -> float:
    """Of at least one value."""
    kept = list(values)
    return sum(kept) / len(kept)


def tuning_table(results: dict[str, Any]) -> str:
    """What --tune found."""
    tuned: dict[str, Any] = results["tuning"]
    if not tuned:
        return "Not measured yet: `python benchmarks/shift_adapt.py --tune`."
    columns = [f"{NAMES[n]}, n = {size}" for n in tuned for size in (64, 256)]
    lines = [f"| N | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    for prior in PRIORS:
        here = [next(r for r in tuned[n] if (r["prior"], r["size"]) == (prior, s)) for n in tuned for s in (64, 256)]
        values = [f"{share(r['recovery'])} %, clean {100 * r['clean']:+.1f}" for r in here]
        lines.append(f"| {prior} | {' | '.join(values)} |")
    return "\n".join(lines)


def checks(results: dict[str, Any]) -> list[tuple[str, bool]]:
    """What was asked of the default settings beforehand, and whether it holds."""
    found: list[tuple[str, bool]] = []
    for name, least in (("mnist", 0.5), ("cifar10", 0.0)):
        if name not in results["models"]:
            continue
        model = results["models"][name]
        wanted, gained = {"mnist": 0.98, "cifar10": 0.6}[name], model["remeasured"] - model["accuracy"]
        fit = model["accuracy"] >= wanted and gained <= 0.01
        found.append((f"{NAMES[name]}: accuracy {model['accuracy']:.2%}, measured anew {gained:+.2%}", fit))
        prior = [c for c in rows_of(results, name) if c.guarded and c.method == "prior"]
        for size in sorted({c.size for c in prior if c.size >= 64}):
            here = [c for c in prior if c.size == size and c.order == "random"]
            back, over = recovery([c for c in here if c.severity == 5])
            clean = next(c.after - c.before for c in here if c.severity == 0)
            holds = back is not None and back >= least and (back > 0) and clean >= -0.01
            words = f"recovery {share(back)} % over {over} corruptions at severity 5, clean {100 * clean:+.2f} points"
            found.append((f"{NAMES[name]}, n = {size}: {words}", holds))
        small = [c for c in prior if c.size < 64]
        found.append((f"{NAMES[name]}: n < 64 abstains", all(c.adapted == 0 for c in small)))
        ordered = [c for c in prior if c.order == "sorted" and c.size >= 64]
        worse = min(c.after - c.before for c in ordered)
        refused = sum(c.abstained for c in ordered) / sum(c.adapted + c.abstained + c.retrain for c in ordered)
        found.append((f"{NAMES[name]}: sorted, n >= 64: {refused:.1%} refused, worst cell {100 * worse:+.1f} points",
                      worse >= -0.01))  # fmt: skip
    return found


def write_tables(results: dict[str, Any]) -> None:
    """Puts the tables between the guide's marks."""
    tables = {
        "constants": constants_table(),
        "recovery": recovery_table(results),
        "corruptions": corruption_table(results),
        "guards": guards_table(results),
        "tuning": tuning_table(results),
        "checks": "\n".join(f"- {'holds' if held else '**does not hold**'}: {what}" for what, held in checks(results)),
    }
    text = GUIDE.read_text(encoding="utf-8")
    for name, table in tables.items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = block.sub(lambda found, table=table: f"{found[1]}\n{table}\n\n{found[2]}", text)
    aside = GUIDE.with_suffix(".part")
    aside.write_text(text, encoding="utf-8")
    aside.replace(GUIDE)


def read(path: Path) -> dict[str, Any]:
    """What was measured up to now."""
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {"prior": PRIOR, "columns": Cell._fields, "tuning": {}, "models": {}} | known


def write(results: dict[str, Any], path: Path) -> None:
    """As JSON, one cell a line, aside first."""
    text = json.dumps(results, indent=1)
    text = re.sub(r'\[\s+("[a-z_]+",[^\[\]]*?)\s+\]', lambda found: "[" + " ".join(found[1].split()) + "]", text)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    aside.write_text(text + "\n", encoding="utf-8")
    aside.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, writes, and says whether what was asked holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    modes = parser.add_mutually_exclusive_group()
    for mode in ("quick", "tune", "tables"):
        modes.add_argument(f"--{mode}", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    quick = Path(tempfile.gettempdir()) / "adapt-quick.json"
    path = options.out or (quick if options.quick else MEASURED)
    for name in [] if options.tables else options.models:
        if options.tune:
            keep(path, "tuning", name, tune(name, options))
        else:
            measure(name, options, path)
    results = read(path)
    for what, held in checks(results):
        print("holds         " if held else "does not hold ", what)
    if path == MEASURED and len(results["models"]) == len(MODELS):
        write_tables(results)
    return 0 if all(held for _, held in checks(results)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
