"""Small pictures drawn without a library: an interval against what matters, and a line chart for notebooks."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from steadynorm.report.schema import Claim
from steadynorm.report.wording import claim_figure, number

__all__ = ["Line", "interval_svg", "line_chart_svg"]

_WIDTH, _PAD = 300.0, 14.0
_NARROW = 48.0  # pixels that two numbers side by side need
_NOTHING_LOST = "standardisation"


def interval_svg(claim: Claim) -> str:
    """Draw a claim's estimate and interval against the zone of effects too small to matter.

    The zone reaches from minus to plus the smallest effect that matters; a ratio ("times") is drawn on a logarithmic
    scale around 1, with the zone from one over the smallest effect to the smallest effect. The claim "standardisation"
    says that nothing is lost, so it has a margin at minus the effect instead of a zone. An open end has an arrow.

    Args:
        claim: one claim of the results.

    Returns:
        An `<svg>` element, coloured by the classes `zone`, `margin`, `null`, `range` and `point`;
        "" without an estimate.
    """
    estimate = claim["estimate"]
    ratio = claim["unit"] == "times"
    if estimate is None or (ratio and estimate <= 0):
        return ""
    measure: Callable[[float], float] = math.log if ratio else float
    effect = abs(claim["smallest_effect"])
    zone = measure(effect if effect >= 1 else 1 + effect) if ratio else effect
    low, high = ((None if end is None else measure(end)) for end in (claim["interval"] or [None, None]))
    middle = measure(estimate)
    known = [value for value in (low, high, middle, -1.6 * zone, 1.6 * zone) if value is not None]
    left, right = min(known), max(known)
    scale = (_WIDTH - 2 * _PAD) / ((right - left) or 1.0)

    def x(value: float) -> float:
        return round(_PAD + (value - left) * scale, 1)

    start = x(low) if low is not None else 2.0
    end = x(high) if high is not None else _WIDTH - 2
    arrows = ("" if low is not None else f'<path class="range" d="M{start + 5} 13 L{start} 18 L{start + 5} 23"/>') + (
        "" if high is not None else f'<path class="range" d="M{end - 5} 13 L{end} 18 L{end - 5} 23"/>'
    )
    suffix, value_at = ("×", math.exp) if ratio else ("", float)
    if claim["id"] == _NOTHING_LOST:
        edges, meaning = [-zone], f"the interval has to lie above {number(-zone)}"
        ground = f'<line class="margin" x1="{x(-zone)}" x2="{x(-zone)}" y1="2" y2="34"/>'
    else:
        edges = [-zone, zone]
        meaning = f"effects from {number(value_at(-zone))} to {number(value_at(zone))} are too small to matter"
        ground = f'<rect class="zone" x="{x(-zone)}" y="2" width="{round(x(zone) - x(-zone), 1)}" height="32"/>'
    # Two numbers that would run into each other become one, under the line of no effect.
    names = {edge: f"{number(value_at(edge))}{suffix}" for edge in edges}
    if len(edges) == 2 and x(zone) - x(-zone) < _NARROW:
        names = {0.0: f"{names[-zone]} to {names[zone]}" if ratio else f"±{names[zone]}"}
    marks = "".join(f'<text x="{x(edge)}" y="48" text-anchor="middle">{name}</text>' for edge, name in names.items())
    return (
        f'<svg class="interval" viewBox="0 0 {_WIDTH:g} 52" role="img" '
        f'aria-label="{escape(f"{claim_figure(claim)}; {meaning}")}">{ground}'
        f'<line class="null" x1="{x(0)}" x2="{x(0)}" y1="2" y2="34"/>'
        f'<line class="range" x1="{start}" x2="{end}" y1="18" y2="18"/>{arrows}'
        f'<circle class="point" cx="{x(middle)}" cy="18" r="5.5"/>{marks}</svg>'
    )


@dataclass(frozen=True)
class Line:
    """A named line of a chart, in a CSS colour."""

    name: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]


def line_chart_svg(lines: Sequence[Line], *, x_title: str, y_title: str, level: float | None = None) -> str:
    """Draw lines over a logarithmic x axis and a linear y axis of fractions, shown in per cent.

    Args:
        lines: at least one, each with at least one positive x.
        x_title: what x is, written under the axis.
        y_title: what y is, written above the axis.
        level: a height to mark by a dashed line.

    Returns:
        An `<svg>` element that uses the text colour of its surroundings, so it suits light and dark notebooks.
    """
    points = [[(math.log10(x), y) for x, y in zip(line.x, line.y, strict=True) if x > 0] for line in lines]
    across = [x for line in points for x, _ in line]
    left, right = min(across), max(max(across), min(across) + 0.1)
    width, height, inset = 560.0, 250.0, (44.0, 24.0, 12.0, 40.0)  # left, top, right, bottom

    def place(x: float, y: float) -> str:
        px = inset[0] + (x - left) / (right - left) * (width - inset[0] - inset[2])
        return f"{px:.1f} {height - inset[3] - y * (height - inset[1] - inset[3]):.1f}"

    def text(x: float, y: float, words: str, anchor: str = "middle") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'

    parts: list[str] = []
    for y in (0.0, 0.25, 0.5, 0.75, 1.0):
        px, py = place(left, y).split()
        parts.append(f'<path d="M{place(left, y)} L{place(right, y)}" stroke="currentColor" stroke-opacity="0.15"/>')
        parts.append(text(float(px) - 6, float(py) + 4, f"{100 * y:.0f} %", "end"))
    for power in range(math.ceil(left), math.floor(right) + 1):
        px, py = place(power, 0).split()
        parts.append(text(float(px), float(py) + 16, number(10.0**power)))
    if level is not None:
        dashes = 'stroke="currentColor" stroke-opacity="0.6" stroke-dasharray="5 4"'
        parts.append(f'<path d="M{place(left, level)} L{place(right, level)}" {dashes}/>')
    for line, drawn in zip(lines, points, strict=True):
        path = " L".join(place(x, y) for x, y in drawn)
        parts.append(f'<path d="M{path}" fill="none" stroke="{escape(line.colour)}" stroke-width="2"/>')
    parts += [text(width / 2, height - 6, x_title), text(4, 12, y_title, "start")]
    names = ", ".join(line.name for line in lines)
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" width="100%" style="max-width:{width:g}px;font-size:12px" '
        f'fill="currentColor" role="img" aria-label="{escape(f"{y_title} against {x_title}: {names}")}">'
        f"{''.join(parts)}</svg>"
    )
