"""How fast: accuracy against steps, and the ratio of steps at one target and at many."""

from collections.abc import Sequence

from steadynorm.report.charts.base import (
    Chart,
    Spec,
    Switch,
    arm_names,
    arm_style,
    axis,
    band,
    error_bars,
    figure,
    log_axis,
    row_axis,
    target_line,
)
from steadynorm.report.curves import curve_groups
from steadynorm.report.schema import INITS, Curve, Ratio, Results
from steadynorm.report.wording import arm_labels, count, percent, ratio_figure

__all__ = ["accuracy_chart", "ratio_chart", "ratio_curve_chart"]

_INITS = ("tuned", *INITS)
_BOUNDS = {"at least": "triangle-up-open", "at most": "triangle-down-open"}


def accuracy_chart(results: Results) -> Chart | None:
    """Validation accuracy against steps, one line per arm with the band of its seeds, and the target."""
    groups = curve_groups(results)
    if not groups:
        return None
    traces = [trace for name, curves in groups.items() for c in curves for trace in _curve_traces(results, c, name)]
    if "speed" in groups:
        traces += _arrivals(results)
    steps = [step for curves in groups.values() for curve in curves for step in curve["steps"] if step > 0]
    x = log_axis("Training steps", steps)
    linear: Spec = {"xaxis.type": "linear", "xaxis.range": [0, max(steps)], "xaxis.tickmode": "auto"}
    logarithmic: Spec = {"xaxis.type": "log", "xaxis.range": x["range"], "xaxis.tickmode": "array"}
    switches = [Switch("Steps", (("logarithmic", logarithmic), ("linear", linear)))]
    if len(groups) > 1:
        switches.insert(0, Switch("Settings tuned for", tuple((name, name) for name in groups)))
    target = results["target"]
    layout = target_line(target, f"target {percent(target)}") if target is not None else {}
    labels = arm_labels(results)
    arrived = "; ".join(
        f"{labels[row['arm']]}: {count(row['steps_to_target'])} steps to the target" for row in results["summaries"]
    )
    return Chart(
        "accuracy",
        figure(traces, x, axis("Validation accuracy", tickformat=".0%", rangemode="tozero"), height=420,
               hovermode="closest", **layout),
        f"Line chart of validation accuracy against training steps, one line per arm. {arrived}.",
        switches=tuple(switches),
    )  # fmt: skip


def _curve_traces(results: Results, curve: Curve, group: str) -> list[Spec]:
    colour, _ = arm_style(results, curve["arm"])
    keep = [i for i, step in enumerate(curve["steps"]) if step > 0]
    steps, low, middle, high = ([curve[name][i] for i in keep] for name in ("steps", "p10", "p50", "p90"))
    shared: Spec = {"legendgroup": curve["arm"], "meta": group}
    return [
        band(steps, low, high, colour, **shared),
        {
            "type": "scatter",
            "mode": "lines",
            "name": arm_names(results)[curve["arm"]],
            "x": steps,
            "y": middle,
            "line": {"color": colour, "width": 2.25},
            "hovertemplate": "%{y:.1%} after %{x:,} steps",
            **shared,
        },
    ]


def _arrivals(results: Results) -> list[Spec]:
    """A marker on the target line where each arm's median run arrives."""
    traces: list[Spec] = []
    for row in results["summaries"]:
        if row["steps_to_target"] is None or results["target"] is None:
            continue
        colour, symbol = arm_style(results, row["arm"])
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [row["steps_to_target"]],
                "y": [results["target"]],
                "marker": {"color": colour, "symbol": symbol, "size": 10, "line": {"color": "--paper", "width": 2}},
                "hovertemplate": "target reached after %{x:,.0f} steps",
                "name": arm_names(results)[row["arm"]],
                "legendgroup": row["arm"],
                "meta": "speed",
            }
        )
    return traces


def _extent(rows: Sequence[Ratio]) -> list[float]:
    """Every positive end and ratio of these rows, and 1, for the range of an axis."""
    ends = [value for row in rows for value in (row["ratio"], *row["interval"])]
    return [1.0, *(value for value in ends if value is not None and value > 0)]


def ratio_chart(results: Results) -> Chart | None:
    """The ratio of steps for the tuned and for each initialisation, side by side."""
    known = [row for row in results["ratios"] if row["ratio"]]
    if not known:
        return None
    traces: list[Spec] = []
    arms = [arm for arm in arm_names(results) if any(row["arm"] == arm for row in known)]
    for i, arm in enumerate(arms):
        rows = [row for row in known if row["arm"] == arm]
        shift = 0.28 * (i - (len(arms) - 1) / 2)
        colour, symbol = arm_style(results, arm)
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": arm_names(results)[arm],
                "legendgroup": arm,
                "x": [row["ratio"] for row in rows],
                "y": [_INITS.index(row["init"]) + shift for row in rows],
                "error_x": error_bars([row["ratio"] or 0.0 for row in rows], [row["interval"] for row in rows], colour),
                "marker": {"color": colour, "symbol": symbol, "size": 11},
                "customdata": [ratio_figure(row) for row in rows],
                "hovertemplate": "%{customdata}",
            }
        )
    spec = figure(
        traces,
        log_axis("Times fewer steps", _extent(known), suffix="×"),
        row_axis(range(len(_INITS)), [f"{init}<br>initialisation" for init in _INITS]),
    )
    spec["layout"]["shapes"] = [_one_line("x")]
    said = "; ".join(f"{arm_labels(results)[r['arm']]}, {r['init']}: {ratio_figure(r)}" for r in known)
    return Chart("ratios", spec, f"Ratios of steps with their 95 % intervals. {said}.")


def _one_line(direction: str) -> Spec:
    """A line at ratio 1: no difference."""
    across = "y" if direction == "x" else "x"
    return {
        "type": "line",
        f"{across}ref": "paper",
        f"{across}0": 0,
        f"{across}1": 1,
        f"{direction}0": 1,
        f"{direction}1": 1,
        "line": {"color": "--muted", "width": 1, "dash": "dash"},
    }


def ratio_curve_chart(results: Results) -> Chart | None:
    """The ratio of steps over the whole curve of targets; a mere bound as an open triangle."""
    known = [row for row in results["ratio_curve"] if row["ratio"]]
    if not known:
        return None
    traces: list[Spec] = []
    for arm, label in arm_names(results).items():
        rows = sorted((r for r in known if r["arm"] == arm), key=lambda r: r["target"])
        if not rows:
            continue
        colour, symbol = arm_style(results, arm)
        closed = [(r["target"], *r["interval"]) for r in rows if None not in r["interval"]]
        x, low, high = (list(column) for column in zip(*closed, strict=True)) if closed else ([], [], [])
        traces += [
            band(x, low, high, colour, legendgroup=arm),
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": label,
                "legendgroup": arm,
                "x": [row["target"] for row in rows],
                "y": [row["ratio"] for row in rows],
                "line": {"color": colour, "width": 2.25},
                "marker": {
                    "size": 8,
                    "color": colour,
                    "symbol": [_BOUNDS.get(row["method"], symbol) for row in rows],
                },
                "customdata": [ratio_figure(row) for row in rows],
                "hovertemplate": "target %{x:.1%}: %{customdata}",
            },
        ]
    spec = figure(
        traces,
        axis("Target accuracy", tickformat=".0%"),
        log_axis("Times fewer steps", _extent(known), suffix="×"),
    )
    spec["layout"]["shapes"] = [_one_line("y")]
    return Chart("ratio-curve", spec, "Line chart of the ratio of steps against the target accuracy, one line per arm.")
