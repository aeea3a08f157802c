"""What `check` found as text, for terminals and logs. Takes the plain data of `CheckReport.to_dict`."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from steadynorm.report.wording import MISSING, number

__all__ = ["check_table", "check_text", "print_check"]


def check_table(check: Mapping[str, Any]) -> Group:
    """The verdict, a table of the versions side by side, and what the operations on models would do, for Rich."""
    parts: list[Text | Table] = [Text(check["verdict"], style="bold green" if check["safe"] else "bold yellow")]
    sides: list[Mapping[str, Any]] = check["sides"]
    if sides:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column(check["place"], overflow="fold")
        for side in sides:
            table.add_column(side["name"], justify="right", no_wrap=True)
        for quantity in sides[-1]["errors"]:
            table.add_row(f"error: {quantity}", *(_error(side["errors"].get(quantity)) for side in sides))
        table.add_row("training step", *(_time(side["seconds"]) for side in sides))
        table.add_row("  by torch's", *(_ratio(side) for side in sides))
        table.add_row("memory for backward", *(_size(side["memory"]) for side in sides))
        parts.append(table)
    parts += [Text(line) for line in _would(check)]
    parts += [Text(f"note: {note}") for note in check["notes"]]
    return Group(*parts)


def _error(value: float | str | None) -> str:
    return MISSING if value is None else value if isinstance(value, str) else f"{value:.1e}"


def _time(seconds: float | None) -> str:
    return MISSING if seconds is None else f"{number(seconds * 1e3)} ms"


def _ratio(side: Mapping[str, Any]) -> str:
    return "1" if side["name"] == "torch" else MISSING if side["ratio"] is None else f"{side['ratio']:.2f}"


def _size(size: int | None) -> str:
    return MISSING if size is None else f"{number(size / 1e6)} MB" if size >= 1e5 else f"{number(size / 1e3)} kB"


def _would(check: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for name, done in (("convert", "converted"), ("fuse", "fused"), ("fold", "folded")):
        found = check[name]
        if found is None or not check["batch_norms"]:
            continue
        call = "convert_" if name == "convert" else name
        lines.append(f"{call}: {found[done]} of {check['batch_norms']} batch norms {done}")
        if name == "convert":
            lines += [f"  left {row['name'] or 'the model'}: {row['note']}" for row in found["layers"] if not row["to"]]
    return lines


def check_text(check: Mapping[str, Any]) -> str:
    """The same as text of 100 columns without colours."""
    console = Console(width=100, no_color=True, highlight=False, force_terminal=False)
    with console.capture() as caught:
        console.print(check_table(check))
    return "\n".join(line.rstrip() for line in caught.get().rstrip().splitlines())


def print_check(check: Mapping[str, Any]) -> None:
    """Prints it on the standard output, in colours only where that is a terminal."""
    Console().print(check_table(check))
