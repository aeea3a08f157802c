"""Writes what was measured of covariate shift into docs/guides/shift.md, between its marks.

    python benchmarks/shift_tables.py
    python benchmarks/shift_rare.py
    python benchmarks/shift_scale.py --rows 10000000 --command compare --out docs/measured/shift-scale.json
    python examples/covariate_shift.py > docs/measured/shift-remedies.txt
    python benchmarks/shift_pages.py

A test checks that the page says what the files in docs/measured/ do.
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "guides" / "shift.md"
MEASURED = ROOT / "docs" / "measured"


def null_table(results: dict[str, Any]) -> str:
    """False alarms among alike tables, a row for each number of rows a side."""
    peers = list(dict.fromkeys(name for row in results["null"] for name in row["peers"]))
    lines = [
        "| rows a side | tables | shifted (upper 95 % bound) | cannot tell | no shift or benign | "
        + " | ".join(peers)
        + " | seconds a table |",
        "| --- " * (6 + len(peers)) + "|",
    ]
    for row in results["null"]:
        verdicts = row["verdicts"]
        quiet = verdicts.get("no shift", 0) + verdicts.get("benign", 0)
        others = [
            f"{row['peers'][name]['flagged']} of {row['peers'][name]['tables']}" if name in row["peers"] else "–"
            for name in peers
        ]
        lines.append(
            f"| {row['rows']:,} | {row['tables']} | {row['shifted']} ({100 * row['upper']:.1f} %) | "
            f"{verdicts.get('cannot tell', 0)} | {quiet} | {' | '.join(others)} | {row['seconds']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def power_table(results: dict[str, Any]) -> str:
    """How often the moved column is called shifted, by the size of its shift."""
    shifts = sorted({row["shift"] for row in results["power"]})
    lines = [
        "| rows a side | tables | " + " | ".join(f"d = {d:g}" for d in shifts) + " |",
        "| --- " * (2 + len(shifts)) + "|",
    ]
    for n in sorted({row["rows"] for row in results["power"]}):
        rows = {row["shift"]: row for row in results["power"] if row["rows"] == n}
        shares = [f"{100 * rows[d]['found'] / rows[d]['tables']:.0f} %" for d in shifts]
        lines.append(f"| {n:,} | {rows[shifts[0]]['tables']} | {' | '.join(shares)} |")
    at = next(row for row in results["power"] if row["rows"] == 2_000 and row["shift"] == 0.3)
    lines += [
        "",
        f"At 2,000 rows and d = 0.3 the column was found and ranked first in {at['both']} of {at['tables']} tables. A "
        "shift of 0.05 was never called shifted; p-values (scipy, Benjamini-Hochberg) flagged such tables in "
        + ", ".join(
            f"{row['naive_any']} of {row['tables']} at {row['rows']:,} rows"
            for row in results["power"]
            if row["shift"] == 0.05
        )
        + ".",
    ]
    return "\n".join(lines) + "\n"


def rare_table(results: list[dict[str, Any]]) -> str:
    """False alarms among columns of rare categories."""
    lines = ["| categories | reference | current | shifted |", "| --- | --- | --- | --- |"]
    for row in results:
        n, m = row["sizes"]
        lines.append(f"| {row['pool']} | {n:,} | {m:,} | {row['shifted']} of {row['tables']} |")
    return "\n".join(lines) + "\n"


def scale_table(results: list[dict[str, Any]]) -> str:
    """Seconds and memory of a whole comparison, by the size of the tables."""
    lines = ["| rows a side | columns | on disk | seconds | peak memory |", "| --- " * 5 + "|"]
    lines += [
        f"| {row['rows']:,} | {row['columns']:,} | {row['bytes_on_disk'] / 2**30:.1f} GiB | {row['seconds']:.0f} | "
        f"{row['peak_bytes'] / 2**30:.2f} GiB |"
        for row in results
        if row["command"] == "compare"
    ]
    return "\n".join(lines) + "\n"


def blocks() -> dict[str, str]:
    """The text between each pair of marks."""
    tables = json.loads((MEASURED / "shift-tables.json").read_text())
    return {
        "shift-null": null_table(tables),
        "shift-power": power_table(tables),
        "shift-rare": rare_table(json.loads((MEASURED / "shift-rare.json").read_text())),
        "shift-scale": scale_table(json.loads((MEASURED / "shift-scale.json").read_text())),
        "shift-remedies": f"```text\n{(MEASURED / 'shift-remedies.txt').read_text()}```\n",
    }


def written(page: str) -> str:
    """The page with every block as it was measured."""
    for name, text in blocks().items():
        page = re.sub(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m, t=text: m[1] + t + m[2], page, flags=re.S)
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
