"""How sensitive: accuracy against the learning rate, and against the batch size."""

from steadynorm.report.charts.base import (
    Chart,
    Spec,
    Switch,
    arm_names,
    arm_style,
    axis,
    error_bars,
    figure,
    log_axis,
    target_line,
)
from steadynorm.report.schema import Results
from steadynorm.report.wording import arm_labels, percent, rate_range

__all__ = ["batch_size_chart", "sensitivity_chart"]

_DASHES = {"corrected": "solid", "critical": "dash", "default": "dot"}


def sensitivity_chart(results: Results) -> Chart | None:
    """Validation accuracy against the learning rate, a line per arm and initialisation; a cross where runs diverged."""
    rows = [row for row in results["tuning"] if row["lr"] > 0]
    if not rows:
        return None
    inits = sorted({row["init"] for row in rows})
    traces: list[Spec] = []
    for arm, label in arm_names(results).items():
        colour, symbol = arm_style(results, arm)
        for init in inits:
            line = sorted((r for r in rows if r["arm"] == arm and r["init"] == init), key=lambda r: r["lr"])
            if not line:
                continue
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": f"{label}, {init}",
                    "meta": init,
                    "legendgroup": arm,
                    "x": [row["lr"] for row in line],
                    "y": [row["accuracy"] for row in line],
                    "line": {"color": colour, "width": 2, "dash": _DASHES.get(init, "dashdot")},
                    "marker": {
                        "color": colour,
                        "size": [11 if row["diverged"] else 7 for row in line],
                        "symbol": ["x-thin-open" if row["diverged"] else symbol for row in line],
                        # Plotly outlines markers of several sizes in white, and draws a thin cross by its outline.
                        "line": {"color": colour, "width": [1.5 if row["diverged"] else 0 for row in line]},
                    },
                    "customdata": [f"{row['diverged']} of {len(row['accuracies'])} diverged" for row in line],
                    "hovertemplate": "rate %{x:.2g}: %{y:.1%}, %{customdata}",
                }
            )
    switches = (Switch("Initialisation", (("all", "*"), *((init, init) for init in inits))),) if len(inits) > 1 else ()
    target = results["target"]
    labels = arm_labels(results)
    ranges = "; ".join(f"{labels[row['arm']]}: {rate_range(row['lr_range'])}" for row in results["summaries"])
    return Chart(
        "learning-rates",
        figure(
            traces,
            log_axis("Learning rate", [row["lr"] for row in rows]),
            axis("Validation accuracy", tickformat=".0%", rangemode="tozero"),
            height=420,
            **(target_line(target, f"target {percent(target)}") if target is not None else {}),
        ),
        f"Line chart of validation accuracy against the learning rate. Rates that train: {ranges}.",
        switches=switches,
    )


def batch_size_chart(results: Results) -> Chart | None:
    """Final validation accuracy against the batch size, with 95 % intervals."""
    known = results["batch_sizes"]
    if not known:
        return None
    traces: list[Spec] = []
    for arm, label in arm_names(results).items():
        rows = sorted((r for r in known if r["arm"] == arm), key=lambda r: r["batch_size"])
        if not rows:
            continue
        colour, symbol = arm_style(results, arm)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": label,
                "legendgroup": arm,
                "x": [row["batch_size"] for row in rows],
                "y": [row["final_accuracy"] for row in rows],
                "error_y": error_bars([r["final_accuracy"] for r in rows], [r["interval"] for r in rows], colour),
                "line": {"color": colour, "width": 2},
                "marker": {"color": colour, "symbol": symbol, "size": 8},
                "hovertemplate": "batches of %{x}: %{y:.1%}",
            }
        )
    sizes = sorted({row["batch_size"] for row in known})
    x = log_axis("Batch size", sizes) | {"tickvals": sizes, "ticktext": [str(size) for size in sizes]}
    return Chart(
        "batch-sizes",
        figure(traces, x, axis("Validation accuracy", tickformat=".0%")),
        "Line chart of validation accuracy against the batch size, one line per arm.",
    )
