"""Draws the picture of the worked example: docs/assets/worked-example.svg. Run from anywhere:

python benchmarks/pictures.py
"""

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

from steadynorm.walkthrough import explain

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "assets" / "worked-example.svg"
INK = "#808080"  # mid-tones, readable on white and on black
BEFORE, AFTER = "#e07a3f", "#2a9d8f"


def main() -> None:
    """The values on two rulers: the one they came with, and one with 0 at their mean and 1 a deviation above it."""
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "worked-example", "font.family": "sans-serif"})
    feature = explain([3, 5, 8, 9, 11, 24]).features[0]
    x = [float(v) for v in feature.values]
    mean, divisor = float(feature.mean), float(feature.divisor)
    figure, axes = plt.subplots(figsize=(8, 3.1), layout="constrained")
    axes.set_axis_off()
    axes.set(xlim=(-0.5, 26.5), ylim=(-1.0, 1.75))
    for height, colour, name, marks in (
        (1.0, BEFORE, "x", [(float(v), str(v)) for v in (0, 10, 15, 20, 25)]),
        (0.0, AFTER, "x̂", [(mean + k * divisor, str(k)) for k in (-1, 0, 1, 2)]),
    ):
        axes.axhline(height, color=INK, linewidth=1, zorder=1)
        axes.text(-0.4, height + 0.1, name, color=colour, fontsize=14)
        for place, mark in marks:
            axes.plot([place, place], [height, height - 0.1], color=INK, linewidth=1)
            axes.text(place, height - 0.15, mark, ha="center", va="top", color=INK, fontsize=8)
        axes.scatter(x, [height] * len(x), s=60, color=colour, zorder=3)
    for i, (value, normalised) in enumerate(zip(x, feature.x_hat, strict=True)):
        axes.plot([value, value], [0, 1], color=INK, linewidth=0.7, linestyle=(0, (3, 3)), zorder=2)
        axes.text(value, 1.14, f"{value:g}", ha="center", color=BEFORE)
        axes.text(value, -0.38 - 0.2 * (i % 2), normalised.text(2), ha="center", va="top", color=AFTER)
    spread = {"color": INK, "capsize": 3, "fmt": "|", "markersize": 9}
    axes.errorbar([mean], [1.45], xerr=[float(feature.deviation)], **spread)
    axes.text(mean, 1.55, "mean 10, deviation √46 ≈ 6.78", ha="center", color=INK)
    axes.text(mean, -0.8, "mean 0, deviation 1", ha="center", va="top", color=INK)
    figure.savefig(PICTURE, transparent=True, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
