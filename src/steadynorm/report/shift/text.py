"""A shift report as plain text, for terminals and logs."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from steadynorm.report.wording import count, number, percent

__all__ = ["SIGNS", "headline", "leading", "print_shift", "schema_lines", "shift_text"]

SIGNS = {"shifted": "▲", "cannot tell": "?", "benign": "≈", "no shift": "=", "not compared": "–"}
_STYLES = {"shifted": "red", "cannot tell": "yellow", "benign": "default", "no shift": "green", "not compared": "dim"}
_MOST = 20


def shift_text(report: Mapping[str, Any]) -> str:
    """The report as text of 100 columns without colours; see `print_shift`."""
    console = Console(width=100, no_color=True, highlight=False, force_terminal=False)
    with console.capture() as caught:
        print_shift(report, console)
    return caught.get().rstrip()


def headline(report: Mapping[str, Any]) -> str:
    """The verdict and its reason in one line."""
    return f"{report['verdict'].capitalize()}: {report['reason']}."


def leading(feature: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The effect that a feature's rank rests on."""
    return max(feature["effects"], key=lambda effect: (effect["low"], abs(effect["estimate"])), default=None)


def schema_lines(report: Mapping[str, Any]) -> list[str]:
    """What differs between the two sides' columns, a sentence each."""
    changes = report["schema_changes"]
    lines: list[str] = []
    for which, side in (("only_reference", "reference"), ("only_current", "current data")):
        if changes[which]:
            lines.append(f"Only the {side} has: {', '.join(changes[which])}.")
    lines += [f"{name} is {before} in the reference and {after} now." for name, before, after in changes["retyped"]]
    lines += [f"{name} is left out: {reason}." for name, reason in changes["left_out"]]
    return lines


def print_shift(report: Mapping[str, Any], console: Console | None = None, *, most: int = _MOST) -> None:
    """Prints the verdict, the features (the most shifted first) and what the classifier found.

    Args:
        report: the data of `ShiftReport.to_dict`.
        console: where to; the standard output by default, in colours only where it is a terminal.
        most: features to list.
    """
    console = console or Console()
    console.print(Text(headline(report), style="bold"))
    sides = [f"{side['name']} ({count(side['rows'])} rows)" for side in report["sides"].values()]
    console.print(Text(" against ".join(sides)))
    for line in schema_lines(report):
        console.print(Text(line, style="yellow"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("Feature", "Verdict", "Effect", "Interval", "Missing"):
        table.add_column(name, justify="left" if name in ("Feature", "Verdict") else "right", overflow="fold")
    table.add_column("Why", overflow="fold", ratio=1)
    for feature in report["features"][:most]:
        effect = leading(feature)
        verdict = feature["verdict"]
        facts = [feature["facts"][side] for side in ("reference", "current")]
        shares = [percent(side["missing"] / side["rows"]) if side["rows"] else "–" for side in facts]
        table.add_row(
            escape(feature["name"]),
            Text(f"{SIGNS[verdict]} {verdict}", style=_STYLES[verdict]),
            "–" if effect is None else number(effect["estimate"], 2),
            "–" if effect is None else f"{effect['low']:.2f}–{effect['high']:.2f}",
            shares[0] if shares[0] == shares[1] else f"{shares[0]} → {shares[1]}",
            escape(feature["reason"]),
        )
    console.print(table)
    if len(report["features"]) > most:
        console.print(Text(f"and {len(report['features']) - most} more features."))
    domain = report["domain"]
    if domain is not None:
        used = ", ".join(entry["feature"] for entry in domain["features"][:5])
        console.print(
            Text(
                f"Domain classifier: AUC {domain['auc']:.3f} on {count(domain['rows'])} rows a side, "
                f"p = {domain['p']:.3f}{f', by {used}' if used else ''}."
            )
        )
    console.print(Text(report["caveat"]))
