"""What happens inside: gradient norms layer by layer, and the drift of a layer's inputs over training."""

from html import escape

from steadynorm.report.charts.base import Chart, Spec, arm_names, arm_style, axis, band, figure, log_axis
from steadynorm.report.schema import Results
from steadynorm.report.wording import arm_labels, count, number

__all__ = ["drift_charts", "gradient_charts"]


def gradient_charts(results: Results) -> list[Chart]:
    """One panel per phase of training, all on the same scale: gradient norm against the layer."""
    rows = results["gradients"]
    norms = [norm for row in rows for norm in row["norms"] if norm > 0]
    if not norms:
        return []
    deepest = max(len(row["norms"]) for row in rows)
    labels, names = arm_labels(results), arm_names(results)
    charts: list[Chart] = []
    for phase in ("start", "middle", "end"):
        panel = [row for row in rows if row["phase"] == phase]
        if not panel:
            continue
        traces: list[Spec] = []
        for row in panel:
            colour, symbol = arm_style(results, row["arm"])
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": names[row["arm"]],
                    "legendgroup": row["arm"],
                    "x": list(range(1, len(row["norms"]) + 1)),
                    "y": [norm if norm > 0 else None for norm in row["norms"]],
                    "text": [escape(layer, quote=False) for layer in row["layers"]],
                    "line": {"color": colour, "width": 2},
                    "marker": {"color": colour, "symbol": symbol, "size": 6},
                    "hovertemplate": "%{text}: %{y:.2e}",
                }
            )
        said = "; ".join(
            f"{labels[row['arm']]}: {row['verdict']}, {number(row['spread_decades'], 2)} decades" for row in panel
        )
        spec = figure(
            traces,
            axis("Layer, input to output", tick0=1, dtick=max(1, round(deepest / 5))),
            log_axis("", norms),
            height=300,
        )
        title = f"{phase.capitalize()} (step {count(panel[0]['step'])})"
        charts.append(
            Chart(f"gradients-{phase}", spec, f"Gradient norm per layer, {phase} of training. {said}.", title)
        )
    return charts


def drift_charts(results: Results) -> list[Chart]:
    """One panel per arm, all on the same scale: the 15th, 50th and 85th percentile of a layer's inputs over steps."""
    rows = [row for row in results["drift"] if row["steps"]]
    if not rows:
        return []
    low, high = min(min(row["p15"]) for row in rows), max(max(row["p85"]) for row in rows)
    pad = 0.05 * (high - low or 1.0)
    labels = arm_labels(results)
    charts: list[Chart] = []
    for row in rows:
        colour, _ = arm_style(results, row["arm"])
        traces: list[Spec] = [
            band(row["steps"], row["p15"], row["p85"], colour),
            {
                "type": "scatter",
                "mode": "lines",
                "name": "median",
                "x": row["steps"],
                "y": row["p50"],
                "line": {"color": colour, "width": 2},
                "customdata": [list(pair) for pair in zip(row["p15"], row["p85"], strict=True)],
                "hovertemplate": "step %{x:,}: %{y:.2f} (%{customdata[0]:.2f} to %{customdata[1]:.2f})",
            },
        ]
        spec = figure(
            traces,
            axis("Training steps", nticks=4, tickformat=","),
            axis("", range=[low - pad, high + pad]),
            height=280,
        )
        charts.append(
            Chart(
                f"drift-{len(charts)}",
                spec,
                f"{labels[row['arm']]}: 15th, 50th and 85th percentile of the inputs over training; "
                f"drift of the median {number(row['drift'], 2)}.",
                labels[row["arm"]],
            )
        )
    return charts
