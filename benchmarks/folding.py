"""What `fold` and `fuse` do to networks of every form: how many batch norms go, the error, and the time it saves.

    python benchmarks/folding.py                  # some minutes on one core, then the guide's table
    python benchmarks/folding.py --tables         # the guide's table again, from the file
    python benchmarks/folding.py --only RepVGG    # one network, printed, nothing written

Each network has random weights, running statistics and affine weights, and is in evaluation. Columns: its batch norms;
those that `fuse` lets do what follows them; those that `fold` removes; those that torch's own pass does
(torch.fx.experimental.optimization.fuse; 0 where it cannot trace the network); the largest error of the folded network
in float32 against the original in float64, as a share of the output's scale, beside that of the original in float32;
and the median time of a forward before and after, of one example and of eight, each model called in turns. The networks
of transformers need that package; without it they are left out, and the file says why.

Writes docs/measured/folding.json and what stands between the marks of docs/guides/fold.md.
"""

import argparse
import copy
import importlib
import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse as fx_fuse
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

import steadynorm as sn
from cpu_timing import interleaved
from folding_models import OURS, TRANSFORMERS, example_of, of_transformers, stirred
from steadynorm.experiment.environment import describe

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "docs" / "measured" / "folding.json"
GUIDE = ROOT / "docs" / "guides" / "fold.md"
SIZES = (1, 8)


def by_fx(model: nn.Module) -> int:
    """How many batch norms torch.fx's own pass removes."""
    try:
        fused = fx_fuse(copy.deepcopy(model))
    except Exception:  # most networks of transformers cannot be traced by it
        return 0
    left = [fused.get_submodule(str(node.target)) for node in fused.graph.nodes if node.op == "call_module"]
    return sum(isinstance(m, _BatchNorm) for m in model.modules()) - sum(isinstance(m, _BatchNorm) for m in left)


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """All tensors that it gives, in float64."""
    return [y.double() for y in pytree.tree_leaves(model(x)) if isinstance(y, Tensor)]


def error(got: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest, as a share of the output's scale."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, wanted, strict=True))


def measured(name: str, seconds: float) -> dict[str, Any]:
    """One row."""
    torch.manual_seed(0)
    model = stirred(OURS[name]() if name in OURS else of_transformers(name))
    folded = sn.fold(model)
    report = folded.fold_report
    x = example_of(name, SIZES[-1])
    wanted = outputs(copy.deepcopy(model).double(), x.double())
    row = {
        "network": name,
        "batch_norms": len(report.layers),
        "fused": sn.fuse(model).fuse_report.fused,
        "folded": report.folded,
        "fx": by_fx(model),
        "error": error(outputs(folded, x), wanted),
        "error_before": error(outputs(model, x), wanted),
        "left": sorted({layer.how for layer in report.layers if not layer.folded}),
    }
    for rows in SIZES:
        x = example_of(name, rows)
        with torch.inference_mode():
            times = interleaved({"before": lambda x=x: model(x), "after": lambda x=x: folded(x)}, seconds)
        row |= {f"{key}_{rows}_ms": median(found) / 1e3 for key, found in times.items()}
    return row


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    cells = [row["network"], row["batch_norms"], row["fused"], row["folded"], row["fx"]]
    cells += [f"{row['error']:.1e}", f"{row['error_before']:.1e}"]
    for rows in SIZES:
        before, after = row[f"before_{rows}_ms"], row[f"after_{rows}_ms"]
        cells += [f"{before:.2f} → {after:.2f}", f"{before / after:.2f}×"]
    return "| " + " | ".join(map(str, cells)) + " |"


def table(results: dict[str, Any]) -> str:
    """A row for each network, and what it was measured on."""
    heads = ["network", "batch norms", "fused", "folded", "by torch.fx", "error", "error before"]
    heads += ["one example, ms", "faster", "eight, ms", "faster"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    lines += [line(row) for row in results["networks"]]
    where = results["environment"]
    versions = f"torch {where['torch']}, transformers {where['transformers']}, Python {where['python']}"
    lines += ["", f"On one core of an {where['processor']}, {where['system']}; {versions}."]
    lines += [f"Left out: {name} ({why})." for name, why in results["left_out"].items()]
    return "\n".join(lines) + "\n"


def written(page: str) -> str:
    """The page with the table as it was measured."""
    text = table(json.loads(MEASURED.read_text()))
    return re.sub(r"(<!-- folding -->\n).*?(<!-- /folding -->)", lambda m: m[1] + text + m[2], page, flags=re.S)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures unless only the table is wanted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tables", action="store_true", help="the guide's table again, from the file")
    parser.add_argument("--only", metavar="NAME", help="one network, printed, nothing written")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each network and batch (%(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.only:
        print(json.dumps(measured(options.only, options.seconds), indent=1))
        return
    if not options.tables:
        there = importlib.util.find_spec("transformers") is not None
        rows: list[dict[str, Any]] = []
        for name in [*OURS, *(TRANSFORMERS if there else ())]:
            rows.append(measured(name, options.seconds))
            print(line(rows[-1]), flush=True)
        version = importlib.import_module("transformers").__version__ if there else "-"
        left_out = {} if there else dict.fromkeys(TRANSFORMERS, "transformers is not installed")
        results = {"environment": describe(1) | {"transformers": version}, "networks": rows, "left_out": left_out}
        MEASURED.write_text(json.dumps(results, indent=1) + "\n")
    GUIDE.write_text(written(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
