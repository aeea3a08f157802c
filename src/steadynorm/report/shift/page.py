"""A shift report as one HTML page, and as a fragment for notebooks: no script, no network, every value escaped."""

import os
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from markupsafe import Markup

from steadynorm.report.html import environment, write_page
from steadynorm.report.shift.pictures import distribution_svg, effect_svg
from steadynorm.report.shift.text import SIGNS, headline, leading, schema_lines
from steadynorm.report.wording import count, number, percent

__all__ = ["shift_fragment", "write_shift_html"]

_DRAWN = 200  # features with pictures; the others are in the table alone
_ORDER = ("shifted", "cannot tell", "benign", "no shift", "not compared")


def write_shift_html(report: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Writes a shift report as one HTML file.

    Args:
        report: the data of `ShiftReport.to_dict`.
        path: where to write; folders are made as needed.

    Returns:
        The path written.
    """
    widest = _widest(report)
    features = report["features"]
    page = (
        environment()
        .get_template("shift.html.j2")
        .render(
            report=report,
            headline=headline(report),
            schema=schema_lines(report),
            tally=[(verdict, sum(f["verdict"] == verdict for f in features)) for verdict in _ORDER],
            signs=SIGNS,
            features=[(f, _pictures(f, report, widest), _facts(f)) for f in features[:_DRAWN]],
            rows=[_row(f) for f in features],
            drawn=_DRAWN,
        )
    )
    return write_page(page, path)


def shift_fragment(report: Mapping[str, Any]) -> str:
    """A fragment of HTML for a notebook's output: the verdict and a table, with no style sheet or script."""
    cell = 'style="text-align:left;padding:0.1em 0.9em 0.1em 0"'
    rows = "".join(
        f"<tr><td {cell}>{escape(f['name'])}</td><td {cell}>{SIGNS[f['verdict']]} {escape(f['verdict'])}</td>"
        f"<td {cell}>{escape(f['reason'])}</td></tr>"
        for f in report["features"][:20]
    )
    more = len(report["features"]) - 20
    return (
        f'<div style="max-width:60em"><p><strong>{escape(headline(report))}</strong></p>'
        + "".join(f"<p>{escape(line)}</p>" for line in schema_lines(report))
        + f"<table><tr><th {cell}>Feature</th><th {cell}>Verdict</th><th {cell}>Why</th></tr>{rows}</table>"
        + (f"<p>and {more} more features.</p>" if more > 0 else "")
        + f"<p>{escape(report['caveat'])}</p></div>"
    )


def _widest(report: Mapping[str, Any]) -> float:
    """Where the pictures of effects end: beyond the tolerance, and at most a few deviations."""
    largest = max((e["high"] for f in report["features"] for e in f["effects"]), default=0.0)
    return min(max(largest, 3 * report["settings"]["tolerance"]), 2.0)


def _pictures(feature: Mapping[str, Any], report: Mapping[str, Any], widest: float) -> tuple[Markup, Markup]:
    effects = effect_svg(feature["effects"], report["settings"]["tolerance"], widest) if feature["effects"] else ""
    return Markup(distribution_svg(feature["picture"], feature["name"])), Markup(effects)


def _facts(feature: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What was counted on either side: name, reference, current."""
    before, after = (feature["facts"][side] for side in ("reference", "current"))
    rows = [("rows", count(before["rows"]), count(after["rows"])), ("missing", _share(before), _share(after))]
    rows += [
        ({"std": "deviation"}.get(key, key), number(before[key]), number(after[key]))
        for key in ("mean", "std", "minimum", "maximum", "infinite", "distinct")
        if key in before and (before[key] or after[key])
    ]
    return rows


def _share(facts: Mapping[str, Any]) -> str:
    return percent(facts["missing"] / facts["rows"]) if facts["rows"] else "–"


def _row(feature: Mapping[str, Any]) -> tuple[str, ...]:
    effect, distances = leading(feature), feature["distances"]
    shown = "–" if effect is None else f"{number(effect['estimate'], 2)} ({effect['low']:.2f} to {effect['high']:.2f})"
    if distances is None:
        return feature["name"], feature["verdict"], shown, "–", "–", "–", "–"
    return (
        feature["name"],
        feature["verdict"],
        shown,
        f"{number(distances['psi'], 2)} ({number(distances['psi_bias'], 2)})",
        f"{number(distances['js'], 2)} ({number(distances['js_bias'], 2)})",
        "–"
        if distances["wasserstein"] is None
        else f"{number(distances['wasserstein'], 2)} ({number(distances['wasserstein_bias'], 2)})",
        number(feature["q"], 2),
    )
