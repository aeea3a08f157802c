"""Table files: which there are, and what can be told of CSV before and after a reader has failed on it."""

import csv
import gzip
import re
import zlib
from pathlib import Path
from typing import Final, TextIO, cast

from steadynorm.errors import DataError

__all__ = ["MISSING", "SUFFIXES", "is_table", "odd_line", "separator_of", "suffix_of"]

SUFFIXES: Final = (".csv", ".tsv", ".parquet", ".jsonl", ".ndjson", ".json")

MISSING: Final = ["", "NA", "N/A", "NaN", "nan", "NULL", "null", "?"]
"""How CSV files spell a missing value."""


def is_table(path: Path) -> bool:
    """Whether a file's name ends like a table's, compressed by gzip or not.

    Example:
        >>> is_table(Path("a.csv.gz")), is_table(Path("a.txt"))
        (True, False)
    """
    return suffix_of(path) in SUFFIXES


def suffix_of(path: Path) -> str:
    """What the name ends on, in lower case, without a final .gz.

    Example:
        >>> suffix_of(Path("train.CSV.gz"))
        '.csv'
    """
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _open(path: Path, errors: str) -> TextIO:
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    return cast("TextIO", opened(path, "rt", encoding="utf-8-sig", errors=errors, newline=""))


def separator_of(path: Path) -> str:
    """What separates the names in a .csv's or .tsv's header: the most frequent candidate outside quotes, else a comma.

    Raises:
        DataError: The file cannot be read, or starts with an empty line.
    """
    try:
        with _open(path, "replace") as file:
            header = file.readline()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}. Copy or export the file again.") from error
    if not header.strip():
        raise DataError(f"{path}: a table starts with a line of column names, got an empty line or file.")
    bare = re.sub(r'"[^"]*"', "", header)
    return max(("\t" if suffix_of(path) == ".tsv" else ",", ",", ";", "\t", "|"), key=bare.count)


def odd_line(path: Path, separator: str) -> str | None:
    """What is wrong with the first line that does not fit the header, if one is to be found."""
    try:
        with _open(path, "strict") as file:
            rows = csv.reader(file, delimiter=separator)
            width = len(next(rows, []))
            for row in rows:
                if row and len(row) != width:
                    return f"line {rows.line_num} has {len(row)} fields, the header {width}"
    except UnicodeDecodeError as error:
        return f"it is not UTF-8 text ({error.reason} at byte {error.start:,} of a block)"
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        return str(error)
    return None
