"""The picture of what benchmarks/cpu.py measured: time over that of a copy, against the size of the input."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

__all__ = ["draw"]

INK = "#808080"  # mid-tones, readable on white and on black
PEERS = {
    "eager": ("torch.nn", "#e07a3f", "o"),
    "compiled": ("torch.compile", "#5b7fd4", "^"),
    "ours": ("steadynorm", "#2a9d8f", "o"),
}
LAYOUTS = {"contiguous": "contiguous", "channels_last": "channels last"}


def draw(measured: dict[str, Any], path: Path) -> None:
    """Forward + backward of BN + ReLU in float32: a panel for each layout, a point for each input."""
    mpl.rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "speed", "font.family": "sans-serif", "text.color": INK}
        | {f"{kind}.color": INK for kind in ("xtick", "ytick")}
        | {"axes.labelcolor": INK, "axes.edgecolor": INK, "axes.spines.top": False, "axes.spines.right": False}
    )
    rows = [row for row in measured["rows"] if (row["dtype"], row["variant"]) == ("float32", "relu")]
    figure, panels = plt.subplots(1, len(LAYOUTS), figsize=(10, 4.2), sharex=True, sharey=True, layout="constrained")
    for panel, (layout, label) in zip(panels, LAYOUTS.items(), strict=True):
        inside = [row for row in rows if row["layout"] == layout]
        for peer, (_, colour, marker) in PEERS.items():
            points = [
                (row["x_bytes"] / 1e6, row["passes"]["both"]["over_floor"][peer])
                for row in inside
                if peer in row["passes"]["both"]["over_floor"]
            ]
            panel.scatter(
                *zip(*points, strict=True) if points else ((), ()), s=22, color=colour, marker=marker, alpha=0.8
            )
        panel.axhline(1, color=INK, linewidth=1, linestyle=(0, (3, 3)))
        for edge in (1, 32):
            panel.axvline(edge, color=INK, linewidth=0.6, alpha=0.5)
        panel.set(title=label, xlabel="size of x in MB", xscale="log", yscale="log")
        panel.xaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.grid(color=INK, alpha=0.2)
    panels[0].set_ylabel("time over that of a copy of the bytes\nthat must move (forward + backward)")
    marks = [mpl.lines.Line2D([], [], color=c, marker=m, linestyle="", alpha=0.8) for _, c, m in PEERS.values()]
    names = [name for name, _, _ in PEERS.values()]
    figure.legend(marks, names, frameon=False, labelcolor=INK, loc="outside lower center", ncols=len(names))
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    figure.savefig(aside, format="svg", transparent=True, metadata={"Date": None})
    aside.replace(path)
    plt.close(figure)
