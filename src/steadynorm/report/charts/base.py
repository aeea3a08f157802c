"""What every chart shares: its frame, its axes, and the look of an arm."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, TypeAlias

from steadynorm.report.schema import Interval, Results
from steadynorm.report.wording import arm_labels

__all__ = [
    "Chart",
    "Spec",
    "Switch",
    "arm_names",
    "arm_style",
    "axis",
    "band",
    "error_bars",
    "figure",
    "folded",
    "log_axis",
    "row_axis",
    "target_line",
]

Spec: TypeAlias = dict[str, Any]
"""A trace, an axis or a layout, as Plotly takes them."""

_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")
_COLOURS = 6  # that the style sheet defines: --arm-0 to --arm-5


@dataclass(frozen=True)
class Switch:
    """A row of buttons above a chart, of which one is on.

    `options` are label and value: the traces of group `value` are shown (those without a group always are), or, where
    the value is a dictionary, the layout is changed by it. The first option is how the chart starts.
    """

    label: str
    options: tuple[tuple[str, str | Spec], ...]


@dataclass(frozen=True)
class Chart:
    """A Plotly figure with the words that stand for it where it cannot be seen.

    A trace's `legendgroup` is the id of its arm, by which the page's legend shows and hides it; its `meta` is the group
    that a switch shows.
    """

    id: str
    spec: Spec
    description: str
    title: str = ""
    switches: tuple[Switch, ...] = ()


def arm_style(results: Results, arm: str) -> tuple[str, str]:
    """The colour variable and the marker symbol of an arm, by its place in the experiment."""
    ids = [info["id"] for info in results["arms"]]
    place = ids.index(arm) if arm in ids else len(ids)
    return f"--arm-{place % _COLOURS}", _SYMBOLS[place % len(_SYMBOLS)]


def arm_names(results: Results) -> dict[str, str]:
    """Arm ids and labels, escaped: Plotly reads tags such as <b> and <a> in every text it draws."""
    return {arm: escape(label, quote=False) for arm, label in arm_labels(results).items()}


def folded(text: str, width: int = 20) -> str:
    """Escaped text broken into short lines, so that it fits beside a chart on a phone."""
    return "<br>".join(escape(line, quote=False) for line in textwrap.wrap(text, width))


def figure(traces: Sequence[Spec], x: Spec, y: Spec, *, height: int = 360, **layout: Any) -> Spec:
    """A figure in the page's look; `layout` is added to the layout."""
    return {
        "data": list(traces),
        "layout": {
            "xaxis": x,
            "yaxis": y,
            "height": height,
            "showlegend": False,  # the page has its own, which wraps on a phone
            "margin": {"l": 8, "r": 12, "t": 8, "b": 8, "pad": 4},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"color": "--muted", "size": 13},
            "hoverlabel": {
                "bgcolor": "--paper",
                "bordercolor": "--rule",
                "font": {"color": "--text"},
                "namelength": -1,
            },
            **layout,
        },
    }


def axis(title: str, **changes: Any) -> Spec:
    """A linear axis."""
    return {
        "title": {"text": title, "standoff": 10, "font": {"size": 13}},
        "automargin": True,
        "gridcolor": "--grid",
        "linecolor": "--rule",
        "zeroline": False,
        "ticks": "",
        **changes,
    }


def log_axis(title: str, values: Sequence[float], suffix: str = "", **changes: Any) -> Spec:
    """A logarithmic axis over positive `values`, ticked at 1, 2, 5 or at powers of ten as the range allows."""
    low, high = math.log10(min(values)), math.log10(max(values))
    pad = 0.04 * max(high - low, 0.3)
    ticks = _log_ticks(low - pad, high + pad)
    return axis(
        title,
        type="log",
        range=[low - pad, high + pad],
        tickmode="array",
        tickvals=ticks,
        ticktext=[_tick_text(t) + suffix for t in ticks],
        **changes,
    )


def row_axis(places: Sequence[float], texts: Sequence[str]) -> Spec:
    """A vertical axis of named rows at given places, the first at the top."""
    return axis(
        "",
        tickmode="array",
        tickvals=list(places),
        ticktext=list(texts),
        range=[max(places) + 0.6, min(places) - 0.6],
        tickfont={"size": 12},
        showgrid=False,
    )


def _log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    decades = range(math.floor(low), math.ceil(high) + 1)
    for steps in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [float(f"{s}e{d}") for d in decades for s in steps if low <= math.log10(s) + d <= high]
        if len(ticks) <= most:
            return ticks
    powers = [10.0**d for d in decades if low <= d <= high]
    return powers[:: math.ceil(len(powers) / most)]


def _tick_text(value: float) -> str:
    power = math.log10(value)
    if -4 < power < 5:
        return f"{value:,.10f}".rstrip("0").rstrip(".")
    mantissa = value / 10 ** math.floor(power)
    return ("" if mantissa == 1 else f"{mantissa:g}×") + f"10<sup>{math.floor(power)}</sup>".replace("-", "−")


def band(x: Sequence[float], low: Sequence[float], high: Sequence[float], colour: str, **changes: Any) -> Spec:
    """A filled band between two lines, as one closed outline."""
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [*x, *reversed(x)],
        "y": [*low, *reversed(high)],
        "fill": "toself",
        "fillcolor": f"{colour}@0.14",
        "line": {"width": 0},
        "hoverinfo": "skip",
        **changes,
    }


def error_bars(values: Sequence[float], intervals: Sequence[Interval], colour: str) -> Spec:
    """Error bars that reach to the ends of intervals; an open end is left without a bar."""
    ends = [(value, *interval) for value, interval in zip(values, intervals, strict=True)]
    return {
        "type": "data",
        "symmetric": False,
        "array": [0 if high is None else max(0.0, high - value) for value, _, high in ends],
        "arrayminus": [0 if low is None else max(0.0, value - low) for value, low, _ in ends],
        "color": colour,
        "thickness": 1.75,
        "width": 4,
    }


def target_line(target: float, text: str) -> Spec:
    """Layout: a dashed horizontal line at a height, named at its right end."""
    return {
        "shapes": [
            {
                "type": "line",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "y0": target,
                "y1": target,
                "line": {"color": "--muted", "width": 1, "dash": "dash"},
            }
        ],
        "annotations": [
            {
                "xref": "paper",
                "x": 0,
                "xanchor": "left",
                "y": target,
                "yanchor": "bottom",
                "text": text,
                "showarrow": False,
                "font": {"color": "--muted", "size": 12},
            }
        ],
    }
