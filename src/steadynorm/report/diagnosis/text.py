"""A diagnosis as text, for terminals and logs."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from steadynorm.report.wording import number, plural

__all__ = ["SIGNS", "diagnosis_table", "diagnosis_text", "figures_of", "grouped", "headline", "print_diagnosis"]

SIGNS = {"error": "▲", "warning": "!", "note": "·"}
_STYLES = {"error": "red", "warning": "yellow", "note": "dim"}
_KINDS = {"error": "error", "warning": "warning", "note": "note"}


def headline(diagnosis: Mapping[str, Any]) -> str:
    """How many findings of each severity, in one line.

    Example:
        >>> headline({"subject": "net", "layers": 3, "findings": []})
        'net, 3 batch norms: nothing found.'
    """
    counts = {s: sum(f["severity"] == s for f in diagnosis["findings"]) for s in SIGNS}
    said = ", ".join(plural(n, _KINDS[s]) for s, n in counts.items() if n)
    return f"{diagnosis['subject']}, {plural(diagnosis['layers'], 'batch norm')}: {said or 'nothing found'}."


def grouped(findings: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], list[str]]]:
    """The first finding of each kind and severity, with the names of the other layers that have it, too."""
    groups: dict[tuple[str, str], tuple[Mapping[str, Any], list[str]]] = {}
    for finding in findings:
        key = (finding["kind"], finding["severity"])
        if key in groups:
            groups[key][1].append(finding["layer"])
        else:
            groups[key] = (finding, [])
    return list(groups.values())


def figures_of(values: Mapping[str, Any]) -> str:
    """Figures in one line: name and value, underscores as spaces."""
    return ", ".join(f"{name.replace('_', ' ')} {_shown(value)}" for name, value in values.items() if value is not None)


def _shown(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)


def diagnosis_table(diagnosis: Mapping[str, Any]) -> Group:
    """The headline, the measured figures and a table of findings, for Rich."""
    parts: list[Text | Table] = [Text(headline(diagnosis), style="bold")]
    if diagnosis["figures"]:
        parts.append(Text(f"Measured: {figures_of(diagnosis['figures'])}."))
    if diagnosis["findings"]:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("", no_wrap=True)
        table.add_column("Layer", overflow="fold", max_width=24)
        table.add_column("What", overflow="fold", ratio=1)
        table.add_column("What to do", overflow="fold", ratio=1)
        for finding, others in grouped(diagnosis["findings"]):
            severity = finding["severity"]
            more = f"\nand {len(others)} more" if others else ""
            what = Text(finding["kind"], style="bold").append(f"\n{finding['summary']}", style="not bold")
            table.add_row(
                Text(f"{SIGNS[severity]} {severity}", style=_STYLES[severity]),
                Text((finding["layer"] or "–") + more),
                what,
                Text(finding["remedy"]),
            )
        parts.append(table)
    return Group(*parts)


def diagnosis_text(diagnosis: Mapping[str, Any]) -> str:
    """The diagnosis as text of 100 columns without colours."""
    console = Console(width=100, no_color=True, highlight=False, force_terminal=False)
    with console.capture() as caught:
        console.print(diagnosis_table(diagnosis))
    return "\n".join(line.rstrip() for line in caught.get().rstrip().splitlines())


def print_diagnosis(diagnosis: Mapping[str, Any]) -> None:
    """Prints it on the standard output, in colours only where that is a terminal."""
    Console().print(diagnosis_table(diagnosis))
