"""What else it changes: dropout, standardisation, and the time of a step."""

from steadynorm.report.charts.base import Chart, Spec, arm_names, arm_style, axis, error_bars, figure, folded, row_axis
from steadynorm.report.schema import Results
from steadynorm.report.wording import arm_labels, duration, number, percent

__all__ = ["regularization_chart", "standardization_chart", "timing_chart"]


def regularization_chart(results: Results) -> Chart | None:
    """Train and test accuracy, joined by their gap, for each arm and dropout."""
    known = results["regularization"]
    if not known:
        return None
    names = arm_names(results)
    traces: list[Spec] = []
    places: list[float] = []
    for i, row in enumerate(known):
        colour, symbol = arm_style(results, row["arm"])
        apart = i > 0 and row["arm"] != known[i - 1]["arm"]
        places.append(places[-1] + (1.6 if apart else 1) if places else 0.0)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": names[row["arm"]],
                "legendgroup": row["arm"],
                "x": [row["test_accuracy"], row["train_accuracy"]],
                "y": [places[-1]] * 2,
                "line": {"color": f"{colour}@0.45", "width": 5},
                "marker": {"color": colour, "symbol": [symbol, f"{symbol}-open"], "size": 10, "opacity": 1},
                "customdata": ["test", "train"],
                "hovertemplate": "%{customdata}: %{x:.1%}",
            }
        )
    texts = ["no dropout" if row["dropout"] == 0 else f"dropout {number(row['dropout'])}" for row in known]
    return Chart(
        "regularisation",
        figure(
            traces,
            axis("Accuracy", tickformat=".3~p", nticks=6),
            row_axis(places, texts),
            height=round(90 + 34 * (places[-1] + 1)),
        ),
        "Test accuracy (filled) joined to train accuracy (open) for each arm and dropout.",
    )


def standardization_chart(results: Results) -> Chart | None:
    """Test accuracy of each remedy on badly scaled features, with its interval."""
    rows = results["standardization"]
    if not rows:
        return None
    trace: Spec = {
        "type": "scatter",
        "mode": "markers",
        "x": [row["test_accuracy"] for row in rows],
        "y": list(range(len(rows))),
        "error_x": error_bars([r["test_accuracy"] for r in rows], [r["interval"] for r in rows], "--accent"),
        "marker": {"color": "--accent", "size": 10},
        "hovertemplate": "%{x:.1%}",
        "name": "",
    }
    texts = [f"{folded(row['condition'], 22)}<br>{row['init']} init." for row in rows]
    said = "; ".join(f"{row['condition']}: {percent(row['test_accuracy'])}" for row in rows)
    return Chart(
        "standardisation",
        figure(
            [trace],
            axis("Test accuracy", tickformat=".3~p", nticks=6),
            row_axis(range(len(rows)), texts),
            height=90 + 56 * len(rows),
        ),
        f"Test accuracy on badly scaled features. {said}.",
    )


def timing_chart(results: Results) -> Chart | None:
    """Time per training step, the median with the 20th and 80th percentile."""
    known = results["timing"]
    if not known:
        return None
    labels, names = arm_labels(results), arm_names(results)
    traces: list[Spec] = []
    for place, row in enumerate(known):
        colour, symbol = arm_style(results, row["arm"])
        middle, low, high = (1e3 * row[name] for name in ("seconds_per_step", "p20", "p80"))
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": names[row["arm"]],
                "x": [middle],
                "y": [place],
                "error_x": error_bars([middle], [[low, high]], colour),
                "marker": {"color": colour, "symbol": symbol, "size": 11},
                "hovertemplate": "%{x:.3g} ms",
            }
        )
    texts = [folded(labels[row["arm"]]) for row in known]
    said = "; ".join(f"{labels[row['arm']]}: {duration(row['seconds_per_step'])}" for row in known)
    return Chart(
        "timing",
        figure(
            traces,
            axis("Milliseconds per training step", rangemode="tozero"),
            row_axis(range(len(known)), texts),
            height=90 + 44 * len(known),
        ),
        f"Time per training step. {said}.",
    )
