"""What a comparison shows of itself in a notebook: the headline, one picture, and two tables, with no script at all."""

from markupsafe import Markup

from steadynorm.report.curves import chosen_curves
from steadynorm.report.headline import headline
from steadynorm.report.html import environment
from steadynorm.report.schema import Results
from steadynorm.report.serialize import check_schema
from steadynorm.report.svg import Line, line_chart_svg
from steadynorm.report.tables import Table, claims, summaries
from steadynorm.report.wording import arm_labels

__all__ = ["notebook_html"]

_COLOURS = ("#d1600f", "#1f7fc0", "#109a78", "#b7639a", "#a8831a", "#6c7886")
"""Seen on white and on black alike: a notebook's theme is its own, and no media query tells it."""


def notebook_html(results: Results) -> str:
    """A fragment of HTML for a notebook's output, light enough to keep in the file: no script, no style sheet.

    Args:
        results: what `sn.compare` measured, as plain data.

    Returns:
        The headline, accuracy against steps as an inline picture, the arms and the claims as tables.

    Raises:
        DataError: the results are of another schema.
    """
    check_schema(results)
    labels = arm_labels(results)
    colours = {arm: _COLOURS[i % len(_COLOURS)] for i, arm in enumerate(labels)}
    lines = [
        Line(labels[curve["arm"]], colours[curve["arm"]], curve["steps"], curve["p50"])
        for curve in chosen_curves(results, "speed") or chosen_curves(results, "accuracy")
    ]
    picture = (
        line_chart_svg(lines, x_title="training steps", y_title="validation accuracy", level=results["target"])
        if lines
        else ""
    )
    tables = [
        _columns(summaries(results), "Arm", "Steps to target", "95 % interval", "Test accuracy", "Time per step"),
        _columns(claims(results), "Claim", "Measured (95 % interval)", "Verdict"),
    ]
    return (
        environment()
        .get_template("notebook.html.j2")
        .render(
            results=results,
            headline=headline(results),
            picture=Markup(picture),
            lines=lines,
            tables=[table for table in tables if table.rows],
        )
    )


def _columns(table: Table, *names: str) -> Table:
    """Only these columns of a table; of two with one name, the first."""
    places = [table.columns.index(name) for name in names]
    rows = tuple(tuple(row[i] for i in places) for row in table.rows)
    return Table(table.caption, names, rows, frozenset(k for k, i in enumerate(places) if i in table.numeric))
