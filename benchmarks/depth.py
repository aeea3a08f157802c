"""How the second moment of the activations goes through 50 layers: with each activation's own gain, ReLU's, batch norm.

Writes docs/measured/depth.json and draws docs/assets/depth.svg from it:

    python benchmarks/depth.py            # measure and draw (seconds)
    python benchmarks/depth.py --draw     # draw again from the file
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from torch import nn

import steadynorm as sn
from steadynorm.activations import Activation
from steadynorm.init.quadrature import expect_square

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "docs" / "measured" / "depth.json"
PICTURE = ROOT / "docs" / "assets" / "depth.svg"

WIDTH, DEPTH, BATCH, SEEDS = 512, 50, 512, 10
ACTIVATIONS = ("elu", "gelu", "silu")
ARMS = ("own gain", "ReLU's gain", "batch norm")
INK = "#808080"  # mid-tones, readable on white and on black
COLOURS = {"own gain": "#2a9d8f", "ReLU's gain": "#e07a3f", "batch norm": "#5b7fd4"}


def second_moments(
    name: str, gain: float, batch_norm: bool, seed: int, width: int = WIDTH, depth: int = DEPTH, batch: int = BATCH
) -> list[float]:
    """Mean of f(h)^2 over the batch and the units, layer by layer; what enters the first f is N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    f = Activation(name)
    h = torch.randn(batch, width, generator=generator)
    weight = torch.empty(width, width)
    moments = [float(f(h).double().square().mean())]
    for _ in range(depth):
        nn.init.normal_(weight, 0.0, gain / math.sqrt(width), generator=generator)
        h = f(h) @ weight.T
        if batch_norm:
            h = sn.BatchNorm1d(width)(h).detach()
        moments.append(float(f(h).double().square().mean()))
    return moments


def predicted(name: str, gain: float, batch_norm: bool) -> list[float]:
    """The same in an infinitely wide network; a batch norm sets q to 1 at every layer."""
    qs = [1.0] * (DEPTH + 1) if batch_norm else sn.init.mean_field(name, gain, layers=DEPTH)
    return [expect_square(Activation(name), math.sqrt(q)) for q in qs]


def measure() -> dict[str, Any]:
    """Every curve, in units of E[f(z)^2], which is where the activation's own gain would keep it."""
    curves: list[dict[str, Any]] = []
    for name in ACTIVATIONS:
        own = sn.init.gain(name)
        for arm in ARMS:
            gain, batch_norm = (math.sqrt(2) if arm == "ReLU's gain" else own), arm == "batch norm"
            runs = [second_moments(name, gain, batch_norm, seed) for seed in range(SEEDS)]
            curves.append(
                {
                    "activation": name,
                    "arm": arm,
                    "gain": round(gain, 6),
                    "slope": None if batch_norm else round(sn.init.slope(name, own), 4),
                    "predicted": _short(predicted(name, gain, batch_norm), own),
                    "seeds": [_short(run, own) for run in runs],
                }
            )
    settings = {"width": WIDTH, "depth": DEPTH, "batch": BATCH, "seeds": list(range(SEEDS))}
    return {"settings": settings, "torch": torch.__version__, "unit": "E[f(z)^2], z ~ N(0, 1)", "curves": curves}


def _short(moments: list[float], own_gain: float) -> list[float]:
    return [float(f"{m * own_gain**2:.5g}") for m in moments]


def draw(measured: dict[str, Any]) -> None:
    """One panel per activation: the median over the seeds, their range as a band, the prediction dashed."""
    mpl.rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "depth", "font.family": "sans-serif", "text.color": INK}
        | {f"{kind}.color": INK for kind in ("xtick", "ytick")}
        | {"axes.labelcolor": INK, "axes.edgecolor": INK, "axes.spines.top": False, "axes.spines.right": False}
    )
    figure, panels = plt.subplots(1, len(ACTIVATIONS), figsize=(10, 3.9), sharex=True, layout="constrained")
    for panel, name in zip(panels, ACTIVATIONS, strict=True):
        for curve in (c for c in measured["curves"] if c["activation"] == name):
            colour, seeds = COLOURS[curve["arm"]], torch.tensor(curve["seeds"], dtype=torch.float64)
            layers = range(seeds.shape[1])
            low, middle, high = seeds.amin(0), seeds.quantile(0.5, dim=0), seeds.amax(0)
            panel.fill_between(layers, low, high, color=colour, alpha=0.25, linewidth=0)
            panel.plot(layers, middle, color=colour, label=curve["arm"])
            panel.plot(layers, curve["predicted"], color=colour, linestyle=(0, (2, 2)), linewidth=1)
        slope = next(c["slope"] for c in measured["curves"] if c["activation"] == name and c["slope"])
        label = {"elu": "ELU", "gelu": "GELU", "silu": "SiLU"}[name]
        panel.set(title=f"{label}: slope {slope:.2f}, {'stable' if slope < 1 else 'unstable'}", xlabel="layer")
        panel.set_yscale("log")
        panel.grid(color=INK, alpha=0.2)
    panels[0].set_ylabel("second moment of the activations\n(1 = where their own gain keeps it)")
    lines = [*panels[0].get_legend_handles_labels()[0], mpl.lines.Line2D([], [], color=INK, linestyle=(0, (2, 2)))]
    labels = [*ARMS, "mean-field prediction"]
    figure.legend(lines, labels, frameon=False, labelcolor=INK, loc="outside lower center", ncols=4)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, transparent=True, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Measures unless told only to draw, then draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="draw again from docs/measured/depth.json")
    if not parser.parse_args().draw:
        MEASURED.parent.mkdir(parents=True, exist_ok=True)
        MEASURED.write_text(json.dumps(measure()).replace("}, {", "},\n{") + "\n", encoding="utf-8")
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    draw(measured)
    for curve in measured["curves"]:
        last = sorted(run[-1] for run in curve["seeds"])
        print(
            f"{curve['activation']:5} {curve['arm']:12} gain {curve['gain']:.4f}  after {DEPTH} layers: "
            f"{last[len(last) // 2]:.3g} ({last[0]:.3g} to {last[-1]:.3g}), mean field {curve['predicted'][-1]:.3g}"
        )


if __name__ == "__main__":
    main()
