"""A mini-batch from a CSV file."""

import csv
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path

from steadynorm.errors import DataError
from steadynorm.walkthrough.steps import Number, Walkthrough, explain

__all__ = ["from_csv"]


def from_csv(
    path: str | Path,
    gamma: Number | Sequence[Number] = 1,
    beta: Number | Sequence[Number] = 0,
    eps: Number = 1e-5,
    *,
    momentum: Number | None = 0.1,
    digits: int = 6,
) -> Walkthrough:
    """`explain` for the rows of a CSV file: one example per line, one feature per column.

    A first line without a single number in it names the features. The delimiter is a comma, or where the first line
    has none, a semicolon or a tab. Blank lines are skipped.

    Args:
        path: A file of text in UTF-8.
        gamma: As in `explain`; one or one per column.
        beta: As in `explain`; one or one per column.
        eps: As in `explain`.
        momentum: As in `explain`.
        digits: As in `explain`.

    Returns:
        The steps of each column.

    Raises:
        DataError: The file cannot be read, is not text, holds fewer than 2 rows, rows of different lengths, or a cell
            that is not a finite number; the message says where.
        ArgumentError: As in `explain`.

    Example:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "batch.csv"
        >>> _ = file.write_text("height,weight\\n3,10\\n5,30\\n")
        >>> [(f.name, f.mean.text(3)) for f in from_csv(file).features]
        [('height', '4'), ('weight', '20')]
    """
    lines = _read(Path(path))
    names = None
    if not any(_is_number(cell) for cell in lines[0][1]):
        names, lines = [cell.strip() for cell in lines[0][1]], lines[1:]
    width = len(names or lines[0][1]) if lines else 0
    for line, cells in lines:
        if len(cells) != width:
            raise DataError(
                f"{path}: every row must have the same columns: {width} expected, line {line} has {len(cells)}."
            )
        for column, cell in enumerate(cells, start=1):
            if not _is_number(cell):
                raise DataError(
                    f"{path}: every cell must be a finite number, line {line}, column {column} holds {cell[:60]!r}. "
                    "Correct or drop that row."
                )
    if len(lines) < 2:
        under = f" under the heading {', '.join(names)[:60]!r}" if names else ""
        raise DataError(f"{path}: a mini-batch needs at least 2 rows of numbers, {len(lines)} found{under}.")
    return explain([c for _, c in lines], gamma, beta, eps, momentum=momentum, digits=digits, names=names)


def _read(path: Path) -> list[tuple[int, list[str]]]:
    """The file's rows with their line numbers."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = next((line for line in file if line.strip()), "")
            file.seek(0)
            delimiter = next((mark for mark in ",;\t" if mark in first), ",")
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"{path} must be a readable CSV file in UTF-8: {reason}.") from error
    if not rows:
        raise DataError(f"{path} is empty: a mini-batch needs at least 2 rows of numbers.")
    return rows


def _is_number(cell: str) -> bool:
    try:
        return Decimal(cell.strip()).is_finite()
    except InvalidOperation:
        return False
