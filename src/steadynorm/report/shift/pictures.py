"""The pictures of a shift report: both distributions of a feature, and its effect's interval against the tolerance."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from steadynorm.report.wording import number, percent

__all__ = ["distribution_svg", "effect_svg"]

_WIDTH, _HEIGHT = 240.0, 64.0
_ROW = 18.0


def distribution_svg(picture: Mapping[str, Any], name: str) -> str:
    """Both sides' distribution of one feature: two outlines over an axis, or a pair of bars for each category.

    Args:
        picture: `edges` or `categories`, and the shares of `reference` and `current` in each; may be empty.
        name: the feature, for who cannot see the picture.

    Returns:
        An `<svg>` element coloured by the classes `reference` and `current`; "" without a picture.
    """
    if "edges" in picture:
        return _outlines(picture, name)
    if "categories" in picture:
        return _bars(picture, name)
    return ""


def _outlines(picture: Mapping[str, Any], name: str) -> str:
    edges: Sequence[float] = picture["edges"]
    top = max(*picture["reference"], *picture["current"]) or 1.0
    step = _WIDTH / (len(edges) - 1)
    parts: list[str] = []
    for side in ("reference", "current"):
        points = [f"M0 {_HEIGHT:g}"]
        for i, share in enumerate(picture[side]):
            y = _HEIGHT - share / top * (_HEIGHT - 4)
            points.append(f"L{i * step:.1f} {y:.1f} L{(i + 1) * step:.1f} {y:.1f}")
        parts.append(f'<path class="{side}" d="{" ".join(points)} L{_WIDTH:g} {_HEIGHT:g} Z"/>')
    low, high = number(edges[0]), number(edges[-1])
    parts.append(f'<line class="axis" x1="0" x2="{_WIDTH:g}" y1="{_HEIGHT:g}" y2="{_HEIGHT:g}"/>')
    parts.append(f'<text x="0" y="{_HEIGHT + 13:g}">{low}</text>')
    parts.append(f'<text x="{_WIDTH:g}" y="{_HEIGHT + 13:g}" text-anchor="end">{high}</text>')
    label = f"{name}: distribution of the reference and of the current data, from {low} to {high}"
    return _svg("distribution", _HEIGHT + 18, label, parts)


def _bars(picture: Mapping[str, Any], name: str) -> str:
    top = max(*picture["reference"], *picture["current"]) or 1.0
    parts: list[str] = []
    room = _WIDTH * 0.55
    for i, category in enumerate(picture["categories"]):
        y = i * _ROW
        shown = category if len(category) <= 16 else category[:15] + "…"
        parts.append(f'<text x="0" y="{y + 12:g}">{escape(shown)}<title>{escape(category)}</title></text>')
        for j, side in enumerate(("reference", "current")):
            share = picture[side][i]
            parts.append(
                f'<rect class="{side}" x="{_WIDTH - room:g}" y="{y + 2 + 7 * j:g}" width="{share / top * room:.1f}" '
                f'height="6"><title>{escape(f"{category}: {percent(share)}")}</title></rect>'
            )
    return _svg("distribution", len(picture["categories"]) * _ROW + 2, f"{name}: shares of its categories", parts)


def effect_svg(effects: Sequence[Mapping[str, Any]], tolerance: float, widest: float) -> str:
    """The interval of each effect's size against the tolerance, one above the other.

    Args:
        effects: `kind`, `estimate`, `low` and `high` of each.
        tolerance: what does not matter is shaded from 0 to it.
        widest: the size at the right edge; intervals that go on beyond have an arrow.

    Returns:
        An `<svg>` element.
    """
    left, room = 86.0, _WIDTH - 86.0 - 8

    def x(value: float) -> float:
        return round(left + min(value / widest, 1.0) * room, 1)

    height = len(effects) * _ROW
    parts = [f'<rect class="zone" x="{left:g}" y="0" width="{x(tolerance) - left:.1f}" height="{height:g}"/>']
    for i, effect in enumerate(effects):
        y = i * _ROW + _ROW / 2
        low, high, middle = effect["low"], effect["high"], abs(effect["estimate"])
        words = f"{effect['kind']}: {middle:.2f} ({low:.2f} to {high:.2f})"
        arrow = f'<path class="range" d="M{_WIDTH - 8:g} {y - 4:g} l5 4 l-5 4"/>' if high > widest else ""
        point = f'<circle class="point" cx="{x(middle)}" cy="{y:g}" r="4"/>' if middle <= widest else ""
        parts.append(
            f'<g><title>{escape(words)}</title><text x="0" y="{y + 4:g}">{escape(effect["kind"])}</text>'
            f'<line class="range" x1="{x(low)}" x2="{x(high)}" y1="{y:g}" y2="{y:g}"/>{arrow}{point}</g>'
        )
    spoken = "; ".join(f"{e['kind']} {e['low']:.2f} to {e['high']:.2f}" for e in effects)
    parts.append(f'<text x="{x(tolerance)}" y="{height + 12:g}" text-anchor="middle">{number(tolerance)}</text>')
    return _svg("interval", height + 16, f"sizes in reference deviations: {spoken}", parts)


def _svg(kind: str, height: float, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg class="{kind}" viewBox="0 0 {_WIDTH:g} {height:g}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )
