"""The report in a terminal: what was found, in tables that fit 80 columns, plain text when it goes to a file."""

import os
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text

from steadynorm.report.headline import headline
from steadynorm.report.schema import INITS, Results
from steadynorm.report.serialize import check_schema
from steadynorm.report.wording import (
    accuracy_interval,
    arm_labels,
    bracketed,
    claim_figure,
    count,
    duration,
    interval,
    percent,
    rate_range,
    ratio_figure,
)

__all__ = ["print_report"]

_VERDICTS = {
    "supported": ("✓", "green"),
    "contradicted": ("✗", "red"),
    "no material difference": ("=", "default"),
    "cannot tell": ("?", "yellow"),
}


def print_report(
    results: Results, console: Console | None = None, *, report: str | os.PathLike[str] | None = None
) -> None:
    """Print the headline, the arms, the ratios of steps and the claims.

    Args:
        results: what `sn.compare` measured, as plain data.
        console: where to print; the standard output by default, in colours only where it is a terminal.
        report: the path of the written page, named in the last line.

    Raises:
        DataError: the results are of another schema.
    """
    check_schema(results)
    console = console or Console()
    console.print()
    console.print(Text(headline(results), style="bold"))
    if results["status"] == "interrupted":
        console.print(Text("Interrupted: this is what had finished.", style="yellow"))
    for table in (_arms(results), _ratios(results), _claims(results)):
        if table.row_count:
            console.print()
            console.print(table)
    if report is not None:
        console.print()
        # A path is one word, to be selected and opened: never wrapped, never read as markup.
        console.print(Text(f"Report: {os.fspath(report)}"), soft_wrap=True)


def _table(title: str, columns: Sequence[str], right: Sequence[int] = ()) -> RichTable:
    table = RichTable(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(columns):
        figures = i in right
        table.add_column(name, justify="right" if figures else "left", no_wrap=figures, overflow="fold")
    return table


def _stacked(figure: str) -> str:
    """The interval under its estimate, which leaves room for more columns."""
    return figure.replace(" (", "\n(")


def _arms(results: Results) -> RichTable:
    table = _table(
        f"The arms, target {percent(results['target'])}",
        ("", "Steps to target", "Test accuracy", "Rates", "Per step"),
        right=(1, 2, 3, 4),
    )
    for row in results["summaries"]:
        steps = count(row["steps_to_target"]) if row["steps_to_target"] is not None else "not reached"
        table.add_row(
            escape(arm_labels(results)[row["arm"]]),
            _stacked(steps + bracketed(interval(row["steps_interval"], decimals=0))),
            _stacked(percent(row["test_accuracy"]) + bracketed(accuracy_interval(row["test_interval"]))),
            rate_range(row["lr_range"]).replace(" of those tried", ""),
            duration(row["seconds_per_step"]),
        )
    return table


def _ratios(results: Results) -> RichTable:
    inits = ("tuned", *INITS)
    table = _table(
        "Times fewer steps than plain, by initialisation", ("", *inits), right=tuple(range(1, len(inits) + 1))
    )
    for arm, label in arm_labels(results).items():
        rows = {row["init"]: row for row in results["ratios"] if row["arm"] == arm}
        if rows:
            table.add_row(
                escape(label),
                *(_stacked(ratio_figure(rows[init])) if init in rows else "–" for init in inits),
            )
    return table


def _claims(results: Results) -> RichTable:
    table = _table("The claims", ("Claim", "Measured (95 % interval)", "Verdict"), right=(1,))
    for claim in results["claims"]:
        sign, style = _VERDICTS[claim["verdict"]]
        table.add_row(escape(claim["claim"]), claim_figure(claim), Text(f"{sign} {claim['verdict']}", style=style))
    return table
