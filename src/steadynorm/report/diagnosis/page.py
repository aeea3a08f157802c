"""A diagnosis as one HTML page, and as a fragment for notebooks: no script, no network, every value escaped."""

import os
from collections.abc import Mapping
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

from steadynorm.report.diagnosis.text import SIGNS, figures_of, grouped, headline
from steadynorm.report.html import environment, write_page

__all__ = ["diagnosis_fragment", "write_diagnosis_html"]


def write_diagnosis_html(diagnosis: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Writes a diagnosis as one HTML file.

    Args:
        diagnosis: The data of `Diagnosis.to_dict`.
        path: Where to write; folders are made as needed.

    Returns:
        The path written.
    """
    page = (
        environment()
        .get_template("diagnosis.html.j2")
        .render(
            diagnosis=diagnosis,
            headline=headline(diagnosis),
            signs=SIGNS,
            groups=[(finding, others, figures_of(finding["evidence"])) for finding, others in
                    grouped(diagnosis["findings"])],
            tally=[(s, sum(f["severity"] == s for f in diagnosis["findings"])) for s in SIGNS],
            figures=[(name.replace("_", " "), figures_of({"": value}).strip()) for name, value in
                     diagnosis["figures"].items() if value is not None],
            version=version("steadynorm"),
        )
    )  # fmt: skip
    return write_page(page, path)


def diagnosis_fragment(diagnosis: Mapping[str, Any]) -> str:
    """A fragment of HTML for a notebook's output: the headline and a table, with no style sheet or script."""
    cell = 'style="text-align:left;vertical-align:top;padding:0.1em 0.9em 0.1em 0"'
    rows = "".join(
        f"<tr><td {cell}>{SIGNS[f['severity']]} {escape(f['severity'])}</td>"
        f"<td {cell}>{escape(f['layer'] or '–')}{f' and {len(others)} more' if others else ''}</td>"
        f"<td {cell}><strong>{escape(f['kind'])}</strong>: {escape(f['summary'])}</td>"
        f"<td {cell}>{escape(f['remedy'])}</td></tr>"
        for f, others in grouped(diagnosis["findings"])
    )
    head = "".join(f"<th {cell}>{name}</th>" for name in ("", "Layer", "What", "What to do"))
    table = f"<table><tr>{head}</tr>{rows}</table>" if rows else ""
    return f'<div style="max-width:70em"><p><strong>{escape(headline(diagnosis))}</strong></p>{table}</div>'
