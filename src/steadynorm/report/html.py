"""The page: one self-contained HTML file that draws its charts without any network."""

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from steadynorm.files.aside import write_aside
from steadynorm.report.charts import Chart
from steadynorm.report.charts.base import arm_style
from steadynorm.report.headline import headline
from steadynorm.report.schema import Choice, Claim, Results, Summary
from steadynorm.report.sections import sections
from steadynorm.report.serialize import check_schema
from steadynorm.report.svg import interval_svg
from steadynorm.report.tables import summaries
from steadynorm.report.wording import (
    accuracy_interval,
    arm_labels,
    bracketed,
    claim_figure,
    count,
    duration,
    interval,
    percent,
    rate,
    rate_range,
)

__all__ = ["environment", "render_html", "write_html", "write_page"]


_SIGNS = {"circle": "●", "square": "■", "diamond": "◆", "triangle-up": "▲", "cross": "✚", "star": "★"}


@dataclass(frozen=True)
class _Tile:
    """One arm in one glance."""

    label: str
    colour: str
    figure: str
    figure_label: str
    facts: tuple[tuple[str, str], ...]


def write_html(results: Results, path: str | os.PathLike[str]) -> Path:
    """Write the report as one HTML file with everything in it: text, tables, charts and the library that draws them.

    The page asks for nothing from any network, and its content security policy forbids it to. It follows the reader's
    light or dark theme, fits a phone, and every chart has a table behind it. The file is written beside its place and
    then renamed, so a reader never meets half a page.

    Args:
        results: what `sn.compare` measured, as plain data.
        path: where to write; folders are made as needed.

    Returns:
        The path written.

    Raises:
        DataError: the results are of another schema.
    """
    return write_page(render_html(results), path)


def write_page(page: str, path: str | os.PathLike[str]) -> Path:
    """Writes a page beside its place and renames it, so that a reader never meets half of one.

    Args:
        page: the whole HTML.
        path: where to write; folders are made as needed.

    Returns:
        The path written.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_aside({target: page.encode()})
    return target


def render_html(results: Results) -> str:
    """The page as text; see `write_html`.

    Raises:
        DataError: the results are of another schema.
    """
    check_schema(results)
    story = sections(results)
    charts = [chart for section in story for chart in section.charts]
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            results=results,
            headline=headline(results),
            tiles=[_tile(results, row) for row in results["summaries"]],
            summary=summaries(results),
            sections=[section for section in story if not section.missing],
            missing=[section.title for section in story if section.missing],
            claims=[(claim, _drawn(claim), claim_figure(claim)) for claim in results["claims"]],
            specs={chart.id: chart.spec for chart in charts},
            edges=[choice for choice in results["choices"] if choice["at_edge"]],
            labels=arm_labels(results),
            marks={arm: _mark(results, arm) for arm in arm_labels(results)},
            plotly=Markup(_plotly_js()) if charts else "",
        )
    )


@cache
def environment() -> Environment:
    """The templates of this package, with every value escaped unless it is marked as markup."""
    env = Environment(
        loader=PackageLoader("steadynorm.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    filters: dict[str, Any] = {
        "percent": percent,
        "rate": rate,
        "count": count,
        "switches": _switches,
        "spaced": _spaced,
    }
    env.filters.update(filters)
    return env


def _plotly_js() -> str:
    """The whole of plotly.js, 4.8 MB: Plotly's Python package ships no smaller bundle."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def _drawn(claim: Claim) -> Markup:
    return Markup(interval_svg(claim))


def _spaced(text: str) -> str:
    """Keep a figure and its per cent sign on one line."""
    return text.replace(" %", "\u00a0%")


def _mark(results: Results, arm: str) -> tuple[str, str]:
    """The colour and the sign that stand for an arm in a legend, as the charts draw it."""
    colour, symbol = arm_style(results, arm)
    return f"var({colour})", _SIGNS[symbol]


def _switches(chart: Chart) -> list[dict[str, Any]]:
    return [
        {"label": switch.label, "options": [{"label": label, "value": value} for label, value in switch.options]}
        for switch in chart.switches
    ]


def _setting(choice: Choice) -> str:
    return f"rate {rate(choice['lr'])}, {choice['init']} initialisation"


def _tile(results: Results, row: Summary) -> _Tile:
    reached = row["steps_to_target"] is not None
    facts = [
        ("reached by", f"{row['reached']} of {row['seeds']} seeds"),
        ("test accuracy", f"{percent(row['test_accuracy'])}{bracketed(accuracy_interval(row['test_interval']))}"),
        ("rates that train", rate_range(row["lr_range"])),
        ("time per step", duration(row["seconds_per_step"])),
        ("time to target", duration(row["seconds_to_target"])),
        ("setting", _setting(row["choice_speed"])),
    ]
    return _Tile(
        arm_labels(results)[row["arm"]],
        f"var({arm_style(results, row['arm'])[0]})",
        count(row["steps_to_target"]) if reached else "not reached",
        f"steps to {percent(results['target'])}{bracketed(interval(row['steps_interval'], decimals=0))}"
        if reached
        else f"target {percent(results['target'])}",
        tuple(fact for fact in facts if fact[1] != "–"),
    )
